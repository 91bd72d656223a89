"""Convolution: im2col and BLAS, block by block, with its epilogue while the block is in cache.

The tensor before the pool exists for one block only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import cast

import numpy as np

from parcnn.cpu import conv_grouped, conv_wgrad, norm
from parcnn.cpu.conv_error import dgrad_epilogue, routed_error
from parcnn.cpu.lowering import Block, Lowering, lowering
from parcnn.cpu.pointwise import activate
from parcnn.cpu.pool import pool_fprop, pool_scratch
from parcnn.cpu.pool2x2 import avg_pool, error_scratch, max_pool, max_scratch
from parcnn.cpu.workers import Scratch, ScratchSize, Shape, Workspace, scratch_bytes
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.pool import PoolFprop, PoolWindow

Arrays = list[tuple[Shape, np.dtype | type]]


def conv_fprop(op: ConvFprop, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """y = pool(act(columns @ filters^T + bias [+ addend])); of a maximum the winners' indices too, and y's moments if asked."""
    _convolve(op, inputs, outputs, workspace)
    if op.moments:
        y, (mean, squares) = outputs[0], outputs[-1]
        squares[...] = norm.moments(y.reshape(-1, y.shape[-1]), mean, workspace)


def _convolve(op: ConvFprop, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    if op.window is not None:
        _fprop_then_pool(op, op.window, inputs, outputs, workspace)
        return
    x, w = inputs[:2]
    y = outputs[0]
    low = _lower(op, x.shape, w.shape, x.itemsize)
    workspace.shared.rewind()
    if op.groups > 1:
        conv_grouped.fprop(op, low, x, w, inputs[2] if op.bias else None, y, workspace)
        return
    _by_columns(op, low, inputs, outputs, workspace)
    if low.pool_as_filters and y.size and np.isnan(y.max()):
        _by_columns(
            op, low.apart, inputs, outputs, workspace.elsewhere(_sizes(op, low.apart, x.dtype, workspace.workers))
        )


def _by_columns(
    op: ConvFprop, low: Lowering, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    x, w = inputs[:2]
    y = outputs[0]
    filters = low.filter_matrix(w, workspace.shared)
    bias = (np.tile(inputs[2], 4) if low.pool_as_filters else inputs[2]) if op.bias else None
    transposed = low.products_transposed
    direct = not (op.pool or op.add or transposed)

    def block(part: Block, scratch: Scratch) -> None:
        columns = low.columns(x, part, scratch)
        out = y[part.images, part.rows]
        m = columns.shape[0]
        if direct:
            product = out.reshape(m, low.outputs)
        else:
            product = scratch.take((low.outputs, m) if transposed else (m, low.outputs), x.dtype)
        for rows, result in low.stacks(columns, product.T if transposed else product):
            np.matmul(rows, filters.T, out=result)
        if bias is not None:
            product += bias[:, None] if transposed else bias
        if op.add:
            added = inputs[-1][part.images, part.rows].reshape(m, low.outputs)
            product += added.T if transposed else added
        if op.keep:
            before = outputs[-1][part.images, part.rows].reshape(m, low.outputs)
            np.copyto(before, product.T if transposed else product)
        if op.act:
            activate(op.act, product, product)
        if op.pool:
            candidates = low.candidates(product, part.shape, transposed)
            if op.pool == "max":
                packed = outputs[1][part.images, part.rows] if op.has_indices else None
                max_pool(candidates, out, packed, transposed, scratch)
            else:
                avg_pool(candidates, out)
        elif not direct:
            np.copyto(out.reshape(m, low.outputs), product.T if transposed else product)

    workspace.each(low.blocks(workspace.workers), block)


def _fprop_then_pool(
    op: ConvFprop, window: PoolWindow, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """The convolution's outputs in scratch memory, then a pool of another window than 2x2."""
    conv, pool, between = _apart(op, window, inputs[0].shape, inputs[1].shape)
    workspace.shared.rewind()
    before = workspace.shared.take(between, inputs[0].dtype)
    inner = workspace.within(workspace.shared.used)
    conv_fprop(conv, inputs, [before], inner)
    pool_fprop(pool, [before], outputs, inner)


