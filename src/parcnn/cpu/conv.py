"""Convolution: im2col and BLAS, block by block, with its epilogue while the block is in cache.

The tensor before the pool exists for one block only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import cast

import numpy as np

from parcnn.cpu import conv_grouped
from parcnn.cpu.conv_epilogue import dgrad_epilogue
from parcnn.cpu.lowering import Block, Lowering, lowering
from parcnn.cpu.pointwise import activate
from parcnn.cpu.pool2x2 import avg_pool, error_scratch, max_pool, max_scratch, route_error
from parcnn.cpu.sums import RowSums, add_in_order, row_sums_bytes
from parcnn.cpu.workers import ALIGNMENT, PIECE, Scratch, ScratchSize, Shape, Workspace, scratch_bytes
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad

Arrays = list[tuple[Shape, np.dtype | type]]

# Bytes of a block's product that are added to those of other blocks, in filter gradients: half of a block.
TERM_BYTES = 512 * 1024


def conv_fprop(op: ConvFprop, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """y = pool(act(columns @ filters^T + bias)); with max-pooling the winners' indices too."""
    x, w = inputs[:2]
    y = outputs[0]
    low = lowering(_geometry(op), x.shape, w.shape, x.itemsize)
    workspace.shared.rewind()
    if op.groups > 1:
        conv_grouped.fprop(op, low, x, w, inputs[2] if op.bias else None, y, workspace)
        return
    filters = low.filter_matrix(w, workspace.shared)
    bias = (np.tile(inputs[2], 4) if low.pool_as_filters else inputs[2]) if op.bias else None
    transposed = low.products_transposed
    direct = not op.pool and not transposed

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
        if op.act:
            activate(op.act, product, product)
        if op.pool:
            candidates = low.candidates(product, part.shape, transposed)
            if op.pool == "max":
                max_pool(candidates, out, outputs[1][part.images, part.rows], transposed, scratch)
            else:
                avg_pool(candidates, out)
        elif transposed:
            np.copyto(out.reshape(m, low.outputs), product.T)

    workspace.each(low.blocks(workspace.workers), block)


