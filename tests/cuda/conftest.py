"""Executors for tests: `null` runs no kernel and needs no GPU; `cuda` is real, for tests marked `gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parcnn.cuda.device import is_available
from parcnn.cuda.executor import CudaExecutor
from tests.cuda import toy


@pytest.fixture
def null() -> Iterator[CudaExecutor]:
    """The null executor on parcnn's kernels; it ends with all memory given back."""
    executor = CudaExecutor.null()
    yield executor
    _close(executor)


@pytest.fixture
def null_toy() -> Iterator[CudaExecutor]:
    """The null executor on the toy kernels."""
    executor = CudaExecutor.null(registry=toy.REGISTRY)
    yield executor
    _close(executor)


@pytest.fixture(scope="module", params=["sm_80", "sm_89", "sm_90a"])
def null_of(request: pytest.FixtureRequest) -> Iterator[CudaExecutor]:
    """Null executors of several architectures."""
    executor = CudaExecutor.null(request.param)
    yield executor
    _close(executor)


@pytest.fixture(scope="session")
def cuda() -> CudaExecutor:
    """A real executor on parcnn's kernels. Not skipped once there is a GPU: what then lacks is a failure."""
    if not is_available():
        pytest.skip("no NVIDIA GPU")
    return CudaExecutor()


@pytest.fixture(scope="session")
def cuda_toy() -> CudaExecutor:
    """A real executor on the toy kernels."""
    if not is_available():
        pytest.skip("no NVIDIA GPU")
    return CudaExecutor(registry=toy.REGISTRY)


def _close(executor: CudaExecutor) -> None:
    executor.close()
    assert executor.allocated_bytes == 0
    assert executor.driver.counters.allocated_bytes == 0
