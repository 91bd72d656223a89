"""The memory-bound kernels on typical sizes, against a copy of as many bytes.

Each op runs alone, as a program of calls on tensors of their own, enough of them that none is still in the L2 cache when
its turn comes again ("cold"), or on the same tensors over and over ("warm": how a small network finds them). Steps are
replayed as CUDA graphs. GB/s counts the fewest bytes that the op can move (`Op.bytes`). A copy's time is that of moving as
many bytes, half read and half written, under the same conditions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from parcnn.bench.machine import Machine
from parcnn.bench.rows import Row, append
from parcnn.cuda.executor import CudaExecutor
from parcnn.ops.base import Op, Spec
from parcnn.ops.feed import STATE, GatherBatch
from parcnn.ops.loss import CrossEntropy
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormTrain
from parcnn.ops.pointwise import Act, ActDgrad, Add, Cast, Dropout
from parcnn.ops.pool import AdaptiveAvgDgrad, AdaptiveAvgFprop, PoolDgrad, PoolFprop
from parcnn.ops.program import Call, Program, Slot
from parcnn.ops.shape import Cat, ChannelSlice, ToChannelsFirst
from parcnn.ops.update import AdamUpdate, SgdUpdate
from parcnn.plan.variable import align
from parcnn.train.timing import StepTiming

COLD_BYTES = 512 * 10**6  # ten times an H200's L2 cache
MOST_CALLS = 64
REPEATS = 9
LEAST_SECONDS = 0.02  # of one repeat


def f32(*shape: int) -> Spec:
    """A tensor of 32-bit floats."""
    return Spec(shape)


def i32(*shape: int) -> Spec:
    """A tensor of 32-bit integers."""
    return Spec(shape, "i32")


Problem = tuple[str, Op, tuple[Spec, ...]]


def problems() -> list[Problem]:
    """(name, op, inputs): cifarnet's images at batch 512, ResNet-50's last at 64, and what LeNet-5 has at 64."""
    lenet = [f32(6, 5, 5, 1), f32(6), f32(16, 5, 5, 6), f32(16), f32(120, 400), f32(120), f32(84, 120), f32(84)]
    cifarnet = [
        f32(64, 3, 3, 3),
        *(f32(k, 3, 3, c) for k, c in ((64, 64), (128, 64), (128, 128), (256, 128), (256, 256))),
    ]
    one, million, many = f32(1, 4), f32(10**6), f32(25 * 10**6)
    return [
        *on_images("f32"),
        *((f"{name} bf16", op, inputs) for name, op, inputs in on_images("bf16")),
        ("sgd LeNet-5", SgdUpdate(len(lenet), momentum=0.9), (one, STATE, *lenet * 3)),
        ("sgd 1M", SgdUpdate(momentum=0.9), (one, STATE, *[million] * 3)),
        ("sgd 25M", SgdUpdate(momentum=0.9), (one, STATE, *[many] * 3)),
        ("adam 1M", AdamUpdate(), (one, STATE, *[million] * 4)),
        ("adam 25M", AdamUpdate(), (one, STATE, *[many] * 4)),
        ("cast LeNet-5's filters to bf16", Cast("bf16"), tuple(lenet[::2])),
        ("cast cifarnet's filters to bf16", Cast("bf16"), tuple(cifarnet)),
        ("cast 25M to bf16", Cast("bf16"), (many,)),
        ("cast 25M to f32", Cast("f32"), (Spec(many.shape, "bf16"),)),
    ]


def on_images(dtype: str) -> list[Problem]:
    """Those on images and predictions of one type."""

    def data(*shape: int) -> Spec:
        return Spec(shape, dtype)

    x, c = data(512, 16, 16, 64), f32(64)
    deep, d = data(64, 7, 7, 2048), f32(2048)
    small, s = data(64, 8, 8, 64), f32(64)
    pooled = data(512, 8, 8, 64)
    mnist = (Spec((60000, 28, 28, 1), "u8"), i32(60000), i32(60000), STATE)
    cifar = (Spec((50000, 32, 32, 3), "u8"), i32(50000), i32(50000), STATE)
    result: list[Problem] = []
    for name, image, channel in (("512x64x16x16", x, c), ("64x2048x7x7", deep, d), ("64x64x8x8", small, s)):
        result += [
            (f"batch norm train {name}", BatchNormTrain(act="relu"), (image, *[channel] * 4)),
            (f"batch norm dgrad {name}", BatchNormDgrad(act="relu"), (image, image, *[channel] * 4)),
            (f"batch norm infer {name}", BatchNormInfer(act="relu"), (image, *[channel] * 4)),
        ]
    for kind in ("relu", "gelu"):
        result += [
            (f"act {kind} 512x64x16x16", Act(kind), (x,)),
            (f"act dgrad {kind} 512x64x16x16", ActDgrad(kind), (x, x)),
        ]
    return [
        *result,
        ("add 512x64x16x16", Add("relu"), (x, x)),
        ("dropout 512x64x16x16", Dropout(0.5), (x, STATE)),
        ("max-pool 2x2 512x64x16x16", PoolFprop(), (x,)),
        ("max-pool 2x2 dgrad 512x64x16x16", PoolDgrad(image=(16, 16)), (pooled, Spec(pooled.shape, "u8"))),
        ("max-pool 3x3/2 512x64x16x16", PoolFprop("max", (3, 3), (2, 2), (1, 1)), (x,)),
        (
            "max-pool 3x3/2 dgrad 512x64x16x16",
            PoolDgrad("max", (3, 3), (2, 2), (1, 1), image=(16, 16)),
            (pooled, Spec(pooled.shape, "u8")),
        ),
        ("avg-pool 3x3/2 512x64x16x16", PoolFprop("avg", (3, 3), (2, 2), (1, 1)), (x,)),
        ("max-pool global 512x256x4x4", PoolFprop("max", (4, 4), (4, 4)), (data(512, 4, 4, 256),)),
        ("avg-pool global 64x2048x7x7", AdaptiveAvgFprop(), (deep,)),
        ("avg-pool global dgrad 64x2048x7x7", AdaptiveAvgDgrad((7, 7)), (data(64, 1, 1, 2048),)),
        ("cat 512x(64+64)x16x16", Cat(), (x, x)),
        ("channels first 512x64x16x16", ToChannelsFirst(), (x,)),
        ("channels first 64x16x5x5", ToChannelsFirst(), (data(64, 5, 5, 16),)),
        ("cross-entropy 64x10", CrossEntropy(), (data(64, 10), i32(64))),
        ("cross-entropy 4096x10", CrossEntropy(), (data(4096, 10), i32(4096))),
        ("cross-entropy 256x1000", CrossEntropy(), (data(256, 1000), i32(256))),
        ("gather 64 of MNIST", GatherBatch(64, dtype), mnist),
        ("gather 4096 of CIFAR", GatherBatch(4096, dtype), cifar),
        ("gather 4096 of CIFAR, augmented", GatherBatch(4096, dtype, flip=True, shift_px=4), cifar),
    ]


def time_op(executor: CudaExecutor, op: Op, inputs: Sequence[Spec], *, cold: bool) -> StepTiming:
    """Time of one call, on zeros: labels, samples and rows of logs are then in range."""
    outputs = op.infer(*inputs)
    scratch = executor.workspace_bytes(op, tuple(inputs), outputs)
    workspace = (Spec((scratch,), "u8"),) if scratch else ()
    count = min(MOST_CALLS, -(-COLD_BYTES // op.bytes(tuple(inputs), outputs))) if cold else 1
    place = _Arena()
    kept = [place(spec) if isinstance(op, GatherBatch) else None for spec in inputs]  # there is one data set
    calls = []
    for i in range(count):
        own = tuple(slot or place(spec) for slot, spec in zip(kept, inputs, strict=True))
        results = tuple(place(spec) for spec in outputs)
        space = place(workspace[0]) if workspace else None
        calls.append(Call(op, own, results, space, layer=op.name, after=(i - 1,) if i else ()))
    region = executor.region("arena", place.total)
    program = executor.load(Program(op.name, tuple(calls), {"arena": place.total}), {"arena": region})

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


class _Arena:
    """Gives out places one after the other."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, spec: Spec) -> Slot:
        slot = Slot(spec, "arena", self.total)
        self.total = align(slot.end)
        return slot


