"""Calls of a plan with a fusion and without it, timed in turns: what `kernels_norm.py` and `kernels_act.py` share.

Many calls in a CUDA graph, on several sets of tensors that take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parcnn.bench.layer import Layer
from parcnn.bench.machine import Machine
from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.bench.rows import Row, append
from parcnn.cuda.executor import CudaExecutor
from parcnn.ops.program import Call


def rows_of(
    executor: CudaExecutor,
    bench: str,
    problem: dict[str, Any],
    tensor_bytes: int,
    ways: Mapping[str, Sequence[Call]],
    say: Callable[[str], None],
) -> list[Row]:
    """A row of each way; the first is the one without the fusion."""
    repeated = {way: RepeatedCalls(executor, calls) for way, calls in ways.items()}
    timings = time_in_turn([way.run for way in repeated.values()], executor.synchronize)
    took = {name: timing.of(way.count) for (name, way), timing in zip(repeated.items(), timings, strict=True)}
    for way in repeated.values():
        way.free()
    apart, fused = (timing.p50_us for timing in took.values())
    what = " ".join(map(str, problem.values()))
    say(f"{what:44}{tensor_bytes / 2**20:7.1f} MiB{apart:9.1f} us{fused:9.1f} us{apart / fused:8.3f}x")
    machine = Machine.of(executor)
    return [machine.row(bench, problem, name, timing, tensor_bytes=tensor_bytes) for name, timing in took.items()]


def run(description: str, layers: Iterable[Layer], measure: Callable[[Sequence[Layer]], list[Row]]) -> None:
    """The command line: measure some layers, print, and keep the rows where asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default="", help="layers whose N,H,W,C,K,R,stride,pad has this in it")
    parser.add_argument("--rows", type=Path, help="append the rows to this .jsonl file")
    arguments = parser.parse_args()
    rows = measure([layer for layer in layers if arguments.only in layer.shape])
    if arguments.rows:
        append(arguments.rows, rows)
