"""Launcher of conv_wgrad_sm90.cu: gradient of a bf16 convolution's filters and bias on Hopper's tensor cores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil

import numpy as np

from parcnn.cuda.kernels import conv_wgrad_sm90_choice as choice
from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_common import MAX_SIDE, Conv
from parcnn.cuda.kernels.conv_sm90 import CHANNEL_UNIT
from parcnn.cuda.kernels.conv_sm90_maps import image_map
from parcnn.cuda.kernels.conv_unpool import unpool
from parcnn.cuda.kernels.conv_wgrad_sm90_tiles import (
    BARRIER_BYTES,
    FORMS,
    MOST_TILES,
    SOURCE,
    WINDOW_TAPS,
    Form,
    Line,
    Stage,
    Variant,
    line_of,
    outputs_of,
    pitches,
    round_up,
)
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer, Struct, TensorMap
from parcnn.cuda.tensormap import MAX_ELEMENT_STRIDE
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvWgrad,)
_SUM_THREADS, _MOST_PARTS = 256, 8
_MANY_SUMS = 2**19  # fours of fours of them keep a GPU busy
_ALIGNMENT = 256  # of the partial sums behind an unpooled dy
SUM_KERNELS = {eights: Kernel(SOURCE, "conv_wgrad_sm90_sum", (("EIGHTS", eights),)) for eights in (1, 4)}


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvWgrad):
        return f"{op.name} is not a convolution's filter gradient"
    x, dy = inputs[:2]
    if x.dtype != "bf16" or dy.dtype != "bf16":
        return f"the tensor-core filter gradient takes bf16 operands, not {x.dtype} and {dy.dtype}"
    if op.groups != 1:
        return f"the tensor-core filter gradient has one group, not {op.groups}"
    if max(op.stride) > MAX_ELEMENT_STRIDE:
        return f"strides above {MAX_ELEMENT_STRIDE} are not copied by TMA, got {op.stride}"
    c, k = x.shape[3], dy.shape[3]
    if c % CHANNEL_UNIT or k % CHANNEL_UNIT:
        return f"channels must be multiples of {CHANNEL_UNIT}, got {c} -> {k}"
    span = [d * (f - 1) + 1 for d, f in zip(op.dilation, op.filter, strict=True)]
    if max(x.shape[1], x.shape[2], *span, *op.pad) >= MAX_SIDE:
        return f"image sides, filter spans and padding must be below {MAX_SIDE}"
    if x.size == 0 or dy.size == 0:
        return "there are no pixels to sum over"
    if max(x.size, dy.size * (4 if op.pool else 1), *(spec.size for spec in op.infer(*inputs))) >= 2**31:
        return "a tensor has 2**31 elements or more"
    if not choice.has_variant(_conv(op, x, op.infer(*inputs)[0])[1], op.bias):
        return f"the outputs of all taps make {MOST_TILES} tiles or more, in any form"
    return None


def unpools(call: Call, device: Device, variant: Variant | None = None) -> bool:
    """True: tensor maps know no indices."""
    return True


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """dy unpooled where there is a pool, and the partial sums of the blocks where items do not begin and end with them."""
    op, conv = _conv(op, inputs[0], outputs[0])
    chosen = variant or choice.ranked(conv, op.bias, device)[0]
    return _partial_offset(conv) + line_of(conv, op.bias, chosen).partial_bytes


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    return list(choice.ranked(conv, op.bias, device))


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant, to compare with other families."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    return choice.cost_us(conv, op.bias, device)


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """Unpools dy where there is a pool, multiplies, and adds up the sums of items that several blocks have; `variant` forces
    one of `candidates`."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    chosen = variant or choice.ranked(conv, op.bias, device)[0]
    line = line_of(conv, op.bias, chosen)
    x, dy = call.inputs[:2]
    result = []
    if conv.pool:
        error = _workspace(call)
        result.append(unpool(dy, call.inputs[2] if conv.pool == "max" else None, error))
        dy = error
    partial = Pointer(_workspace(call), _partial_offset(conv), line.partial_bytes) if line.partial_bytes else None
    gradients = (call.outputs[0], call.outputs[1] if op.bias else None, partial)
    result.append(_product(conv, chosen, line, x, dy, gradients))
    if partial:
        result.append(_sum(chosen.form, line, gradients))
    return result


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for `conv_unpool`'s."""
    yield from (form.kernel for form in FORMS)
    yield from SUM_KERNELS.values()


def _conv(op: Op, x: Spec, dw: Spec) -> tuple[ConvWgrad, Conv]:
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is not a convolution's filter gradient")
    return op, Conv.of(op, x, dw)


