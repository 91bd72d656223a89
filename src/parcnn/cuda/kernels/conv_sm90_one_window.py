"""Launcher of conv_sm90_one_window.cu: 3x3 bf16 convolutions of 3x3 images, of which a maximum keeps one pixel."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

import numpy as np

from parcnn.cuda.kernels import conv_sm90
from parcnn.cuda.kernels.common import act_code
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, MAX_GRID_YZ
from parcnn.cuda.kernels.conv_sm90 import NEGATIVE_INFINITIES
from parcnn.cuda.kernels.gate import gate_of
from parcnn.cuda.launch import Device, Kernel, Launch, Struct, TensorMap
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvFprop
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvFprop,)
KERNEL = Kernel("conv_sm90_one_window.cu", "conv_sm90_one_window")
# Twins of the .cu's: images and output channels of a block, reduction channels of a step.
IMAGES, CHANNELS, CB, STAGES, THREADS = 64, 64, 64, 4, 160
VARIANT = f"{IMAGES} images, {CHANNELS} channels"
SIDE = 3  # of images and filters
_PIXEL_BYTES, _TAP_BYTES = 2 * CB * IMAGES, 2 * CB * CHANNELS
_ROW_BYTES = SIDE * (_PIXEL_BYTES + _TAP_BYTES)  # of pixels, and of taps
_SHARED_BYTES = STAGES * (_PIXEL_BYTES + _ROW_BYTES) + 16 * STAGES  # with a pixel of zeros, and barriers
_PRODUCTS = 15  # rows of outputs by taps that meet the image


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernel runs the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop):
        return f"{op.name} is not a forward convolution"
    if reason := conv_sm90.supports(op, inputs):
        return reason
    if op.pool != "max" or op.has_indices:
        return "the kernel writes maxima of 2x2 windows, not which element won"
    x, w = inputs[0].shape, inputs[1].shape
    if (*x[1:3], *w[1:3]) != (SIDE,) * 4 or {*op.stride, *op.dilation, *op.pad[:2]} != {1}:
        return f"the kernel runs 3x3 filters over 3x3 images padded by one, not {w[1:3]} over {x[1:3]}"
    if op.pooled_hw(*x[1:3], *w[1:3]) != (1, 1):
        return "the kernel writes one window of an image"
    if not inputs[0].size or not inputs[1].size:
        return "there is nothing to compute"
    if ceil(w[0] / CHANNELS) > MAX_GRID_YZ:
        return f"a grid has at most {MAX_GRID_YZ * CHANNELS} channels, not {w[0]}"
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
    """Estimated microseconds: of each wave of blocks a start and an end, and the steps, by what `conv_sm90_cost` counts: a
    product m64n128k16 takes 64 cycles, L2 brings 40 bytes a cycle to a multiprocessor. (On an H200 four of six problems took
    3 % less to 15 % more; two that fill half of it or less 13 and 30 % less.)"""
    n, k, c = _sizes(call)
    steps, waves = ceil(c / CB), ceil(ceil(n / IMAGES) * ceil(k / CHANNELS) / device.sm_count)
    product, copies = _PRODUCTS * CB / 16 * 64, SIDE * _ROW_BYTES / 40
    step = max(product, copies) + 0.1 * min(product, copies)
    return 2.8 + 0.84 * waves * (3500 + steps * step) / CYCLES_PER_US + 0.074 * waves * steps * SIDE


def launches(call: Call, device: Device, variant: str = VARIANT) -> list[Launch]:
    """The convolution."""
    (n, k, c), act = _sizes(call), call.op.act if isinstance(call.op, ConvFprop) else None
    x, w, *bias = call.inputs
    pixel = 2 * c
    x_map = TensorMap(x, (c, n, SIDE, SIDE), (9 * pixel, pixel, 3 * pixel), (CB, IMAGES, SIDE, 1), (), "128B")
    w_map = TensorMap(w, (c, SIDE * SIDE, k), (pixel, 9 * pixel), (CB, 1, CHANNELS), (), "128B")
    y_map = TensorMap(call.outputs[0], (k, n, 1, 1), (2 * k, 2 * k, 2 * k), (CHANNELS, IMAGES, 1, 1), (), "128B")
    is_relu = act == "relu"
    epilogue = (np.int32(0 if is_relu else act_code(act)), np.uint32(0 if is_relu else NEGATIVE_INFINITIES))
    args = (
        x_map,
        w_map,
        y_map,
        bias[0] if bias else None,
        np.int32(k),
        np.int32(ceil(c / CB)),
        *epilogue,
        Struct(gate_of(act)),
    )
    grid = (ceil(n / IMAGES), ceil(k / CHANNELS), 1)
    return [Launch(KERNEL, grid, (THREADS, 1, 1), args, _SHARED_BYTES)]


def variants() -> Iterable[Kernel]:
    """The kernel that `launches` names."""
    return (KERNEL,)


def _sizes(call: Call) -> tuple[int, int, int]:
    """Images, output channels, reduction channels."""
    return call.inputs[0].spec.shape[0], call.inputs[1].spec.shape[0], call.inputs[0].spec.shape[3]
