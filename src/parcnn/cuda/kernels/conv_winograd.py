"""Launcher of conv_winograd.cu: 3x3 convolutions of stride 1, and their input's gradient, by Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple, cast

import numpy as np

from parcnn.cuda.kernels.common import refuse_dtype
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, Conv, unsupported
from parcnn.cuda.kernels.conv_unpool import pass_us, scratch_bytes, unpool, unpooled
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer
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
    """What is computed, as a forward convolution whose p and q count tiles; the outputs' sides before a pool.

    A gradient reads the error before its pool, `error_pool`.
    """

    conv: Conv
    height: int
    width: int
    turned: bool
    act: str | None
    error_pool: str | None

    @property
    def tiles(self) -> int:
        return self.conv.n * self.conv.p * self.conv.q


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvDgrad):
        return f"{op.name} is not a convolution or its input gradient"
    outputs, w = op.infer(*inputs), inputs[1]
    if (*w.shape[1:3], *op.stride, *op.dilation) != (3, 3, 1, 1, 1, 1):
        return "Winograd's algorithm runs 3x3 filters of stride and dilation 1"
    if isinstance(op, ConvFprop):
        image, floats = inputs[0], [spec for spec in (*inputs, *outputs) if spec.dtype != "u2"]
    else:
        if op.act not in (None, *FROM_OUTPUT):
            return f"the derivative of {op.act} does not follow from its output"
        named = cast("dict[str, Spec]", {**op.operands(inputs), "dy": unpooled(inputs[0], op.pool)})
        image, floats = outputs[0], [*outputs, *(spec for name, spec in named.items() if name != "idx")]
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


def unpools(call: Call, device: Device, variant: str | None = None) -> bool:
    """True: patches are read without indices."""
    return True


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: str | None = None
) -> int:
    """The error before a pool, of a gradient behind one, and the transformed filters."""
    problem = _problem(op, inputs, outputs)
    conv = problem.conv
    return scratch_bytes(inputs[0], problem.error_pool) + 4 * PRODUCTS * conv.c * ceil(conv.k / FILTERS) * FILTERS


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
    return (product + filters) / CYCLES_PER_US + pass_us(call.input_specs[0], problem.error_pool)


def launches(call: Call, device: Device, variant: str | None = None) -> list[Launch]:
    """The error's way back through a pool, of a gradient behind one, the filters' transform, and the convolution."""
    op, scratch = call.op, call.workspace
    problem = _problem(op, call.input_specs, call.output_specs)
    conv, sides = problem.conv, (problem.tiles, problem.height, problem.width)
    if scratch is None:
        raise ValueError("Winograd's algorithm needs its workspace")
    x, w, *rest = call.inputs
    offset, result = scratch_bytes(x.spec, problem.error_pool), []
    transformed = Pointer(scratch, offset)
    named = cast("dict[str, Slot]", op.operands(call.inputs)) if isinstance(op, ConvDgrad) else {}
    idx = call.outputs[1] if isinstance(op, ConvFprop) and op.has_indices else None
    if offset:
        result.append(unpool(x, named.get("idx"), scratch))
        x = scratch
    args: tuple[Argument, ...] = (
        x, transformed, rest[0] if isinstance(op, ConvFprop) and op.bias else None, named.get("saved"), named.get("addend"),
        call.outputs[0], idx, conv.argument(problem.act), *map(np.int32, sides),
    )  # fmt: skip
    filters = (w, transformed, np.int32(conv.c), np.int32(conv.k), np.int32(problem.turned))
    return [
        *result,
        Launch(FILTERS_KERNEL, (2 * ceil(conv.k / FILTERS), ceil(conv.c / 16), 1), (32, 4, 1), filters),
        Launch(KERNEL, (ceil(problem.tiles / TILES), ceil(conv.k / FILTERS), 1), (THREADS, 1, 1), args, SHARED_BYTES),
    ]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for `conv_unpool`'s."""
    yield from (FILTERS_KERNEL, KERNEL)


def _problem(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> _Problem:
    if isinstance(op, ConvFprop):
        n, h, w, c = inputs[0].shape
        k, top, left, turned = inputs[1].shape[0], *op.pad[:2], False
        height, width = h + op.pad[0] + op.pad[2] - 2, w + op.pad[1] + op.pad[3] - 2
        p, q = op.pooled_hw(h, w, 3, 3)
    elif isinstance(op, ConvDgrad):
        n, h, w, c = unpooled(inputs[0], op.pool).shape
        _, height, width, k = outputs[0].shape
        top, left, turned = 2 - op.pad[0], 2 - op.pad[1], True
        p, q = height, width
    else:
        raise TypeError(f"{op.name} is not a convolution or its input gradient")
    pool, error_pool = (None, op.pool) if turned else (op.pool, None)
    if not pool:
        p, q = ceil(p / 2), ceil(q / 2)
    conv = Conv(n, h, w, c, k, 3, 3, p, q, (1, 1), (top, left), (1, 1), pool)
    return _Problem(conv, height, width, turned, op.act, error_pool)
