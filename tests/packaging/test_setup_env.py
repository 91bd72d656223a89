"""The environment is made of what is there, and nothing is done twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Tool

# Answers questions about itself as the real interpreter; writes down every pip call instead of making it.
FAKE_PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then exec {real} "$@"; fi
echo "$@" >> {log}
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(FAKE_PYTHON.format(real=sys.executable, log=tmp_path / "pip.log"))
    python.chmod(0o755)
    return folder


def installs(venv: Path) -> list[str]:
    log = venv.parent / "pip.log"
    return [line.rsplit(" ", 1)[-1] for line in log.read_text().splitlines()] if log.exists() else []


def test_extras_are_installed_once_and_grow(tool: Tool, venv: Path) -> None:
    for extras in (["lint"], ["lint"], ["test"], ["lint"]):
        done = tool("setup_env.py", "--venv", venv, "--no-cuda", *extras)
        assert done.returncode == 0, done.stderr
    assert installs(venv) == [f"{ROOT}[lint]", f"{ROOT}[lint,test]"]


def test_nothing_is_said_when_nothing_changed(tool: Tool, venv: Path) -> None:
    first = tool("setup_env.py", "--venv", venv, "--no-cuda", "test")
    second = tool("setup_env.py", "--venv", venv, "--no-cuda", "test")
    assert "installing parcnn[test]" in first.stderr
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_changed_sources_install_again_with_all_extras(tool: Tool, venv: Path) -> None:
    tool("setup_env.py", "--venv", venv, "--no-cuda", "test")
    stamp = venv / "parcnn-setup.json"
    stamp.write_text(stamp.read_text().replace('"sources": "', '"sources": "of an older pyproject.toml '))
    tool("setup_env.py", "--venv", venv, "--no-cuda", "plots")
    assert installs(venv) == [f"{ROOT}[test]", f"{ROOT}[plots,test]"]


def test_failing_pip_is_not_remembered_as_done(tool: Tool, venv: Path) -> None:
    python = venv / "bin" / "python"
    python.write_text(python.read_text() + "exit 1\n")
    done = tool("setup_env.py", "--venv", venv, "--no-cuda", "test")
    assert done.returncode == 1
    assert "make PYTHON=python3" in done.stderr
    assert not (venv / "parcnn-setup.json").exists()


def test_python_too_old_is_named_with_the_remedy(tool: Tool, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho '[[3, 9], true, \"/usr/include/python3.9\"]'\n")
    old.chmod(0o755)
    done = tool("setup_env.py", "--venv", tmp_path / "venv", "test", env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed; python3 is 3.9" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_python_without_venv_is_named_with_the_remedy(tool: Tool, tmp_path: Path) -> None:
    bare = tmp_path / "python3.12"
    bare.write_text("#!/bin/sh\necho '[[3, 12], false, \"/usr/include/python3.12\"]'\n")
    bare.chmod(0o755)
    done = tool("setup_env.py", "--venv", tmp_path / "venv", "test", env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "apt install python3.12-venv" in done.stderr


def test_a_folder_that_is_no_environment_is_not_cleared(tool: Tool, tmp_path: Path) -> None:
    precious = tmp_path / "home" / "letters.txt"
    precious.parent.mkdir()
    precious.write_text("dear")
    done = tool("setup_env.py", "--venv", precious.parent, "--no-cuda", "test")
    assert done.returncode == 1
    assert "is no environment" in done.stderr
    assert precious.read_text() == "dear"
