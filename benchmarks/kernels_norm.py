"""An input gradient and the backward of the batch norm and ReLU below it: the norm's sums by a pass of its own, or by dgrad.

3x3 filters, bf16. Calls out of a plan, many in a CUDA graph, on several sets of tensors that take turns. Both ways are timed
also where the plan would not take dgrad's sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from parcnn import nn
from parcnn.bench.layer import Layer
from parcnn.bench.machine import Machine
from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.bench.rows import Row, append
from parcnn.cuda.executor import CudaExecutor
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad
from parcnn.ops.norm import BatchNormDgrad
from parcnn.ops.program import Call
from parcnn.optim import SGD
from parcnn.plan.describe import outline

LAYERS = tuple(
    Layer(n, side, side, c, k, 3, 1, 1)
    for n, side, c, k in (
        (256, 56, 64, 64), (256, 28, 128, 128), (256, 14, 256, 256), (256, 7, 512, 512), (64, 28, 512, 512), (64, 56, 64, 64),
        (64, 28, 128, 128), (64, 14, 256, 256), (512, 32, 64, 64), (512, 16, 128, 128), (512, 16, 64, 256), (512, 8, 256, 256),
        (512, 8, 64, 64), (2000, 7, 256, 256), (2000, 15, 64, 64),
    )
)  # fmt: skip


class Choosing(CudaExecutor):
    """Takes dgrad's sums always, or never."""

    takes_sums = False

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """As it is, but for the sums."""
        if isinstance(op, BatchNormDgrad) and op.sums:
            return self.takes_sums
        return super().can_fuse(op, inputs) and (self.takes_sums or not (isinstance(op, ConvDgrad) and op.sums))


def calls_of(executor: Choosing, layer: Layer, takes_sums: bool) -> list[Call]:
    """The layer's input gradient, and the norm's behind it."""
    executor.takes_sums = takes_sums
    model = nn.Sequential(
        nn.Conv2d(layer.c, layer.c, 1, bias=False), nn.BatchNorm2d(layer.c), nn.ReLU(),
        nn.Conv2d(layer.c, layer.k, layer.r, padding=layer.pad, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    plan = outline(
        model, mode="train", batch=layer.n, sample=(layer.c, layer.h, layer.w), executor=executor,
        loss=nn.CrossEntropyLoss(), optimizer=SGD(0.1), precision="bf16",
    )  # fmt: skip
    found = [call for call in plan.program.calls if isinstance(call.op, ConvDgrad | BatchNormDgrad)]
    if [getattr(call.op, "sums", None) for call in found] != [takes_sums] * 2:
        raise ValueError(f"{layer.shape}: no plan of an input gradient and a batch norm, but {found}")
    return found


def measure(executor: Choosing, layers: Sequence[Layer], say: Callable[[str], None]) -> list[Row]:
    """Rows of each layer, both ways."""
    machine, rows = Machine.of(executor), []
    for layer in layers:
        ways = {
            way: RepeatedCalls(executor, calls_of(executor, layer, way == "dgrad")) for way in ("own pass", "dgrad")
        }
        timings = time_in_turn([way.run for way in ways.values()], executor.synchronize)
        took = {name: timing.of(way.count) for (name, way), timing in zip(ways.items(), timings, strict=True)}
        own, dgrad = took["own pass"].p50_us, took["dgrad"].p50_us
        tensor = 2 * layer.n * layer.h * layer.w * layer.c
        say(f"{layer.shape:30}{tensor / 2**20:7.1f} MiB{own:9.1f} us{dgrad:9.1f} us{own / dgrad:8.3f}x")
        problem = {"shape": layer.shape}
        rows += [machine.row("norm sums", problem, name, timing, tensor_bytes=tensor) for name, timing in took.items()]
        for way in ways.values():
            way.free()
    return rows


def main() -> None:
    """Measure, print, and keep the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="layers whose N,H,W,C,K,R,stride,pad has this in it")
    parser.add_argument("--rows", type=Path, help="append the rows to this .jsonl file")
    arguments = parser.parse_args()
    rows = measure(Choosing(), [layer for layer in LAYERS if arguments.only in layer.shape], print)
    if arguments.rows:
        append(arguments.rows, rows)


if __name__ == "__main__":
    main()
