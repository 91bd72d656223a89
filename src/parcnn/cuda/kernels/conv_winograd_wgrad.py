"""Launcher of conv_winograd_wgrad.cu: gradient of 3x3 filters of stride 1 by Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import refuse_dtype
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, Conv, unsupported
from parcnn.cuda.kernels.conv_unpool import pass_us, scratch_bytes, unpool, unpooled
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvWgrad,)
KERNEL = Kernel("conv_winograd_wgrad.cu", "conv_winograd_wgrad")
FILTERS, CHANNELS, DEPTH, THREADS = 64, 32, 8, 256  # twins of conv_winograd_wgrad.cu's
SHARED_BYTES = 2 * 4 * DEPTH * 16 * (FILTERS + CHANNELS)
# A block's start and end, a step of DEPTH tiles, in clock cycles; the sum of the splits: its start, bytes a cycle.
BLOCK_CYCLES, STEP_CYCLES = 6000.0, 3020.0
SUM_CYCLES, SUM_BYTES = 3000.0, 915.0


class Variant(NamedTuple):
    """Into how many runs of tiles the sum is cut."""

    splits: int

    def __str__(self) -> str:
        return f"2x2 of 3x3 in {self.splits}"


class _Problem(NamedTuple):
    """The convolution with p and q counted in tiles, and the sides of dy before the pool, if there is one."""

    conv: Conv
    height: int
    width: int
    pool: str | None

    @property
    def tiles(self) -> int:
        return self.conv.n * self.conv.p * self.conv.q

    @property
    def blocks(self) -> int:
        return ceil(self.conv.k / FILTERS) * ceil(self.conv.c / CHANNELS)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvWgrad):
        return f"{op.name} is not a convolution's filter gradient"
    x, dy = inputs[:2]
    outputs = op.infer(*inputs)
    if (*op.filter, *op.stride, *op.dilation) != (3, 3, 1, 1, 1, 1):
        return "Winograd's algorithm runs 3x3 filters of stride and dilation 1"
    error = unpooled(dy, op.pool)
    if reason := refuse_dtype(x, dy) or unsupported(op, (x, error, *outputs), (x.shape[1], x.shape[2]), op.filter):
        return reason
    if not all(spec.size for spec in (*inputs, *outputs)):
        return "there is nothing to compute"
    sides = zip(x.shape[1:3], error.shape[1:3], op.pad[:2], strict=True)
    if not all(_meets(tap, *side) for side in sides for tap in range(3)):
        return "the gradient of a tap that meets no pixel is zero, which Winograd's sums only come near to"
    if x.shape[3] % 4 or dy.shape[3] % 4:
        return f"Winograd's filter gradient takes multiples of 4 channels, not {x.shape[3]} and {dy.shape[3]}"
    return None


def _meets(tap: int, pixels: int, outputs: int, pad: int) -> bool:
    """Whether a tap's row (or column) of some output is one of the image's."""
    return max(0, pad - tap) < min(outputs, pixels + pad - tap)


def unpools(call: Call, device: Device, variant: Variant | None = None) -> bool:
    """True: tiles are read without indices."""
    return True


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The error before a pool, and the splits' partial sums where there are several."""
    problem = _problem(op, inputs)
    splits = (variant or _ranked(op, problem, device)[0]).splits
    partial = 4 * splits * _row_size(op, problem.conv) if splits > 1 else 0
    return scratch_bytes(inputs[1], problem.pool) + partial


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    return _ranked(call.op, _problem(call.op, call.input_specs), device)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    problem = _problem(call.op, call.input_specs)
    return min(_cycles(call.op, problem, device).values()) / CYCLES_PER_US + pass_us(call.input_specs[1], problem.pool)


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; before it, one that takes the error back through a pool, and behind it one that adds the partial sums of
    several splits; `variant` forces one of `candidates`."""
    op, problem = call.op, _problem(call.op, call.input_specs)
    conv = problem.conv
    splits = (variant or _ranked(op, problem, device)[0]).splits
    x, dy, *idx = call.inputs
    dw, db = call.outputs[0], call.outputs[1] if len(call.outputs) > 1 else None
    offset, scratch, result = scratch_bytes(dy.spec, problem.pool), call.workspace, []
    if scratch is None and (offset or splits > 1):
        raise ValueError("a filter gradient of several splits, or behind a pool, needs its workspace")
    if scratch and offset:
        result.append(unpool(dy, idx[0] if idx else None, scratch))
        dy = scratch
    partial = Pointer(scratch, offset) if scratch and splits > 1 else None
    sides = (np.int32(problem.tiles), np.int32(problem.height), np.int32(problem.width))
    chunk = np.int32(DEPTH * ceil(ceil(problem.tiles / DEPTH) / splits))
    args: tuple[Argument, ...] = (x, dy, dw, db, partial, conv.argument(), *sides, chunk)
    grid = (ceil(conv.k / FILTERS), ceil(conv.c / CHANNELS), splits)
    result.append(Launch(KERNEL, grid, (THREADS, 1, 1), args, SHARED_BYTES))
    if splits > 1:
        result.append(sum_launch(call, splits, offset))
    return result


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for `conv_unpool`'s and the sum's."""
    yield KERNEL


def _problem(op: Op, inputs: tuple[Spec, ...]) -> _Problem:
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is not a convolution's filter gradient")
    (n, h, w, c), (_, height, width, k) = inputs[0].shape, unpooled(inputs[1], op.pool).shape
    conv = Conv(n, h, w, c, k, 3, 3, ceil(height / 2), ceil(width / 2), (1, 1), op.pad[:2], (1, 1), None)
    return _Problem(conv, height, width, op.pool)


def _row_size(op: Op, conv: Conv) -> int:
    return conv.k * (conv.taps_c + bool(getattr(op, "bias", False)))


def _ranked(op: Op, problem: _Problem, device: Device) -> list[Variant]:
    costs = _cycles(op, problem, device)
    return sorted(costs, key=costs.__getitem__)


def _cycles(op: Op, problem: _Problem, device: Device) -> dict[Variant, float]:
    """Estimated clock cycles of the variants that can run the problem."""
    steps = ceil(problem.tiles / DEPTH)
    costs: dict[Variant, float] = {}
    for waves in (1, 2, 3, 4):
        each = ceil(steps / max(1, min(steps, waves * device.sm_count // problem.blocks)))
        splits = ceil(steps / each)  # none is empty
        rounds = ceil(problem.blocks * splits / device.sm_count)
        product = rounds * (BLOCK_CYCLES + each * STEP_CYCLES)
        total = SUM_CYCLES + 4 * splits * _row_size(op, problem.conv) / SUM_BYTES if splits > 1 else 0.0
        costs[Variant(splits)] = product + total
    return costs
