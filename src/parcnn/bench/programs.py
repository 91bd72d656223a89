"""A plan bound to memory of its own and run without training logic, to time parts of it and to count what it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from parcnn.nn import Module
from parcnn.ops.base import Spec
from parcnn.ops.program import Call, Executor, LoadedProgram, Program, Region
from parcnn.plan.build import Plan
from parcnn.plan.options import Options
from parcnn.plan.schedule import schedule
from parcnn.train.batches import state_words
from parcnn.train.timing import StepTiming

LEARNING_RATE = 1e-3


class BoundPlan:
    """A plan of `parcnn.plan.describe.outline` with its memory: the model's weights, one random image, its first label.

    Raises OutOfMemoryError where the executor cannot give the memory. `free` gives it back.
    """

    def __init__(self, plan: Plan, model: Module, executor: Executor) -> None:
        self.plan, self.executor = plan, executor
        needed = {**plan.program.region_bytes, "weights": plan.layout.weights_bytes}
        if plan.mode == "train":
            needed["optimizer"] = plan.layout.optimizer_bytes
        self.regions: dict[str, Region] = {}
        try:
            for name, nbytes in needed.items():
                self.regions[name] = executor.region(name, nbytes)
        except MemoryError:
            self.free()
            raise
        for variable, offset in plan.layout.offsets.items():
            self.regions["weights"].write(plan.layout.packings[variable].pack(variable.data), offset)
        pixels = np.random.default_rng(0).integers(0, 256, plan.feed.images.nbytes, np.uint8)
        self.regions["images"].write(pixels)
        if "hyper" in self.regions:
            self.regions["hyper"].write(np.array([[LEARNING_RATE, 1, 1, 0]], np.float32))

    def step(self) -> float:
        """Run one step; its loss."""
        self.regions["state"].write(state_words(0, 0, self.plan.batch, 0))
        self.executor.load(self.plan.program, self.regions).run(1)
        self.executor.synchronize()
        return float(self.regions["losses"].read(Spec((1,)))[0])

    def time_calls(self, wanted: Callable[[Call], bool], options: Options, steps: int, repeats: int) -> StepTiming:
        """Time the calls that are `wanted`, on random tensors, in the order and on the streams that `options` allow."""
        calls = [call for call in self.plan.program.calls if wanted(call)]
        scheduled = schedule(calls, options.side_streams if options.parallel else 0)
        program: Program = replace(self.plan.program, calls=scheduled, replay=options.graph)
        values = np.random.default_rng(1).standard_normal(self.regions["arena"].nbytes // 4, np.float32)
        loaded = self.executor.load(program, self.regions)
        timings = []
        for _ in range(repeats):
            self.regions["arena"].write(values)  # so that tensors which a step overwrites do not run away
            timings.append(time_program(self.executor, loaded, steps))
        p20, p50, p80 = np.percentile(timings, (20, 50, 80))
        return StepTiming(float(p20), float(p50), float(p80))

    def free(self) -> None:
        """Give the memory back."""
        for region in self.regions.values():
            region.free()
        self.regions = {}


def time_program(executor: Executor, loaded: LoadedProgram, steps: int) -> float:
    """Microseconds of one of `steps` steps, after one to warm up."""
    loaded.run(1)
    executor.synchronize()
    began = time.perf_counter()
    loaded.run(steps)
    executor.synchronize()
    return (time.perf_counter() - began) / steps * 1e6
