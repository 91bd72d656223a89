"""Checkpoints: whole or not at all, and damage is named."""

from __future__ import annotations

import json
import os
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
            assert (theirs[name].dtype, theirs[name].shape) == (value.dtype, value.shape)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, SAMPLE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("what", ["tensor", "description"])
def test_changed_bytes_are_found(tmp_path: Path, what: str) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, SAMPLE)
    data = bytearray(path.read_bytes())
    at = data.rindex(np.float32(5).tobytes()) + 2 if what == "tensor" else data.index(b"epoch") + 10
    data[at] ^= 2
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: the file was changed"):
        load_checkpoint(path)


def test_a_checkpoint_without_a_digest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "older.safetensors"
    metadata = {"format": module.FORMAT, "info": json.dumps(SAMPLE.info)}
    save_file({f"model.{k}": v for k, v in SAMPLE.weights.items()}, path, metadata)
    assert load_checkpoint(path).info == SAMPLE.info


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder"):
        load_checkpoint(tmp_path)


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

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: cannot be written \(No space"):
        save_checkpoint(path, Checkpoint({"other": np.zeros(3)}))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_checkpoint_may_be_read_by_whom_the_user_s_other_files_may(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    save_checkpoint(tmp_path / "c.safetensors", SAMPLE)
    assert (tmp_path / "c.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file") as caught:
        save_checkpoint(tmp_path / "file" / "c.safetensors", SAMPLE)
    assert "another folder" in caught.value.remedy


def test_weights_of_a_type_that_numpy_lacks_are_told_apart(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    path = tmp_path / "torch.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="not a parcnn checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("info", ["{", "[]"])
def test_a_damaged_description_is_named(tmp_path: Path, info: str) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"model.w": np.zeros(2, np.float32)}, path, {"format": module.FORMAT, "info": info})
    with pytest.raises(CheckpointError, match="description is damaged"):
        load_checkpoint(path)
