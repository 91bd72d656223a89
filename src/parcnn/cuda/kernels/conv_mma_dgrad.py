"""Launcher of conv_mma_dgrad.cu: gradient of a bf16 convolution's input on the tensor cores of sm_80 and later."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, gcd
from typing import cast

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div
from parcnn.cuda.kernels.conv_common import POOL_CODES
from parcnn.cuda.kernels.conv_mma import (
    CHUNK,
    SMALLEST,
    Grouped,
    Pieces,
    Tile,
    cycles,
    fitting,
    gathers,
    key,
    microseconds,
    refuse,
    shared_bytes,
    vector,
)
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvDgrad,)
SOURCE = "conv_mma_dgrad.cu"

_FLAT = (Tile(128, 64, 32, 4, 1, 4, 1), Tile(64, 64, 32, 2, 2, 4, 1), Tile(64, 16, 64, 2, 1, 4, 1), SMALLEST)
_FEW_WARPS = 1.08  # what four warps take for the largest tile that they hold, against the same forward
_GATHERED, _FEW_GATHERED = Tile(128, 64, 32, 4, 1, 3, 1), Tile(64, 16, 32, 4, 1, 3, 1)
# (ROUTED, VEC_A, VEC_B): tiles compiled for it, from many pixels and channels down to few. Every problem fits (ROUTED, 1, 1).
TILES_OF = {
    (0, 8, 8): (
        Tile(128, 256, 64, 2, 4, 3),
        Tile(256, 128, 64, 4, 2, 3),
        Tile(192, 128, 64, 4, 2, 3),
        Tile(128, 128, 64, 2, 2, 3),
        Tile(256, 64, 32, 4, 1, 4),
        Tile(128, 64, 64, 4, 1, 3),
        Tile(64, 64, 64, 2, 2, 3),
        Tile(128, 32, 32, 4, 1, 4),
        *_FLAT,
    ),
    (0, 8, 2): _FLAT,
    (0, 2, 2): _FLAT,
    (0, 8, 1): (_GATHERED, _FEW_GATHERED),
    (0, 2, 1): (_GATHERED, _FEW_GATHERED),
    (0, 1, 1): (_GATHERED, _FEW_GATHERED),
    (1, 8, 8): (Tile(128, 128, 32, 4, 2, 3), Tile(128, 64, 32, 4, 1, 3), Tile(64, 64, 32, 2, 2, 3, 1)),
    (1, 8, 1): (_FEW_GATHERED,),
    (1, 1, 1): (_FEW_GATHERED,),
}
Variant = Tile


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvDgrad):
        return f"{op.name} is not a convolution's input gradient"
    if op.act not in (None, *FROM_OUTPUT):
        return f"the derivative of {op.act} does not follow from its output"
    _, r, s, _ = inputs[1].shape
    tensors = [spec for name, spec in op.operands(inputs).items() if name != "idx"]
    return refuse(op, (*cast("list[Spec]", tensors), *op.infer(*inputs)), op.image, (r, s))


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """None is needed."""
    return 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Tiles that can run the call, best estimate first."""
    costs = _costs(call, device)
    return sorted(costs, key=costs.__getitem__)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best tile."""
    return microseconds(min(_costs(call, device).values()), call)


def _costs(call: Call, device: Device) -> dict[Variant, float]:
    """Estimated cycles of tiles that can run the call."""
    op, sizes = _sizes(call)
    routed, vec_a, vec_b = kind = key(op, sizes)
    classes = op.stride[0] * op.stride[1]
    taps = sizes.conv.r * sizes.conv.s / classes
    costs = {}
    for tile in fitting(TILES_OF[kind], call.inputs[1].spec, device):
        blocks = ceil(_class_rows(sizes) / tile.bm) * classes * ceil(sizes.channels / tile.bn) * sizes.groups
        copies = gathers(tile.bm, tile.bk, vec_a) + gathers(tile.bn, tile.bk, vec_b)
        pieces = Pieces(copies, vec_b == 1, vector(sizes.channels) < CHUNK, bool(tile.flat))
        estimate = cycles(tile, blocks, tile.steps(taps, sizes.filters), pieces, shared_bytes(tile), device)
        few_warps = _FEW_WARPS if tile.bm * tile.bn == 128 * tile.threads else 1
        costs[tile] = estimate * (1.2 if routed else 1) * few_warps
    return costs


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, sizes = _sizes(call)
    rows, classes = _class_rows(sizes), op.stride[0] * op.stride[1]
    if rows == 0:
        return []
    tile = variant or candidates(call, device)[0]
    named = cast("dict[str, Slot]", op.operands(call.inputs))
    n_tiles = ceil(sizes.channels / tile.bn)
    args: tuple[Argument, ...] = (
        named["dy"], named["w"], named.get("idx"), named.get("saved"), named.get("addend"), call.outputs[0],
        _problem(sizes, tile, rows, n_tiles, op.act),
    )  # fmt: skip
    grid = (ceil(rows / tile.bm) * classes * n_tiles, sizes.groups, 1)
    return [Launch(_kernel(tile, key(op, sizes)), grid, (tile.threads, 1, 1), args, shared_bytes(tile))]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (_kernel(tile, kind) for kind, tiles in TILES_OF.items() for tile in tiles)


def _sizes(call: Call) -> tuple[ConvDgrad, Grouped]:
    op = call.op
    if not isinstance(op, ConvDgrad):
        raise TypeError(f"{op.name} is not a convolution's input gradient")
    return op, Grouped.of(op, call.outputs[0].spec, call.inputs[1].spec)


def _kernel(tile: Tile, kind: tuple[int, int, int]) -> Kernel:
    flags = tuple(zip(("ROUTED", "VEC_A", "VEC_B"), kind, strict=True))
    return Kernel(SOURCE, "conv_mma_dgrad", (*tile.defines, *flags))


def _class_rows(sizes: Grouped) -> int:
    """Pixels of a class."""
    conv = sizes.conv
    return conv.n * ceil(conv.h / conv.stride[0]) * ceil(conv.w / conv.stride[1])


def _problem(sizes: Grouped, tile: Tile, rows: int, n_tiles: int, act: str | None) -> Struct:
    """`Problem` of conv_mma_dgrad.cu."""
    conv = sizes.conv
    (stride_h, stride_w), (dilation_h, dilation_w) = conv.stride, conv.dilation
    common_h, common_w = gcd(stride_h, dilation_h), gcd(stride_w, dilation_w)
    step_h, step_w = stride_h // common_h, stride_w // common_w
    numbers = (
        rows, conv.h, conv.w, conv.c, *sizes.outputs, conv.k, sizes.channels, sizes.filters, conv.r, conv.s,
        *conv.stride, *conv.pad, *conv.dilation, -dilation_h % stride_h, -dilation_w % stride_w, step_h, step_w,
        dilation_h // common_h, dilation_w // common_w, ceil(conv.r / step_h), POOL_CODES[conv.pool], act_code(act),
    )  # fmt: skip
    divisors = (
        ceil(conv.h / stride_h), ceil(conv.w / stride_w), sizes.filters, ceil(conv.s / step_w), max(1, conv.s // step_w),
        n_tiles, stride_h * stride_w, stride_h, stride_w,
    )  # fmt: skip
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors)))
