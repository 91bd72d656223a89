"""Launcher of conv_stem_sm90.cu: bf16 convolution forward of few channels on Hopper."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US
from parcnn.cuda.kernels.conv_stem import Sizes, sizes_of
from parcnn.cuda.kernels.conv_stem import supports as portable_supports
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct, TensorMap
from parcnn.cuda.tensormap import NBYTES
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvFprop
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop,)
FILTERS = 64  # of a block
START_US, PORTABLE_SCALE = 4.8, 1.6
PIXELS = (112, 128)  # output columns of a strip
RUNS = (1, 2, 3, 4)  # eights of a filter's row
ROWS = (3, 7)  # of a filter, for which registers are kept
MOST_PAIRS = 32  # of rows in the ring
RAW_STAGES = 8  # of two rows, as the image has them
SHARED_BYTES = 227 * 1024 - 2048  # a block's, on Hopper, but for barriers and the table of a strip's pixels


class Variant(NamedTuple):
    """Output columns of a strip, of which so many are of each image."""

    pixels: int
    columns: int

    @property
    def images(self) -> int:
        """Side by side in a strip."""
        return self.pixels // self.columns

    def __str__(self) -> str:
        return f"2x{self.columns}x{self.images}"


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernel runs the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop):
        return f"{op.name} is no forward convolution"
    if reason := portable_supports(op, inputs):
        return reason
    sizes = sizes_of(op, inputs)
    if sizes.r > max(ROWS) or not _variants(sizes):
        return (
            f"filters of {sizes.r} x {sizes.s} or what they read of an image do not fit in registers or shared memory"
        )
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """None is needed."""
    return 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    sizes = sizes_of(call.op, call.input_specs)
    return sorted(_variants(sizes), key=lambda variant: _cycles(sizes, variant, device))


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant, to the scale of conv_stem's, which on an H200 are that much too low.

    What comes once: filters to registers, and the first rows of an image, which go through shared memory twice.
    """
    sizes = sizes_of(call.op, call.input_specs)
    cycles = min(_cycles(sizes, variant, device) for variant in _variants(sizes))
    return START_US + cycles / (PORTABLE_SCALE * CYCLES_PER_US)


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, sizes = call.op, sizes_of(call.op, call.input_specs)
    if not isinstance(op, ConvFprop):
        raise TypeError(f"{op.name} is no forward convolution")
    if sizes.n * sizes.p == 0:
        return []
    chosen = variant or candidates(call, device)[0]
    groups = ceil(sizes.k / FILTERS)
    grid = (min(items_of(sizes, chosen), max(1, device.sm_count // groups)), groups, 1)
    x, w, *bias = call.inputs
    idx = call.outputs[1] if op.has_indices else None
    y = call.outputs[0]
    args: tuple[Argument, ...] = (x, w, bias[0] if op.bias else None, y, idx, _tiles(y, sizes, chosen))
    problem = problem_of(op, sizes, chosen, grid[0], _pairs_in_ring(sizes, chosen), _rows_held_twice(sizes))
    kernel = _kernel(sizes.runs, rows_of(sizes), chosen.pixels, sizes.pool)
    return [Launch(kernel, grid, (_threads(sizes, chosen), 1, 1), (*args, problem), _shared_bytes(sizes, chosen))]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    for runs in RUNS:
        for rows in ROWS:
            yield from (_kernel(runs, rows, pixels, pool) for pixels in PIXELS for pool in (False, True))


def _tiles(y: Slot, sizes: Sizes, variant: Variant) -> Argument:
    """How the copy engine writes y: 64 channels of a strip's row at a time. Channels that are no eights it cannot write."""
    n, p, q, k = y.spec.shape
    if k % 8:
        return bytes(NBYTES)
    columns = variant.columns // 2 if sizes.pool else variant.columns
    strides = (2 * k, 2 * k * q, 2 * k * q * p)
    return TensorMap(y, (k, q, p, n), strides, (FILTERS, columns, 1, variant.images), swizzle="128B")


def _kernel(runs: int, rows: int, pixels: int, pool: bool) -> Kernel:
    macros = (("RUNS", runs), ("ROWS", rows), ("PIXELS", pixels), ("POOL", int(pool)))
    return Kernel("conv_stem_sm90.cu", "conv_stem_sm90", macros)


def rows_of(sizes: Sizes) -> int:
    """Of a filter, as many as the kernel is compiled for."""
    return min(rows for rows in ROWS if rows >= sizes.r)


def _threads(sizes: Sizes, variant: Variant) -> int:
    """Of a block: two warpgroups make rows where registers allow, else one."""
    return 384 if variant.pixels == 128 or rows_of(sizes) * sizes.runs == 28 else 512


def _span(sizes: Sizes) -> int:
    """Rows of the image that two rows of outputs take, even: what they read, and what lies between them and the next two."""
    rows = max(sizes.stride[0] + (sizes.r - 1) * sizes.dilation_h + 1, 2 * sizes.stride[0])
    return rows + rows % 2


def _strip_rows(sizes: Sizes) -> int:
    """Items of a strip: two rows of outputs."""
    return ceil(sizes.p / 2)


def _across(sizes: Sizes, variant: Variant) -> int:
    """Strips along the width."""
    return ceil(sizes.q / variant.columns)


def items_of(sizes: Sizes, variant: Variant) -> int:
    """Of all strips."""
    return ceil(sizes.n / variant.images) * _across(sizes, variant) * _strip_rows(sizes)


def rows_apart(sizes: Sizes, items: int) -> int:
    """The most rows of the image that so many items of a strip take, one after the other."""
    advance, strips = 2 * sizes.stride[0], ceil(items / max(1, _strip_rows(sizes)))
    return strips * _span(sizes) + (items - strips) * advance


def _raw_row_bytes(sizes: Sizes, variant: Variant) -> int:
    """Of a row of an image's part of a strip, wherever in sixteen bytes it starts."""
    return 16 * ceil((14 + 2 * ((variant.columns - 1) * sizes.step + 8 * sizes.runs) + 4) / 16)


def raw_bytes(sizes: Sizes, variant: Variant) -> int:
    """Of the stages in which rows are as the image has them."""
    return RAW_STAGES * 2 * variant.images * _raw_row_bytes(sizes, variant)


def row_bytes(sizes: Sizes, variant: Variant) -> int:
    """Of a row in the ring."""
    return 16 * variant.pixels * sizes.runs


def tiles_of(sizes: Sizes) -> list[Variant]:
    """Strips of balanced widths, one of each that holds more than a narrower."""
    found: dict[tuple[int, int], Variant] = {}
    for pixels in PIXELS:
        columns = ceil(sizes.q / ceil(sizes.q / pixels))
        variant = Variant(pixels, columns + columns % 2)
        found.setdefault((variant.columns, variant.images), variant)
    return list(found.values())


def _rows_held_twice(sizes: Sizes) -> int:
    """Rows that the ring holds twice: operands of two rows may lie across its end."""
    return sizes.dilation_h if sizes.runs % 2 else 0


def _fixed_bytes(sizes: Sizes, variant: Variant) -> int:
    """Of shared memory, without the ring but for its rows that are there twice: two staged tiles, zeros, rows as they come."""
    staging_and_zeros = (2 * 128 + 16) * variant.pixels
    return staging_and_zeros + raw_bytes(sizes, variant) + _rows_held_twice(sizes) * row_bytes(sizes, variant)


def _pairs_in_ring(sizes: Sizes, variant: Variant) -> int:
    """Pairs of rows in the ring."""
    return min(MOST_PAIRS, (SHARED_BYTES - _fixed_bytes(sizes, variant)) // (2 * row_bytes(sizes, variant)))


def _shared_bytes(sizes: Sizes, variant: Variant) -> int:
    return _fixed_bytes(sizes, variant) + 2 * _pairs_in_ring(sizes, variant) * row_bytes(sizes, variant)


def _variants(sizes: Sizes) -> list[Variant]:
    """Those whose ring has room for three items of a strip, or two of two: so far apart the block's warpgroups may be."""
    rows = max(rows_apart(sizes, 3), 2 * _span(sizes), _rows_held_twice(sizes))
    return [variant for variant in tiles_of(sizes) if rows <= 2 * _pairs_in_ring(sizes, variant)]


def _cycles(sizes: Sizes, variant: Variant, device: Device) -> float:
    """Estimated clock cycles: an item's epilogue and rows, and its products.

    As an H200 was measured before the copy engine wrote y; since then it takes 0.70 to 0.90 of that.
    """
    groups = ceil(sizes.k / FILTERS)
    blocks = min(items_of(sizes, variant), max(1, device.sm_count // groups))
    item = (1770 if sizes.pool else 2070) + 0.92 * variant.pixels * ceil(rows_of(sizes) * sizes.runs / 2)
    return ceil(groups * blocks / device.sm_count) * ceil(items_of(sizes, variant) / blocks) * item


def problem_of(op: Op, sizes: Sizes, variant: Variant, blocks: int, pairs: int, twice: int) -> Struct:
    """`Problem` of conv_stem_sm90.cuh."""
    numbers = (
        sizes.n, sizes.h, sizes.w * sizes.c, sizes.k, sizes.p, sizes.q, sizes.run, sizes.r, sizes.step,
        sizes.pad[1] * sizes.c, sizes.stride[0], sizes.pad[0], sizes.dilation_h, variant.columns, variant.images,
        _raw_row_bytes(sizes, variant), pairs, twice, _span(sizes), *divmod(items_of(sizes, variant), blocks),
        act_code(op.act) if isinstance(op, ConvFprop) else 0,
    )  # fmt: skip
    last = sizes.run - 8 * (sizes.runs - 1)
    keep = (np.uint32(sum(0xFFFF << 16 * e for e in (0, 1) if 2 * i + e < last)) for i in range(4))
    one = (np.uint32(sum(0x3F80 << 16 * e for e in (0, 1) if 2 * i + e == last)) for i in range(4))
    divisors = (max(1, _strip_rows(sizes)), max(1, _across(sizes, variant)), variant.columns)
    return Struct((*(np.int32(v) for v in numbers), *keep, *one, *(fast_div(d) for d in divisors)))
