"""Makes the virtual environment that `make` runs in, with what this machine can use, and keeps it current.

    python3 tools/setup_env.py --venv .venv test            # the extras of pyproject.toml to install

Where there is an NVIDIA driver the CUDA packages are installed too, PyCUDA compiled by build_pycuda.py. Where there is
none, or PyCUDA cannot be compiled, one line says what is missing and how to get it, and the CPU is used. Nothing is
done when nothing has changed: a stamp in the environment remembers what was installed and from which pyproject.toml.

Standard library only. The interpreter that runs this file may be older than 3.11; the environment gets the newest
Python that is installed, one with its C headers first, since PyCUDA needs them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import build_pycuda
from nvidia_driver import OLDEST_CUDA, find_driver

ROOT = Path(__file__).resolve().parent.parent
INTERPRETERS = ("python3.14", "python3.13", "python3.12", "python3.11", "python3")
STAMP = "parcnn-setup.json"
# Printed by each interpreter about itself: version, whether `venv` works, its headers' folder.
PROBE = """
import importlib.util, json, sys, sysconfig
venv = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
print(json.dumps([sys.version_info[:2], venv, sysconfig.get_paths()["include"]]))
"""


@dataclass(frozen=True)
class Stamp:
    """What an environment holds: made from which sources, with which extras, and how PyCUDA's installation went."""

    sources: str = ""
    extras: list[str] = field(default_factory=list)
    cuda: Literal["installed", "failed"] | None = None


class SetupError(Exception):
    """The environment cannot be made: what is missing, and how to get it."""


def main() -> int:
    """Bring the environment up to date with the command line's extras."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml that the environment must have")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment's folder")
    parser.add_argument("--no-cuda", action="store_true", help="do not look for a GPU")
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    arguments = parser.parse_args()
    try:
        set_up(arguments.venv, set(arguments.extras), cuda=not arguments.no_cuda, retry=arguments.retry)
    except SetupError as error:
        say(str(error))
        return 1
    return 0


def set_up(venv: Path, extras: set[str], cuda: bool, retry: bool) -> None:
    """Make or refresh `venv` so that it has the extras and, if `cuda`, the CUDA packages where they can work."""
    python = venv / "bin" / "python"
    if probe(str(python)) is None:
        create_venv(venv)
    before = read_stamp(venv)
    sources = source_hash()
    done = before if before.sources == sources else Stamp(sources)
    wanted = sorted(extras | set(before.extras))
    if done.extras != wanted:
        say(f"installing parcnn[{','.join(wanted)}] and what it needs into {venv} (a minute or two)")
        pip_install(python, "-e", f"{ROOT}[{','.join(wanted)}]")
        done = replace(done, extras=wanted)
        write_stamp(venv, done)
    if not cuda:
        return

    obstacle = cuda_obstacle(probe(str(python)))
    if obstacle is None:
        if done.cuda is None or (done.cuda == "failed" and retry):
            done = replace(done, cuda=install_cuda(python))
            write_stamp(venv, done)
        if done.cuda == "failed":
            obstacle = "PyCUDA could not be built; `make setup` tries again and says why"
    if obstacle is not None:
        say(f"CPU only: {obstacle}")


def create_venv(venv: Path) -> None:
    """Make an empty environment of the best interpreter on the PATH; a broken one is replaced, another folder is not."""
    if venv.exists() and not (venv / "pyvenv.cfg").is_file() and not (venv.is_dir() and not any(venv.iterdir())):
        raise SetupError(f"{venv} is there and is no environment; remove it, or give another folder: make VENV=DIR")
    found = [(name, about) for name in INTERPRETERS if (about := probe(name)) is not None]
    usable = [(name, about) for name, about in found if tuple(about[0]) >= (3, 11)]
    if not usable:
        names = ", ".join(f"{name} is {about[0][0]}.{about[0][1]}" for name, about in found) or "none was found"
        raise SetupError(f"Python 3.11 or newer is needed; {names}. Install one, e.g. apt install python3.12-venv")
    with_venv = [(name, about) for name, about in usable if about[1]]
    if not with_venv:
        major, minor = usable[0][1][0]
        package = f"python{major}.{minor}-venv"
        raise SetupError(f"{usable[0][0]} lacks venv or ensurepip; Debian, Ubuntu: apt install {package}")
    name, about = max(with_venv, key=lambda one: ((Path(one[1][2]) / "Python.h").is_file(), one[1][0]))
    say(f"making {venv} with {name} ({about[0][0]}.{about[0][1]})")
    done = subprocess.run([name, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"`{name} -m venv {venv}` failed:\n{done.stdout}{done.stderr}")


def probe(interpreter: str) -> Any:
    """[version, whether it can make environments, its headers' folder], or None where the interpreter does not run."""
    try:
        done = subprocess.run([interpreter, "-c", PROBE], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return json.loads(done.stdout) if done.returncode == 0 else None


def cuda_obstacle(about: Any) -> str | None:
    """Why this machine cannot run the CUDA executor, and what to do about it; None where it can."""
    driver = find_driver()
    if driver is None:
        return "no NVIDIA driver (libcuda.so.1 does not load); to use an NVIDIA GPU install its driver, 580 or newer"
    if driver.cuda_version < OLDEST_CUDA:
        return f"NVIDIA's driver speaks CUDA {driver.cuda} and 13.0 is needed; install driver 580 or newer"
    missing = build_pycuda.missing_prerequisites(about[2], f"{about[0][0]}.{about[0][1]}")
    if missing:
        return "there is an NVIDIA driver, but to compile PyCUDA these are missing: " + "; ".join(missing)
    return None


def install_cuda(python: Path) -> Literal["installed", "failed"]:
    """Compile PyCUDA and install it with the rest of the `cuda` extra."""
    command = [str(python), str(ROOT / "tools" / "build_pycuda.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # what it says goes to stderr
    if done.returncode != 0:
        return "failed"
    pip_install(python, done.stdout.strip(), "-e", f"{ROOT}[cuda]")
    return "installed"


def pip_install(python: Path, *what: str) -> None:
    """pip install into the environment of `python`."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    if subprocess.run(command, check=False).returncode != 0:
        raise SetupError(
            "pip failed, see above. Without a network, use a Python that has the packages: make PYTHON=python3 ..."
        )


def source_hash() -> str:
    """What decides about the environment's content: pyproject.toml and the tools that make it."""
    tools = [ROOT / "tools" / name for name in ("setup_env.py", "build_pycuda.py", "nvidia_driver.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in [ROOT / "pyproject.toml", *tools])).hexdigest()


def read_stamp(venv: Path) -> Stamp:
    """What an earlier call did to the environment; nothing, where there was none."""
    try:
        return Stamp(**json.loads((venv / STAMP).read_text()))
    except FileNotFoundError:
        return Stamp()


def write_stamp(venv: Path, stamp: Stamp) -> None:
    """Remember what was done, atomically."""
    scratch = venv / (STAMP + ".writing")
    scratch.write_text(json.dumps(asdict(stamp), indent=2) + "\n")
    scratch.replace(venv / STAMP)


def say(text: str) -> None:
    """One line for the user."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
