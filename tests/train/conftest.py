"""Real digits and a small network for the training tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import parcnn
from parcnn import data, models, optim
from parcnn.cpu import CpuExecutor
from parcnn.data import Dataset
from parcnn.train import Trainer


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The first 400 training digits."""
    return data.load("digits").subset(400)


@pytest.fixture(scope="session")
def held_out() -> Dataset:
    """The 360 test digits."""
    return data.load("digits", "test")


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """make_trainer(**arguments of Trainer): a LeNet-5 whose first weights are always the same, on one CPU thread."""

    def make(optimizer: Any = None, **kwargs: Any) -> Trainer:
        parcnn.manual_seed(3)
        kwargs.setdefault("device", CpuExecutor(threads=1))
        kwargs.setdefault("schedule", optim.CosineLR(warmup=0.1))
        optimizer = optimizer or optim.SGD(0.02, momentum=0.9)
        return Trainer(models.create("lenet5"), optimizer, **kwargs)

    return make
