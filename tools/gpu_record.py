"""The committed records of the last run of the GPU tests, benchmarks/results/gpu-check.json, and of the last one under
compute-sanitizer's tools, benchmarks/results/sanitize.json.

CI has no GPU, so the records show which sources were tested, and on which one. They hold a SHA-256 over the sources and
tests; when they change, `status` says that a record is stale.

    python tools/gpu_record.py require                      # fails where no GPU can be used
    python tools/gpu_record.py hash                         # the hash of the sources as they are now
    python tools/gpu_record.py status                       # a line each: fresh, stale or missing
    python tools/gpu_record.py write --junit FILE ... --figures FILE
    python tools/gpu_record.py sanitized --junit TOOL.xml ...       # of every tool; of some only, nothing is written
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path("benchmarks/results/gpu-check.json")
SANITIZED = Path("benchmarks/results/sanitize.json")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Sources, tests, and what decides how they run: tables of tuned kernels, recipes.
HASHED = tuple(
    [f"src/parcnn/**/*.{suffix}" for suffix in ("py", "cu", "cuh", "json", "toml")]
    + [f"tests/**/*.{suffix}" for suffix in ("py", "cu", "cuh")]
)


class RecordError(Exception):
    """The record cannot be written: what is wrong, and what to do."""


def source_hash(root: Path) -> str:
    """SHA-256 over the names and contents of what the GPU tests test, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in HASHED for path in root.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def status(root: Path) -> str:
    """A line for each record, which says whether it is of the sources as they are."""
    digest = source_hash(root)

    def line(name: str, path: Path, target: str, passed: Callable[[dict[str, Any]], str]) -> str:
        try:
            record = json.loads((root / path).read_text())
        except FileNotFoundError:
            return f"{name}: missing ({path}); `make {target}` on a machine with an NVIDIA GPU writes it"
        passed_on = f"{passed(record)} on {record['gpu']}, {record['date']}"
        if record["sources_sha256"] == digest:
            return f"{name}: fresh ({passed_on})"
        return f"{name}: stale, older than the sources ({passed_on}); `make {target}` renews it"

    return "\n".join(
        (
            line("GPU record", RECORD, "gpu-check", lambda record: f"{record['tests']['passed']} tests passed"),
            line("Sanitizer record", SANITIZED, "sanitize", _passed_by_tool),
        )
    )


def _passed_by_tool(record: dict[str, Any]) -> str:
    """'memcheck 167, racecheck 167 tests clean'."""
    return ", ".join(f"{tool} {tests['passed']}" for tool, tests in record["tests"].items()) + " tests clean"


def count_tests(junit: Sequence[Path]) -> dict[str, int]:
    """How many tests passed, failed (errors count) and were skipped, from the JUnit XML of one or more runs of pytest."""
    suites = [suite for file in junit for suite in ElementTree.parse(file).getroot().iter("testsuite")]
    total, failures, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def count_green(junit: Sequence[Path]) -> dict[str, int]:
    """`count_tests` of a run in which every test passed; raises RecordError for any other run."""
    tests = count_tests(junit)
    if tests["failed"] or not tests["passed"]:
        raise RecordError(f"a record needs tests that pass and none that fails; {', '.join(map(str, junit))}: {tests}")
    return tests


def write(root: Path, junit: Sequence[Path], figures: Path) -> Path:
    """Write the record of a run in which every test passed."""
    return _keep(root, RECORD, {"tests": count_green(junit), "figures": json.loads(figures.read_text())})


def write_sanitized(root: Path, junit: Sequence[Path]) -> Path | None:
    """Write the record of runs in which every test passed, each under the tool that its file is named after.

    None: a tool's run lacks, and nothing is written.
    """
    files = {file.stem: file for file in junit}
    if not set(SANITIZERS) <= files.keys():
        return None
    return _keep(root, SANITIZED, {"tests": {tool: count_green([files[tool]]) for tool in SANITIZERS}})


def _keep(root: Path, path: Path, found: dict[str, Any]) -> Path:
    """Write a record of what was found here and now, atomically."""
    record = {
        **machine(),
        "sources_sha256": source_hash(root),
        **found,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(root),
    }
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".writing")
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    scratch.replace(target)
    return target


def machine() -> dict[str, Any]:
    """The GPU, its driver and the versions of what ran on it; raises RecordError where there is no GPU."""
    try:
        from pycuda import driver
    except ImportError as error:
        raise RecordError(
            f"no GPU can be used: PyCUDA does not import ({error}). It takes an NVIDIA GPU, its driver and PyCUDA; "
            "`make setup` installs PyCUDA where there is a driver, or says what is missing"
        ) from error
    try:
        driver.init()
        name = driver.Device(0).name()
    except driver.Error as error:
        raise RecordError(f"no GPU can be used: {error}. Run this on a machine with an NVIDIA GPU") from error
    cuda = driver.get_driver_version()
    return {
        "gpu": name,
        "driver": driver_release(),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "pycuda", "cuda-bindings")},
    }


def driver_release() -> str:
    """The driver's own version, such as 580.82.07."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RecordError(f"the driver's version is unknown: {error}; nvidia-smi comes with the driver") from error
    return done.stdout.splitlines()[0]


def commit(root: Path) -> str | None:
    """The commit of the work tree, "+changes" where it was edited since; None outside of git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", "src", "tests")
    return f"{head}+changes" if head and changed else head


def main() -> int:
    """Run the subcommand of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the work tree (default: the one of this file)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("require", "hash", "status"):
        commands.add_parser(name)
    writer = commands.add_parser("write")
    writer.add_argument("--junit", type=Path, nargs="+", required=True, help="pytest's --junitxml")
    writer.add_argument("--figures", type=Path, required=True, help="JSON of `parcnn bench gpu-check`")
    sanitized = commands.add_parser("sanitized")
    sanitized.add_argument("--junit", type=Path, nargs="+", required=True, help="pytest's --junitxml, TOOL.xml each")
    arguments = parser.parse_args()
    try:
        if arguments.command == "require":
            print(f"GPU: {machine()['gpu']}")
        elif arguments.command == "hash":
            print(source_hash(arguments.root))
        elif arguments.command == "status":
            print(status(arguments.root))
        elif arguments.command == "write":
            print(write(arguments.root, arguments.junit, arguments.figures))
        else:
            print(write_sanitized(arguments.root, arguments.junit) or f"no record: it takes {', '.join(SANITIZERS)}")
    except RecordError as error:
        print(f"gpu_record: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
