"""Philox4x32-10 (Salmon et al., SC'11): random words as a pure function of a counter and a key, on every executor alike."""

from __future__ import annotations

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# The second counter word tells the uses apart (dropout layers count 0, 1, 2, ...).
SHUFFLE, AUGMENT = 0x53485546, 0x41554721


def philox4x32(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> np.ndarray:
    """Four random words (..., 4) uint32 for each counter; the four counter words broadcast against each other."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) & _LOW for c in np.broadcast_arrays(*counter))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def split_seed(seed: int) -> tuple[int, int]:
    """A 64-bit seed as the key's low and high word."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order (count,) int32 in which epoch `epoch` visits the samples: sorted by a random 64-bit word each."""
    words = philox4x32((np.arange(count, dtype=np.uint64), SHUFFLE, epoch, 0), split_seed(seed)).astype(np.uint64)
    return np.argsort((words[:, 0] << _SHIFT) | words[:, 1], kind="stable").astype(np.int32)
