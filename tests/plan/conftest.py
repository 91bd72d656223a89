from __future__ import annotations

from collections.abc import Iterator

import pytest

from parcnn.cpu import CpuExecutor


@pytest.fixture(scope="session")
def cpu() -> Iterator[CpuExecutor]:
    executor = CpuExecutor(threads=1)
    executor.concurrent = True  # so that plans schedule as they do for a GPU
    yield executor
    executor.close()
