"""What launchers share: the host's side of `common.cuh`."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

from parcnn.cuda.launch import Struct
from parcnn.ops.base import ACTIVATIONS, Spec

ELEMENTS = {"f32": "float", "bf16": "bf16"}  # the kernels' macro ELEMENT for each type of tensors that they compute on
VECTOR_WIDTHS = {"f32": (4, 1), "bf16": (8, 4, 1)}
WORDS = {2: "u16", 4: "u32", 8: "uint2", 16: "uint4"}  # what is moved at once, by its bytes


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


def refuse_dtype(*tensors: Spec, among: Sequence[str] = ("f32",)) -> str | None:
    """Why kernels for one element type, out of `among`, cannot take these tensors; None where they can."""
    found = sorted({t.dtype for t in tensors})
    if len(found) == 1 and found[0] in among:
        return None
    return f"tensors must be all {' or all '.join(among)}, they are {' and '.join(found)}"


def refuse_size(*tensors: Spec) -> str | None:
    """Why kernels that count elements in 32 bits cannot take these tensors; None where they can."""
    return next((f"{t.shape} has 2**31 elements or more" for t in tensors if t.size >= 2**31), None)


def vector_width(*runs: int, dtype: str = "f32") -> int:
    """Elements that a thread takes at once, so that every run of neighbouring ones is a multiple and accesses are aligned.

    4 f32 or 8 bf16 (16 bytes), 4 bf16, or one.
    """
    widths = VECTOR_WIDTHS[dtype]
    return next(width for width in widths if not any(run % width for run in runs))


def word_bytes(*runs_bytes: int) -> int:
    """The largest of WORDS that every run is a multiple of, so that accesses are aligned."""
    return gcd(max(WORDS), *runs_bytes)


def lanes_for(vectors: int, most: int) -> int:
    """log2 of the threads along a dimension: the least power of two that covers `vectors`, at most the power `most`."""
    return min((vectors - 1).bit_length(), most.bit_length() - 1)
