"""Launcher of conv_stem_sm90_wgrad.cu: gradients of the filters of bf16 convolutions of few channels on Hopper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil

import numpy as np

from parcnn.cuda.kernels.conv_common import CYCLES_PER_US
from parcnn.cuda.kernels.conv_stem import Sizes, sizes_of
from parcnn.cuda.kernels.conv_stem import supports as portable_supports
from parcnn.cuda.kernels.conv_stem_sm90 import (
    FILTERS,
    MOST_PAIRS,
    PIXELS,
    ROWS,
    RUNS,
    SHARED_BYTES,
    Variant,
    items_of,
    problem_of,
    raw_bytes,
    row_bytes,
    rows_apart,
    rows_of,
    tiles_of,
)
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Argument, Device, Kernel, Launch
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvWgrad,)
STAGES = (3, 2)  # of errors
_ZERO_BYTES = 128


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernel runs the op on these operands, else the reason why not."""
    if not isinstance(op, ConvWgrad):
        return f"{op.name} is no filter gradient"
    if reason := portable_supports(op, inputs):
        return reason
    sizes = sizes_of(op, inputs)
    if not all(spec.size for spec in inputs):
        return "there is nothing to sum"
    if sizes.k % 8:
        return f"the kernel copies filters by eights, got {sizes.k}"
    if sizes.dilation_h != 1:
        return f"the kernel takes neighbouring rows of the image, got a dilation of {sizes.dilation_h}"
    if op.bias and sizes.run % 8 == 0:
        return f"the bias' gradient has no place behind a filter's row of {sizes.run} elements"
    if sizes.r > max(ROWS) or not _variants(sizes):
        return f"filters of {sizes.r} rows or what they read of an image do not fit in registers or shared memory"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The partial sums."""
    if not isinstance(op, ConvWgrad):
        return 0
    sizes = sizes_of(op, inputs)
    return 4 * _blocks(sizes, variant or _ranked(sizes, device)[0], device) * _row_size(op, sizes)


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    return _ranked(sizes_of(call.op, call.input_specs), device)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    sizes = sizes_of(call.op, call.input_specs)
    return 8.0 + min(_cycles(sizes, variant, device) for variant in _variants(sizes)) / CYCLES_PER_US


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """The products, and the sum of the blocks' parts; `variant` forces one of `candidates`."""
    op, sizes = call.op, sizes_of(call.op, call.input_specs)
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is no filter gradient")
    chosen = variant or _ranked(sizes, device)[0]
    stages, pairs = next(_memory(sizes, chosen))
    x, dy, *routes = call.inputs
    blocks, row_size = _blocks(sizes, chosen, device), _row_size(op, sizes)
    problem = problem_of(op, sizes, chosen, blocks, pairs, _rows_held_twice(sizes))
    args: tuple[Argument, ...] = (x, dy, routes[0] if routes else None, call.workspace, problem)
    shared_bytes = _fixed_bytes(sizes, chosen, stages) + 2 * pairs * row_bytes(sizes, chosen)
    grid = (blocks, ceil(sizes.k / FILTERS), 1)
    kernel = _kernel(sizes.runs, rows_of(sizes), chosen.pixels, sizes.pool)
    threads = 384 if rows_of(sizes) * sizes.runs == 28 else 512  # one warpgroup that makes rows, or two
    return [
        Launch(kernel, grid, (threads, 1, 1), (*args, np.int32(stages), np.int32(row_size)), shared_bytes),
        sum_launch(call, blocks),
    ]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for conv_wgrad's sum."""
    for runs in RUNS:
        for rows in ROWS:
            yield from (_kernel(runs, rows, pixels, pool) for pixels in PIXELS for pool in (False, True))


def _kernel(runs: int, rows: int, pixels: int, pool: bool) -> Kernel:
    macros = (("RUNS", runs), ("ROWS", rows), ("PIXELS", pixels), ("POOL", int(pool)))
    return Kernel("conv_stem_sm90_wgrad.cu", "conv_stem_sm90_wgrad", macros)


def _rows_held_twice(sizes: Sizes) -> int:
    """Rows that the ring holds twice: an operand is of so many neighbours."""
    return rows_of(sizes) - 1


def _row_size(op: ConvWgrad, sizes: Sizes) -> int:
    """Floats of a block's sums: dw, then db."""
    return sizes.k * (sizes.r * sizes.run + op.bias)


def _blocks(sizes: Sizes, variant: Variant, device: Device) -> int:
    """That share the items."""
    return max(1, min(items_of(sizes, variant), device.sm_count // ceil(sizes.k / FILTERS)))


def _fixed_bytes(sizes: Sizes, variant: Variant, stages: int) -> int:
    """Of shared memory, without the ring but for its rows that are there twice."""
    errors = stages * 2 * 128 * variant.pixels
    return errors + _ZERO_BYTES + raw_bytes(sizes, variant) + _rows_held_twice(sizes) * row_bytes(sizes, variant)


def _memory(sizes: Sizes, variant: Variant) -> Iterator[tuple[int, int]]:
    """Stages of errors, and pairs of rows in the ring with room for two items of a strip; the best first."""
    for stages in STAGES:
        room = SHARED_BYTES - _fixed_bytes(sizes, variant, stages)
        pairs = min(MOST_PAIRS, room // (2 * row_bytes(sizes, variant)))
        if rows_apart(sizes, 2) <= 2 * pairs:
            yield stages, pairs


def _variants(sizes: Sizes) -> list[Variant]:
    return [variant for variant in tiles_of(sizes) if any(_memory(sizes, variant))]


def _ranked(sizes: Sizes, device: Device) -> list[Variant]:
    return sorted(_variants(sizes), key=lambda variant: _cycles(sizes, variant, device))


def _cycles(sizes: Sizes, variant: Variant, device: Device) -> float:
    """Estimated clock cycles, as an H200 was measured: of an item's rows and errors, and of its products."""
    blocks, groups = _blocks(sizes, variant, device), ceil(sizes.k / FILTERS)
    products = variant.pixels // 16 * 2 * 4 * sizes.runs * rows_of(sizes)
    item = (1680 if sizes.pool else 1230) + 1.1 * products
    return ceil(groups * blocks / device.sm_count) * ceil(items_of(sizes, variant) / blocks) * item
