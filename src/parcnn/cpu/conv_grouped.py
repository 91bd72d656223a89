"""Grouped convolution: im2col and a product a group. Of one channel a group (depthwise): a sum over the filter's taps.

    groups G > 1:   Y[g] (M, K/G) = columns[g] (M, R*S*C/G) @ filters[g]^T       for each group g, block by block
    depthwise:      y += window(r, s) * w[:, r, s]                               for each tap (r, s): no product is thin

Blocks, padding and windows are those of the convolution without groups (`lowering.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np

from parcnn.cpu.conv_error import dgrad_epilogue
from parcnn.cpu.lowering import Block, Lowering
from parcnn.cpu.pointwise import activate
from parcnn.cpu.workers import Scratch, ScratchSize, Shape, Workspace, scratch_bytes
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad

Taps = Iterator[tuple[np.ndarray, np.ndarray]]


def fprop(
    op: ConvFprop,
    low: Lowering,
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None,
    y: np.ndarray,
    workspace: Workspace,
) -> None:
    """y = act(x * w + b) of each group's channels."""
    depthwise = w.shape[3] == 1
    weights = _taps_first(op.groups, w, workspace.shared) if depthwise else _by_group(op.groups, w)

    def block(part: Block, scratch: Scratch) -> None:
        seen = low.receptive(*low.pixels(x, part, scratch), part)
        out = y[part.images, part.rows]
        if depthwise:
            sums = out.reshape(*seen.shape[:3], op.groups, -1)
            term = scratch.take(sums.shape, x.dtype)
            sums.fill(0)
            for window, tap in _taps(seen, weights):
                sums += np.multiply(window[..., None], tap, out=term)
        else:
            columns = _columns(op.groups, seen, scratch)
            shape = (*columns.shape[:2], weights.shape[1])
            product = np.matmul(columns, weights.transpose(0, 2, 1), out=scratch.take(shape, x.dtype))
            np.copyto(out.reshape(shape[1], op.groups, -1), product.transpose(1, 0, 2))
        if b is not None:
            out += b
        if op.act:
            activate(op.act, out, out)

    workspace.each(low.blocks(), block)


def dgrad(
    op: ConvDgrad, low: Lowering, operands: Mapping[str, np.ndarray], dx: np.ndarray, workspace: Workspace
) -> None:
    """dx = (each window's share of dy given back to its pixels + addend) * act'(saved)."""
    dy, w = operands["dy"], operands["w"]
    depthwise = w.shape[3] == 1
    weights = _taps_first(op.groups, w, workspace.shared) if depthwise else _by_group(op.groups, w)
    (_, h, width, _), (top, left, _, _) = dx.shape, op.pad

    def images(parts: list[Block], scratch: Scratch) -> None:
        part = parts[0].images
        here = dx[part]
        target = scratch.take(low.padded_image(len(here)), dx.dtype)
        target.fill(0)
        start = scratch.used
        for block in parts:
            scratch.rewind(start)
            seen = low.receptive(target, block.rows.start * low.stride[0], block)
            error = dy[block.images, block.rows].reshape(*seen.shape[:3], op.groups, -1)
            if depthwise:
                share = scratch.take(seen.shape[:3] + seen.shape[5:], dx.dtype)
                for window, tap in _taps(seen, weights):
                    for j in range(tap.shape[1]):
                        window += np.multiply(error[..., j], tap[:, j], out=share)
            else:
                _col2im(seen, error, weights, scratch)
        dgrad_epilogue(op, operands, target[:, top : top + h, left : left + width], (part,), here)

    workspace.each(low.blocks_by_images(), images)


