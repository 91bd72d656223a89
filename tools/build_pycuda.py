"""Builds a wheel of PyCUDA for this Python without a CUDA toolkit, and prints the wheel's path.

PyCUDA is published as source only. To compile it takes a C++ compiler, Python's headers, cuda.h, cudaProfiler.h and a
libcuda to link. The first two must be on the machine; the CUDA headers come out of NVIDIA's own wheels (3 MB), and the
driver's libcuda.so.1 is linked under the name without the number that only toolkits install. An nvcc on the PATH, from
which PyCUDA would guess where CUDA is, has no say.

The wheel is kept in $XDG_CACHE_HOME/parcnn/wheels (~/.cache/parcnn/wheels), so the minutes are spent once a machine;
a stub is kept beside the wheel that was linked to it.

    python tools/build_pycuda.py                                    # against this machine's driver
    python tools/build_pycuda.py --stub                             # against a stub, for machines without a GPU

Exit codes: 0 built or found; 2 something is missing on the machine; 3 something could not be downloaded; 4 it does not
compile. What is missing, and how to get it, is said on stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from nvidia_driver import EXTRA_FOLDERS, OLDEST_CUDA, SONAME, find_driver
from stub_libcuda import build_stub

PYCUDA = "2026.1"
# The oldest headers that parcnn supports: a PyCUDA compiled with newer ones could ask an older driver for functions
# that it does not have.
HEADERS = ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-profiler-api==13.0.*")

COMPILERS = (("gcc", "g++"), ("clang", "clang++"), ("cc", "c++"))


class BuildError(Exception):
    """PyCUDA cannot be built: what is missing, and how to get it."""

    exit_code = 4


class MissingPrerequisiteError(BuildError):
    """The machine lacks something that no Python package brings."""

    exit_code = 2


class DownloadError(BuildError):
    """A package could not be fetched."""

    exit_code = 3


def missing_prerequisites(include: str, version: str) -> list[str]:
    """What no Python package can bring and this machine lacks, each with how to get it.

    `include` is the folder of Python's headers, `version` Python's version as "3.12".
    """
    missing = []
    if find_compilers() is None:
        missing.append("a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)")
    if not (Path(include) / "Python.h").is_file():
        missing.append(
            f"Python's headers, {include}/Python.h (Debian, Ubuntu: apt install python{version}-dev; "
            f"Fedora: dnf install python{version}-devel)"
        )
    return missing


def find_compilers() -> tuple[str, str] | None:
    """The C and C++ compilers: those that $CC and $CXX name, else the first pair on the PATH."""
    pairs = [(os.environ["CC"], os.environ["CXX"])] if {"CC", "CXX"} <= os.environ.keys() else COMPILERS
    for c, cxx in pairs:
        if shutil.which(c.split()[0]) and shutil.which(cxx.split()[0]):
            return c, cxx
    return None


def cached_wheel(cache: Path, against: str) -> Path | None:
    """The wheel that an earlier call built for this Python and this kind of libcuda, if any."""
    return next(iter(sorted(_wheel_folder(cache, against).glob("pycuda-*.whl"))), None)


def build(cache: Path, stub: bool) -> Path:
    """Build PyCUDA against the driver or against the stub, keep the wheel in `cache`, and return its path."""
    against = "stub" if stub else "driver"
    wheel = cached_wheel(cache, against)
    if wheel is not None:
        return wheel
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    missing = missing_prerequisites(sysconfig.get_paths()["include"], version)
    if missing:
        raise MissingPrerequisiteError("PyCUDA cannot be built here; missing: " + "; ".join(missing))
    compilers = find_compilers()
    if compilers is None:
        raise MissingPrerequisiteError("PyCUDA cannot be built here: the C++ compiler went away")

    folder = _wheel_folder(cache, against)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as scratch_name:  # same disk: the move is atomic
        scratch = Path(scratch_name)
        root = scratch / "cuda"
        _say("getting CUDA's headers")
        _fetch_headers(root / "include", scratch)
        (root / "lib64").mkdir()
        library = _stub_library(root / "include", scratch, compilers[0]) if stub else _driver_library()
        (root / "lib64" / "libcuda.so").symlink_to(library)
        _say(f"getting the source of PyCUDA {PYCUDA}")
        source = _fetch_source(scratch)
        _say("compiling PyCUDA (two to three minutes on one core; once a machine)")
        built = _compile(source, root, scratch, compilers)
        if stub:
            library.replace(folder / SONAME)  # who imports a PyCUDA that is linked to it needs it
        wheel = folder / built.name
        built.replace(wheel)
    return wheel


def default_cache() -> Path:
    """Where wheels are kept: $XDG_CACHE_HOME/parcnn/wheels, or ~/.cache/parcnn/wheels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parcnn" / "wheels"


