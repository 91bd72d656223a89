"""Launcher of conv_wgrad_sm90_halves.cu: filter gradients of 1x1 bf16 layers by pairs of blocks, half of the pixels each."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, prod

import numpy as np

from parcnn.cuda.kernels import conv_wgrad_sm90
from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, Conv
from parcnn.cuda.launch import Device, Kernel, Launch, Struct, TensorMap
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvWgrad,)
FILTERS, CHANNELS, SPAN, PIXELS, STAGES, WARPS = 128, 128, 64, 64, 6, 9  # of the .cu; warps without those of db
BLOCKS = 2  # of an item
_GPCS = 8
VARIANT = f"2x{FILTERS}x{CHANNELS} {PIXELS} {STAGES}"
KERNEL = Kernel("conv_wgrad_sm90_halves.cu", "conv_wgrad_sm90_halves")
_BIAS_WARPS = FILTERS // SPAN
_SUMS_BYTES = 2 * FILTERS * CHANNELS  # half of them
_BARRIERS = 2 * STAGES + WARPS + _BIAS_WARPS
_SHARED_BYTES = 2 * STAGES * PIXELS * (FILTERS + CHANNELS) + _SUMS_BYTES + 4 * FILTERS + 8 * _BARRIERS


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernel runs the op on these operands, else the reason why not."""
    if (reason := conv_wgrad_sm90.supports(op, inputs)) or not isinstance(op, ConvWgrad):
        return reason
    if op.pool:
        return "the kernel reads the error as it is, not one behind a pool"
    conv = Conv.of(op, inputs[0], op.infer(*inputs)[0])
    if (conv.h, conv.w, conv.r, conv.s) != (1, 1, 1, 1) or any(op.pad):
        return f"the kernel multiplies matrices: filters of one pixel without stride and padding, not {op.filter}"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: str = VARIANT
) -> int:
    """None."""
    return 0


def candidates(call: Call, device: Device) -> list[str]:
    """The one way to run the call."""
    return [VARIANT]


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds: of each wave of blocks a start and an end, and the stages; a later wave starts unevenly.

    Fitted to an H200's times under load of layers of 13 to 392 stages a block, where a stage's products take 512 cycles at a
    lower clock.
    """
    conv = _conv(call)
    waves = ceil(BLOCKS * prod(_blocks(conv)) / device.sm_count)
    cycles = waves * (5000 + 690 * ceil(_tiles(conv) / BLOCKS)) + 2000 * (waves - 1)
    return 2.75 + cycles / CYCLES_PER_US


def launches(call: Call, device: Device, variant: str = VARIANT) -> list[Launch]:
    """The product."""
    conv, tiles = _conv(call), _tiles(_conv(call))
    filters, channels = _blocks(conv)
    row = next(width for width in (4, 3, 2, 1) if channels % width == 0)
    sizes = (conv.c, conv.k, tiles, ceil(tiles / BLOCKS), *divmod(filters * channels, _GPCS))
    problem = Struct((*(np.int32(v) for v in sizes), fast_div(filters * row), fast_div(row)))
    x, dy = (_map(slot, conv.n, n) for slot, n in zip(call.inputs, (conv.c, conv.k), strict=True))
    dw, *db = call.outputs
    threads = 32 * (WARPS + (_BIAS_WARPS if db else 0))
    args = (x, dy, dw, db[0] if db else None, problem)
    return [Launch(KERNEL, (BLOCKS * filters * channels, 1, 1), (threads, 1, 1), args, _SHARED_BYTES)]


def variants() -> Iterable[Kernel]:
    """The kernel that `launches` names."""
    return (KERNEL,)


def _conv(call: Call) -> Conv:
    if not isinstance(call.op, ConvWgrad):
        raise TypeError(f"{call.op.name} is not a convolution's filter gradient")
    return Conv.of(call.op, call.inputs[0].spec, call.outputs[0].spec)


def _blocks(conv: Conv) -> tuple[int, int]:
    """Of FILTERS, and of CHANNELS."""
    return ceil(conv.k / FILTERS), ceil(conv.c / CHANNELS)


def _tiles(conv: Conv) -> int:
    return ceil(conv.n / PIXELS)


def _map(slot: Slot, pixels: int, channels: int) -> TensorMap:
    return TensorMap(slot, (channels, pixels), (2 * channels,), (SPAN, PIXELS), (), "128B")
