"""Checkpoints name the tables of measured kernels that they were trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from parcnn.cpu import CpuExecutor
from parcnn.data import Dataset
from parcnn.train import Trainer
from parcnn.train.checkpoint import load_checkpoint

Make = Callable[..., Trainer]


def executor(digest: str) -> CpuExecutor:
    made = CpuExecutor(threads=1)
    made.tuning_digest = digest
    return made


def test_other_tables_are_warned_of_when_training_goes_on(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    make_trainer(device=executor("0123456789ab")).fit(digits, 1, checkpoint=path)
    assert load_checkpoint(path).info["tuning"] == "0123456789ab"

    same = make_trainer(device=executor("0123456789ab"))
    same.load(path)
    same.fit(digits, 2)  # a warning would fail the test
    other = make_trainer(device=executor(""))
    other.load(path)
    other.evaluate(digits)  # nor does what does not train
    with pytest.warns(UserWarning, match="0123456789ab"):
        other.fit(digits, 2)


def test_other_hardware_is_warned_of(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "c.safetensors", executor("")
    elsewhere.hardware = "sm_80 with 108 multiprocessors"
    make_trainer(device=elsewhere).fit(digits, 1, checkpoint=path)
    here = make_trainer(device=executor(""))
    here.load(path)
    with pytest.warns(UserWarning, match="108 multiprocessors.*the CPU"):
        here.fit(digits, 2)
