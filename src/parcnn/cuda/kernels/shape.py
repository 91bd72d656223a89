"""Launcher of the kernels that move elements: concatenation, channels fewer and more, both orders of a flattened image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, WORDS, fast_div, refuse_dtype, refuse_size, word_bytes
from parcnn.cuda.launch import Argument, Device, Kernel, Launch
from parcnn.ops.base import ITEM_BYTES, Op, Spec
from parcnn.ops.program import Call, Slot
from parcnn.ops.shape import Cat, ChannelPad, ChannelSlice, ToChannelsFirst, ToChannelsLast

OPS = (Cat, ChannelSlice, ChannelPad, ToChannelsFirst, ToChannelsLast)

THREADS = 256
TILE_SIDE = 32  # of a tile of a matrix that is large both ways
TILE_ELEMENTS = 2048
MAX_GRID_YZ = 65535

WARP = 32
ROW_BYTES = 16  # of a thread's square of elements
WARP_ROWS, WARP_COLS = 8, 4  # squares of a warp


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    outputs = op.infer(*inputs)
    reason = refuse_dtype(*inputs, among=tuple(ELEMENTS)) or refuse_size(*inputs, *outputs)
    if reason is None and isinstance(op, ToChannelsFirst | ToChannelsLast):
        rows, cols = _matrix(op, inputs[0], outputs[0])
        if _square_side(inputs[0].dtype, rows, cols):
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
    if isinstance(op, ChannelPad):
        return [_copy_channels(x, y, op.channels, 0, 0)]
    rows, cols = _matrix(op, x.spec, y.spec)
    side = _square_side(x.spec.dtype, rows, cols)
    args: tuple[Argument, ...]
    if side:
        row_tiles, col_tiles = -(-rows // (side * WARP_ROWS)), -(-cols // (side * WARP_COLS))
        tiles = x.spec.shape[0] * row_tiles * col_tiles
        args = (x, y, np.int32(tiles), np.int32(rows), np.int32(cols), fast_div(col_tiles), fast_div(row_tiles))
        kernel = _transpose_kernel("transpose_squares", x.spec.dtype)
        return [Launch(kernel, (-(-tiles * WARP // THREADS), 1, 1), (THREADS, 1, 1), args)]
    tile_rows, tile_cols = _tile(rows, cols)
    args = (x, y, np.int32(rows), np.int32(cols), fast_div(tile_rows), fast_div(tile_cols))
    grid = (x.spec.shape[0], -(-rows // tile_rows), -(-cols // tile_cols))
    return [Launch(_transpose_kernel("transpose", x.spec.dtype), grid, (THREADS, 1, 1), args)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    yield from (_copy_kernel(nbytes) for nbytes in WORDS)
    yield from (_transpose_kernel(entry, dtype) for entry in ("transpose", "transpose_squares") for dtype in ELEMENTS)


def _copy_kernel(nbytes: int) -> Kernel:
    return Kernel("shape.cu", "copy_channels", (("WORD", WORDS[nbytes]),))


def _transpose_kernel(entry: str, dtype: str) -> Kernel:
    return Kernel("shape.cu", entry, (("BITS", WORDS[ITEM_BYTES[dtype]]),))


def _copy_channels(x: Slot, y: Slot, channels: int, x_start: int, y_start: int) -> Launch:
    """Copy `channels` channels of every row, from channel x_start of x to channel y_start of y; zeros where x has no more."""
    x_channels = x.spec.shape[-1]
    runs = (channels, min(channels, x_channels - x_start), x_channels, x_start, y.spec.shape[-1], y_start)
    runs_bytes = [run * ITEM_BYTES[x.spec.dtype] for run in runs]
    nbytes = word_bytes(*runs_bytes)
    words, *places = (run // nbytes for run in runs_bytes)
    count = x.spec.size // x_channels * words
    args: tuple[Argument, ...] = (x, y, np.int32(count), fast_div(words), *(np.int32(v) for v in places))
    return Launch(_copy_kernel(nbytes), (-(-count // THREADS), 1, 1), (THREADS, 1, 1), args)


def _square_side(dtype: str, rows: int, cols: int) -> int:
    """Elements in a row of the squares that tile a matrix; 0 where none do."""
    side = ROW_BYTES // ITEM_BYTES[dtype]
    return 0 if rows % side or cols % side else side


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
