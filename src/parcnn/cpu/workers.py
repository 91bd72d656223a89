"""Threads, and the scratch memory that each of them works in.

Work is cut into pieces whose size depends on the problem alone, never on the number of threads, and sums over pieces run in
the pieces' order: results are the same bits for every number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Shape = tuple[int, ...]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
# Elements of one piece of an element-by-element op: 128 KiB of float32, so that an op's few operands stay in the L2 cache.
PIECE = 32768
# Most pieces that a thread takes in one go where several work.
MOST_PIECES = 8


class Scratch:
    """Hands out arrays from one thread's scratch memory, front to back."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self.used = 0  # bytes handed out

    def behind(self, used: int) -> Scratch:
        """The memory behind the first `used` bytes."""
        return Scratch(self._memory[used:])

    def rewind(self, used: int = 0) -> None:
        """Forget what was handed out after the first `used` bytes."""
        self.used = used

    def take(self, shape: Shape, dtype: np.dtype | type) -> np.ndarray:
        """An uninitialised array."""
        array = np.ndarray(shape, dtype, self._memory, self.used)
        self.used += padded_bytes(array.nbytes)
        return array


def padded_bytes(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of the next array."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def scratch_bytes(arrays: Sequence[tuple[Shape, np.dtype | type]]) -> int:
    """What `Scratch.take` needs for these arrays, shape and element type each."""
    return sum(padded_bytes(prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in arrays)


class Workers:
    """`count` threads, the caller's among them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, thread_name_prefix="parcnn-cpu") if count > 1 else None

    def each(self, items: Sequence[Item], work: Callable[[Item, int], None], count: int) -> None:
        """work(item, worker) for every item, worker being 0..count-1: each takes a run of neighbours."""
        if self._pool is None or count == 1 or len(items) <= 1:
            for item in items:
                work(item, 0)
            return
        largest = -(-len(items) // count)

        def share(worker: int) -> None:
            with np.errstate(all="ignore"):  # NaN and infinity go through, silently; the setting is per thread
                for item in items[worker * largest : (worker + 1) * largest]:
                    work(item, worker)

        others = [self._pool.submit(share, worker) for worker in range(1, -(-len(items) // largest))]
        share(0)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


@dataclass(frozen=True)
class ScratchSize:
    """Bytes that an op needs once, and once per worker."""

    shared: int = 0
    per_worker: int = 0


class Workspace:
    """The threads that run a call, `workers` of them, and their scratch memory: a part for all, and one for each."""

    def __init__(self, memory: np.ndarray, size: ScratchSize, threads: Workers, workers: int) -> None:
        self.workers = workers
        self._threads = threads
        self.shared = Scratch(memory[: size.shared])
        parts = (memory[size.shared + i * size.per_worker :][: size.per_worker] for i in range(workers))
        self._parts = [Scratch(part) for part in parts]

    def within(self, used: int) -> Workspace:
        """The same workspace, but that the first `used` bytes of the part for all are somebody's."""
        inner = copy(self)
        inner.shared = self.shared.behind(used)
        return inner

    def elsewhere(self, size: ScratchSize) -> Workspace:
        """The same threads with other memory, for what is too rare to be reserved."""
        memory = np.empty(size.shared + self.workers * size.per_worker, np.uint8)
        return Workspace(memory, size, self._threads, self.workers)

    def each(self, items: Sequence[Item], work: Callable[[Item, Scratch], None]) -> None:
        """work(item, scratch) for every item, spread over the workers; scratch is rewound before each."""

        def rewound(item: Item, worker: int) -> None:
            scratch = self._parts[worker]
            scratch.rewind()
            work(item, scratch)

        self._threads.each(items, rewound, self.workers)

    def each_in_order(
        self, count: int, work: Callable[[int, Scratch], Item], finish: Callable[[int, Item], None]
    ) -> None:
        """finish(i, work(i, scratch)) for i in 0..count-1: the work spread over the workers, `finish` in the order of i."""
        results: dict[int, Item] = {}

        def keep(i: int, scratch: Scratch) -> None:
            results[i] = work(i, scratch)

        for first in range(0, count, self.workers):
            wave = range(first, min(first + self.workers, count))
            self.each(wave, keep)
            for i in wave:
                finish(i, results.pop(i))

    def each_slice(self, count: int, work: Callable[[slice, Scratch], None], piece: int = PIECE) -> None:
        """work(slice, scratch) for slices that cover 0..count: each of `together(...)` pieces, the last of what is left."""
        size = piece * together(-(-count // piece), self.workers)
        self.each([slice(i, min(i + size, count)) for i in range(0, count, size)], work)


def together(pieces: int, workers: int, most: int = MOST_PIECES) -> int:
    """How many pieces a thread takes in one go, at most `most`: its share, or equal parts of it.

    A thread alone takes one, which stays in its cache. Among several each call of NumPy ends in a wait for the interpreter's
    lock, of about 7 us for all of them: fewer, longer calls are worth their reads from a farther cache.
    """
    if workers == 1 or pieces == 0:
        return 1
    share = -(-pieces // workers)
    return -(-share // -(-share // most))
