"""Every candidate tile of the convolution kernels on the layers of LeNet-5 and cifarnet.

Each call runs alone, many in a row on the same random tensors, replayed as a CUDA graph. GFLOP/s counts the outputs that
are computed. `*` marks the variant that the launcher's rule takes; the last column is its time over the best one's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from parcnn.bench.machine import Machine
from parcnn.bench.rows import Row, append
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import Registry, conv_dgrad, conv_fprop, conv_wgrad
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Program, Slot
from parcnn.plan.variable import align
from parcnn.train.timing import StepTiming

KERNELS = Path(conv_fprop.__file__).parent
MOST_CALLS = 32  # in a graph: its launch is then a small part of the time
CALL_FLOPS = 10**9  # and no more calls than this many operations make
REPEATS = 5
LEAST_SECONDS = 0.006  # of one repeat
NOISE = np.random.default_rng(0).standard_normal(999_983, np.float32)  # what the tensors hold, over and over
MOST_SPLITS = 4  # numbers of splits of a wgrad tile, the best estimates


@dataclass(frozen=True)
class Layer:
    """A convolution of a network; pad on every side."""

    name: str
    batches: tuple[int, ...]
    image: tuple[int, int, int]  # H, W, C
    filters: tuple[int, int, int]  # K, R, S
    pad: int = 0
    pool: str | None = None
    act: str | None = None
    bias: bool = True
    needs_dx: bool = True


LENET, CIFARNET = (64, 512, 4096), (512,)
LAYERS = (
    Layer("lenet conv 1", LENET, (28, 28, 1), (6, 5, 5), pad=2, pool="max", act="relu", needs_dx=False),
    Layer("lenet conv 2", LENET, (14, 14, 6), (16, 5, 5), pool="max", act="relu"),
    Layer("lenet conv 1 unpooled", LENET, (28, 28, 1), (6, 5, 5), pad=2, act="relu", needs_dx=False),
    Layer("lenet conv 2 unpooled", LENET, (14, 14, 6), (16, 5, 5), act="relu"),
    Layer("lenet linear 1", LENET, (5, 5, 16), (120, 5, 5), act="relu"),
    Layer("lenet linear 2", LENET, (1, 1, 120), (84, 1, 1), act="relu"),
    Layer("lenet linear 3", LENET, (1, 1, 84), (10, 1, 1)),
    Layer("cifarnet 3-64", CIFARNET, (32, 32, 3), (64, 3, 3), 1, "max", bias=False, needs_dx=False),
    Layer("cifarnet 64-64", CIFARNET, (16, 16, 64), (64, 3, 3), 1, bias=False),
    Layer("cifarnet 64-128", CIFARNET, (16, 16, 64), (128, 3, 3), 1, "max", bias=False),
    Layer("cifarnet 128-128", CIFARNET, (8, 8, 128), (128, 3, 3), 1, bias=False),
    Layer("cifarnet 128-256", CIFARNET, (8, 8, 128), (256, 3, 3), 1, "max", bias=False),
    Layer("cifarnet 256-256", CIFARNET, (4, 4, 256), (256, 3, 3), 1, bias=False),
    Layer("cifarnet linear", CIFARNET, (1, 1, 256), (10, 1, 1)),
)


def problems() -> Iterator[tuple[str, ModuleType, Op, tuple[Spec, ...]]]:
    """(name, family, op, inputs) of every layer, batch and direction."""
    for layer in LAYERS:
        (h, w, c), (k, r, s) = layer.image, layer.filters
        shape = {"pad": (layer.pad,) * 4, "pool": layer.pool}
        for batch in layer.batches:
            x, filters, b = Spec((batch, h, w, c)), Spec((k, r, s, c)), (Spec((k,)),) * layer.bias
            fprop = ConvFprop(**shape, bias=layer.bias, act=layer.act)
            dy, *idx = fprop.infer(x, filters)
            name = f"{layer.name}, batch {batch}"
            yield f"{name}, fprop", conv_fprop, fprop, (x, filters, *b)
            if layer.needs_dx:
                yield f"{name}, dgrad", conv_dgrad, ConvDgrad(**shape, image=(h, w)), (dy, filters, *idx)
            wgrad = ConvWgrad(**shape, filter=(r, s), bias=layer.bias)
            yield f"{name}, wgrad", conv_wgrad, wgrad, (x, dy, *idx)


def call_of(executor: CudaExecutor, op: Op, inputs: Sequence[Spec]) -> tuple[Call, int]:
    """The call on tensors side by side in one region, and the region's size."""
    outputs = op.infer(*inputs)
    scratch = executor.workspace_bytes(op, tuple(inputs), outputs)
    places, total = [], 0
    for spec in (*inputs, *outputs, Spec((scratch,), "u8")):
        places.append(Slot(spec, "arena", total))
        total = align(places[-1].end)
    count = len(inputs)
    call = Call(op, tuple(places[:count]), tuple(places[count:-1]), places[-1] if scratch else None, layer=op.name)
    return call, total


