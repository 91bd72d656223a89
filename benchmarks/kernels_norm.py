"""An input gradient and the backward of the batch norm and ReLU below it: the norm's sums by a pass of its own, or by dgrad.

3x3 filters, bf16. Both ways are timed also where the plan would not take dgrad's sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import both_ways

from parcnn import nn
from parcnn.bench.layer import Layer
from parcnn.bench.rows import Row
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


def measure(layers: Sequence[Layer]) -> list[Row]:
    """Rows of each layer, both ways."""
    executor = Choosing()
    return [
        row
        for layer in layers
        for row in both_ways.rows_of(
            executor,
            "norm sums",
            {"shape": layer.shape},
            2 * layer.n * layer.h * layer.w * layer.c,
            {way: calls_of(executor, layer, way == "dgrad") for way in ("own pass", "dgrad")},
            print,
        )
    ]


if __name__ == "__main__":
    both_ways.run(__doc__.splitlines()[0], LAYERS, measure)
