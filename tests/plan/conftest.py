from __future__ import annotations

from collections.abc import Iterator

import pytest

from parcnn import manual_seed
from parcnn.cpu import CpuExecutor


@pytest.fixture(scope="session")
def cpu() -> Iterator[CpuExecutor]:
    executor = CpuExecutor(threads=1)
    executor.concurrent = True  # so that plans schedule as they do for a GPU
    yield executor
    executor.close()


@pytest.fixture(autouse=True)
def _same_first_weights() -> None:
    """Weights do not depend on which tests ran before: a channel that ReLU silences lies on batch norm's kink."""
    manual_seed(0)
