"""The GPU's records are fresh, stale or missing, and are written of green runs only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.packaging.conftest import Tool

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests">
<testsuite name="pytest" errors="{errors}" failures="{failures}" skipped="2" tests="12" time="1.0"/></testsuites>"""
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small work tree with a record of its sources."""
    for name in ("src/parcnn/cuda/kernels/conv.cu", "src/parcnn/nn.py", "tests/test_nn.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def write_record(tree: Path, digest: str, name: str = "gpu-check", tests: dict[str, object] | None = None) -> None:
    record = {"sources_sha256": digest, "gpu": "NVIDIA H200", "date": "2026-01-01T00:00:00+00:00"}
    file = tree / f"benchmarks/results/{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**record, "tests": tests or {"passed": 10, "failed": 0, "skipped": 2}}))


def tools_runs(tree: Path, failing: str = "", tools: tuple[str, ...] = TOOLS) -> list[Path]:
    """Results of the tests under each tool."""
    files = [tree / f"{tool}.xml" for tool in tools]
    for file in files:
        file.write_text(JUNIT.format(errors=0, failures=int(file.stem == failing)))
    return files


def test_status_without_a_record(tool: Tool, tree: Path) -> None:
    done = tool("gpu_record.py", "--root", tree, "status")
    assert done.returncode == 0
    assert done.stdout.startswith("GPU record: missing (benchmarks/results/gpu-check.json)")


@pytest.mark.parametrize(
    ("changed", "state"),
    [
        (None, "fresh"),
        ("README.md", "fresh"),
        ("src/parcnn/cuda/kernels/conv.cu", "stale"),
        ("src/parcnn/nn.py", "stale"),
        ("tests/test_nn.py", "stale"),
        ("src/parcnn/cuda/kernels/shared.cuh", "stale"),  # a file that was not there
        ("src/parcnn/cuda/tuned/sm_90a.json", "stale"),
        ("src/parcnn/recipes/own.toml", "stale"),
        ("tests/cuda/toy.cu", "stale"),
    ],
)
def test_status_follows_the_sources(tool: Tool, tree: Path, changed: str | None, state: str) -> None:
    write_record(tree, tool("gpu_record.py", "--root", tree, "hash").stdout.strip())
    if changed is not None:
        (tree / changed).parent.mkdir(parents=True, exist_ok=True)
        (tree / changed).write_text("changed")
    done = tool("gpu_record.py", "--root", tree, "status")
    assert done.returncode == 0
    assert done.stdout.startswith(f"GPU record: {state}")
    assert "10 tests passed on NVIDIA H200" in done.stdout


def test_hash_tells_a_moved_file(tool: Tool, tree: Path) -> None:
    before = tool("gpu_record.py", "--root", tree, "hash").stdout
    (tree / "src/parcnn/nn.py").rename(tree / "src/parcnn/layers.py")
    assert tool("gpu_record.py", "--root", tree, "hash").stdout != before


@pytest.mark.parametrize(("errors", "failures"), [(0, 1), (1, 0)])
def test_no_record_of_a_failing_run(tool: Tool, tree: Path, errors: int, failures: int) -> None:
    junit, figures = tree / "junit.xml", tree / "figures.json"
    junit.write_text(JUNIT.format(errors=errors, failures=failures))
    figures.write_text("{}")
    done = tool("gpu_record.py", "--root", tree, "write", "--junit", junit, "--figures", figures)
    assert done.returncode == 1
    assert "'passed': 9, 'failed': 1, 'skipped': 2" in done.stderr
    assert not (tree / "benchmarks").exists()


def test_no_record_without_a_gpu(tool: Tool, tree: Path) -> None:
    junit, figures = tree / "junit.xml", tree / "figures.json"
    junit.write_text(JUNIT.format(errors=0, failures=0))
    figures.write_text("{}")
    hidden: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
    for command in (["require"], ["write", "--junit", junit, "--figures", figures]):
        done = tool("gpu_record.py", "--root", tree, *command, env=hidden)
        assert done.returncode == 1
        assert "no GPU can be used" in done.stderr
    assert not (tree / "benchmarks").exists()


@pytest.mark.gpu
def test_record_of_a_green_run(tool: Tool, tree: Path) -> None:
    junit, figures = tree / "junit.xml", tree / "figures.json"
    junit.write_text(JUNIT.format(errors=0, failures=0))
    figures.write_text('{"lenet5_step_us": 1.5}')
    done = tool("gpu_record.py", "--root", tree, "write", "--junit", junit, "--figures", figures)
    assert done.returncode == 0, done.stderr
    record = json.loads((tree / "benchmarks/results/gpu-check.json").read_text())
    assert record["tests"] == {"passed": 10, "failed": 0, "skipped": 2}
    assert record["figures"] == {"lenet5_step_us": 1.5}
    assert {"gpu", "driver", "cuda", "python", "numpy", "pycuda", "commit", "date"} <= record.keys()
    assert tool("gpu_record.py", "--root", tree, "status").stdout.startswith("GPU record: fresh")


# The sanitizers'


@pytest.mark.parametrize(("changed", "state"), [(None, "fresh"), ("tests/test_nn.py", "stale")])
def test_status_of_the_sanitizers(tool: Tool, tree: Path, changed: str | None, state: str) -> None:
    digest = tool("gpu_record.py", "--root", tree, "hash").stdout.strip()
    write_record(tree, digest)
    lines = tool("gpu_record.py", "--root", tree, "status").stdout.splitlines()
    assert [line.partition(" (")[0] for line in lines] == ["GPU record: fresh", "Sanitizer record: missing"]
    write_record(tree, digest, "sanitize", {"memcheck": {"passed": 7}, "racecheck": {"passed": 6}})
    if changed is not None:
        (tree / changed).write_text("changed")
    of_tests, of_tools = tool("gpu_record.py", "--root", tree, "status").stdout.splitlines()
    assert of_tests.startswith(f"GPU record: {state}")
    assert of_tools.startswith(f"Sanitizer record: {state}")
    assert "memcheck 7, racecheck 6 tests clean on NVIDIA H200" in of_tools


@pytest.mark.parametrize("failing", TOOLS)
def test_no_record_of_a_tool_that_found_something(tool: Tool, tree: Path, failing: str) -> None:
    done = tool("gpu_record.py", "--root", tree, "sanitized", "--junit", *tools_runs(tree, failing))
    assert done.returncode == 1
    assert f"{failing}.xml: {{'passed': 9, 'failed': 1, 'skipped': 2}}" in done.stderr
    assert not (tree / "benchmarks").exists()


def test_no_record_of_some_tools(tool: Tool, tree: Path) -> None:
    done = tool("gpu_record.py", "--root", tree, "sanitized", "--junit", *tools_runs(tree, tools=TOOLS[1:]))
    assert done.returncode == 0
    assert done.stdout == "no record: it takes memcheck, racecheck, initcheck, synccheck\n"
    assert not (tree / "benchmarks").exists()


def test_no_record_of_tools_without_a_gpu(tool: Tool, tree: Path) -> None:
    hidden: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
    done = tool("gpu_record.py", "--root", tree, "sanitized", "--junit", *tools_runs(tree), env=hidden)
    assert done.returncode == 1
    assert "no GPU can be used" in done.stderr
    assert not (tree / "benchmarks").exists()


@pytest.mark.gpu
def test_record_of_clean_tools(tool: Tool, tree: Path) -> None:
    done = tool("gpu_record.py", "--root", tree, "sanitized", "--junit", *tools_runs(tree))
    assert done.returncode == 0, done.stderr
    record = json.loads((tree / "benchmarks/results/sanitize.json").read_text())
    assert record["tests"] == {each: {"passed": 10, "failed": 0, "skipped": 2} for each in TOOLS}
    assert {"gpu", "driver", "cuda", "python", "numpy", "pycuda", "commit", "date"} <= record.keys()
    assert "Sanitizer record: fresh" in tool("gpu_record.py", "--root", tree, "status").stdout
