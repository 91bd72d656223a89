"""PyCUDA is built on a machine without a CUDA toolkit, a driver or a GPU, against a stub of the driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.conftest import Tool

NO_TOOLKIT: dict[str, str | None] = dict.fromkeys(
    ("CUDA_ROOT", "CUDA_PATH", "CUDA_HOME", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
)
USE = """
from pycuda import driver
print(driver.get_driver_version(), driver.get_version()[:2])
try:
    driver.init()
except driver.Error as error:
    print(error)
"""


@pytest.mark.packaging
def test_builds_without_toolkit_and_reports_no_device(
    tool: Tool, no_network: Callable[[str], None], tmp_path: Path
) -> None:
    # An nvcc that leads nowhere: PyCUDA takes the folder above the first one on the PATH for CUDA's.
    trap = tmp_path / "trap" / "bin"
    trap.mkdir(parents=True)
    (trap / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (trap / "nvcc").chmod(0o755)
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    if shutil.which("g++", path=os.pathsep.join(path)) is None:  # g++ shares its folder with an nvcc: keep it
        path = os.environ["PATH"].split(os.pathsep)
    env = {**NO_TOOLKIT, "PATH": os.pathsep.join([str(trap), *path])}

    built = tool("build_pycuda.py", "--stub", env=env)
    if built.returncode == 3:
        no_network(built.stderr)
    assert built.returncode == 0, built.stderr
    wheel = Path(built.stdout.strip())
    assert "-stub-" in wheel.parent.name

    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "site"), str(wheel)]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        no_network(installed.stderr)
    used = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "LD_LIBRARY_PATH": str(wheel.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.returncode == 0, used.stderr
    versions, error = used.stdout.splitlines()
    assert versions == "13000 (13, 0)"
    assert error == "cuInit failed: no CUDA-capable device is detected"


def test_missing_compiler_is_named_with_the_remedy(tool: Tool, tmp_path: Path) -> None:
    done = tool("build_pycuda.py", "--stub", "--cache", tmp_path, env={"PATH": str(tmp_path), "CC": None, "CXX": None})
    assert done.returncode == 2
    assert "a C++ compiler" in done.stderr
    assert "apt install g++" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_driver_that_is_too_old_is_named_with_the_remedy(tool: Tool, tmp_path: Path) -> None:
    source = tmp_path / "driver.c"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }\n")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    # Under the name that no folder's search precedes, so that it also stands before a real driver.
    done = tool("build_pycuda.py", "--cache", tmp_path / "cache", env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "speaks CUDA 12.4; 13.0 or newer is needed: install driver 580 or newer" in done.stderr
    assert str(library) in done.stderr


def test_interrupted_build_leaves_no_wheel(tool: Tool, tmp_path: Path) -> None:
    # A compiler that fails: what is half made must not be taken for a wheel by the next call.
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("gcc", "g++"):
        (binaries / name).write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
        (binaries / name).chmod(0o755)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    done = tool("build_pycuda.py", "--stub", "--cache", tmp_path / "cache", env={"PATH": path, "CC": None, "CXX": None})
    assert done.returncode in (3, 4), done.stderr  # 3: no network
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
