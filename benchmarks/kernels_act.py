"""A convolution and the gelu or silu behind it, and both derivatives: in passes of their own, or in epilogues.

Training on Hopper in bf16: forward, where what the activation is taken of is kept; backward the input gradient of a convolution
above, of the same filters and channels. Inference by the kernels that run on every GPU, bf16's by mma.sync and those of fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import both_ways

from parcnn import nn
from parcnn.bench.layer import Layer
from parcnn.bench.rows import Row
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.pointwise import Act, ActDgrad
from parcnn.ops.program import Call
from parcnn.optim import SGD
from parcnn.plan.describe import outline

LAYERS = tuple(
    Layer(n, side, side, c, k, r, 1, r // 2)
    for n, side, c, k, r in (
        (256, 56, 64, 64, 3), (256, 28, 128, 128, 3), (256, 14, 256, 256, 3), (256, 7, 512, 512, 3), (512, 16, 128, 128, 3),
        (512, 8, 256, 256, 3), (256, 56, 96, 384, 1), (256, 28, 192, 768, 1), (256, 14, 384, 1536, 1), (256, 7, 768, 3072, 1),
        (512, 16, 64, 64, 1),
    )
)  # fmt: skip
ACTIVATIONS: dict[str, nn.Module] = {"gelu": nn.GELU(), "silu": nn.SiLU()}
PORTABLE_LAYERS = (LAYERS[0], LAYERS[1], LAYERS[7])
PORTABLE_KERNELS = {"mma.sync": "bf16", "fp32": "fp32"}


class Choosing(CudaExecutor):
    """Takes activations by their input into epilogues, or never."""

    fuses = False

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """As it is, but for those."""
        by_input = isinstance(op, ConvFprop | ConvDgrad) and op.act is not None and op.act not in FROM_OUTPUT
        return (self.fuses or not by_input) and super().can_fuse(op, inputs)


def calls_of(
    executor: Choosing, layer: Layer, act: str, mode: str, precision: str, fuses: bool
) -> dict[str, list[Call]]:
    """By direction: the convolution forward with its activation, in training the next's input gradient with the derivative."""
    executor.fuses = fuses
    model = nn.Sequential(
        nn.Conv2d(layer.c, layer.c, 1, bias=False), nn.Conv2d(layer.c, layer.k, layer.r, padding=layer.pad), ACTIVATIONS[act],
        nn.Conv2d(layer.k, layer.c, layer.r, padding=layer.pad), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    plan = outline(
        model, mode=mode, batch=layer.n, sample=(layer.c, layer.h, layer.w), executor=executor,
        loss=nn.CrossEntropyLoss(), optimizer=SGD(0.1), precision=precision,
    )  # fmt: skip
    calls = plan.program.calls
    found = {"forward": [call for call in calls if isinstance(call.op, ConvFprop | Act) and call.layer in ("1", "2")]}
    if mode == "train":
        found["backward"] = [
            call for call in calls if isinstance(call.op, ConvDgrad | ActDgrad) and call.layer in ("2", "3")
        ]
    for part in found.values():
        if len(part) != (1 if fuses else 2):
            raise ValueError(f"{layer.shape}: {[call.op for call in part]}")
    return found


def rows_of(executor: Choosing, layer: Layer, act: str, mode: str, precision: str, kernels: str | None) -> list[Row]:
    """Rows of each direction, both ways."""
    ways = {way: calls_of(executor, layer, act, mode, precision, way == "epilogue") for way in ("own pass", "epilogue")}
    nbytes = (2 if precision == "bf16" else 4) * layer.n * layer.h * layer.w * layer.k
    rows = []
    for direction in ways["epilogue"]:
        problem = {"shape": layer.shape, "act": act, "direction": f"{direction}, {kernels}" if kernels else direction}
        calls = {way: found[direction] for way, found in ways.items()}
        rows += both_ways.rows_of(executor, "activation", problem, nbytes, calls, print)
    return rows


def measure(layers: Sequence[Layer]) -> list[Row]:
    """Rows of each layer, activation and direction, both ways."""
    executor, portable, rows = Choosing(), Choosing(registry=REGISTRY.portable), []
    for layer in layers:
        for act in ACTIVATIONS:
            rows += rows_of(executor, layer, act, "train", "bf16", None)
            for kernels, precision in PORTABLE_KERNELS.items() if layer in PORTABLE_LAYERS else ():
                rows += rows_of(portable, layer, act, "predict", precision, kernels)
    return rows


if __name__ == "__main__":
    both_ways.run(__doc__.splitlines()[0], LAYERS, measure)
