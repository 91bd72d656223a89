"""Launcher of conv_winograd.cu: 3x3 convolutions of stride 1, and their input's gradient, by Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple, cast

import numpy as np

from parcnn.cuda.kernels.common import refuse_dtype
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, Conv, unsupported
from parcnn.cuda.launch import Argument, Device, Kernel, Launch
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad)
SOURCE = "conv_winograd.cu"
KERNEL, FILTERS_KERNEL = Kernel(SOURCE, "conv_winograd"), Kernel(SOURCE, "conv_winograd_filters")
VARIANT = "2x2 of 3x3"  # the only one
TILES, FILTERS, DEPTH, THREADS = 32, 64, 8, 256  # twins of conv_winograd.cu's
SHARED_BYTES = 2 * 4 * DEPTH * (16 * FILTERS + 16 * TILES + 4)
PRODUCTS = 16
# A block's start and end, a step of DEPTH channels, in clock cycles; the filters' transform: its start, bytes a cycle.
BLOCK_CYCLES, STEP_CYCLES = 6000.0, 2950.0
FILTER_CYCLES, FILTER_BYTES = 4000.0, 1000.0


class _Problem(NamedTuple):
    """What is computed, as a forward convolution whose p and q count tiles; the outputs' sides before a pool."""

    conv: Conv
    height: int
    width: int
    turned: bool
    act: str | None

    @property
    def tiles(self) -> int:
        return self.conv.n * self.conv.p * self.conv.q


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvDgrad):
        return f"{op.name} is not a convolution or its input gradient"
    outputs, w = op.infer(*inputs), inputs[1]
    forward = isinstance(op, ConvFprop)
    if (*w.shape[1:3], *op.stride, *op.dilation) != (3, 3, 1, 1, 1, 1):
        return "Winograd's algorithm runs 3x3 filters of stride and dilation 1"
    if not forward and (op.pool or op.act not in (None, *FROM_OUTPUT)):
        return "Winograd's input gradient has no pool, and an activation whose derivative follows from its output"
    floats = [spec for spec in (*inputs, *outputs) if spec.dtype != "u2"]
    image = inputs[0] if forward else outputs[0]
    if reason := refuse_dtype(*floats) or unsupported(op, floats, (image.shape[1], image.shape[2]), (3, 3)):
        return reason
    if not all(spec.size for spec in (*inputs, *outputs)):
        return "there is nothing to compute"
    conv = _problem(op, inputs, outputs).conv
    if conv.c % DEPTH or conv.k % 4:
        return f"Winograd's algorithm sums multiples of {DEPTH} channels to multiples of 4, not {conv.c} to {conv.k}"
    if 4 * PRODUCTS * conv.c * (conv.k + FILTERS) >= 2**31:
        return "the transformed filters have 2**31 bytes or more"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: str | None = None
) -> int:
    """The transformed filters."""
    conv = _problem(op, inputs, outputs).conv
    return 4 * PRODUCTS * conv.c * ceil(conv.k / FILTERS) * FILTERS


def candidates(call: Call, device: Device) -> list[str]:
    """The one variant."""
    return [VARIANT]


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds."""
    problem = _problem(call.op, call.input_specs, call.output_specs)
    conv = problem.conv
    blocks = ceil(problem.tiles / TILES) * ceil(conv.k / FILTERS)
    product = ceil(blocks / device.sm_count) * (BLOCK_CYCLES + conv.c // DEPTH * STEP_CYCLES)
    filters = FILTER_CYCLES + 4 * (PRODUCTS + 9) * conv.c * conv.k / FILTER_BYTES
    return (product + filters) / CYCLES_PER_US


def launches(call: Call, device: Device, variant: str | None = None) -> list[Launch]:
    """The filters' transform, and the convolution."""
    op, scratch = call.op, call.workspace
    problem = _problem(op, call.input_specs, call.output_specs)
    conv, sides = problem.conv, (problem.tiles, problem.height, problem.width)
    if scratch is None:
        raise ValueError("Winograd's algorithm needs its workspace")
    x, w, *rest = call.inputs
    named = cast("dict[str, Slot]", op.operands(call.inputs)) if isinstance(op, ConvDgrad) else {}
    idx = call.outputs[1] if isinstance(op, ConvFprop) and op.has_indices else None
    args: tuple[Argument, ...] = (
        x, scratch, rest[0] if isinstance(op, ConvFprop) and op.bias else None, named.get("saved"), named.get("addend"),
        call.outputs[0], idx, conv.argument(problem.act), *map(np.int32, sides),
    )  # fmt: skip
    filters = (w, scratch, np.int32(conv.c), np.int32(conv.k), np.int32(problem.turned))
    return [
        Launch(FILTERS_KERNEL, (2 * ceil(conv.k / FILTERS), ceil(conv.c / 16), 1), (32, 4, 1), filters),
        Launch(KERNEL, (ceil(problem.tiles / TILES), ceil(conv.k / FILTERS), 1), (THREADS, 1, 1), args, SHARED_BYTES),
    ]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (FILTERS_KERNEL, KERNEL)


def _problem(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> _Problem:
    if isinstance(op, ConvFprop):
        n, h, w, c = inputs[0].shape
        k, top, left, turned = inputs[1].shape[0], *op.pad[:2], False
        height, width = h + op.pad[0] + op.pad[2] - 2, w + op.pad[1] + op.pad[3] - 2
        p, q = op.pooled_hw(h, w, 3, 3)
    elif isinstance(op, ConvDgrad):
        n, h, w, c = inputs[0].shape
        _, height, width, k = outputs[0].shape
        top, left, turned = 2 - op.pad[0], 2 - op.pad[1], True
        p, q = height, width
    else:
        raise TypeError(f"{op.name} is not a convolution or its input gradient")
    if not op.pool:
        p, q = ceil(p / 2), ceil(q / 2)
    conv = Conv(n, h, w, c, k, 3, 3, p, q, (1, 1), (top, left), (1, 1), op.pool)
    return _Problem(conv, height, width, turned, op.act)