def timed(variants: Sequence[Any]) -> list[Any]:
    """The variants without those that are but further numbers of splits of the same tile; the order is kept."""
    kept: list[Any] = []
    for variant in variants:
        form = getattr(variant, "form", variant)
        if sum(getattr(other, "form", other) == form for other in kept) < MOST_SPLITS:
            kept.append(variant)
    return kept


def time_variant(
    executor: CudaExecutor, family: ModuleType, variant: object, op: Op, inputs: tuple[Spec, ...]
) -> StepTiming:
    """Time of one call by one variant."""
    executor.registry = Registry([Forced(family, variant)], KERNELS)
    call, total = call_of(executor, op, inputs)
    flops = op.flops(inputs, call.output_specs)
    count = max(1, min(MOST_CALLS, CALL_FLOPS // flops))
    calls = tuple(
        Call(op, call.inputs, call.outputs, call.workspace, op.name, after=(i - 1,) if i else ()) for i in range(count)
    )
    region = executor.region("arena", total)
    region.write(np.resize(NOISE, total // 4))
    program = executor.load(Program(op.name, calls, {"arena": total}), {"arena": region})

    def run(steps: int) -> float:
        executor.synchronize()
        began = time.perf_counter()
        program.run(steps)
        executor.synchronize()
        return time.perf_counter() - began

    run(9), run(8)  # the first launch, then both graphs
    steps = 8 * max(1, min(60, round(LEAST_SECONDS / max(run(8), 1e-6))))
    times = [run(steps) / steps / count * 1e6 for _ in range(REPEATS)]
    region.free()
    p20, p50, p80 = np.percentile(times, (20, 50, 80))
    return StepTiming(float(p20), float(p50), float(p80))


def measure(executor: CudaExecutor, say: Callable[[str], None], only: str = "", every: bool = True) -> list[Row]:
    """A row for each variant (or the chosen ones) of each problem whose name has `only` in it."""
    machine, rows = Machine.of(executor), []
    usual = executor.registry
    for name, family, op, inputs in problems():
        if only not in name:
            continue
        executor.registry = usual
        call, _ = call_of(executor, op, inputs)
        flops = op.flops(inputs, call.output_specs)
        chosen, *others = timed(family.candidates(call, executor.device))
        timings = {v: time_variant(executor, family, v, op, inputs) for v in (chosen, *(others if every else ()))}
        best = min(timing.p50_us for timing in timings.values())
        say(f"{name}: {timings[chosen].p50_us / best:.2f} of the best")
        for variant in sorted(timings, key=lambda v: timings[v].p50_us):
            timing = timings[variant]
            mark = "*" if variant == chosen else " "
            say(f"  {mark} {variant!s:34}{timing.p50_us:10.2f} us{flops / timing.p50_us / 1e3:10.0f} GFLOP/s")
            rows.append(machine.row("kernels conv", name, str(variant), timing, flops=flops, chosen=variant == chosen))
    executor.registry = usual
    return rows


def main() -> None:
    """Measure, print, and keep the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="problems whose name has this in it")
    parser.add_argument("--chosen", action="store_true", help="only the variants that the launchers take")
    parser.add_argument("--rows", type=Path, help="append the rows to this .jsonl file")
    arguments = parser.parse_args()
    rows = measure(CudaExecutor(), print, arguments.only, not arguments.chosen)
    if arguments.rows:
        append(arguments.rows, rows)


if __name__ == "__main__":
    main()
