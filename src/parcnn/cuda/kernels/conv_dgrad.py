"""Launcher of conv_dgrad.cu: gradient of a convolution with respect to its input."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, gcd
from typing import cast

import numpy as np

from parcnn.cuda.kernels import conv_dgrad_direct
from parcnn.cuda.kernels.common import ELEMENTS, fast_div
from parcnn.cuda.kernels.conv_common import (
    CYCLES_PER_US,
    MAX_GRID_YZ,
    MOST_FILTERS,
    SMALLEST_GPU,
    Conv,
    Tile,
    refuse_columns,
    tile_cycles,
    unsupported,
)
from parcnn.cuda.kernels.conv_dgrad_direct import DIRECTS, Direct
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvDgrad,)
SOURCE = "conv_dgrad.cu"

# From many pixels and channels down to few channels (64x8) and to linear layers at a small batch.
TILES = (
    Tile(64, 64, 16, 8, 4, 1, 4),
    Tile(128, 32, 16, 8, 4, 1, 3),
    Tile(64, 8, 32, 4, 4, 4, 3),
    Tile(32, 32, 32, 4, 4, 4, 4),
    Tile(16, 16, 64, 4, 4, 8, 4),
    Tile(128, 64, 16, 8, 8, 1, 3),
)
# (ROUTED, VEC_K, VEC_C): tiles compiled for it. Every problem fits (ROUTED, 1, 1).
TILES_OF = {
    (0, 4, 4): TILES,
    (0, 4, 1): (TILES[0], TILES[2]),
    (0, 1, 1): (TILES[0], TILES[2], TILES[4]),
    (1, 4, 4): (TILES[0], TILES[3]),
    (1, 4, 1): (TILES[0], TILES[2]),
    (1, 1, 1): (TILES[0], TILES[2]),
}
Variant = Tile | Direct


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvDgrad):
        return f"{op.name} is not a convolution's input gradient"
    if op.act not in (None, *FROM_OUTPUT):
        return f"the derivative of {op.act} does not follow from its output"
    _, r, s, _ = inputs[1].shape
    floats = [spec for name, spec in op.operands(inputs).items() if name != "idx"]
    dx = op.infer(*inputs)[0]
    reason = unsupported(op, (*cast("list[Spec]", floats), dx), op.image, (r, s))
    if reason is None and op.stride[0] * op.stride[1] > MAX_GRID_YZ:
        reason = f"the two strides' product may be at most {MAX_GRID_YZ}"
    conv = Conv.of(op, dx, inputs[1])
    if reason or dx.dtype == "f32":
        return reason or refuse_columns(conv.c, "channels")
    if conv.k <= MOST_FILTERS and conv_dgrad_direct.fitting(conv, SMALLEST_GPU):
        return None
    return f"in {dx.dtype} these kernels run only what is direct: few channels and filters behind a max-pool, stride 1"


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """None is needed."""
    return 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    costs = _cycles(call, device)
    return sorted(costs, key=costs.__getitem__)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    scale = 0.9 if call.input_specs[0].dtype == "f32" else 1.1
    return 4 + scale * min(_cycles(call, device).values()) / CYCLES_PER_US


def _cycles(call: Call, device: Device) -> dict[Variant, float]:
    """Estimated clock cycles of the variants that can run the call."""
    op, conv = _conv(call)
    routed, vec_k, vec_c = key = _key(op, conv)
    classes = op.stride[0] * op.stride[1]
    depth = ceil(conv.r * conv.s * conv.k / classes)
    copies = (1.0 if vec_k == 1 or vec_c == 1 else 0.25) * (1.5 if routed else 1.0)
    pixels = conv.n * conv.h * conv.w

    costs: dict[Variant, float] = {
        tile: tile_cycles(tile, tile.blocks(pixels, conv.c), depth, copies, device.sm_count)
        for tile in (TILES_OF[key] if call.inputs[0].spec.dtype == "f32" else ())
        if tile.covers(conv.c)
    }
    for direct, cut in conv_dgrad_direct.fitting(conv, device).items():
        costs[direct] = conv_dgrad_direct.cycles(conv, direct, cut, device)
    return costs


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, conv = _conv(call)
    named = cast("dict[str, Slot]", op.operands(call.inputs))
    argument, rows = _classes(conv)
    if rows == 0:
        return []
    args: tuple[Argument, ...] = (
        named["dy"], named["w"], named.get("idx"), named.get("saved"), named.get("addend"), call.outputs[0],
        conv.argument(op.act),
    )  # fmt: skip
    chosen = variant or candidates(call, device)[0]
    if isinstance(chosen, Direct):
        return [conv_dgrad_direct.launch(conv, chosen, call.inputs[0].spec.dtype, device, args)]
    grid = (ceil(rows / chosen.bm), ceil(conv.c / chosen.bn), conv.stride[0] * conv.stride[1])
    shared_bytes = 4 * chosen.stages * (chosen.bm * (chosen.bk + 4) + chosen.bk * (chosen.bn + 4))
    return [Launch(_kernel(chosen, _key(op, conv)), grid, (chosen.threads, 1, 1), (*args, argument), shared_bytes)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (_kernel(tile, key) for key, tiles in TILES_OF.items() for tile in tiles)
    yield from (direct.kernel(dtype) for direct in DIRECTS for dtype in ELEMENTS)


def _conv(call: Call) -> tuple[ConvDgrad, Conv]:
    op = call.op
    if not isinstance(op, ConvDgrad):
        raise TypeError(f"{op.name} is not a convolution's input gradient")
    return op, Conv.of(op, call.outputs[0].spec, call.inputs[1].spec)


def _key(op: ConvDgrad, conv: Conv) -> tuple[int, int, int]:
    routed, vec_k = int(op.pool is not None), 4 if conv.k % 4 == 0 else 1
    key = routed, vec_k, 4 if vec_k == 4 and conv.c % 4 == 0 else 1
    return key if key in TILES_OF else (routed, 1, 1)


def _kernel(tile: Tile, key: tuple[int, int, int]) -> Kernel:
    flags = tuple(zip(("ROUTED", "VEC_K", "VEC_C"), key, strict=True))
    return Kernel(SOURCE, "conv_dgrad", (*tile.defines, *flags))


def _classes(conv: Conv) -> tuple[Struct, int]:
    """`Classes` of conv_dgrad.cu, and the rows of a class."""
    (stride_h, stride_w), (dilation_h, dilation_w) = conv.stride, conv.dilation
    common_h, common_w = gcd(stride_h, dilation_h), gcd(stride_w, dilation_w)
    step_h, step_w = stride_h // common_h, stride_w // common_w
    h, w = ceil(conv.h / stride_h), ceil(conv.w / stride_w)
    taps_s = ceil(conv.s / step_w)
    rows = conv.n * h * w
    numbers = (rows, h, w, step_h, step_w, dilation_h // common_h, dilation_w // common_w, taps_s)
    divisors = (h, w, conv.k, taps_s, max(1, conv.s // step_w))
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors))), rows
