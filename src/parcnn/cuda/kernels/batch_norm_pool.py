"""Launcher of batch_norm_pool_fprop.cu and batch_norm_pool_dgrad.cu: batch normalisation in training with the maximum behind
it, and its backward from the error and winners of that maximum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

import numpy as np

from parcnn.cuda.kernels import batch_norm
from parcnn.cuda.kernels.batch_norm import Geometry
from parcnn.cuda.kernels.common import ELEMENTS, fast_div, lanes_for, refuse_size, vector_width
from parcnn.cuda.kernels.pool import INDEX_BITS, window_of
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import ITEM_BYTES, PACKED, Op, Spec
from parcnn.ops.norm import BatchNormDgrad, BatchNormTrain
from parcnn.ops.pool import PoolWindow
from parcnn.ops.program import Call, Slot

OPS = (BatchNormTrain, BatchNormDgrad)

LINE_BYTES = 128  # of a block's channels, at most
SUM_THREADS, LEAST_SUM_THREADS, WRITE_THREADS = 512, 256, 256
TRAIN_BLOCKS_PER_SM, SUM_BLOCKS_PER_SM, DGRAD_BLOCKS_PER_SM = 2, 1, 3
# Channels of an access, at most, of the pass that writes dx: with fewer registers more blocks are resident, which that pass
# needs more than long accesses (256x112x112x64, bf16, H200: 257 us, of eight 280; the sums 165 and 136).
DGRAD_WIDEST = 4
SIDES = ((2, 2), (3, 3))  # of windows, forward
OUTPUTS = {2: 2, 3: 1}  # of a tile that a thread has, by that side
# Cells of a tile that a thread has, by their side.
SUM_CELLS = {1: 4, 2: 2}
DGRAD_CELLS = {"f32": {1: 2, 2: 1}, "bf16": {1: 4, 2: 2}}
# In the order of batch_norm_pool_dgrad.cu's macros.
DGRAD_ENTRIES = ("batch_norm_pool_gradients", "batch_norm_pool_dgrad")
# CELL and REACH: sides of a thread's cell, and windows along a side that cover it.
SINGLE_PIXELS, WINDOWS_APART, WINDOWS_OVERLAP = (1, 1), (2, 1), (2, 2)


gains = batch_norm.gains


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    if not isinstance(op, BatchNormTrain | BatchNormDgrad) or op.window is None:
        return "there must be a pool behind the norm"
    if op.window.kind != "max" or op.window.dilation != (1, 1) or _cell(op.window) is None:
        return f"windows must be of a maximum and apart, or 3x3 with strides of 2, not {op.window}"
    if isinstance(op, BatchNormTrain):
        tensors, parameters = inputs[:1], inputs[1:]
        if op.add:
            return "there must be no addend"
        if op.act not in (None, "relu"):
            return f"an activation must be ReLU, not {op.act}"
        if op.window.kernel not in SIDES:
            return f"windows must be 2x2 or 3x3, not {op.window.kernel}"
    else:
        tensors, parameters = inputs[:2], inputs[2:6]
        if op.act or op.sums:
            return "an activation must be the pool's, and the sums this call's own"
    x = tensors[-1]
    if x.dtype not in ELEMENTS or any(t.dtype != x.dtype for t in tensors) or any(t.dtype != "f32" for t in parameters):
        return f"tensors must be all {' or all '.join(ELEMENTS)}, parameters and statistics f32"
    if op.window.index_dtype(x.shape[3]) not in PACKED:
        return f"indices must share bytes: windows of at most 16 elements, channels in fours, not {x.shape[3]}"
    return refuse_size(x)


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """Two partial results a channel from each block that sums."""
    if isinstance(op, BatchNormTrain):
        return 0 if op.moments else batch_norm.partial_bytes(batch_norm.moments_geometry(inputs[0], device))
    if isinstance(op, BatchNormDgrad) and op.window:
        return batch_norm.partial_bytes(_sums(inputs[1], op.window, device))
    raise TypeError(op.name)


def launches(call: Call, device: Device) -> list[Launch]:
    """Two launches, of forward with moments one: sum, then merge and write."""
    if isinstance(call.op, BatchNormTrain) and call.op.window:
        return _train(call.op, call.op.window, call, device)
    if isinstance(call.op, BatchNormDgrad) and call.op.window:
        return _dgrad(call.op.window, call, device)
    raise TypeError(call.op.name)


def _train(op: BatchNormTrain, window: PoolWindow, call: Call, device: Device) -> list[Launch]:
    x, gamma, beta, running_mean, running_var, *moments = call.inputs
    y, idx, mean, rstd = call.outputs
    pixels = x.spec.size // x.spec.shape[3]
    write = _blocks(
        _geometry(y.spec, y.spec.shape[:3], WRITE_THREADS, OUTPUTS[window.kernel[0]]), TRAIN_BLOCKS_PER_SM, device
    )
    partial: Slot | None
    if moments:  # as if one block had left the partial results
        first, partial = [], moments[0]
        split = Struct((fast_div(1), np.int32(1), np.int32(pixels)))
    else:
        sums, partial = batch_norm.moments_geometry(x.spec, device), call.workspace
        split = sums.split
        first = [sums.launch("batch_norm_moments", x, partial, split, sums.shape)]
    statistics = Struct((running_mean, running_var, mean, rstd, np.float32(op.eps), np.float32(op.momentum)))
    grid = Struct((fast_div(y.spec.shape[2]), fast_div(y.spec.shape[1])))
    args: tuple[Argument, ...] = (
        x,
        gamma,
        beta,
        partial,
        y,
        idx,
        statistics,
        split,
        np.int32(pixels),
        write.shape,
        grid,
    )
    kernel = _train_kernel(write.dtype, write.width, window.kernel)
    return [*first, _launch(kernel, write, (*args, window_of(window, x.spec, y.spec, op.act)))]


def _dgrad(window: PoolWindow, call: Call, device: Device) -> list[Launch]:
    dy, x, gamma, _, mean, rstd, idx = call.inputs
    sums, write = _sums(x.spec, window, device), _write(x.spec, window, device)
    partials = batch_norm.partials(call.workspace, sums)
    cell_rows, cell_columns = _cells(x.spec, window)
    grid = Struct((fast_div(cell_columns), fast_div(cell_rows)))
    where = window_of(window, x.spec, dy.spec)
    pixels = np.int32(x.spec.size // x.spec.shape[3])
    sum_args: tuple[Argument, ...] = (dy, idx, x, mean, rstd, *partials, sums.shape, grid, where)
    write_args: tuple[Argument, ...] = (dy, idx, x, gamma, mean, rstd, *partials, *call.outputs)
    write_args += (np.int32(sums.row_blocks), pixels, write.shape, grid, where)
    return [
        _launch(_dgrad_kernel(entry, geometry.dtype, geometry.width, idx.spec.dtype, _cell(window)), geometry, args)
        for entry, geometry, args in zip(DGRAD_ENTRIES, (sums, write), (sum_args, write_args), strict=True)
    ]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name, but for batch_norm_moments."""
    for dtype, width in (("f32", 4), ("bf16", 8), ("bf16", 4)):
        for kernel in SIDES:
            yield _train_kernel(dtype, width, kernel)
        for entry in DGRAD_ENTRIES[: 1 if width > DGRAD_WIDEST else 2]:
            for cell in (SINGLE_PIXELS, WINDOWS_APART, WINDOWS_OVERLAP):
                for index in ("u4",) if cell == WINDOWS_OVERLAP else PACKED:
                    yield _dgrad_kernel(entry, dtype, width, index, cell)


