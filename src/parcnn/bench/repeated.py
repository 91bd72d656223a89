"""Calls out of a plan, run again and again on random tensors: what a layer costs, or a variant of its kernel."""

from __future__ import annotations

import functools
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil

import numpy as np

from parcnn.cuda.executor import STEPS_PER_GRAPH
from parcnn.errors import ArgumentError
from parcnn.ops.base import Spec
from parcnn.ops.program import Call, Executor, Program, Slot
from parcnn.plan.options import Options
from parcnn.plan.schedule import schedule
from parcnn.plan.variable import align
from parcnn.train.timing import StepTiming

SETS_BYTES = 256 << 20  # tensors of all sets together: several times what a GPU's L2 holds
FEWEST_SETS, MOST_SETS = 2, 16
GRAPH_US = 1000.0  # of a graph, at the least: launching it costs next to nothing beside it
FP32_FLOPS_PER_US, BF16_FLOPS_PER_US, BYTES_PER_US = 60e6, 800e6, 4e6  # a fast GPU's
REPEAT_SECONDS = 0.01
MOST_STEPS = 7  # of a repeat: one more, and the executor would capture long ones, too, several times in one graph
_PATTERN_BYTES, _SHIFT_BYTES = 8 << 20, 4096  # random bytes that a tensor repeats; sets start so far apart in them


