"""Initial values, made on the host from one seeded generator, so that every executor starts from the same weights."""

from __future__ import annotations

from math import sqrt

import numpy as np

from parcnn.errors import ArgumentError

_generator = np.random.Generator(np.random.Philox(0))


def manual_seed(seed: int) -> None:
    """Restart the generator of initial weights (torch.manual_seed's role). Without it the seed is 0.

    Raises ArgumentError for a seed outside 0..2**64-1.
    """
    global _generator
    if not 0 <= seed < 2**64:
        raise ArgumentError("a seed out of range", where="manual_seed", expected="0 to 2**64 - 1", got=seed)
    _generator = np.random.Generator(np.random.Philox(seed))


def uniform(shape: tuple[int, ...], bound: float) -> np.ndarray:
    """float32 values uniform in [-bound, bound)."""
    return ((_generator.random(shape) * 2 - 1) * bound).astype(np.float32)


def fan_in_bound(fan_in: int) -> float:
    """1/sqrt(fan_in): torch's default for weights (kaiming_uniform with a=sqrt(5); He et al. 2015) and biases."""
    return 1 / sqrt(fan_in) if fan_in else 0.0
