"""Launcher of the kernels that move elements: concatenation, channel slices, both orders of a flattened image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parcnn.cuda.kernels.common import fast_div, refuse_dtype, refuse_size, vector_width
from parcnn.cuda.launch import Argument, Device, Kernel, Launch
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call, Slot
from parcnn.ops.shape import Cat, ChannelSlice, ToChannelsFirst, ToChannelsLast

OPS = (Cat, ChannelSlice, ToChannelsFirst, ToChannelsLast)

THREADS = 256
TILE_SIDE = 32  # of a tile of a matrix that is large both ways
TILE_ELEMENTS = 2048
MAX_GRID_YZ = 65535

WARP = 32
WARP_ROWS, WARP_COLS = 32, 16  # of a warp of transpose4

_TRANSPOSE, _TRANSPOSE4 = Kernel("shape.cu", "transpose"), Kernel("shape.cu", "transpose4")


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    outputs = op.infer(*inputs)
    reason = refuse_dtype(*inputs) or refuse_size(*inputs, *outputs)
    if reason is None and isinstance(op, ToChannelsFirst | ToChannelsLast):
        rows, cols = _matrix(op, inputs[0], outputs[0])
        if vector_width(rows, cols) == 4:
            return None
        tiles = [-(-extent // tile) for extent, tile in zip((rows, cols), _tile(rows, cols), strict=True)]
        if max(tiles) > MAX_GRID_YZ:
            return f"an image of {rows} x {cols} elements needs more tiles than a grid has"
    return reason


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch; Cat: one an input."""
    op, y = call.op, call.outputs[0]
    if isinstance(op, Cat):
        starts = np.cumsum([0, *(x.spec.shape[-1] for x in call.inputs)])
        return [
            _copy_channels(x, y, x.spec.shape[-1], 0, int(start))
            for x, start in zip(call.inputs, starts[:-1], strict=True)
        ]
    x = call.inputs[0]
    if isinstance(op, ChannelSlice):
        return [_copy_channels(x, y, op.stop - op.start, op.start, 0)]
    rows, cols = _matrix(op, x.spec, y.spec)
    args: tuple[Argument, ...]
    if vector_width(rows, cols) == 4:
        row_tiles, col_tiles = -(-rows // WARP_ROWS), -(-cols // WARP_COLS)
        tiles = x.spec.shape[0] * row_tiles * col_tiles
        args = (x, y, np.int32(tiles), np.int32(rows), np.int32(cols), fast_div(col_tiles), fast_div(row_tiles))
        return [Launch(_TRANSPOSE4, (-(-tiles * WARP // THREADS), 1, 1), (THREADS, 1, 1), args)]
    tile_rows, tile_cols = _tile(rows, cols)
    args = (x, y, np.int32(rows), np.int32(cols), fast_div(tile_rows), fast_div(tile_cols))
    grid = (x.spec.shape[0], -(-rows // tile_rows), -(-cols // tile_cols))
    return [Launch(_TRANSPOSE, grid, (THREADS, 1, 1), args)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    return _copy_kernel(1), _copy_kernel(4), _TRANSPOSE, _TRANSPOSE4


def _copy_kernel(width: int) -> Kernel:
    return Kernel("shape.cu", "copy_channels", (("VEC", width),))


def _copy_channels(x: Slot, y: Slot, channels: int, x_start: int, y_start: int) -> Launch:
    """Copy `channels` channels of every row, from channel x_start of x to channel y_start of y."""
    x_stride, y_stride = x.spec.shape[-1], y.spec.shape[-1]
    width = vector_width(channels, x_stride, y_stride, x_start, y_start)
    count = x.spec.size // x_stride * channels // width
    sizes = (np.int32(v) for v in (x_stride, x_start, y_stride, y_start))
    args: tuple[Argument, ...] = (x, y, np.int32(count), fast_div(channels // width), *sizes)
    return Launch(_copy_kernel(width), (-(-count // THREADS), 1, 1), (THREADS, 1, 1), args)


def _matrix(op: Op, x: Spec, y: Spec) -> tuple[int, int]:
    """An image of the source as (rows, columns): (pixels, channels) towards channels first, else the other way."""
    _, h, w, c = x.shape if isinstance(op, ToChannelsFirst) else y.shape
    return (h * w, c) if isinstance(op, ToChannelsFirst) else (c, h * w)


def _tile(rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns of a tile: 32 x 32, or as long one way as the other, short one allows."""
    if cols < TILE_SIDE:
        return min(rows, TILE_ELEMENTS // (cols | 1)), cols
    if rows < TILE_SIDE:
        return rows, min(cols, TILE_ELEMENTS // rows)
    return TILE_SIDE, TILE_SIDE
