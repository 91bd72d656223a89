"""What an input gradient passes through on its way out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from parcnn.cpu.pointwise import activate_backward
from parcnn.ops.conv import ConvDgrad


def dgrad_epilogue(
    op: ConvDgrad, operands: Mapping[str, np.ndarray], gradient: np.ndarray, part: tuple[slice, ...], out: np.ndarray
) -> None:
    """out = (gradient + addend) * act'(saved) for a part of the images; gradient is used up."""
    if op.add:
        gradient += operands["addend"][part]
    if op.act:
        activate_backward(op.act, gradient, operands["saved"][part], out)
    else:
        np.copyto(out, gradient)