def measure(executor: CudaExecutor, say: Callable[[str], None], only: str = "") -> list[Row]:
    """A row for each problem whose name has `only` in it."""
    machine = Machine.of(executor)
    rows: list[Row] = []
    copies: dict[Spec, StepTiming] = {}  # of as many bytes
    say(f"{'':40}{'cold us':>9}{'GB/s':>7}{'copy us':>9}{'of copy':>9}{'warm us':>9}{'launches':>10}")
    for name, op, inputs in problems():
        if only not in name:
            continue
        outputs = op.infer(*inputs)
        nbytes = op.bytes(inputs, outputs)
        half = f32(1, max(1, nbytes // 8))
        if half not in copies:
            copies[half] = time_op(executor, ChannelSlice(0, half.size), (half,), cold=True)
        copy = copies[half]
        cold, warm = (time_op(executor, op, inputs, cold=cold) for cold in (True, False))
        kernels = executor.kernel_name(op, inputs, outputs)
        say(
            f"{name:40}{cold.p50_us:9.2f}{nbytes / cold.p50_us / 1e3:7.0f}{copy.p50_us:9.2f}"
            f"{copy.p50_us / cold.p50_us:9.0%}{warm.p50_us:9.2f}{kernels.count('+') + 1:10}"
        )
        for variant, timing in (("cold", cold), ("warm", warm)):
            rows.append(
                machine.row(
                    "kernels memory",
                    name,
                    variant,
                    timing,
                    peer="copy of as many bytes",
                    peer_p50_us=copy.p50_us if variant == "cold" else None,
                    bytes_moved=nbytes,
                    kernels=kernels,
                )
            )
    return rows


def main() -> None:
    """Measure, print, and keep the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="problems whose name has this in it")
    parser.add_argument("--rows", type=Path, help="append the rows to this .jsonl file")
    arguments = parser.parse_args()
    rows = measure(CudaExecutor(), print, arguments.only)
    if arguments.rows:
        append(arguments.rows, rows)


if __name__ == "__main__":
    main()
