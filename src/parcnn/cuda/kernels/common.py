"""What launchers share: the host's side of `common.cuh`."""

from __future__ import annotations

import numpy as np

from parcnn.cuda.launch import Struct
from parcnn.ops.base import ACTIVATIONS, Spec


def fast_div(divisor: int) -> Struct:
    """`FastDiv` of common.cuh: n // divisor = (2n * mul >> 32) >> shift, exact for 0 <= n < 2**31 (Granlund & Montgomery)."""
    if not 1 <= divisor < 2**31:
        raise ValueError(f"fast_div needs a divisor in 1..2**31-1, got {divisor}")
    shift = (divisor - 1).bit_length()
    multiplier = -(-(1 << (31 + shift)) // divisor)
    return Struct((np.uint32(multiplier), np.uint32(shift), np.uint32(divisor)))


def act_code(act: str | None) -> int:
    """The `ACT_*` number of an activation in common.cuh; 0 for none."""
    return ACTIVATIONS.index(act) + 1 if act else 0


def refuse_dtype(*tensors: Spec) -> str | None:
    """Why kernels for 32-bit floats cannot take these tensors; None where they can."""
    return next((f"tensors must be f32, one is {t.dtype}" for t in tensors if t.dtype != "f32"), None)


def refuse_size(*tensors: Spec) -> str | None:
    """Why kernels that count elements in 32 bits cannot take these tensors; None where they can."""
    return next((f"{t.shape} has 2**31 elements or more" for t in tensors if t.size >= 2**31), None)


def vector_width(*runs: int) -> int:
    """4 where every run of neighbouring floats is a multiple of 4, so that 16-byte accesses are aligned; else 1."""
    return 1 if any(run % 4 for run in runs) else 4


def lanes_for(vectors: int, most: int) -> int:
    """log2 of the threads along a dimension: the least power of two that covers `vectors`, at most the power `most`."""
    return min((vectors - 1).bit_length(), most.bit_length() - 1)
