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
    with np.errstate(invalid="ignore"):  # a NaN that signals
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats as a tensor of type `dtype`, f32 or bf16."""
    return to_bits(values) if dtype == "bf16" else values.astype(np.float32)


def values_of(tensor: np.ndarray) -> np.ndarray:
    """What a tensor holds: bit patterns as float64, all else as it is."""
    return from_bits(tensor) if tensor.dtype == np.uint16 else tensor
