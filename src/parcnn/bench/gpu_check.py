"""A few figures of the GPU in less than a minute, for the record that goes with the GPU tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parcnn import data, recipes
from parcnn.bench.speedup import AGREEMENT_STEPS
from parcnn.bench.step import PROBLEMS, REPEATS, STEPS, noise
from parcnn.cpu import CpuExecutor
from parcnn.data import Dataset
from parcnn.errors import DataUnavailableError
from parcnn.ops.program import Executor
from parcnn.optim import Schedule
from parcnn.train.timing import time_steps


@dataclass(frozen=True)
class FirstSteps:
    """The beginning of a run of `total` steps, for one that ends early: a run's whole warm-up pressed into a hundred steps
    is so unsteady that rounding alone moves its losses by half (float32 against float64 on one CPU)."""

    schedule: Schedule
    total: int

    def factor(self, step: np.ndarray, total: int) -> np.ndarray:
        """The factor on lr at each of `step` of the whole run."""
        return self.schedule.factor(step, self.total)


def run(executor: Executor, say: Callable[[str], None], data_dir: Path | None = None) -> dict[str, Any]:
    """Step times; how far the losses of CPU and GPU are apart over the first steps; accuracy after one epoch."""
    figures: dict[str, Any] = {}
    for network, batch in PROBLEMS:
        subject = noise(network, batch, STEPS)
        trainer = subject.trainer(executor, batch)
        timing = time_steps(trainer, subject.train, "train", steps=STEPS, repeats=REPEATS)
        figures[f"{network}_batch{batch}_step_us"] = round(timing.p50_us, 2)
        say(f"  {network}, batch {batch}: {timing.p50_us:,.1f} us a step")
    train, test = _images(data_dir, say)
    whole = recipes.read(f"{train.name}-lenet5")
    trainer = replace(whole, epochs=1).trainer(train, executor)
    trainer.fit(train, 1)
    accuracy = trainer.evaluate(test).accuracy
    some = train.subset(min(len(train), AGREEMENT_STEPS * whole.batch))
    beginning = FirstSteps(whole.schedule, whole.epochs * -(-len(train) // whole.batch))
    recipe = replace(whole, epochs=1, schedule=beginning)
    losses = [recipe.trainer(some, each).fit(some, 1).losses for each in (CpuExecutor(), executor)]
    difference = float(np.max(np.abs(losses[1] - losses[0]) / np.abs(losses[0])))
    figures |= {
        "data": train.name,
        "lenet5_accuracy_after_1_epoch": accuracy,
        "cpu_gpu_loss_difference": difference,
        "cpu_gpu_steps_compared": len(losses[0]),
    }
    say(f"  {train.name}: accuracy after one epoch {accuracy:.2%}")
    say(f"  losses of CPU and GPU over {len(losses[0])} steps differ by at most {difference:.1e}, relative")
    return figures


def _images(data_dir: Path | None, say: Callable[[str], None]) -> tuple[Dataset, Dataset]:
    try:
        return data.load("mnist", "train", data_dir, notice=say), data.load("mnist", "test", data_dir)
    except DataUnavailableError as error:
        say(f"MNIST cannot be had ({error.what}): digits take its place")
        return data.load("digits", "train"), data.load("digits", "test")