def _apart(op: ConvFprop, window: PoolWindow, x: Shape, w: Shape) -> tuple[ConvFprop, PoolFprop, Shape]:
    """Convolution and pool as ops of their own, and the shape of what is between them."""
    between = (x[0], *op.output_hw(*x[1:3], *w[1:3]), w[0])
    return replace(op, pool=None, window=None, moments=False), PoolFprop(**window.__dict__), between


def conv_dgrad(op: ConvDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """dx = (dgrad + addend) * act'(what is below); with a batch norm there, also its sums, by a pass over dx."""
    if not op.sums:
        _dgrad(op, inputs, outputs[0], workspace)
        return
    operands = cast(dict[str, np.ndarray], op.operands(tuple(inputs)))
    below = [operands.pop(name) for name in ("x", "gamma", "beta", "mean", "rstd")]
    _dgrad(replace(op, act=None, sums=False), list(operands.values()), outputs[0], workspace)
    norm.pass_error(op.act, outputs[0], below, outputs[1:], workspace)


def _dgrad(op: ConvDgrad, inputs: list[np.ndarray], dx: np.ndarray, workspace: Workspace) -> None:
    """dx = (col2im(dy @ filters) + addend) * act'(saved), dy routed back through the pool first.

    The product is taken for `taps` of the filter apart: neighbours in a filter's row whose pixels lie between those of the
    next window. What a tap adds to an image's row is then one run of memory.
    """
    operands = cast(dict[str, np.ndarray], op.operands(tuple(inputs)))
    dy, w, packed = operands["dy"], operands["w"], operands.get("idx")
    low = _lower(op, dx.shape, w.shape, dx.itemsize)
    workspace.shared.rewind()
    if op.groups > 1:
        conv_grouped.dgrad(op, low, operands, dx, workspace)
        return
    if low.pool_as_filters and dy.size and not np.isfinite([dy.min(), dy.max()]).all():
        low = low.apart
        workspace = workspace.elsewhere(_sizes(op, low, dx.dtype, workspace.workers))
    if (mirror := _mirrored(low)) is not None:
        _dgrad_by_fprop(op, mirror, operands, dx, workspace)
        return
    filters = low.filter_matrix(w, workspace.shared)
    epilogue = op.act is not None or op.add
    (_, h, width, c), (top, left, _, _) = dx.shape, op.pad
    if not low.plain:
        width_taps = _tap_width(low)
        taps = workspace.shared.take((low.r * low.s // width_taps, low.outputs, width_taps * c), w.dtype)
        np.copyto(taps, filters.reshape(low.outputs, len(taps), -1).transpose(1, 0, 2))

    def images(parts: list[Block], scratch: Scratch) -> None:
        part = parts[0].images
        here = dx[part]
        target = scratch.take(low.padded_image(len(here)), dx.dtype) if low.padded or epilogue else here
        if not low.plain:
            target.fill(0)
        start = scratch.used
        for block in parts:
            scratch.rewind(start)
            error = routed_error(low, dy, packed, block, False, scratch)
            if low.plain:
                pixels = target[:, slice(None) if low.p == 1 else block.rows].reshape(-1, low.depth)
                for rows, result in low.stacks(error, pixels):
                    np.matmul(rows, filters, out=result)
            else:
                _col2im(low, error, taps, block, target, scratch)
        inside = target[:, top : top + h, left : left + width] if low.padded else target
        if target is not here:
            dgrad_epilogue(op, operands, inside, (part,), here)

    workspace.each(low.blocks_by_images(workspace.workers), images)


def _dgrad_by_fprop(
    op: ConvDgrad, mirror: Lowering, operands: dict[str, np.ndarray], dx: np.ndarray, workspace: Workspace
) -> None:
    """dx as the convolution of dy with the filters mirrored: copies in place of col2im's sums (84 against 61 GFLOP/s)."""
    dy, w = operands["dy"], operands["w"]
    filters = workspace.shared.take(mirror.filters, w.dtype)
    np.copyto(filters, w[:, ::-1, ::-1].transpose(3, 1, 2, 0))
    matrix = filters.reshape(mirror.outputs, mirror.depth)

    def block(part: Block, scratch: Scratch) -> None:
        here = dx[part.images, part.rows]
        columns = mirror.columns(dy, part, scratch)
        alone = not op.act and not op.add
        target = here if alone else scratch.take(here.shape, dx.dtype)
        for rows, result in mirror.stacks(columns, target.reshape(-1, mirror.outputs)):
            np.matmul(rows, matrix.T, out=result)
        if not alone:
            dgrad_epilogue(op, operands, target, (part.images, part.rows), here)

    workspace.each(mirror.blocks(workspace.workers), block)


def filter_gradient(op: ConvWgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """dw = dy^T @ columns, dy routed back through the pool first; db = sums of dy."""
    x, dy = inputs[:2]
    packed = inputs[2] if op.pool == "max" else None
    dw, db = outputs[0], outputs[1] if op.bias else None
    low = _lower(op, x.shape, dw.shape, x.itemsize)
    workspace.shared.rewind()
    if op.groups > 1:
        conv_grouped.wgrad(op, low, x, dy, dw, db, workspace)
    else:
        conv_wgrad.wgrad(low, x, dy, packed, dw, db, workspace)


def kernel_name(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> str:
    """How the convolution is run, for tables."""
    low = _lowering_of(op, inputs, outputs)
    if isinstance(op, ConvGeometry) and op.groups > 1:
        return conv_grouped.kernel_name(low.filters)
    if low.plain:
        return "numpy gemm"
    return "numpy im2col+gemm" + (" pool as filters" if low.pool_as_filters else "")


def time_us(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> float:
    """About how long the convolution takes one thread."""
    low = _lowering_of(op, inputs, outputs)
    return low.time_us / (op.groups if isinstance(op, ConvGeometry) else 1)


@lru_cache(maxsize=4096)
def _lower(op: ConvGeometry, image: Shape, filters: Shape, itemsize: int) -> Lowering:
    """The lowering of an op, alike for fprop, dgrad and wgrad."""
    return lowering(ConvGeometry(op.stride, op.pad, op.dilation, op.pool), image, filters, itemsize)


def _mirrored(low: Lowering) -> Lowering | None:
    """The forward convolution that gives dx from dy, where there is one and it copies less than col2im would add."""
    g = low.geometry
    (n, _, _, c), (k, r, s, _) = low.image, low.filters
    rows, columns = g.dilation[0] * (r - 1), g.dilation[1] * (s - 1)
    pad = (rows - g.pad[0], columns - g.pad[1], rows - g.pad[2], columns - g.pad[3])
    if low.plain or g.pool or g.stride != (1, 1) or min(pad) < 0 or k > 2 * c:
        return None
    return lowering(ConvGeometry(pad=pad, dilation=g.dilation), (n, low.p, low.q, k), (c, r, s, k), low.itemsize)


def _col2im(
    low: Lowering, error: np.ndarray, taps: np.ndarray, block: Block, target: np.ndarray, scratch: Scratch
) -> None:
    """Add error @ taps to the (padded) images at the windows' places."""
    n, p, q = low.windows(block.shape)
    length = taps.shape[2]
    products = scratch.take((len(taps), n * p * q, length), error.dtype)
    for rows, result in low.stacks(error, products.transpose(1, 0, 2)):
        np.matmul(rows[:, None], taps, out=result.transpose(0, 2, 1, 3))
    products = products.reshape(len(taps), n, p, q, length)
    sn, sh, sw, sc = target.strides
    first = block.rows.start * low.windows_per_output * low.stride[0]
    per_row = len(taps) // low.r
    step, dilation = low.s // per_row, low.geometry.dilation
    strides = (sn, sh * low.stride[0], sw * low.stride[1], sc)
    for i, product in enumerate(products):
        row, column = first + i // per_row * dilation[0], i % per_row * step * dilation[1]
        windows = np.ndarray((n, p, q, length), target.dtype, target, row * sh + column * sw, strides)
        windows += product


def _tap_width(low: Lowering) -> int:
    """Neighbours of a filter's row that are taken together: as many as the stride, where it divides the row."""
    stride = low.stride[1]
    return stride if low.geometry.dilation[1] == 1 and low.s % stride == 0 else 1


def _lowering_of(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> Lowering:
    if not isinstance(op, ConvGeometry):
        raise TypeError(f"{op.name} is no convolution")
    x = outputs[0] if isinstance(op, ConvDgrad) else inputs[0]
    w = outputs[0] if isinstance(op, ConvWgrad) else inputs[1]
    if isinstance(op, ConvFprop) and op.window is not None:
        op = replace(op, pool=None, window=None)
    return _lower(op, x.shape, w.shape, _dtype(x).itemsize)


def _dtype(spec: Spec) -> np.dtype:
    return np.dtype(np.float64 if spec.dtype == "f64" else np.float32)


def _scratch(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    low = _lowering_of(op, inputs, outputs)
    dtype = _dtype(inputs[0])
    if isinstance(op, ConvFprop) and op.window is not None:
        conv, pool, shape = _apart(op, op.window, inputs[0].shape, inputs[1].shape)
        between = Spec(shape, inputs[0].dtype)
        parts = [_scratch(conv, inputs, (between,), workers), pool_scratch(pool, (between,), outputs, workers)]
        own = scratch_bytes([(shape, dtype)])
        return ScratchSize(own + max(part.shared for part in parts), max(part.per_worker for part in parts))
    if isinstance(op, ConvGeometry) and op.groups > 1:
        return conv_grouped.scratch(op, low, dtype)
    if isinstance(op, ConvWgrad):
        return conv_wgrad.scratch(low, op.bias, dtype, workers)
    return _sizes(op, low, dtype, workers)


def _sizes(op: Op, low: Lowering, dtype: np.dtype, workers: int) -> ScratchSize:
    """Of fprop and dgrad without groups."""
    n, rows = low.taken_shape(workers)
    m = prod(low.windows((n, rows)))
    pooled = (n, rows, low.q, low.filters[0])
    columns: Arrays = [(shape, dtype) for shape in low.columns_scratch((n, rows))]
    product: Arrays = [((m, low.outputs), dtype)]
    filters: Arrays = [((low.outputs, low.depth), dtype)] * low.pool_as_filters
    if isinstance(op, ConvFprop):
        epilogue = max_scratch(pooled, dtype) if op.pool == "max" else []
        return ScratchSize(scratch_bytes(filters), scratch_bytes([*columns, *product, *epilogue]))
    routed: Arrays = [*product, *error_scratch(pooled, dtype)] if low.geometry.pool else []
    if (mirror := _mirrored(low)) is not None:
        n, rows = mirror.taken_shape(workers)
        columns = [(shape, dtype) for shape in mirror.columns_scratch((n, rows))]
        columns.append(((n, rows, mirror.q, mirror.outputs), dtype))
        return ScratchSize(scratch_bytes([(mirror.filters, dtype)]), scratch_bytes(columns))
    taps: Arrays = [] if low.plain else [((low.outputs, low.depth), dtype)]
    target: Arrays = [(low.padded_image(n), dtype)]
    products: Arrays = [] if low.plain else [((m, low.depth), dtype)]
    return ScratchSize(scratch_bytes([*filters, *taps]), scratch_bytes([*target, *routed, *products]))


def _scratch_with_sums(
    op: ConvFprop | ConvDgrad, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int
) -> ScratchSize:
    """The convolution's, and after it that of the sums over what it writes."""
    own = _scratch(op, inputs, outputs, workers)
    count = int(op.moments) if isinstance(op, ConvFprop) else 2 * op.sums
    if not count:
        return own
    sums = norm.scratch_size(count)(op, inputs, outputs, workers)
    return ScratchSize(max(own.shared, sums.shared), max(own.per_worker, sums.per_worker))


TIME_US = {ConvFprop: time_us, ConvDgrad: time_us, ConvWgrad: time_us}
RUN = {ConvFprop: conv_fprop, ConvDgrad: conv_dgrad, ConvWgrad: filter_gradient}
SCRATCH = {ConvFprop: _scratch_with_sums, ConvDgrad: _scratch_with_sums, ConvWgrad: _scratch}
