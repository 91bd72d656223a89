"""The tools as a user runs them: as programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Tool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def tool() -> Tool:
    """Runs a file of tools/ with the arguments; `env` is added to the environment, None removes a variable."""

    def run(
        name: str, *arguments: object, env: dict[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment: dict[str, str | None] = {**os.environ, **(env or {})}
        kept = {key: value for key, value in environment.items() if value is not None}
        command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=kept)

    return run


@pytest.fixture
def no_network() -> Callable[[str], None]:
    """Says that a test stops for want of a network: skipped on a user's machine, failed where CI is set."""

    def stop(output: str) -> None:
        if os.environ.get("CI"):
            pytest.fail(f"packages could not be fetched:\n{output}")
        pytest.skip(f"needs a network for packages: {output.strip().splitlines()[-1]}")

    return stop


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the builds first: they take minutes on one core, while other workers run the rest."""
    items.sort(key=lambda item: item.get_closest_marker("packaging") is None)
