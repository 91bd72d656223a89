"""Filter gradients: products of errors and columns, block by block, added in the blocks' order.

    dW (K, R*S*C) = error (M, K)^T @ columns (M, R*S*C)

The gradient at some channels of the filters needs no others of the images. Large filters are cut there: for the same memory
blocks then have more windows, and there are fewer products to add. Items, each some blocks of some channels, are dealt out to
the threads; when a wave of them is done, its products are added in the items' order, threads sharing the elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from parcnn.cpu.conv_error import routed_error
from parcnn.cpu.lowering import Block, Lowering, lowering
from parcnn.cpu.pool2x2 import error_scratch
from parcnn.cpu.sums import MOST_ROWS, RowSums, add_in_order, row_sums_bytes
from parcnn.cpu.workers import ALIGNMENT, PIECE, Scratch, ScratchSize, Shape, Workspace, scratch_bytes
from parcnn.ops.conv import ConvGeometry

# Bytes of a block's product: half of what the block itself takes.
TERM_BYTES = 512 * 1024
# Bytes of products that several threads keep, at least one each, before they are added.
WAVE_BYTES = 32 * 1024 * 1024


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
        if len(rows) <= MOST_ROWS:
            np.add.reduce(rows, axis=0, out=db)
        else:
            sums = RowSums(len(rows), dy.shape[3], 1, dy.dtype, workspace)
            db[...] = sums.total(lambda part, _: (rows[part],), pieces=64)[0]
            shared.rewind()
    plan = _plan(low, workspace.workers)
    x, dw = x.reshape(plan.image), dw.reshape(plan.filters)
    terms = dw.reshape(1, -1) if plan.direct else shared.take((plan.terms, plan.sizes[0]), x.dtype)
    totals = list(terms) if plan.single else [shared.take((size,), x.dtype) for size in plan.sizes]

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

    def fold(i: int, scratch: Scratch) -> None:
        channels, part = plan.parts[i]
        part.fold_filters(totals[i][: part.outputs * part.depth], dw[..., channels])

    for products, additions in plan.waves:
        workspace.each(products, multiply)
        if not plan.single:
            workspace.each(additions, add)
    if not plan.direct:
        workspace.each(range(len(totals)), fold)


def scratch(low: Lowering, bias: bool, dtype: np.dtype, workers: int) -> ScratchSize:
    """What wgrad takes."""
    plan = _plan(low, workers)
    sums = [(size,) for size in plan.sizes] + [(plan.terms, plan.sizes[0])]
    own = 0
    for _, part in plan.parts:
        taken = part.taken_shape(plan.workers_a_part)
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
    """A filter gradient: its parts by channels, and in turn what is multiplied and then added."""

    image: Shape
    filters: Shape
    parts: list[tuple[slice, Lowering]]
    sizes: list[int]  # elements of a part's product, in whole lines of the cache
    workers_a_part: int
    terms: int  # most at a time
    waves: list[tuple[list[_Product], list[_Addition]]]
    single: bool  # there is one product for each part
    direct: bool  # ... and for all of the filters, whose gradient it is


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

    workers_a_part = max(2, -(-workers // len(parts))) if workers > 1 else 1
    items = [(i, block) for i, (_, part) in enumerate(parts) for block in part.blocks(workers_a_part)]
    item_bytes = sizes[0] * low.itemsize * max(parts[i][1].count(block) for i, block in items)
    a_wave = workers * max(1, WAVE_BYTES // (workers * item_bytes)) if workers > 1 else 1
    waves = []
    for start in range(0, len(items), a_wave):
        products: list[_Product] = []
        for i, block in items[start : start + a_wave]:
            channels, part = parts[i]
            used = products[-1].terms.stop if products else 0
            products.append(_Product(i, channels, part, block, slice(used, used + part.count(block))))
        waves.append((products, _additions(products, sizes)))
    terms = max(products[-1].terms.stop for products, _ in waves)
    single = len(waves) == 1 and terms == len(parts)
    direct = single and len(parts) == 1 and not low.pool_as_filters
    return _Plan(low.image, low.filters, parts, sizes, workers_a_part, terms, waves, single, direct)


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
