"""The wheel carries all that the package needs at run time, and stays small."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT

LARGEST_WHEEL_BYTES = 2_000_000


@pytest.mark.packaging
def test_wheel_is_complete_and_small(no_network: Callable[[str], None], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "hatchling" in done.stderr:
        no_network(done.stderr)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("parcnn-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        inside = set(opened.namelist())
        (entry_points,) = (opened.read(name).decode() for name in inside if name.endswith("entry_points.txt"))
    files = (path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.is_file())
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert {Path(name).suffix for name in expected} >= {".py", ".cuh", ".typed"}
    assert expected <= inside
    assert {name for name in inside if not name.startswith(("parcnn/", "parcnn-"))} == set()
    assert "parcnn = parcnn.cli:main" in entry_points
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB")
    assert size < LARGEST_WHEEL_BYTES
