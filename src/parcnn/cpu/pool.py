"""Pooling on its own: one strided view of the padded images for each position in the window; and the error's way back through
a convolution's pool."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parcnn.cpu.pointwise import activate, activate_backward, route
from parcnn.cpu.pool2x2 import error_scratch, route_error
from parcnn.cpu.workers import PIECE, Scratch, ScratchSize, Shape, Workspace, scratch_bytes, together
from parcnn.ops.base import FROM_OUTPUT, Spec
from parcnn.ops.conv import ConvUnpool
from parcnn.ops.pool import AdaptiveAvgDgrad, AdaptiveAvgFprop, PoolDgrad, PoolFprop, PoolWindow


def pool_fprop(op: PoolFprop, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """Largest element of each window and where it was (the first of equals; NaN wins), or the mean; of act(x)."""
    x, y = inputs[0], outputs[0]
    n, h, w, c = x.shape
    out_hw = y.shape[1:3]
    divisor = _divisors(op, (h, w), out_hw, x.dtype)
    first = _first_inside(op, (h, w), out_hw)
    late = op.act in FROM_OUTPUT

    def piece(i: slice, scratch: Scratch) -> None:
        padded = scratch.take((i.stop - i.start, *_padded_hw(op, (h, w), out_hw), c), x.dtype)
        padded.fill(-np.inf if op.kind == "max" else 0)
        inside, best = _inside(op, padded, (h, w)), y[i]
        inside[...] = x[i]
        if op.act and not late:
            activate(op.act, inside, inside)
        if op.kind == "avg":
            best.fill(0)
            for _, view in _positions(op, padded, out_hw):
                best += view
            best /= divisor
            return
        idx = scratch.take(best.shape, np.int32)
        best.fill(-np.inf)
        idx[...] = first
        wins, other = scratch.take(best.shape, bool), scratch.take(best.shape, bool)
        for position, view in _positions(op, padded, out_hw):
            np.less_equal(view, best, out=wins)
            np.not_equal(best, best, out=other)
            wins |= other
            np.logical_not(wins, out=wins)  # greater, or the first NaN
            np.copyto(best, view, where=wins)
            np.copyto(idx, np.int32(position), where=wins)
        _pack(idx, outputs[1][i])
        if op.keep:
            _inside(op, padded, (h, w))[...] = x[i]
            for position, view in _positions(op, padded, out_hw):
                np.equal(idx, position, out=wins)
                np.copyto(outputs[2][i], view, where=wins)
        if op.act and late:
            activate(op.act, best, best)

    workspace.each_slice(n, piece, _images_a_piece(x.shape))


def pool_dgrad(op: PoolDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """Each window's error to its winner, or in equal parts to its elements."""
    dy, dx = inputs[0], outputs[0]
    n, h, w, c = dx.shape
    out_hw = dy.shape[1:3]
    divisor = _divisors(op, (h, w), out_hw, dy.dtype)

    def piece(i: slice, scratch: Scratch) -> None:
        padded = scratch.take((i.stop - i.start, *_padded_hw(op, (h, w), out_hw), c), dx.dtype)
        padded.fill(0)
        part = scratch.take(dy[i].shape, dy.dtype)
        if op.kind == "avg":
            np.divide(dy[i], divisor, out=part)
        else:
            idx = _unpack(inputs[1][i], scratch.take(part.shape, np.int32))
        for position, view in _positions(op, padded, out_hw):
            if op.kind == "max":
                route(dy[i], idx == position, part)
            view += part
        dx[i] = _inside(op, padded, (h, w))

    workspace.each_slice(n, piece, _images_a_piece(dx.shape))


