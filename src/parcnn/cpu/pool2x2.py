"""The 2x2 pool that is fused with a convolution: its forward, its 2-bit indices, and the error's way back.

Arrays are (n,P,Q,K) views; where the convolution's matrices are stored transposed, so is their memory, and `transposed` says
so. An index byte holds four channels: channel c in bits 2*(c%4) of byte c//4, and each pixel starts a byte.
"""

from __future__ import annotations

import numpy as np

from parcnn.cpu.pointwise import route
from parcnn.cpu.workers import Scratch, Shape

_POSITIONS = np.arange(4, dtype=np.uint8).reshape(2, 2, 1, 1, 1, 1)
_SHIFTS = np.array([[0], [2], [4], [6]], np.uint8)
_FACTORS = 1 << _SHIFTS
# The four indices of each byte, in the bytes of a word.
_UNPACKED = np.ascontiguousarray((np.arange(256)[:, None] >> _SHIFTS[:, 0] & 3).astype(np.uint8)).view("<u4")[:, 0]


def max_scratch(shape: Shape, dtype: np.dtype) -> list[tuple[Shape, np.dtype | type]]:
    """Shapes and types of what max_pool takes from the scratch memory; `shape` is (n,P,Q,K)."""
    return [(shape, dtype), (_padded(shape), np.uint8), ((4, *shape), bool)]


def max_pool(
    candidates: np.ndarray, y: np.ndarray, packed: np.ndarray | None, transposed: bool, scratch: Scratch
) -> None:
    """y = the largest candidate, packed (if given) = which it was: the first of equals; NaN wins over numbers."""
    best = _take(scratch, y.shape, y.dtype, transposed) if transposed else y
    np.maximum(candidates[0, 0], candidates[0, 1], out=best)
    np.maximum(best, candidates[1, 0], out=best)
    np.maximum(best, candidates[1, 1], out=best)
    if packed is not None:
        _name_winners(candidates, best, packed, transposed, scratch)
    if transposed:
        np.copyto(y, best)


def _name_winners(
    candidates: np.ndarray, best: np.ndarray, packed: np.ndarray, transposed: bool, scratch: Scratch
) -> None:
    """packed = which candidate equals `best`, the first of them; `best` is of the shape (n,P,Q,K)."""
    k = best.shape[3]
    indices = _take(scratch, _padded(best.shape), np.uint8, transposed)
    indices[..., k:] = 0
    index = indices[..., :k]
    if np.isnan(best.max()):
        every = candidates.reshape(4, *best.shape)
        np.copyto(index, np.argmax(every, axis=0), casting="unsafe")  # argmax: the first NaN
    else:
        # The index is how many of the first three candidates come before the first that equals the largest.
        missed = _take(scratch, best.shape, bool, transposed, 4)
        np.not_equal(candidates, best, out=missed.reshape(candidates.shape))
        np.logical_and(missed[0], missed[1], out=missed[1])
        np.logical_and(missed[1], missed[2], out=missed[2])
        np.add.reduce(missed[:3].view(np.uint8), axis=0, dtype=np.uint8, out=index)
    _pack(indices, packed, transposed)


def avg_pool(candidates: np.ndarray, y: np.ndarray) -> None:
    """y = the candidates' mean."""
    np.add(candidates[0, 0], candidates[0, 1], out=y)
    y += candidates[1, 0]
    y += candidates[1, 1]
    y *= 0.25


def error_scratch(shape: Shape, dtype: np.dtype) -> list[tuple[Shape, np.dtype | type]]:
    """Shapes and types of what route_error takes from the scratch memory; `shape` is (n,P,Q,K)."""
    return [(shape, dtype), (_padded(shape), np.uint8), ((4, *shape), bool)]


def route_error(
    dy: np.ndarray, packed: np.ndarray | None, candidates: np.ndarray, transposed: bool, scratch: Scratch
) -> None:
    """Each window's error to its winner, or in equal parts to all four where there are no indices (average)."""
    if packed is None:
        np.multiply(dy, 0.25, out=candidates)
        return
    if transposed:
        moved = _take(scratch, dy.shape, dy.dtype, transposed)
        np.copyto(moved, dy)
        dy = moved
    index = _unpack(packed, transposed, scratch)[..., : dy.shape[3]]
    wins = _take(scratch, dy.shape, bool, transposed, 4).reshape(candidates.shape)
    np.equal(index, _POSITIONS, out=wins)
    route(dy, wins, candidates)


def _pack(indices: np.ndarray, packed: np.ndarray, transposed: bool) -> None:
    """Indices (n,P,Q,4*groups), which are used up, to bytes (n,P,Q,groups)."""
    if transposed:
        lanes = _lanes(indices)
        lanes *= _FACTORS  # a third of the time of shifts
        lanes[:, :2] |= lanes[:, 2:]
        np.bitwise_or(lanes[:, 0], lanes[:, 1], out=packed.reshape(-1, packed.shape[3]).T)
        return
    words = indices.view("<u4")  # four indices at a time: the product brings them together in its highest byte
    words *= np.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    np.copyto(packed, indices[..., 3::4])


def _unpack(packed: np.ndarray, transposed: bool, scratch: Scratch) -> np.ndarray:
    """Bytes (n,P,Q,groups) to indices (n,P,Q,4*groups)."""
    indices = _take(scratch, (*packed.shape[:3], 4 * packed.shape[3]), np.uint8, transposed)
    if transposed:
        lanes = _lanes(indices)
        np.copyto(lanes[:, 3], packed.reshape(-1, packed.shape[3]).T)
        np.right_shift(lanes[:, 3:], _SHIFTS, out=lanes)
        lanes &= 3
    else:
        np.take(_UNPACKED, packed, out=indices.view("<u4"), mode="clip")
    return indices


def _lanes(indices: np.ndarray) -> np.ndarray:
    """Indices (n,P,Q,4*groups) whose channels are outermost in memory, as (groups,4,n*P*Q)."""
    return indices.transpose(3, 0, 1, 2).reshape(indices.shape[3] // 4, 4, -1)


def _take(
    scratch: Scratch, shape: Shape, dtype: np.dtype | type, transposed: bool, count: int | None = None
) -> np.ndarray:
    """An array (n,P,Q,K), or `count` of them; with `transposed` the channels are outermost in each one's memory."""
    n, p, q, k = shape
    lead = () if count is None else (count,)
    if not transposed:
        return scratch.take((*lead, *shape), dtype)
    return np.moveaxis(scratch.take((*lead, k, n, p, q), dtype), -4, -1)


def _padded(shape: Shape) -> Shape:
    """(n,P,Q,K) with whole bytes of indices."""
    return *shape[:3], -(-shape[3] // 4) * 4
