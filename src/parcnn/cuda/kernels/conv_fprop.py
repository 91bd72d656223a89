"""Launcher of conv_fprop.cu: convolution forward with bias, activation and 2x2 pooling."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, fast_div
from parcnn.cuda.kernels.conv_common import (
    CYCLES_PER_US,
    MOST_FILTERS,
    SMALLEST_GPU,
    Conv,
    Tile,
    refuse_columns,
    tile_cycles,
    unsupported,
)
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvFprop
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvFprop,)
SOURCE = "conv_fprop.cu"

# From many pixels and filters down to the small products of linear layers at a small batch.
TILES = (
    Tile(128, 64, 16, 16, 8, 1, 3),
    Tile(64, 64, 16, 8, 4, 1, 4),
    Tile(128, 32, 16, 8, 4, 1, 3),
    Tile(32, 32, 32, 4, 4, 4, 4),
    Tile(16, 16, 64, 4, 4, 8, 4),
    Tile(8, 8, 128, 4, 4, 32, 4),
)
# C not a multiple of 4. 128x16 is the fastest tile of LeNet-5's first layer, which has a direct kernel only if pooled.
SCALAR_TILES = (TILES[1], Tile(128, 16, 16, 4, 4, 2, 3), Tile(64, 16, 32, 4, 4, 4, 3), TILES[4])
DIRECT_SHARED_BYTES = 48 * 1024
DIRECT_CHANNELS = 8


class Direct(NamedTuple):
    """conv_fprop_direct with `kt` filters a thread."""

    kt: int

    def __str__(self) -> str:
        return f"direct {self.kt}"


Variant = Tile | Direct
DIRECTS = (Direct(4), Direct(6), Direct(8))


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop):
        return f"{op.name} is not a forward convolution"
    x, w = inputs[:2]
    reason = unsupported(op, (x, w, op.infer(*inputs)[0]), (x.shape[1], x.shape[2]), (w.shape[1], w.shape[2]))
    if reason or x.dtype == "f32":
        return reason or refuse_columns(w.shape[0], "filters")
    conv = Conv.of(op, x, w)
    if conv.k <= MOST_FILTERS and _fitting(conv, SMALLEST_GPU):
        return None
    return f"in {x.dtype} these kernels run only what is direct: few channels and filters behind a pool, stride 1"


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
    scale = 1.0 if call.input_specs[0].dtype == "f32" else 0.8
    return 2 + scale * min(_cycles(call, device).values()) / CYCLES_PER_US


def _cycles(call: Call, device: Device) -> dict[Variant, float]:
    """Of the variants that can run the call.

    A tile's estimate is `tile_cycles`; the direct kernel's, fitted to the same times, is its arithmetic, its fill of
    shared memory and its scattered stores, or what a block needs alone.
    """
    _, conv = _conv(call)
    vector = conv.c % 4 == 0
    copies = 0.25 if vector else 1.0
    costs: dict[Variant, float] = {}
    if call.inputs[0].spec.dtype == "f32":
        for tile in TILES if vector else SCALAR_TILES:
            if tile.covers(conv.k):
                blocks = tile.blocks(conv.rows, conv.k)
                costs[tile] = tile_cycles(tile, blocks, conv.taps_c, copies, device.sm_count)
    for direct, plan in _fitting(conv, device).items():
        warps = plan.block_x * plan.block_y / 32
        filters_taps = direct.kt * conv.taps_c
        work = 1.1 * warps * filters_taps + 1.3 * plan.shared_bytes / 4 + 40 * warps * direct.kt
        alone = 700 + 18.5 * filters_taps
        rounds = plan.grid_x * plan.grid_y / device.sm_count
        resident = max(1, int(32 / warps))
        costs[direct] = max(ceil(rounds) * work, ceil(rounds / resident) * alone)
    return costs


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, conv = _conv(call)
    if conv.rows == 0:
        return []
    x, w, *rest = call.inputs
    idx = call.outputs[1] if op.has_indices else None
    args: tuple[Argument, ...] = (x, w, rest[0] if op.bias else None, call.outputs[0], idx, conv.argument(op.act))
    chosen = variant or candidates(call, device)[0]
    if isinstance(chosen, Direct):
        plan = _fitting(conv, device).get(chosen)
        if plan is None:
            raise ValueError(f"variant {chosen} cannot run {op}")
        grid, block = (plan.grid_x, plan.grid_y, 1), (plan.block_x, plan.block_y, 1)
        return [Launch(_direct_kernel(chosen, x.spec.dtype), grid, block, (*args, plan.argument), plan.shared_bytes)]
    grid = (ceil(conv.rows / chosen.bm), ceil(conv.k / chosen.bn), 1)
    shared_bytes = 4 * chosen.stages * (chosen.bm + chosen.bn) * (chosen.bk + 4)
    return [Launch(_tile_kernel(chosen, 4 if conv.c % 4 == 0 else 1), grid, (chosen.threads, 1, 1), args, shared_bytes)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (_tile_kernel(tile, 4) for tile in TILES)
    yield from (_tile_kernel(tile, 1) for tile in SCALAR_TILES)
    yield from (_direct_kernel(direct, dtype) for direct in DIRECTS for dtype in ELEMENTS)


def _conv(call: Call) -> tuple[ConvFprop, Conv]:
    op = call.op
    if not isinstance(op, ConvFprop):
        raise TypeError(f"{op.name} is not a forward convolution")
    return op, Conv.of(op, call.inputs[0].spec, call.inputs[1].spec)


def _tile_kernel(tile: Tile, vec: int) -> Kernel:
    return Kernel(SOURCE, "conv_fprop", (*tile.defines, ("VEC", vec)))


def _direct_kernel(direct: Direct, dtype: str) -> Kernel:
    return Kernel(SOURCE, "conv_fprop_direct", (("KT", direct.kt), ("ELEMENT", ELEMENTS[dtype])))


class _DirectPlan(NamedTuple):
    grid_x: int
    grid_y: int
    block_x: int
    block_y: int
    shared_bytes: int
    argument: Struct


def _fitting(conv: Conv, device: Device) -> dict[Direct, _DirectPlan]:
    """The direct kernels that run the problem, and how."""
    plans = {direct: _direct_plan(conv, direct, device) for direct in DIRECTS}
    return {direct: plan for direct, plan in plans.items() if plan}


def _direct_plan(conv: Conv, direct: Direct, device: Device) -> _DirectPlan | None:
    """How the direct kernel cuts the problem; None where it does not fit.

    A block takes about 128 pooled pixels (of one image where that has as many), and as many filter groups as make 256
    threads.
    """
    plain = conv.pool is not None and conv.stride == (1, 1) and conv.dilation == (1, 1)
    if not plain or conv.c > DIRECT_CHANNELS or (direct.kt % 4 and conv.k > direct.kt):
        return None
    if direct.kt == 4 and conv.k <= 8:  # a thread has room for all, which read x once then
        return None
    width = min(conv.q, 32)
    tiles_h = ceil(conv.p / max(1, 128 // width))
    height = ceil(conv.p / tiles_h)
    tiles_w = ceil(conv.q / width)
    whole = tiles_h == tiles_w == 1
    images = max(1, min(128 // (width * height), ceil(conv.n / device.sm_count))) if whole else 1
    patch_h, patch_w = 2 * height + conv.r - 1, (2 * width + conv.s + 1) // 2 * 2
    groups = ceil(conv.k / direct.kt)
    block_x = ceil(images * height * width / 32) * 32
    block_y = min(groups, max(1, 256 // block_x))
    shared_bytes = 4 * (block_y * conv.taps_c * direct.kt + images * conv.c * patch_h * patch_w)
    if shared_bytes > DIRECT_SHARED_BYTES:
        return None
    numbers = (images, conv.n, height, width, tiles_h, tiles_w, patch_h, patch_w)
    divisors = (width, height, tiles_w, tiles_h, patch_w, patch_h, conv.taps_c)
    argument = Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors)))
    grid_x = ceil(conv.n / images) * tiles_h * tiles_w
    return _DirectPlan(grid_x, ceil(groups / block_y), block_x, block_y, shared_bytes, argument)