def adaptive_avg_fprop(
    op: AdaptiveAvgFprop, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """Means over windows that tile the image."""
    x, y = inputs[0], outputs[0]

    def piece(i: slice, _: Scratch) -> None:
        for p, q, rows, columns in _adaptive_windows(x.shape[1:3], y.shape[1:3]):
            x[i, rows, columns].mean(axis=(1, 2), out=y[i, p, q])

    workspace.each_slice(x.shape[0], piece, _images_a_piece(x.shape))


def adaptive_avg_dgrad(
    op: AdaptiveAvgDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """Each mean's error in equal parts to its window."""
    dy, dx = inputs[0], outputs[0]

    def piece(i: slice, _: Scratch) -> None:
        dx[i] = 0
        for p, q, rows, columns in _adaptive_windows(dx.shape[1:3], dy.shape[1:3]):
            window = dx[i, rows, columns]
            window += (dy[i, p, q] / (window.shape[1] * window.shape[2]))[:, None, None]

    workspace.each_slice(dx.shape[0], piece, _images_a_piece(dx.shape))


def conv_unpool(op: ConvUnpool, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """dy * act'(saved), each to its window's winner or in equal parts to all four."""
    dy, error = inputs[0], outputs[0]
    n, p, q, k = dy.shape

    def piece(i: slice, scratch: Scratch) -> None:
        here = dy[i]
        if op.act:
            here = scratch.take(here.shape, dy.dtype)
            activate_backward(op.act, dy[i], inputs[-1][i], here)
        windows = error[i].reshape(len(here), p, 2, q, 2, k).transpose(2, 4, 0, 1, 3, 5)
        route_error(here, inputs[1][i] if op.pool == "max" else None, windows, False, scratch)

    workspace.each_slice(n, piece, _images_a_piece(error.shape))


def _pack(indices: np.ndarray, stored: np.ndarray) -> None:
    """Indices (n,P,Q,C) as they are stored: neighbouring channels share bytes where there are fewer of these."""
    each = indices.shape[3] // stored.shape[3]
    stored[...] = indices[..., ::each]
    for j in range(1, each):
        stored |= (indices[..., j::each] << 8 // each * j).astype(np.uint8)


def _unpack(stored: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The way back: `indices`, filled."""
    each = indices.shape[3] // stored.shape[3]
    if each == 1:
        indices[...] = stored
    else:
        bits = 8 // each
        for j in range(each):
            indices[..., j::each] = stored >> bits * j & (1 << bits) - 1
    return indices


def _images_a_piece(shape: Shape) -> int:
    """Images (n,H,W,C) of a piece: as many as stay in cache."""
    n, h, w, c = shape
    return max(1, min(n, 4 * PIECE // (h * w * c)))


def _adaptive_windows(image: tuple[int, ...], out: tuple[int, ...]) -> Iterator[tuple[int, int, slice, slice]]:
    (h, w), (p_count, q_count) = image, out
    for p in range(p_count):
        for q in range(q_count):
            rows = slice(p * h // p_count, -(-(p + 1) * h // p_count))
            yield p, q, rows, slice(q * w // q_count, -(-(q + 1) * w // q_count))


def _padded_hw(op: PoolWindow, image: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, int]:
    """The padded image, made larger where ceil_mode lets a window hang over it."""
    h, w = (
        max(image[a] + 2 * op.pad[a], (out[a] - 1) * op.stride[a] + (op.kernel[a] - 1) * op.dilation[a] + 1)
        for a in (0, 1)
    )
    return h, w


def _inside(op: PoolWindow, padded: np.ndarray, image: tuple[int, int]) -> np.ndarray:
    (top, left), (h, w) = op.pad, image
    return padded[:, top : top + h, left : left + w]


def _positions(op: PoolWindow, padded: np.ndarray, out: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Each position in the window, row-major, with the elements (n,P,Q,C) that the windows have there."""
    for r in range(op.kernel[0]):
        for s in range(op.kernel[1]):
            top, left = r * op.dilation[0], s * op.dilation[1]
            rows = slice(top, top + (out[0] - 1) * op.stride[0] + 1, op.stride[0])
            columns = slice(left, left + (out[1] - 1) * op.stride[1] + 1, op.stride[1])
            yield r * op.kernel[1] + s, padded[:, rows, columns]


def _divisors(op: PoolWindow, image: tuple[int, int], out: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What each window's sum is divided by, (P,Q,1)."""
    if op.divisor is not None:
        return np.full((*out, 1), op.divisor, dtype)
    margin = op.pad if op.count_include_pad else (0, 0)
    counts = []
    for a in (0, 1):
        taps = np.arange(op.kernel[a]) * op.dilation[a]
        position = np.arange(out[a])[:, None] * op.stride[a] - op.pad[a] + taps
        counts.append(((position >= -margin[a]) & (position < image[a] + margin[a])).sum(axis=1))
    return np.multiply.outer(*counts)[..., None].astype(dtype)


def _first_inside(op: PoolWindow, image: tuple[int, int], out: tuple[int, ...]) -> np.ndarray:
    """The first position of each window that lies in the image, (P,Q,1): it wins where all elements are -inf."""
    first = []
    for a in (0, 1):
        above = np.maximum(op.pad[a] - np.arange(out[a]) * op.stride[a], 0)
        first.append(-(-above // op.dilation[a]))
    return (first[0][:, None] * op.kernel[1] + first[1])[..., None]


def pool_scratch(
    op: PoolFprop | PoolDgrad, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int
) -> ScratchSize:
    """Memory for each thread."""
    image, small = (inputs[0], outputs[0]) if isinstance(op, PoolFprop) else (outputs[0], inputs[0])
    n, h, w, c = image.shape
    some = _images_a_piece(image.shape)
    n = min(n, some * together(-(-n // some), workers))
    dtype = np.float64 if image.dtype == "f64" else np.float32
    padded = (n, *_padded_hw(op, (h, w), small.shape[1:3]), c)
    part = (n, *small.shape[1:])
    extra: list[tuple[Shape, type]] = [(part, bool)] * 2 if isinstance(op, PoolFprop) else [(part, dtype)]
    extra.append((part, np.int32))
    return ScratchSize(per_worker=scratch_bytes([(padded, dtype), *extra]))


def _unpool_scratch(op: ConvUnpool, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    some = _images_a_piece(outputs[0].shape)
    n = min(inputs[0].shape[0], some * together(-(-inputs[0].shape[0] // some), workers))
    shape, dtype = (n, *inputs[0].shape[1:]), np.float64 if inputs[0].dtype == "f64" else np.float32
    return ScratchSize(per_worker=scratch_bytes([(shape, dtype), *error_scratch(shape, np.dtype(dtype))]))


RUN = {
    PoolFprop: pool_fprop,
    PoolDgrad: pool_dgrad,
    AdaptiveAvgFprop: adaptive_avg_fprop,
    AdaptiveAvgDgrad: adaptive_avg_dgrad,
    ConvUnpool: conv_unpool,
}
SCRATCH = {PoolFprop: pool_scratch, PoolDgrad: pool_scratch, ConvUnpool: _unpool_scratch}