def wgrad(
    op: ConvWgrad,
    low: Lowering,
    x: np.ndarray,
    dy: np.ndarray,
    dw: np.ndarray,
    db: np.ndarray | None,
    workspace: Workspace,
) -> None:
    """dw = sums of dy times what its windows see; db = sums of dy. Blocks are added up in their order."""
    blocks, groups, depthwise = low.blocks(), op.groups, dw.shape[3] == 1

    def block(i: int, scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
        part = blocks[i]
        product, sums = scratch.take(dw.shape, x.dtype), scratch.take((dw.shape[0],), x.dtype)
        seen = low.receptive(*low.pixels(x, part, scratch), part)
        error = dy[part.images, part.rows].reshape(-1, dw.shape[0])
        ones = scratch.take((len(error),), x.dtype)
        ones.fill(1)
        if depthwise:
            term = scratch.take(error.shape, x.dtype)
            by_channel = error.reshape(*seen.shape[:3], groups, -1)
            for r, s in np.ndindex(low.r, low.s):
                np.multiply(seen[:, :, :, r, s, :, None], by_channel, out=term.reshape(by_channel.shape))
                product[:, r, s, 0] = ones @ term
        else:
            columns = _columns(groups, seen, scratch)
            errors = _channels_first(groups, error, scratch)
            np.matmul(errors.transpose(0, 2, 1), columns, out=product.reshape(groups, -1, columns.shape[2]))
        np.matmul(ones, error, out=sums)
        return product, sums

    def add(i: int, partial: tuple[np.ndarray, np.ndarray]) -> None:
        for total, part in zip((dw, db), partial, strict=True):
            if total is not None:
                np.add(total, part, out=total) if i else np.copyto(total, part)

    workspace.each_in_order(len(blocks), block, add)


def kernel_name(filters: Shape) -> str:
    """How it is run, for tables."""
    return "numpy taps" if filters[3] == 1 else "numpy im2col+gemm by group"


def scratch(op: ConvGeometry, low: Lowering, dtype: np.dtype) -> ScratchSize:
    """What the three functions take."""
    n, rows = low.block_shape
    m, k, c = prod(low.windows((n, rows))), low.filters[0], low.image[3]
    depthwise, taps = op.groups == c, low.r * low.s
    shared = [(taps * k,)] if depthwise else []
    pixels = [low.padded_shape((n, rows))] if low.padded else []
    products: list[Shape] = [(m * k,)] if depthwise else [(m * taps * c,), (m * k,)]
    if isinstance(op, ConvDgrad):
        pixels = [low.padded_image(n)]
        products = [(m * c,)] if depthwise else products
    if isinstance(op, ConvWgrad):
        products += [(k * taps * c // op.groups,), (k,), (m,)]
    return ScratchSize(
        scratch_bytes([(s, dtype) for s in shared]), scratch_bytes([(s, dtype) for s in (*pixels, *products)])
    )


def _by_group(groups: int, w: np.ndarray) -> np.ndarray:
    """Filters (K,R,S,C/G) as (G, K/G, R*S*C/G)."""
    return w.reshape(groups, w.shape[0] // groups, -1)


def _taps_first(groups: int, w: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Depthwise filters (K,R,S,1) as (R,S,C,K/C)."""
    k, r, s, _ = w.shape
    scratch.rewind()
    taps = scratch.take((r, s, groups, k // groups), w.dtype)
    np.copyto(taps, w.reshape(groups, -1, r, s).transpose(2, 3, 0, 1))
    return taps


def _taps(seen: np.ndarray, weights: np.ndarray) -> Taps:
    """What each tap sees of the pixels (n,P,Q,C), and its weights (C,K/C)."""
    for r, s in np.ndindex(weights.shape[:2]):
        yield seen[:, :, :, r, s], weights[r, s]


def _columns(groups: int, seen: np.ndarray, scratch: Scratch) -> np.ndarray:
    """What each filter position sees, (n,P,Q,R,S,C), as a matrix a group: (G, M, R*S*C/G)."""
    apart = seen.reshape(*seen.shape[:5], groups, -1).transpose(5, 0, 1, 2, 3, 4, 6)
    columns = scratch.take(apart.shape, seen.dtype)
    np.copyto(columns, apart)
    return columns.reshape(groups, prod(seen.shape[:3]), -1)


def _channels_first(groups: int, error: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Errors (M, K) as a matrix a group: (G, M, K/G)."""
    apart = error.reshape(len(error), groups, -1).transpose(1, 0, 2)
    errors = scratch.take(apart.shape, error.dtype)
    np.copyto(errors, apart)
    return errors


def _col2im(seen: np.ndarray, error: np.ndarray, weights: np.ndarray, scratch: Scratch) -> None:
    """Add error (n,P,Q,G,K/G) @ weights (G,K/G,R*S*C/G) to the pixels that the windows see."""
    n, p, q, groups, _ = error.shape
    errors = _channels_first(groups, error.reshape(n * p * q, -1), scratch)
    product = scratch.take((groups, n * p * q, weights.shape[2]), error.dtype)
    np.matmul(errors, weights, out=product)
    shares = product.reshape(groups, n, p, q, *seen.shape[3:5], -1).transpose(1, 2, 3, 4, 5, 0, 6)
    apart = seen.reshape(*seen.shape[:5], groups, -1)
    for r, s in np.ndindex(seen.shape[3:5]):
        apart[:, :, :, r, s] += shares[:, :, :, r, s]
