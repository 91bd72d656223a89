"""Checkpoints: whole or not at all, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import parcnn.train.checkpoint as module
from parcnn.errors import CheckpointError
from parcnn.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

SAMPLE = Checkpoint(
    {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, np.int64)},
    {"a.weight.0": np.ones((2, 3), np.float32)},
    {"epoch": 3, "classes": ["x", "y"]},
)


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "deep" / "c.safetensors", SAMPLE)
    back = load_checkpoint(tmp_path / "deep" / "c.safetensors")
    assert back.info == SAMPLE.info
    for mine, theirs in ((SAMPLE.weights, back.weights), (SAMPLE.optimizer, back.optimizer)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            np.testing.assert_array_equal(value, theirs[name])
            assert theirs[name].dtype == value.dtype


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, SAMPLE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_plain_weights_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, path)
    with pytest.raises(CheckpointError, match="not a parcnn checkpoint"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, SAMPLE)
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        save_checkpoint(path, Checkpoint({"other": np.zeros(3)}))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
