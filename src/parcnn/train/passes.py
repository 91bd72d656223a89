"""One way through a data set on a device: the programs for whole batches and the last one, and what feeds them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parcnn.ops.base import ITEM_BYTES, Spec
from parcnn.ops.program import LoadedProgram, Region
from parcnn.plan.build import Plan
from parcnn.train.batches import DeviceData, state_words


@dataclass
class Pass:
    """One way through a data set, ready to run: its programs and what feeds them."""

    data: DeviceData
    regions: dict[str, Region]
    plans: dict[str, Plan]  # 'full' for whole batches, 'tail' for the smaller last one, where there are such
    programs: dict[str, list[LoadedProgram]]  # of each plan, one for each bank of the data
    generation: int  # of the session's memory that the programs are bound to

    @property
    def plan(self) -> Plan:
        """The plan of whole batches; of the only batch where that is smaller."""
        return self.plans.get("full") or self.plans["tail"]

    @property
    def count(self) -> int:
        """Samples in the pass."""
        return self.plan.feed.order

    @property
    def steps(self) -> int:
        """Batches in the pass, the last one perhaps smaller."""
        return -(-self.count // self.data.batch)

    def run(self, order: np.ndarray, first: int, seconds: float) -> Iterator[int]:
        """Submit steps `first`, `first` + 1, ... in slices of about `seconds`; give the number done after each."""
        done, slice_steps = first, 1
        whole = self.count // self.data.batch
        for bank, stretch in self.data.stretches(order, first):
            end = done + stretch
            while done < end:
                began = time.perf_counter()
                steps = min(slice_steps, end - done, max(whole - done, 0))
                kind = "full" if steps else "tail"
                steps = steps or 1
                self.programs[kind][bank].run(steps)
                done += steps
                yield done  # the consumer reads results, which waits for the device
                slice_steps = max(1, int(steps * seconds / max(time.perf_counter() - began, 1e-6)))

    def start(self, order: np.ndarray, first: int, trained: int, seed: int, hyper: np.ndarray | None = None) -> None:
        """Put in place what a pass reads: the order of samples, counters, and in training the optimizer's table."""
        self.regions["state"].write(state_words(first, trained, self.data.batch, seed))
        self.regions["order"].write(self.data.positions(order))
        if hyper is not None:
            dtype = np.float64 if self.plan.layout.dtype == "f64" else np.float32
            self.regions["hyper"].write(np.ascontiguousarray(hyper, dtype))

    def results(self, first: int, done: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Losses of steps first..done, and their counts of right answers."""
        dtype = self.plan.layout.dtype
        losses = self.regions["losses"].read(Spec((done - first,), dtype), first * ITEM_BYTES[dtype])
        if "corrects" not in self.regions:
            return losses, None
        return losses, self.regions["corrects"].read(Spec((done - first,), "i32"), 4 * first)

    def sizes(self, first: int, done: int) -> np.ndarray:
        """Samples in each of the batches first..done."""
        starts = np.arange(first, done) * self.data.batch
        return np.minimum(self.data.batch, self.count - starts)

    def means(self, first: int, done: int) -> tuple[float, float | None]:
        """Mean loss and accuracy over the samples of steps first..done."""
        losses, corrects = self.results(first, done)
        sizes = self.sizes(first, done)
        total = max(int(sizes.sum()), 1)
        accuracy = None if corrects is None else float(corrects.sum()) / total
        return float((losses.astype(np.float64) * sizes).sum() / total), accuracy

    def free(self) -> None:
        """Give the memory of data and feeds back."""
        self.data.free()
        for region in self.regions.values():
            region.free()
