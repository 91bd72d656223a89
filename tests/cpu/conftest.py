from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor


@pytest.fixture(scope="session")
def cpu() -> Iterator[CpuExecutor]:
    executor = CpuExecutor(threads=2)  # any other number of threads gives the same bits: test_executor.py
    yield executor
    executor.close()


@pytest.fixture
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(sum(map(ord, request.node.name)))
