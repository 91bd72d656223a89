"""Timing of whole steps, apart from training logic: the same plan, run again and again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parcnn.data import Dataset
from parcnn.errors import ArgumentError

if TYPE_CHECKING:
    from parcnn.train.trainer import Trainer


@dataclass(frozen=True)
class StepTiming:
    """Microseconds a step: 20th, 50th and 80th percentile over the repeats."""

    p20_us: float
    p50_us: float
    p80_us: float

    def of(self, parts: int) -> StepTiming:
        """The timing of one of so many equal parts of what was timed."""
        return StepTiming(self.p20_us / parts, self.p50_us / parts, self.p80_us / parts)


def time_steps(trainer: Trainer, data: Dataset, mode: str = "train", steps: int = 20, repeats: int = 9) -> StepTiming:
    """Time `repeats` runs of `steps` steps with whole batches; each run takes other batches of the data.

    mode: 'train' or 'eval'. The data set needs at least one whole batch. The weights change as in training.
    """
    run = trainer.ready_pass(mode, data)
    if "full" not in run.programs or not run.data.resident:
        raise ArgumentError("steps are timed on whole batches of a resident data set", where=data.name, got=len(data))
    whole = len(data) // run.data.batch
    order = np.arange(len(data), dtype=np.int32)
    rates = np.full(run.steps, trainer.optimizer.lr)
    hyper = trainer.optimizer.hyper(rates, 0) if mode == "train" else None
    steps = min(steps, whole)
    times = []
    for i in range(-2, repeats):  # two runs to warm up
        first = i * steps % (whole - steps + 1)
        run.start(order, first, 0, trainer.seed, hyper)
        trainer.executor.synchronize()
        began = time.perf_counter()
        run.programs["full"][0].run(steps)
        trainer.executor.synchronize()
        times.append((time.perf_counter() - began) / steps * 1e6)
    p20, p50, p80 = np.percentile(times[2:], (20, 50, 80))
    return StepTiming(float(p20), float(p50), float(p80))
