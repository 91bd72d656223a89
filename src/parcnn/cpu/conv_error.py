"""The error on its way into a convolution's gradients, and the input's gradient on its way out."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from parcnn.cpu.lowering import Block, Lowering
from parcnn.cpu.pointwise import activate_backward
from parcnn.cpu.pool2x2 import route_error
from parcnn.cpu.workers import Scratch
from parcnn.ops.conv import ConvDgrad


def routed_error(
    low: Lowering, dy: np.ndarray, packed: np.ndarray | None, block: Block, transposed: bool, scratch: Scratch
) -> np.ndarray:
    """The error at the convolution's own outputs, (M, outputs): dy of a block, routed back through the pool."""
    here = dy[block.images, block.rows]
    if not low.geometry.pool:
        return here.reshape(-1, low.outputs)
    m = prod(low.windows(block.shape))
    error = scratch.take((low.outputs, m) if transposed else (m, low.outputs), dy.dtype)
    indices = None if packed is None else packed[block.images, block.rows]
    route_error(here, indices, low.candidates(error, block.shape, transposed), transposed, scratch)
    return error.T if transposed else error


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
