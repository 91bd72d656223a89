"""Convolution + bias + ReLU + 2x2 max-pool in one kernel against one kernel each: time, memory and bytes moved.

The block stands between a 1x1 convolution, so that it has an error signal to send down, and a global mean, so that one
comes. Only the block's own calls are timed: its forward, and its forward with the whole backward (error signal, weight
and bias gradients). Peak memory is that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parcnn import nn
from parcnn.bench.machine import Machine
from parcnn.bench.programs import BoundPlan
from parcnn.bench.rows import Row
from parcnn.nn.init import manual_seed
from parcnn.ops.program import Call, Executor
from parcnn.optim import SGD
from parcnn.plan.build import Plan
from parcnn.plan.describe import outline
from parcnn.plan.options import Options
from parcnn.train.timing import StepTiming

BLOCK = "block"
VARIANTS = {"fused": Options(fuse=True), "unfused": Options(fuse=False)}


@dataclass(frozen=True)
class Layer:
    """A convolution C -> K, R x R, on H x H images in a batch of N."""

    label: str
    n: int
    c: int
    h: int
    k: int
    r: int
    padding: int


# On a GPU: what LeNet-5, cifarnet and VGG-16 (Simonyan & Zisserman 2015) have before their pools.
ON_GPU = (
    Layer("lenet5 conv1", 512, 1, 28, 6, 5, 2),
    Layer("lenet5 conv2", 512, 6, 14, 16, 5, 0),
    Layer("cifarnet block 1", 512, 3, 32, 64, 3, 1),
    Layer("cifarnet block 2", 512, 64, 16, 128, 3, 1),
    Layer("cifarnet block 3", 512, 128, 8, 256, 3, 1),
    Layer("vgg 64 at 224", 16, 64, 224, 64, 3, 1),
    Layer("vgg 512 at 28", 16, 512, 28, 512, 3, 1),
)
# On a CPU: the same kinds at sizes of which a run takes seconds.
ON_CPU = (
    Layer("lenet5 conv1", 64, 1, 28, 6, 5, 2),
    Layer("lenet5 conv2", 64, 6, 14, 16, 5, 0),
    Layer("cifarnet block 1", 32, 3, 32, 64, 3, 1),
    Layer("cifarnet block 2", 32, 64, 16, 128, 3, 1),
    Layer("vgg 64 at 112", 1, 64, 112, 64, 3, 1),
)


def run(executor: Executor, say: Callable[[str], None], layers: tuple[Layer, ...] | None = None) -> list[Row]:
    """Rows `fused`: every layer, fused and not, forward and with backward."""
    machine = Machine.of(executor)
    rows = []
    for layer in layers or (ON_CPU if executor.name == "cpu" else ON_GPU):
        for variant, options in VARIANTS.items():
            forward, training = _time(layer, options, executor)
            for mode, (timing, plan, calls) in (("forward", forward), ("forward + backward", training)):
                moved = sum(call.op.bytes(call.input_specs, call.output_specs) for call in calls)
                rows.append(
                    machine.row(
                        "fused",
                        f"{layer.label}, batch {layer.n}, {mode}",
                        variant,
                        timing,
                        peak_bytes=plan.peak_bytes,
                        mode=mode,
                        layer=layer.label,
                        nhwckr=(layer.n, layer.h, layer.h, layer.c, layer.k, layer.r),
                        bytes_moved=moved,
                        flops=sum(call.op.flops(call.input_specs, call.output_specs) for call in calls),
                        calls=len(calls),
                    )
                )
                say(
                    f"  {layer.label:<17} {mode:<19} {variant:<8} {timing.p50_us:10.1f} us"
                    f" {plan.peak_bytes / 2**20:9.2f} MiB peak {moved / 1e6:9.2f} MB moved"
                )
    return rows


def _time(layer: Layer, options: Options, executor: Executor) -> list[tuple[StepTiming, Plan, list[Call]]]:
    """(timing, plan, the block's calls) of the forward pass and of training."""
    results = []
    for mode, phases in (("predict", ("forward",)), ("train", ("forward", "backward"))):
        manual_seed(0)
        model = nn.Sequential()
        model.add_module("stem", nn.Conv2d(layer.c, layer.c, 1, bias=False))
        conv = nn.Conv2d(layer.c, layer.k, layer.r, padding=layer.padding)
        model.add_module(BLOCK, nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)))
        model.add_module("tail", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        plan = outline(
            model,
            mode=mode,
            batch=layer.n,
            sample=(layer.c, layer.h, layer.h),
            executor=executor,
            loss=nn.CrossEntropyLoss(),
            optimizer=SGD(1e-3, momentum=0.9),
            options=options,
        )

        def is_own(call: Call, phases: tuple[str, ...] = phases) -> bool:
            return call.layer.startswith(BLOCK) and call.phase in phases

        bound = BoundPlan(plan, model, executor)
        steps, repeats = (1, 5) if executor.name == "cpu" else (20, 9)
        timing = bound.time_calls(is_own, options, steps, repeats)
        bound.free()
        results.append((timing, plan, [call for call in plan.program.calls if is_own(call)]))
    return results