def conv_dgrad(op: ConvDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """dx = (col2im(dy @ filters) + addend) * act'(saved), dy routed back through the pool first.

    The product is taken for `taps` of the filter apart: neighbours in a filter's row whose pixels lie between those of the
    next window. What a tap adds to an image's row is then one run of memory.
    """
    operands = cast(dict[str, np.ndarray], op.operands(tuple(inputs)))
    dy, w, packed = operands["dy"], operands["w"], operands.get("idx")
    dx = outputs[0]
    low = lowering(_geometry(op), dx.shape, w.shape, dx.itemsize)
    workspace.shared.rewind()
    if op.groups > 1:
        conv_grouped.dgrad(op, low, operands, dx, workspace)
        return
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
            error = _error(low, dy, packed, block, False, scratch)
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


def conv_wgrad(op: ConvWgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """dw = dy^T @ columns, dy routed back through the pool first; db = sums of dy. Products of blocks are added in order.

    The gradient at some channels of the filters needs no others of the images. Large filters are cut there: blocks then
    have more windows, and there is less to add.
    """
    x, dy = inputs[:2]
    packed = inputs[2] if op.pool == "max" else None
    dw = outputs[0]
    low = lowering(_geometry(op), x.shape, dw.shape, x.itemsize)
    shared = workspace.shared
    shared.rewind()
    if op.groups > 1:
        conv_grouped.wgrad(op, low, x, dy, dw, outputs[1] if op.bias else None, workspace)
        return
    if op.bias:
        rows = dy.reshape(-1, dy.shape[3])
        sums = RowSums(len(rows), dy.shape[3], 1, dy.dtype, workspace)
        outputs[1][...] = sums.total(lambda part, _: (rows[part],), pieces=64)[0]
        shared.rewind()
    plan = _wgrad_plan(low, workspace.workers)
    x, dw = x.reshape(plan.image), dw.reshape(plan.filters)
    totals = [shared.take((size,), x.dtype) for size in plan.sizes]
    terms = dw.reshape(1, -1) if plan.alone else shared.take((plan.terms, plan.sizes[0]), x.dtype)

    def multiply(product: _Product, scratch: Scratch) -> None:
        part = product.low
        error = _error(part, dy, packed, product.block, part.products_transposed, scratch)
        columns = part.columns(x[..., product.channels], product.block, scratch)
        own = terms[product.terms, : part.outputs * part.depth].reshape(-1, part.outputs, part.depth)
        for left, right in part.stacks(error, columns):
            np.matmul(left.transpose(0, 2, 1), right, out=own[: len(left)])
            own = own[len(left) :]

    def add(task: _Addition, scratch: Scratch) -> None:
        add_in_order(totals[task.part][task.elements], terms[task.terms, task.elements], task.first)

    for products, additions in plan.waves:
        workspace.each(products, multiply)
        workspace.each(additions, add)
    if not plan.alone:
        for (channels, part), total in zip(plan.parts, totals, strict=True):
            part.fold_filters(total[: part.outputs * part.depth], dw[..., channels])


@dataclass(frozen=True)
class _Product:
    """What a thread multiplies in one go, for some channels of the filters, and the terms of their sum that it gives."""

    part: int
    channels: slice
    low: Lowering
    block: Block
    terms: slice


@dataclass(frozen=True)
class _Addition:
    """Terms to add to some elements of a part's sum; `first`: to nothing yet."""

    part: int
    elements: slice
    terms: slice
    first: bool


@dataclass(frozen=True)
class _WgradPlan:
    """A filter gradient: its parts by channels, and in turn what is multiplied, one item a thread, and then added."""

    image: Shape
    filters: Shape
    parts: list[tuple[slice, Lowering]]
    sizes: list[int]  # elements of a part's product, in whole lines of the cache
    terms: int  # most at a time
    waves: list[tuple[list[_Product], list[_Addition]]]
    alone: bool  # one product is the gradient


@lru_cache(maxsize=4096)
def _wgrad_plan(low: Lowering, workers: int) -> _WgradPlan:
    """The filters cut by channels, so that a block's product has about TERM_BYTES; images cut by blocks."""
    if (
        low.plain and low.p == low.q == 1
    ):  # filters that cover the image: as filters of one pixel their depth can be cut
        (n, *_), (k, *_) = low.image, low.filters
        low = lowering(ConvGeometry(), (n, 1, 1, low.depth), (k, 1, 1, low.depth), low.itemsize)
    (n, h, w, c), (k, r, s, _) = low.image, low.filters
    most = max(1, TERM_BYTES // (low.outputs * low.r * low.s * low.itemsize))
    step = -(-c // -(-c // most))
    parts: list[tuple[slice, Lowering]] = []
    for start in range(0, c, step):
        some = min(step, c - start)
        part = lowering(low.geometry, (n, h, w, some), (k, r, s, some), low.itemsize)
        parts.append((slice(start, start + some), part))
    line = ALIGNMENT // low.itemsize
    sizes = [-(-part.outputs * part.depth // line) * line for _, part in parts]

    items = [(i, block) for i, (_, part) in enumerate(parts) for block in part.blocks(workers)]
    waves = []
    for start in range(0, len(items), workers):
        products: list[_Product] = []
        for i, block in items[start : start + workers]:
            channels, part = parts[i]
            used = products[-1].terms.stop if products else 0
            products.append(_Product(i, channels, part, block, slice(used, used + part.count(block))))
        waves.append((products, _additions(products, sizes)))
    terms = max(products[-1].terms.stop for products, _ in waves)
    alone = terms == len(waves) == 1 and not low.pool_as_filters
    if alone:
        waves = [(waves[0][0], [])]
    return _WgradPlan(low.image, low.filters, parts, sizes, terms, waves, alone)


def _additions(products: list[_Product], sizes: list[int]) -> list[_Addition]:
    """The sums of a wave's products, cut in pieces that threads share."""
    additions = []
    for i in sorted({product.part for product in products}):
        own = [product for product in products if product.part == i]
        terms = slice(own[0].terms.start, own[-1].terms.stop)
        first = own[0].block.images.start == own[0].block.rows.start == 0
        for start in range(0, sizes[i], PIECE):
            additions.append(_Addition(i, slice(start, min(start + PIECE, sizes[i])), terms, first))
    return additions


def kernel_name(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> str:
    """How the convolution is run, for tables."""
    low = _lowering_of(op, inputs, outputs)
    if isinstance(op, ConvGeometry) and op.groups > 1:
        return conv_grouped.kernel_name(low.filters)
    if low.plain:
        return "numpy gemm"
    return "numpy im2col+gemm" + (" pool as filters" if low.pool_as_filters else "")


def _geometry(op: ConvGeometry) -> ConvGeometry:
    """The attributes that decide the lowering, alike for fprop, dgrad and wgrad."""
    return ConvGeometry(op.stride, op.pad, op.dilation, op.pool)


def _mirrored(low: Lowering) -> Lowering | None:
    """The forward convolution that gives dx from dy, where there is one and it copies less than col2im would add."""
    g = low.geometry
    (n, _, _, c), (k, r, s, _) = low.image, low.filters
    rows, columns = g.dilation[0] * (r - 1), g.dilation[1] * (s - 1)
    pad = (rows - g.pad[0], columns - g.pad[1], rows - g.pad[2], columns - g.pad[3])
    if low.plain or g.pool or g.stride != (1, 1) or min(pad) < 0 or k > 2 * c:
        return None
    return lowering(ConvGeometry(pad=pad, dilation=g.dilation), (n, low.p, low.q, k), (c, r, s, k), low.itemsize)


def _error(
    low: Lowering, dy: np.ndarray, packed: np.ndarray | None, block: Block, transposed: bool, scratch: Scratch
) -> np.ndarray:
    """The error at the convolution's own outputs, (M, outputs)."""
    here = dy[block.images, block.rows]
    if not low.geometry.pool:
        return here.reshape(-1, low.outputs)
    m = prod(low.windows(block.shape))
    error = scratch.take((low.outputs, m) if transposed else (m, low.outputs), dy.dtype)
    indices = None if packed is None else packed[block.images, block.rows]
    route_error(here, indices, low.candidates(error, block.shape, transposed), transposed, scratch)
    return error.T if transposed else error


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
    return lowering(_geometry(op), x.shape, w.shape, _dtype(x).itemsize)


def _dtype(spec: Spec) -> np.dtype:
    return np.dtype(np.float64 if spec.dtype == "f64" else np.float32)


def _wgrad_scratch(op: ConvWgrad, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    low = _lowering_of(op, inputs, outputs)
    dtype = _dtype(inputs[0])
    if op.groups > 1:
        return conv_grouped.scratch(op, low, dtype)
    plan = _wgrad_plan(low, workers)
    sums: Arrays = [((size,), dtype) for size in plan.sizes] + [((plan.terms, plan.sizes[0]), dtype)]
    own = 0
    for _, part in plan.parts:
        taken = part.taken_shape(workers)
        columns: Arrays = [(shape, dtype) for shape in part.columns_scratch(taken)]
        routed: Arrays = []
        if op.pool:
            routed = [((prod(part.windows(taken)), part.outputs), dtype)]
            routed += error_scratch((*taken, part.q, part.filters[0]), dtype)
        own = max(own, scratch_bytes([*routed, *columns]))
    dy = inputs[1]
    bias = row_sums_bytes(dy.size // dy.shape[3], dy.shape[3], 1, dtype) if op.bias else 0
    return ScratchSize(max(scratch_bytes(sums), bias), own)


def _scratch(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    low = _lowering_of(op, inputs, outputs)
    dtype = _dtype(inputs[0])
    if isinstance(op, ConvGeometry) and op.groups > 1:
        return conv_grouped.scratch(op, low, dtype)
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


RUN = {ConvFprop: conv_fprop, ConvDgrad: conv_dgrad, ConvWgrad: conv_wgrad}
SCRATCH = {ConvFprop: _scratch, ConvDgrad: _scratch, ConvWgrad: _wgrad_scratch}
