"""What one core can do at most, to publish a layer's share of it."""

from __future__ import annotations

import time

import numpy as np
from threadpoolctl import threadpool_limits


def peak_gflops(size: int = 2048, repeats: int = 5) -> float:
    """Peak GFLOP/s of one core: the best of `repeats` float32 matrix products (size x size) with one BLAS thread.

    The time is the thread's own, so that other work on the machine does not lower the result.
    """
    random = np.random.default_rng(0)
    a = random.standard_normal((size, size)).astype(np.float32)
    b = random.standard_normal((size, size)).astype(np.float32)
    c = np.empty_like(a)
    best = float("inf")
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(repeats + 1):  # one more: the first touches the memory
            start = time.thread_time()
            np.matmul(a, b, out=c)
            best = min(best, time.thread_time() - start)
    return 2 * size**3 / best / 1e9
