"""Launcher of batch_norm_pool.cu: backward of batch normalisation from the error and the winners of the maximum behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from parcnn.cuda.kernels import batch_norm
from parcnn.cuda.kernels.batch_norm import Geometry
from parcnn.cuda.kernels.common import ELEMENTS, fast_div, lanes_for, refuse_size, vector_width
from parcnn.cuda.kernels.pool import INDEX_BITS, window_of
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import ITEM_BYTES, PACKED, Op, Spec
from parcnn.ops.norm import BatchNormDgrad
from parcnn.ops.pool import PoolWindow
from parcnn.ops.program import Call

OPS = (BatchNormDgrad,)

LINE_BYTES = 128  # of a block's channels, at most
WORD_BYTES = 16  # of an access, at most
SUM_THREADS, LEAST_SUM_THREADS, WRITE_THREADS = 512, 256, 256
SUM_BLOCKS_PER_SM = {"f32": 1, "bf16": 1}
WRITE_BLOCKS_PER_SM = {"f32": 2, "bf16": 2}
PIXELS = 4  # of a tile that a thread has

# In the order of batch_norm_pool.cu's macros.
ENTRIES = ("batch_norm_pool_gradients", "batch_norm_pool_dgrad")
# CELL and REACH: sides of a thread's cell, and windows along a side that cover it.
SINGLE_PIXELS, WINDOWS_APART, WINDOWS_OVERLAP = (1, 1), (2, 1), (2, 2)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    if not isinstance(op, BatchNormDgrad) or op.window is None:
        return "the error must be that of a pool's outputs"
    if op.act:
        return "an activation must be the pool's"
    if op.window.kind != "max" or op.window.dilation != (1, 1) or _cell(op.window) is None:
        return f"windows must be of a maximum and apart, or 3x3 with strides of 2, not {op.window}"
    dy, x, *parameters = inputs[:6]
    if x.dtype not in ELEMENTS or dy.dtype != x.dtype or any(t.dtype != "f32" for t in parameters):
        return f"tensors must be all {' or all '.join(ELEMENTS)}, parameters and statistics f32"
    if op.window.index_dtype(x.shape[3]) not in PACKED:
        return f"indices must share bytes: windows of at most 16 elements, channels in fours, not {x.shape[3]}"
    return refuse_size(x)


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """Two partial results a channel from each block that sums."""
    if not isinstance(op, BatchNormDgrad) or op.window is None:
        raise TypeError(op.name)
    return batch_norm.partial_bytes(_sums(inputs[1], op.window, device))


def launches(call: Call, device: Device) -> list[Launch]:
    """Two launches: sum, then merge and write."""
    op = call.op
    if not isinstance(op, BatchNormDgrad) or op.window is None:
        raise TypeError(op.name)
    dy, x, gamma, _, mean, rstd, idx = call.inputs
    sums, write = _sums(x.spec, op.window, device), _write(x.spec, op.window, device)
    partials = batch_norm.partials(call.workspace, sums)
    cell_rows, cell_columns = _cells(x.spec, op.window)
    grid = Struct((fast_div(cell_columns), fast_div(cell_rows)))
    window = window_of(op.window, x.spec, dy.spec)
    pixels = np.int32(x.spec.size // x.spec.shape[3])
    sum_args: tuple[Argument, ...] = (dy, idx, x, mean, rstd, *partials, sums.shape, grid, window)
    write_args: tuple[Argument, ...] = (dy, idx, x, gamma, mean, rstd, *partials, *call.outputs)
    write_args += (np.int32(sums.row_blocks), pixels, write.shape, grid, window)
    return [
        _launch(ENTRIES[0], sums, idx.spec.dtype, op.window, sum_args),
        _launch(ENTRIES[1], write, idx.spec.dtype, op.window, write_args),
    ]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    for entry in ENTRIES:
        for dtype, width in (("f32", 4), ("bf16", 8), ("bf16", 4)):
            for cell in (SINGLE_PIXELS, WINDOWS_APART, WINDOWS_OVERLAP):
                for index in PACKED if cell == SINGLE_PIXELS else ("u4",) if cell == WINDOWS_OVERLAP else PACKED:
                    yield _kernel(entry, dtype, width, index, cell)


def _kernel(entry: str, dtype: str, width: int, index: str, cell: tuple[int, int]) -> Kernel:
    macros: list[tuple[str, int | str]] = [("ELEMENT", ELEMENTS[dtype]), ("VEC", width), ("BITS", INDEX_BITS[index])]
    macros += [("CELL", cell[0]), ("REACH", cell[1]), ("ENTRY", ENTRIES.index(entry))]
    return Kernel("batch_norm_pool.cu", entry, tuple(macros))


def _launch(entry: str, geometry: Geometry, index: str, window: PoolWindow, args: tuple[Argument, ...]) -> Launch:
    cell = _cell(window)
    if cell is None:
        raise ValueError(window)
    kernel = _kernel(entry, geometry.dtype, geometry.width, index, cell)
    return Launch(kernel, (geometry.groups, geometry.row_blocks, 1), (geometry.threads, 1, 1), args)


def _cell(window: PoolWindow) -> tuple[int, int] | None:
    """CELL and REACH for a window; None where a pixel lies in more windows than a thread looks at."""
    if all(k <= s for k, s in zip(window.kernel, window.stride, strict=True)):
        return SINGLE_PIXELS if any(s % 2 for s in window.stride) else WINDOWS_APART
    return WINDOWS_OVERLAP if window.kernel == (3, 3) and window.stride == (2, 2) else None


def _cells(x: Spec, window: PoolWindow) -> tuple[int, int]:
    """Rows and columns of an image's cells, from where the padding starts."""
    side, _ = _cell(window) or SINGLE_PIXELS
    return -(-(x.shape[1] + window.pad[0]) // side), -(-(x.shape[2] + window.pad[1]) // side)


def _geometry(x: Spec, window: PoolWindow, threads: int) -> Geometry:
    """A pass over cells."""
    channels = x.shape[3]
    width = vector_width(channels, dtype=x.dtype)
    lanes_log2 = lanes_for(channels // width, LINE_BYTES // ITEM_BYTES[x.dtype] // width)
    side, _ = _cell(window) or SINGLE_PIXELS
    rows, columns = _cells(x, window)
    return Geometry(x.shape[0] * rows * columns, channels, x.dtype, width, lanes_log2, threads, PIXELS // side**2)


def _sums(x: Spec, window: PoolWindow, device: Device) -> Geometry:
    """The pass that sums: blocks of fewer threads where they would leave multiprocessors idle."""
    geometry = _geometry(x, window, SUM_THREADS)
    while geometry.threads > LEAST_SUM_THREADS and geometry.tiles * geometry.groups < device.sm_count:
        geometry = replace(geometry, threads=geometry.threads // 2)
    return _blocks(geometry, SUM_BLOCKS_PER_SM, device)


def _write(x: Spec, window: PoolWindow, device: Device) -> Geometry:
    """The pass that writes."""
    return _blocks(_geometry(x, window, WRITE_THREADS), WRITE_BLOCKS_PER_SM, device)


def _blocks(geometry: Geometry, blocks_per_sm: Mapping[str, int], device: Device) -> Geometry:
    blocks = max(1, blocks_per_sm[geometry.dtype] * device.sm_count // geometry.groups)
    return replace(geometry, row_blocks=min(geometry.tiles, blocks, batch_norm.MAX_GRID_Y))
