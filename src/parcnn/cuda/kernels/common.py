"""What launchers share: the host's side of `common.cuh`."""

from __future__ import annotations

import numpy as np

from parcnn.cuda.launch import Struct
from parcnn.ops.base import ACTIVATIONS


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