def _wheel_folder(cache: Path, against: str) -> Path:
    """One folder for each PyCUDA, Python ABI, kind of libcuda (a stub's is for tests only) and state of this file."""
    abi = sysconfig.get_config_var("SOABI")
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return cache / f"pycuda-{PYCUDA}-{abi}-{against}-{recipe}"


def _driver_library() -> Path:
    driver = find_driver()
    if driver is None:
        raise MissingPrerequisiteError(
            f"PyCUDA needs NVIDIA's driver: no {SONAME} loads. Install the driver (580 or newer), or pass --stub"
        )
    if driver.cuda_version < OLDEST_CUDA:
        raise MissingPrerequisiteError(
            f"NVIDIA's driver at {driver.path} speaks CUDA {driver.cuda}; 13.0 or newer is needed: "
            "install driver 580 or newer"
        )
    return driver.path


def _stub_library(include: Path, out: Path, compiler: str) -> Path:
    try:
        return build_stub(include, out, compiler)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"the stub of libcuda does not compile with {compiler}, see above") from error


def _fetch_headers(include: Path, scratch: Path) -> None:
    """Unpack cuda.h and its neighbours out of NVIDIA's wheels."""
    target = scratch / "headers"
    _pip("install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(target), *HEADERS)
    found = next(target.glob("nvidia/*/include/cuda.h"), None)
    if found is None:
        raise BuildError(f"the packages {', '.join(HEADERS)} were expected to bring cuda.h and do not")
    shutil.move(found.parent, include)


def _fetch_source(scratch: Path) -> Path:
    """Download PyCUDA's source archive and unpack it."""
    requirement = f"pycuda=={PYCUDA}"
    _pip("download", "--quiet", "--no-deps", "--no-binary", "pycuda", "--dest", str(scratch), requirement)
    archive = next(scratch.glob("pycuda-*.tar.gz"))
    shutil.unpack_archive(archive, scratch)
    return scratch / archive.name.removesuffix(".tar.gz")


def _compile(source: Path, root: Path, scratch: Path, compilers: tuple[str, str]) -> Path:
    """Compile PyCUDA in `source` against the CUDA folder `root`."""
    settings = {
        "CUDA_ROOT": str(root),
        "CUDA_INC_DIR": [str(root / "include")],
        "CUDADRV_LIB_DIR": [str(root / "lib64")],
        "CUDADRV_LIBNAME": ["cuda"],
        "CUDA_ENABLE_CURAND": False,  # would need curand.h and its library; parcnn has its own generator
        "CUDA_ENABLE_GL": False,
        "CUDA_TRACE": False,
        "USE_SHIPPED_BOOST": True,
        "CXXFLAGS": ["-g0", "-w"],  # no debug information and no warnings: no one reads them
        "LDFLAGS": [f"-Wl,-rpath,{folder}" for folder in EXTRA_FOLDERS],  # drivers that ldconfig does not know
    }
    (source / "siteconf.py").write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    environment = {**os.environ, "CC": compilers[0], "CXX": compilers[1]}
    out = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"PyCUDA {PYCUDA} does not compile with {compilers[1]}:\n{done.stdout}{done.stderr}")
    return next(out.glob("pycuda-*.whl"))


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        asked = " ".join(arguments)
        raise DownloadError(f"`pip {asked}` failed; is the network up?\n{done.stdout}{done.stderr}")


def _say(text: str) -> None:
    print(f"build_pycuda: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Build, print the wheel's path, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", action="store_true", help="link a stub libcuda, for a machine without a driver")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where wheels are kept")
    arguments = parser.parse_args()
    try:
        print(build(arguments.cache, arguments.stub))
    except BuildError as error:
        _say(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
