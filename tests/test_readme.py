"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parcnn.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_network_trains_as_written() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("batch_size=32)", 'batch_size=32, device="cpu")')
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    accuracy = float(result.stdout.splitlines()[-1].split()[0])
    assert accuracy > 0.9


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^parcnn (\w+)", README, re.MULTILINE))))
def test_commands_exist(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