class RepeatedCalls:
    """`calls` of one plan, on several sets of memory that take turns, so that none finds its operands in L2.

    Calls of a set run on the streams that the plan would give them; sets follow each other. What a call reads before any
    writes it is random: floats standard normal, integers any bits. `scratch_bytes`: the most scratch memory that a call may
    want of a program loaded later. Raises what the executor raises where memory or a kernel lacks. `free` gives the
    memory back.
    """

    def __init__(self, executor: Executor, calls: Sequence[Call], scratch_bytes: int = 0) -> None:
        self._executor, self._scratch_bytes = executor, scratch_bytes
        self._calls, self._set_bytes = _placed(executor, calls, scratch_bytes)
        self.sets = max(FEWEST_SETS, min(MOST_SETS, ceil(SETS_BYTES / self._set_bytes)))
        self.turns = min(STEPS_PER_GRAPH, ceil(GRAPH_US / (self.sets * least_us(calls))))
        self._region = executor.region("arena", self.sets * self._set_bytes)
        self._fill()
        self.run = self.load()

    @property
    def count(self) -> int:
        """Sets that a step runs, one after the other: each of them `turns` times."""
        return self.turns * self.sets

    def load(self) -> Callable[[int], None]:
        """A program of the calls, as the executor runs them now; what comes back submits so many steps of it."""
        own, set_bytes = _placed(self._executor, self._calls, self._scratch_bytes)
        if set_bytes > self._set_bytes:
            raise ArgumentError(
                "a program wants more scratch memory than there is room for",
                where=own[0].op.name,
                expected=f"at most {self._set_bytes:,} bytes a set",
                got=f"{set_bytes:,}",
            )
        captured = (
            self.turns if self.turns == STEPS_PER_GRAPH else 1
        )  # turns that are steps of the executor's own graph
        offsets = [i % self.sets * self._set_bytes for i in range(self.count // captured)]
        repeated = tuple(_in_turn(own, offsets))
        streams = 1 + max(call.stream for call in own)
        program = Program(own[0].op.name, repeated, {"arena": self._region.nbytes}, streams)
        loaded = self._executor.load(program, {"arena": self._region})
        return lambda steps: loaded.run(steps * captured)

    def free(self) -> None:
        """Give the memory back."""
        self._region.free()

    def _fill(self) -> None:
        staged: dict[str, np.ndarray] = {}  # in memory from which copies are fast: a layer may have gigabytes
        for slot in _read_first(self._calls):
            kind = slot.spec.dtype if slot.spec.dtype in ("f32", "bf16") else "bits"
            if kind not in staged:
                staged[kind] = self._executor.pinned((_PATTERN_BYTES + MOST_SETS * _SHIFT_BYTES,), np.dtype(np.uint8))
                staged[kind][:] = _pattern(kind)
            for i in range(self.sets):
                for first in range(0, slot.spec.nbytes, _PATTERN_BYTES):
                    count = min(_PATTERN_BYTES, slot.spec.nbytes - first)
                    shifted = staged[kind][i * _SHIFT_BYTES :][:count]
                    self._region.write(shifted, i * self._set_bytes + slot.offset + first)


def time_in_turn(
    runs: Sequence[Callable[[int], None]],
    wait: Callable[[], object],
    repeats: int = 9,
    repeat_seconds: float | None = None,
    pause_seconds: float = 0.0,
) -> list[StepTiming]:
    """Microseconds of a step of each of `runs`, which submit so many steps; `wait` waits for them.

    A repeat takes at least `repeat_seconds` (REPEAT_SECONDS), within MOST_STEPS. Their repeats take turns, so that what the
    clock of the chip does meets all alike. pause_seconds: the chip rests so long before each repeat: under load without a
    pause a GPU may have to lower its clock, as many tensor-core products draw more power than its limit.
    """

    def seconds(run: Callable[[int], None], steps: int) -> float:
        wait()
        began = time.perf_counter()
        run(steps)
        wait()
        return time.perf_counter() - began

    least = REPEAT_SECONDS if repeat_seconds is None else repeat_seconds
    steps = []
    for run in runs:
        seconds(run, 2)  # the first launches, then a graph
        steps.append(max(1, min(MOST_STEPS, ceil(least / max(seconds(run, 1), 1e-6)))))

    def rested(run: Callable[[int], None], steps: int) -> float:
        wait()
        time.sleep(pause_seconds)
        return seconds(run, steps)

    times = [[rested(run, n) / n * 1e6 for run, n in zip(runs, steps, strict=True)] for _ in range(repeats)]
    return [StepTiming(*(float(p) for p in np.percentile(of_one, (20, 50, 80)))) for of_one in zip(*times, strict=True)]


def least_us(calls: Sequence[Call]) -> float:
    """Microseconds below which no GPU runs the calls: a bound for how long to measure."""
    flops = sum(call.op.flops(call.input_specs, call.output_specs) for call in calls)
    nbytes = sum(call.op.bytes(call.input_specs, call.output_specs) for call in calls)
    single = any(spec.dtype == "f32" for spec in calls[0].input_specs[:1])
    return max(flops / (FP32_FLOPS_PER_US if single else BF16_FLOPS_PER_US), nbytes / BYTES_PER_US, 2.0)


@functools.cache
def _pattern(kind: str) -> np.ndarray:
    """Random bytes: 'f32' and 'bf16' standard normal numbers, else any 'bits'."""
    nbytes = _PATTERN_BYTES + MOST_SETS * _SHIFT_BYTES
    if kind == "bits":
        return np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    normal = np.random.default_rng(0).standard_normal(nbytes // (4 if kind == "f32" else 2), np.float32)
    return (normal if kind == "f32" else (normal.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)


def _placed(executor: Executor, calls: Sequence[Call], least_scratch: int) -> tuple[tuple[Call, ...], int]:
    """The calls with their tensors close together in one region, and its size; tensors that share memory still do.

    Each has room for `least_scratch` bytes of scratch memory or what it takes.
    """
    spans: list[tuple[str, int, int]] = []  # of slots that overlap: region, first byte, end
    for region, first, end in sorted({(s.region, s.offset, s.end) for c in calls for s in (*c.inputs, *c.outputs)}):
        if spans and spans[-1][0] == region and first < spans[-1][2]:
            spans[-1] = (region, spans[-1][1], max(end, spans[-1][2]))
        else:
            spans.append((region, first, end))
    starts = [(region, first) for region, first, _ in spans]
    homes, size = [], 0
    for _, first, end in spans:
        homes.append(size)
        size += align(end - first)

    def place(slot: Slot) -> Slot:
        i = bisect_right(starts, (slot.region, slot.offset)) - 1
        return replace(slot, region="arena", offset=homes[i] + slot.offset - starts[i][1])

    placed = []
    for call in calls:
        nbytes = executor.workspace_bytes(call.op, call.input_specs, call.output_specs)
        scratch = Slot(Spec((nbytes,), "u8"), "arena", size) if nbytes else None
        size += align(max(nbytes, least_scratch))
        inputs, outputs = tuple(map(place, call.inputs)), tuple(map(place, call.outputs))
        placed.append(replace(call, inputs=inputs, outputs=outputs, workspace=scratch))
    return schedule(placed, Options().side_streams if executor.concurrent else 0), size


def _in_turn(calls: Sequence[Call], offsets: Sequence[int]) -> Iterator[Call]:
    """The calls at each of the offsets, all of one set after all of the set before."""
    for turn, offset in enumerate(offsets):
        first = turn * len(calls)
        before = tuple(range(first - len(calls), first)) if turn else ()
        for call in calls:
            inputs, outputs = (
                [replace(s, offset=s.offset + offset) for s in side] for side in (call.inputs, call.outputs)
            )
            scratch = replace(call.workspace, offset=call.workspace.offset + offset) if call.workspace else None
            after = tuple(first + i for i in call.after) or before
            yield replace(call, inputs=tuple(inputs), outputs=tuple(outputs), workspace=scratch, after=after)


def _read_first(calls: Sequence[Call]) -> list[Slot]:
    """Slots that a call reads and none before it writes."""
    written: list[Slot] = []
    found: dict[tuple[int, int], Slot] = {}
    for call in calls:
        for slot in call.inputs:
            if not any(w.offset < slot.end and slot.offset < w.end for w in written):
                found[slot.offset, slot.end] = slot
        written += call.written
    return list(found.values())
