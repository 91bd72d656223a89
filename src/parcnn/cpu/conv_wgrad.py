"""Filter gradients: products of errors and columns, block by block, added in the blocks' order.

    dW (K, R*S*C) = error (M, K)^T @ columns (M, R*S*C)

The gradient at some channels of the filters needs no others of the images. Large filters are cut there: for the same memory
blocks then have more windows, and there are fewer products to add. Items, each some blocks of some channels, are dealt out
one a thread; when a wave of them is done, its products are added in the items' order, threads sharing the elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from parcnn.cpu.conv_error import routed_error
from parcnn.cpu.lowering import Block, Lowering, lowering
from parcnn.cpu.pool2x2 import error_scratch
from parcnn.cpu.sums import RowSums, add_in_order, row_sums_bytes
from parcnn.cpu.workers import ALIGNMENT, PIECE, Scratch, ScratchSize, Shape, Workspace, scratch_bytes
from parcnn.ops.conv import ConvGeometry

# Bytes of a block's product: half of what the block itself takes.
TERM_BYTES = 512 * 1024


def wgrad(
    low: Lowering,
    x: np.ndarray,
    dy: np.ndarray,
    packed: np.ndarray | None,
    dw: np.ndarray,
    db: np.ndarray | None,
    workspace: Workspace,
) -> None:
    """dw = dy^T @ columns, dy routed back through the pool first (by the indices in `packed`); db = sums of dy."""
    shared = workspace.shared
    if db is not None:
        rows = dy.reshape(-1, dy.shape[3])
        sums = RowSums(len(rows), dy.shape[3], 1, dy.dtype, workspace)
        db[...] = sums.total(lambda part, _: (rows[part],), pieces=64)[0]
        shared.rewind()
    plan = _plan(low, workspace.workers)
    x, dw = x.reshape(plan.image), dw.reshape(plan.filters)
    totals = [shared.take((size,), x.dtype) for size in plan.sizes]
    terms = dw.reshape(1, -1) if plan.alone else shared.take((plan.terms, plan.sizes[0]), x.dtype)

    def multiply(product: _Product, scratch: Scratch) -> None:
        part = product.low
        error = routed_error(part, dy, packed, product.block, part.products_transposed, scratch)
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


def scratch(low: Lowering, bias: bool, dtype: np.dtype, workers: int) -> ScratchSize:
    """What wgrad takes."""
    plan = _plan(low, workers)
    sums = [(size,) for size in plan.sizes] + [(plan.terms, plan.sizes[0])]
    own = 0
    for _, part in plan.parts:
        taken = part.taken_shape(workers)
        routed: list[tuple[Shape, np.dtype | type]] = []
        if low.geometry.pool:
            routed = [((prod(part.windows(taken)), part.outputs), dtype)]
            routed += error_scratch((*taken, part.q, part.filters[0]), dtype)
        own = max(own, scratch_bytes([*routed, *((shape, dtype) for shape in part.columns_scratch(taken))]))
    k = low.filters[0]
    ones = row_sums_bytes(low.image[0] * low.p * low.q, k, 1, dtype) if bias else 0
    return ScratchSize(max(scratch_bytes([(shape, dtype) for shape in sums]), ones), own)


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
class _Plan:
    """A filter gradient: its parts by channels, and in turn what is multiplied, one item a thread, and then added."""

    image: Shape
    filters: Shape
    parts: list[tuple[slice, Lowering]]
    sizes: list[int]  # elements of a part's product, in whole lines of the cache
    terms: int  # most at a time
    waves: list[tuple[list[_Product], list[_Addition]]]
    alone: bool  # one product is the gradient


@lru_cache(maxsize=4096)
def _plan(low: Lowering, workers: int) -> _Plan:
    """The filters cut by channels, so that a block's product has about TERM_BYTES; images cut by blocks."""
    if low.plain and low.p == low.q == 1:  # as filters of one pixel, those that cover the image can be cut
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
    return _Plan(low.image, low.filters, parts, sizes, terms, waves, alone)


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
