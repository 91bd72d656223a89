"""bf16 on the host, for tests: values are float arrays, tensors their bit patterns (uint16)."""

from __future__ import annotations

import numpy as np


def to_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bf16, ties to even; every NaN becomes 0x7fff, as the device makes it."""
    words = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """The values, float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
