"""The 2x2 pool that is fused with a convolution: its forward, its 2-bit indices, and the error's way back.

Arrays are (n,P,Q,K) views; where the convolution's matrices are stored transposed, so is their memory, and `transposed` says
so. An index byte holds four channels: channel c in bits 2*(c%4) of byte c//4, and each pixel starts a byte.
"""

from __future__ import annotations

import numpy as np

from parcnn.cpu.pointwise import route
from parcnn.cpu.workers import Scratch, Shape


def max_scratch(shape: Shape, dtype: np.dtype) -> list[tuple[Shape, np.dtype | type]]:
    """Shapes and types of what max_pool takes from the scratch memory; `shape` is (n,P,Q,K)."""
    padded = (*shape[:3], _groups(shape[3]) * 4)
    return [(shape, dtype), (padded, np.uint8), (shape, bool), (padded, np.uint8)]


def max_pool(
    candidates: list[np.ndarray], y: np.ndarray, packed: np.ndarray, transposed: bool, scratch: Scratch
) -> None:
    """y = the largest candidate, packed = which it was: the first of equals; NaN wins over numbers."""
    n, p, q, k = y.shape
    best = _take(scratch, y.shape, y.dtype, transposed) if transposed else y
    np.maximum(candidates[0], candidates[1], out=best)
    np.maximum(best, candidates[2], out=best)
    np.maximum(best, candidates[3], out=best)

    indices = _take(scratch, (n, p, q, _groups(k) * 4), np.uint8, transposed)
    indices[..., k:] = 0
    index = indices[..., :k]
    if np.isnan(best.max()):
        np.copyto(index, np.argmax(np.stack(candidates), axis=0), casting="unsafe")  # argmax: the first NaN
    else:
        # The index is how many of the first three candidates come before the first that equals the largest.
        missed = _take(scratch, y.shape, bool, transposed)
        np.not_equal(candidates[0], best, out=missed)
        np.copyto(index, missed.view(np.uint8))
        later = _take(scratch, y.shape, bool, transposed)
        for candidate in candidates[1:3]:
            np.not_equal(candidate, best, out=later)
            missed &= later
            index += missed.view(np.uint8)
    _pack(indices, packed, transposed)
    if transposed:
        np.copyto(y, best)


def avg_pool(candidates: list[np.ndarray], y: np.ndarray) -> None:
    """y = the candidates' mean."""
    np.add(candidates[0], candidates[1], out=y)
    y += candidates[2]
    y += candidates[3]
    y *= 0.25


def error_scratch(shape: Shape, dtype: np.dtype) -> list[tuple[Shape, np.dtype | type]]:
    """Shapes and types of what route_error takes from the scratch memory; `shape` is (n,P,Q,K)."""
    groups = _groups(shape[3])
    return [(shape, dtype), ((*shape[:3], groups), np.uint32), (shape, bool)]


def route_error(
    dy: np.ndarray, packed: np.ndarray | None, candidates: list[np.ndarray], transposed: bool, scratch: Scratch
) -> None:
    """Each window's error to its winner, or in equal parts to all four where there are no indices (average)."""
    if packed is None:
        for candidate in candidates:
            np.multiply(dy, 0.25, out=candidate)
        return
    if transposed:
        moved = _take(scratch, dy.shape, dy.dtype, transposed)
        np.copyto(moved, dy)
        dy = moved
    index = _unpack(packed, transposed, scratch)[..., : dy.shape[3]]
    wins = _take(scratch, dy.shape, bool, transposed)
    for position, candidate in enumerate(candidates):
        np.equal(index, position, out=wins)
        route(dy, wins, candidate)


def _pack(indices: np.ndarray, packed: np.ndarray, transposed: bool) -> None:
    """Indices (n,P,Q,4*groups), which are used up, to bytes (n,P,Q,groups)."""
    if transposed:
        for lane in (1, 2, 3):
            indices[..., lane::4] <<= 2 * lane
            indices[..., 0::4] |= indices[..., lane::4]
        for group in range(packed.shape[3]):  # long loops over pixels, not short ones over groups: a third of the time
            np.copyto(packed[..., group], indices[..., 4 * group])
        return
    words = indices.view("<u4")  # four indices at a time: 0d0c0b0a becomes ..dcba
    words |= words >> 6
    words |= words >> 12
    np.copyto(packed, words, casting="unsafe")


def _unpack(packed: np.ndarray, transposed: bool, scratch: Scratch) -> np.ndarray:
    """Bytes (n,P,Q,groups) to indices (n,P,Q,4*groups)."""
    n, p, q, groups = packed.shape
    if transposed:
        indices = _take(scratch, (n, p, q, 4 * groups), np.uint8, transposed)
        np.copyto(indices[..., 0::4], packed)
        for lane in (3, 2, 1):
            np.right_shift(indices[..., 0::4], 2 * lane, out=indices[..., lane::4])
            indices[..., lane::4] &= 3
        indices[..., 0::4] &= 3
        return indices
    words = scratch.take(packed.shape, np.dtype("<u4"))
    np.copyto(words, packed)
    words |= words << 12
    words |= words << 6
    words &= 0x03030303
    return words.view(np.uint8)


def _take(scratch: Scratch, shape: Shape, dtype: np.dtype | type, transposed: bool) -> np.ndarray:
    """An array (n,P,Q,K); with `transposed` the channels are outermost in memory."""
    if not transposed:
        return scratch.take(shape, dtype)
    n, p, q, k = shape
    return scratch.take((k, n, p, q), dtype).transpose(1, 2, 3, 0)


def _groups(channels: int) -> int:
    return -(-channels // 4)
