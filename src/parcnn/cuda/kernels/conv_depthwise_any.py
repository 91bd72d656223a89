"""Launcher of conv_depthwise_any.cu: depthwise convolutions that conv_depthwise.cu is not compiled for."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import cast

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div, refuse_dtype, refuse_size
from parcnn.cuda.kernels.conv_common import MAX_SIDE
from parcnn.cuda.kernels.conv_depthwise import ELEMENTS, block_shape, refuse_epilogue
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad, ConvWgrad)
SOURCE = "conv_depthwise_any.cu"
TAPS_A_THREAD = 9  # of the filter gradient
SHARED_BYTES = 48 * 1024  # of filters that are kept there
BLOCKS_A_MULTIPROCESSOR = 8


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvGeometry):
        return f"{op.name} is no convolution"
    outputs = op.infer(*inputs)
    image, filters, data = _image_and_filters(op, inputs, outputs)
    (k, r, s, seen), (_, h, w, c) = filters.shape, image.shape
    if op.groups == 1 or seen != 1:
        return f"not a depthwise convolution: {op.groups} groups, {c} channels, {k} filters of {seen}"
    if op.pool:
        return "depthwise convolutions have no pool"
    span = [d * (side - 1) + 1 for d, side in zip(op.dilation, (r, s), strict=True)]
    if max(h, w, *span, *op.pad, *op.stride) >= MAX_SIDE:
        return f"image sides, filter spans, padding and strides must be below {MAX_SIDE}"
    return refuse_epilogue(op, inputs) or refuse_dtype(*data, among=tuple(ELEMENTS)) or refuse_size(*data, filters)


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """The partial sums of a filter gradient's runs; nothing where there is one run."""
    if not isinstance(op, ConvWgrad):
        return 0
    runs = _runs(inputs[1], outputs[0], device)
    return 4 * runs * sum(spec.size for spec in outputs) if runs > 1 else 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch; of a filter gradient in several runs one more, which adds their sums."""
    op = call.op
    if isinstance(op, ConvWgrad):
        return _wgrad(op, call, device)
    if not isinstance(op, ConvFprop | ConvDgrad):
        raise TypeError(f"{op.name} is no convolution")
    x, w = call.inputs[:2]
    out, k = call.outputs[0], w.spec.shape[0]
    channels, multiplier = out.spec.shape[3], k // op.groups
    vec = 4 if multiplier == 1 and channels % 4 == 0 else 1
    slices, lanes, items = block_shape(channels // vec)
    filters = lanes * vec * (1 if isinstance(op, ConvFprop) else multiplier)
    shared_bytes = 4 * filters * w.spec.shape[1] * w.spec.shape[2]
    in_shared = shared_bytes <= SHARED_BYTES
    blocks = min(ceil(out.spec.size // channels / items), ceil(BLOCKS_A_MULTIPROCESSOR * device.sm_count / slices))
    args: tuple[Argument, ...]
    if isinstance(op, ConvFprop):
        entry, args = "conv_depthwise_any_fprop", (x, w, call.inputs[2] if op.bias else None, out)
    else:
        named = cast("dict[str, Slot]", op.operands(call.inputs))
        entry, args = "conv_depthwise_any_dgrad", (x, w, named.get("saved"), named.get("addend"), out)
    argument = _argument(op, call.input_specs, call.output_specs, slices, op.act, in_shared)
    kernel = _kernel(entry, out.spec.dtype, vec)
    grid, block = (blocks * slices, 1, 1), (lanes, items, 1)
    return [Launch(kernel, grid, block, (*args, argument), shared_bytes if in_shared else 0)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name but conv_wgrad's own that adds partial sums."""
    for dtype in ELEMENTS:
        for vec in (1, 4):
            yield _kernel("conv_depthwise_any_fprop", dtype, vec)
            yield _kernel("conv_depthwise_any_dgrad", dtype, vec)
        yield _kernel("conv_depthwise_any_wgrad", dtype)


def _wgrad(op: ConvWgrad, call: Call, device: Device) -> list[Launch]:
    x, dy = call.inputs[:2]
    dw, db = call.outputs[0], call.outputs[1] if op.bias else None
    slices, lanes, items = block_shape(dw.spec.shape[0])
    runs, chunks = _runs(dy.spec, dw.spec, device), _chunks(dw.spec)
    partial = call.workspace if runs > 1 else None
    argument = _argument(op, call.input_specs, call.output_specs, slices)
    grid, block = (runs * chunks * slices, 1, 1), (lanes, items, 1)
    args = (x, dy, dw, db, partial, argument, fast_div(chunks))
    shared_bytes = 4 * (TAPS_A_THREAD + 1) * lanes * items
    result = [Launch(_kernel("conv_depthwise_any_wgrad", x.spec.dtype), grid, block, args, shared_bytes)]
    if runs > 1:
        result.append(sum_launch(call, runs))
    return result


def _chunks(dw: Spec) -> int:
    return ceil(dw.shape[1] * dw.shape[2] / TAPS_A_THREAD)


def _runs(dy: Spec, dw: Spec, device: Device) -> int:
    """Runs of pixels that fill the GPU, each of some pixels a thread."""
    slices, _, items = block_shape(dw.shape[0])
    groups = ceil(dy.size // dy.shape[3] / items)
    most = max(1, BLOCKS_A_MULTIPROCESSOR * device.sm_count // (slices * _chunks(dw)))
    return ceil(groups / ceil(groups / min(groups, most)))


def _image_and_filters(
    op: ConvGeometry, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]
) -> tuple[Spec, Spec, tuple[Spec, ...]]:
    """The images and filters that the convolution is of, and all its tensors of data."""
    if isinstance(op, ConvWgrad):
        return inputs[0], outputs[0], inputs[:2]
    if isinstance(op, ConvDgrad):
        return outputs[0], inputs[1], (*inputs, *outputs)
    return inputs[0], inputs[1], (*inputs[:2], *outputs)


def _argument(
    op: ConvGeometry,
    inputs: tuple[Spec, ...],
    outputs: tuple[Spec, ...],
    slices: int,
    act: str | None = None,
    in_shared: bool = False,
) -> Struct:
    """`Problem` of conv_depthwise_any.cu."""
    image, filters, _ = _image_and_filters(op, inputs, outputs)
    (n, h, w, c), (k, r, s, _) = image.shape, filters.shape
    p, q = op.output_hw(h, w, r, s)
    rows, columns = (h, w) if isinstance(op, ConvDgrad) else (p, q)
    numbers = (
        n * rows * columns, h, w, c, p, q, k, r, s, k // op.groups, *op.stride, *op.pad[:2], *op.dilation, act_code(act),
        int(in_shared),
    )  # fmt: skip
    divisors = (rows, columns, *op.stride, k // op.groups, s, slices)
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors)))


def _kernel(entry: str, dtype: str, vec: int | None = None) -> Kernel:
    defines: tuple[tuple[str, int | str], ...] = (("ELEMENT", ELEMENTS[dtype]),)
    return Kernel(SOURCE, entry, defines if vec is None else (*defines, ("VEC", vec)))