def _workspace(call: Call) -> Slot:
    if call.workspace is None:
        raise ValueError("a filter gradient of several splits, or behind a pool, needs its workspace")
    return call.workspace


def _partial_offset(conv: Conv) -> int:
    return round_up(2 * conv.rows * conv.k, _ALIGNMENT) if conv.pool else 0


def _product(
    conv: Conv, variant: Variant, line: Line, x: Slot, dy: Slot, gradients: tuple[Slot, Slot | None, Pointer | None]
) -> Launch:
    form, n = variant.form, variant.tile[2]
    stage = Stage.of(conv, form, variant.tile)
    ring_bytes = variant.stages * stage.nbytes
    if form.adders > 1:  # half the other's sums come there last, and those of its dy
        ring_bytes = max(ring_bytes, 2 * form.sums + 256 * form.dy_chunks)
    swizzle = 1 if form.cb == 64 else 2
    descriptors = (
        stage.x_group_bytes >> 4 | swizzle << 30, stage.x_leading_bytes, stage.x_step_bytes >> 4,
        stage.dy_group_bytes >> 4 | 1 << 30, stage.dy_step_bytes >> 4,
    )  # fmt: skip
    sizes = (
        stage.x_row_bytes, stage.x_box_bytes, stage.dy_box_bytes,
        stage.x_chunk_bytes, stage.dy_chunk_bytes, stage.load_bytes, stage.nbytes, variant.stages, ring_bytes,
    )  # fmt: skip
    problem = Struct(
        (
            line.argument(),
            *(np.int32(v) for v in (n, line.places, form.slot_size, stage.steps)),
            *(np.uint32(v) for v in descriptors),
            *(np.int32(v) for v in sizes),
            fast_div(line.blocks_each),
        )
    )
    args: tuple[Argument, ...] = (*_x_maps(x, conv, variant), _dy_map(dy, conv, variant), *gradients, problem)
    return Launch(
        form.kernel,
        (line.blocks * form.sharers, 1, 1),
        (128 * (form.consumers + 1), 1, 1),
        args,
        ring_bytes + BARRIER_BYTES,
    )


def _sum(form: Form, line: Line, gradients: tuple[Slot, Slot | None, Pointer | None]) -> Launch:
    """Few blocks' sums are added by one thread each element, or four of them where there are enough; more by several."""
    parts = 1
    while parts < _MOST_PARTS and line.most_blocks > 8 * parts:
        parts *= 2
    eights = 4 if parts == 1 and line.items * form.sharers * form.sums >= _MANY_SUMS else 1
    threads, own = _SUM_THREADS // parts, form.sums // (4 * eights)
    chunks = ceil((own + (16 * form.dy_chunks if gradients[1] else 0)) / threads)
    rows, columns = line.rows.items, line.columns.items
    sizes = (int(form.window), form.cb, form.slot_size, own, form.sharers)
    divisors = (fast_div(d) for d in (128 * form.consumers, chunks, rows, columns))
    problem = Struct((line.argument(), *(np.int32(v) for v in sizes), *divisors))
    dw, db, partial = gradients
    return Launch(
        SUM_KERNELS[eights],
        (line.items * form.sharers * chunks, 1, 1),
        (threads, parts, 1),
        (partial, dw, db, problem),
    )


def _x_maps(x: Slot, conv: Conv, variant: Variant) -> list[TensorMap]:
    """Of windows of stride 2: x's even rows and columns, even and odd, odd and even, odd and odd. Else four times the same."""
    cb, (w, h, n) = variant.form.cb, variant.tile
    dims = (conv.c, conv.w, conv.h, conv.n)
    if not variant.form.window:
        stride_h, stride_w = conv.stride
        return [image_map(x, dims, (cb, w * stride_w, h * stride_h, n), (1, stride_w, stride_h, 1), cb)] * 4
    whole = image_map(x, dims, (cb, pitches(conv, w)[0], h + WINDOW_TAPS - 1, n), (), cb)
    pixel, row, image = whole.strides_bytes
    down, right = conv.stride

    def part(first_row: int, first_column: int) -> TensorMap:
        part_dims = (conv.c, ceil((conv.w - first_column) / right), ceil((conv.h - first_row) / down), conv.n)
        strides = (right * pixel, down * row, image)
        return replace(whole, dims=part_dims, strides_bytes=strides, offset=first_row * row + first_column * pixel)

    return [part(r % down, s % right) for r in (0, 1) for s in (0, 1)]


def _dy_map(dy: Slot, conv: Conv, variant: Variant) -> TensorMap:
    p, q = outputs_of(conv)
    w, h, n = variant.tile
    width = pitches(conv, w)[1] if variant.form.window else w
    return image_map(dy, (conv.k, q, p, conv.n), (64, width, h, n), (), 64)
