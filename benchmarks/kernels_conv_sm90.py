"""bf16 convolution on tensor cores, Hopper's kernels or the portable ones, against cuDNN: layer by layer, every candidate.

Both sides run many calls in a CUDA graph, one after the other, on copies of the operands that take turns, so that no call
finds its own in L2; repeats of all variants and of cuDNN take turns, so that they meet the same clock. TFLOP/s counts the
whole convolution, also outputs that a pool's floor drops. `*` marks the variant that the launcher's rule takes. cuDNN:
PyTorch with channels_last and cudnn.benchmark, where it is installed; with a pool, its bias, ReLU and pool are kernels of
their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parcnn.bench.layer import LAYERS as SHAPES
from parcnn.bench.machine import Machine
from parcnn.bench.peers import has_torch_on_gpu
from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.bench.rows import Row, append
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import Registry, conv_mma_dgrad, conv_mma_fprop, conv_mma_wgrad, conv_sm90, conv_wgrad_sm90
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Slot
from parcnn.plan.variable import align

KERNELS = Path(conv_sm90.__file__).parent
DIRECTIONS = ("fprop", "fused", "dgrad", "wgrad")


@dataclass(frozen=True)
class Layer:
    """N images H x W of C channels, K filters R x R, the stride, and the padding on every side."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    stride: int
    pad: int

    def __str__(self) -> str:
        return f"{self.n},{self.h},{self.w},{self.c},{self.k},{self.r},{self.stride},{self.pad}"

    @property
    def flops(self) -> int:
        p, q = ((v + 2 * self.pad - self.r) // self.stride + 1 for v in (self.h, self.w))
        return 2 * self.n * p * q * self.k * self.r * self.r * self.c

    def call(self, direction: str) -> tuple[Op, tuple[Spec, ...]]:
        """The op and its operands."""
        geometry: dict[str, Any] = {"stride": (self.stride,) * 2, "pad": (self.pad,) * 4}
        x, w = Spec((self.n, self.h, self.w, self.c), "bf16"), Spec((self.k, self.r, self.r, self.c), "bf16")
        if direction == "fprop":
            return ConvFprop(**geometry), (x, w)
        if direction == "fused":
            return ConvFprop(**geometry, bias=True, act="relu", pool="max"), (x, w, Spec((self.k,)))
        (dy,) = ConvFprop(**geometry).infer(x, w)
        if direction == "wgrad":
            return ConvWgrad(**geometry, filter=(self.r, self.r)), (x, dy)
        return ConvDgrad(**geometry, image=(self.h, self.w)), (dy, w)


LAYERS = tuple(Layer(each.n, each.h, each.w, each.c, each.k, each.r, each.stride, each.pad) for each in SHAPES)


# The launchers of each op.
FAMILIES: dict[str, dict[type[Op], Any]] = {
    "sm90": {ConvFprop: conv_sm90, ConvDgrad: conv_sm90, ConvWgrad: conv_wgrad_sm90},
    "mma": {ConvFprop: conv_mma_fprop, ConvDgrad: conv_mma_dgrad, ConvWgrad: conv_mma_wgrad},
}


def call_of(op: Op, inputs: Sequence[Spec]) -> Call:
    """The call, its tensors one after the other."""
    slots, total = [], 0
    for spec in (*inputs, *op.infer(*inputs)):
        slots.append(Slot(spec, "arena", total))
        total = align(slots[-1].end)
    return Call(op, tuple(slots[: len(inputs)]), tuple(slots[len(inputs) :]), layer=op.name)


def load_variants(
    executor: CudaExecutor, family: Any, call: Call, variants: Sequence[object]
) -> tuple[RepeatedCalls, list[Callable[[int], None]]]:
    """The call on several sets of memory, and what submits rounds of it by each variant."""
    usual = executor.registry
    specs = (call.op, call.input_specs, call.output_specs, executor.device)
    calls = RepeatedCalls(executor, [call], max(family.workspace_bytes(*specs, v) for v in variants))
    runs = []
    for variant in variants:
        executor.registry = Registry([Forced(family, variant)], KERNELS)
        runs.append(calls.load())
    executor.registry = usual
    return calls, runs


def load_cudnn(layer: Layer, direction: str, copies: int, turns: int) -> Callable[[int], None]:
    """Submits rounds of PyTorch's convolution (and bias, ReLU, pool) in a CUDA graph."""
    import torch
    from torch.nn import functional

    torch.backends.cudnn.benchmark = True

    def tensor(*shape: int) -> Any:
        drawn = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        return drawn.to(memory_format=torch.channels_last)

    weights, bias = (
        tensor(layer.k, layer.c, layer.r, layer.r),
        torch.randn(layer.k, device="cuda", dtype=torch.bfloat16),
    )
    images = [tensor(layer.n, layer.c, layer.h, layer.w) for _ in range(copies)]
    options = {"stride": layer.stride, "padding": layer.pad}
    backward = direction in ("dgrad", "wgrad")
    errors = [torch.randn_like(functional.conv2d(x, weights, **options)) for x in images] if backward else images

    def call(i: int) -> Any:
        if direction == "fprop":
            return functional.conv2d(images[i], weights, **options)
        if direction == "fused":
            return functional.max_pool2d(functional.relu(functional.conv2d(images[i], weights, bias, **options)), 2)
        wanted = [direction == "dgrad", direction == "wgrad", False]
        sizes = [[layer.stride] * 2, [layer.pad] * 2, [1, 1], False, [0, 0], 1, wanted]
        return torch.ops.aten.convolution_backward(errors[i], images[i], weights, None, *sizes)

    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for i in (*range(copies), 0):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for i in range(copies * turns):
            call(i % copies)

    def run(steps: int) -> None:
        for _ in range(steps):
            graph.replay()

    torch.cuda.empty_cache()  # of what cuDNN's own trials left, and the layer before
    return run


def problems(only: str, directions: Sequence[str]) -> Iterator[tuple[Layer, str]]:
    """The layers whose name has `only` in it, in each direction."""
    for layer in LAYERS:
        if only in str(layer):
            for direction in directions:
                yield layer, direction


def measure(
    executor: CudaExecutor,
    say: Callable[[str], None],
    name_of_family: str,
    only: str,
    directions: Sequence[str],
    every: bool,
    torch: bool,
) -> list[Row]:
    """A row for each variant (or the chosen one) of each problem; `torch`: with cuDNN's time."""
    machine, rows = Machine.of(executor), []
    ratios: dict[str, list[float]] = {}
    for layer, direction in problems(only, directions):
        name = f"{direction} {layer}"
        op, inputs = layer.call(direction)
        family = FAMILIES[name_of_family][type(op)]
        reason = family.supports(op, inputs)
        if reason:
            say(f"{name}: {reason}")
            continue
        call = call_of(op, inputs)
        found = family.candidates(call, executor.device)
        chosen = found[0]
        variants = found if every else found[:1]
        calls, runs = load_variants(executor, family, call, variants)
        if torch:
            runs.append(load_cudnn(layer, direction, calls.sets, calls.turns))
        times = [timing.of(calls.count) for timing in time_in_turn(runs, executor.synchronize)]
        calls.free()
        timings, peer = dict(zip(variants, times, strict=False)), times[-1] if torch else None
        best = min(t.p50_us for t in timings.values())
        against = f", cuDNN {peer.p50_us:.1f} us, {peer.p50_us / timings[chosen].p50_us:.2f}x" if peer else ""
        say(f"{name}: {timings[chosen].p50_us:.1f} us, {timings[chosen].p50_us / best:.2f} of the best{against}")
        if peer:
            ratios.setdefault(direction, []).append(peer.p50_us / timings[chosen].p50_us)
        for variant in sorted(timings, key=lambda v: timings[v].p50_us):
            took = timings[variant]
            mark = "*" if variant == chosen else " "
            say(f"  {mark} {variant!s:44}{took.p50_us:9.1f} us{layer.flops / took.p50_us / 1e6:7.0f} TFLOP/s")
            rows.append(
                machine.row(
                    f"kernels conv {name_of_family}", name, str(variant), took, flops=layer.flops, chosen=variant == chosen,
                    peer="cudnn" if peer else None, peer_p50_us=peer.p50_us if peer else None,
                )
            )  # fmt: skip
    for direction, found_ratios in ratios.items():
        mean = float(np.exp(np.mean(np.log(found_ratios))))
        say(f"{direction}: {mean:.2f}x cuDNN (geometric mean of {len(found_ratios)}), worst {min(found_ratios):.2f}x")
    return rows


def main() -> None:
    """Measure, print, and keep the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="sm90", choices=FAMILIES, help="Hopper's kernels, or mma.sync's")
    parser.add_argument("--only", default="", help="layers whose N,H,W,C,K,R,stride,pad has this in it")
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--chosen", action="store_true", help="only the variants that the launcher takes")
    parser.add_argument("--no-torch", action="store_true", help="leave cuDNN out")
    parser.add_argument("--rows", type=Path, help="append the rows to this .jsonl file")
    arguments = parser.parse_args()
    torch = has_torch_on_gpu() and not arguments.no_torch
    every = not arguments.chosen
    rows = measure(CudaExecutor(), print, arguments.family, arguments.only, arguments.directions, every, torch)
    if arguments.rows:
        append(arguments.rows, rows)


if __name__ == "__main__":
    main()