def _train_kernel(dtype: str, width: int, window: tuple[int, int]) -> Kernel:
    bits = INDEX_BITS[PoolWindow(kernel=window).index_dtype(width)]
    macros = (("ELEMENT", ELEMENTS[dtype]), ("VEC", width), ("BITS", bits), ("SIDE", window[0]))
    return Kernel("batch_norm_pool_fprop.cu", "batch_norm_pool_train", macros)


def _dgrad_kernel(entry: str, dtype: str, width: int, index: str, cell: tuple[int, int] | None) -> Kernel:
    macros: list[tuple[str, int | str]] = [("ELEMENT", ELEMENTS[dtype]), ("VEC", width), ("BITS", INDEX_BITS[index])]
    side, reach = cell or SINGLE_PIXELS
    macros += [("CELL", side), ("REACH", reach), ("ENTRY", DGRAD_ENTRIES.index(entry))]
    return Kernel("batch_norm_pool_dgrad.cu", entry, tuple(macros))


def _launch(kernel: Kernel, geometry: Geometry, args: tuple[Argument, ...]) -> Launch:
    return Launch(kernel, (geometry.groups, geometry.row_blocks, 1), (geometry.threads, 1, 1), args)


def _cell(window: PoolWindow) -> tuple[int, int] | None:
    """CELL and REACH for a window; None where a pixel lies in more windows than a thread looks at."""
    if all(k <= s for k, s in zip(window.kernel, window.stride, strict=True)):
        return SINGLE_PIXELS if any(s % 2 for s in window.stride) else WINDOWS_APART
    return WINDOWS_OVERLAP if window.kernel == (3, 3) and window.stride == (2, 2) else None


def _side(window: PoolWindow) -> int:
    return (_cell(window) or SINGLE_PIXELS)[0]


def _cells(x: Spec, window: PoolWindow) -> tuple[int, int]:
    """Rows and columns of an image's cells, from where the padding starts."""
    side = _side(window)
    return -(-(x.shape[1] + window.pad[0]) // side), -(-(x.shape[2] + window.pad[1]) // side)


def _geometry(x: Spec, rows: tuple[int, ...], threads: int, unroll: int, widest: int = 8) -> Geometry:
    """A pass over images of so many cells or outputs, of which a thread has `unroll` in a tile."""
    channels = x.shape[3]
    width = min(widest, vector_width(channels, dtype=x.dtype))
    lanes_log2 = lanes_for(channels // width, LINE_BYTES // ITEM_BYTES[x.dtype] // width)
    return Geometry(prod(rows), channels, x.dtype, width, lanes_log2, threads, unroll)


def _sums(x: Spec, window: PoolWindow, device: Device) -> Geometry:
    """The pass that sums: blocks of fewer threads where they would leave multiprocessors idle."""
    cells = x.shape[0], *_cells(x, window)
    geometry = _geometry(x, cells, SUM_THREADS, SUM_CELLS[_side(window)])
    while geometry.threads > LEAST_SUM_THREADS and geometry.tiles * geometry.groups < device.sm_count:
        geometry = replace(geometry, threads=geometry.threads // 2)
    return _blocks(geometry, SUM_BLOCKS_PER_SM, device)


def _write(x: Spec, window: PoolWindow, device: Device) -> Geometry:
    """The pass that writes dx."""
    cells, unroll = (x.shape[0], *_cells(x, window)), DGRAD_CELLS[x.dtype][_side(window)]
    return _blocks(_geometry(x, cells, WRITE_THREADS, unroll, DGRAD_WIDEST), DGRAD_BLOCKS_PER_SM, device)


def _blocks(geometry: Geometry, blocks_per_sm: int, device: Device) -> Geometry:
    blocks = max(1, blocks_per_sm * device.sm_count // geometry.groups)
    return replace(geometry, row_blocks=min(geometry.tiles, blocks, batch_norm.MAX_GRID_Y))
