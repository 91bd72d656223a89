"""Launcher of conv_mma_fprop.cu: bf16 convolution forward on the tensor cores of sm_80 and later."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

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
    microseconds,
    refuse,
    shared_bytes,
    vector,
)
from parcnn.cuda.kernels.gate import gate_of
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvFprop
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvFprop,)
SOURCE = "conv_mma_fprop.cu"
POOLED_ROWS = 32  # eight windows

# From many pixels and filters down to the small products of linear layers at a small batch; then those for few channels.
TILES = (
    Tile(128, 256, 64, 2, 4, 3),
    Tile(256, 128, 64, 4, 2, 3),
    Tile(192, 128, 64, 4, 2, 3),
    Tile(128, 128, 64, 2, 2, 3),
    Tile(256, 64, 32, 4, 1, 4),
    Tile(128, 64, 64, 4, 1, 3),
    Tile(64, 64, 64, 2, 2, 3),
    Tile(128, 64, 32, 4, 1, 4, 1),
    Tile(64, 64, 32, 2, 2, 4, 1),
    Tile(128, 32, 32, 4, 1, 4, 1),
    Tile(64, 16, 64, 4, 1, 4, 1),
    Tile(64, 16, 64, 2, 1, 4, 1),
    SMALLEST,
)
# By what is copied at once: an even number of channels, an odd one.
TILES_OF = {
    8: TILES,
    2: tuple(tile for tile in TILES if tile.flat),
    1: (Tile(128, 64, 32, 4, 1, 3, 1), Tile(128, 16, 32, 4, 1, 3, 1), Tile(64, 32, 32, 2, 2, 3, 1)),
}
Variant = Tile


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop):
        return f"{op.name} is not a forward convolution"
    x, w = inputs[:2]
    if op.bias and inputs[2].dtype != "f32":
        return f"the bias must be f32, not {inputs[2].dtype}"
    if op.groups > 1 and w.shape[3] == 1 and (op.pool or op.act not in (None, "relu")):
        return "depthwise convolutions have kernels of their own, which fuse no such epilogue"
    if op.pool == "max" and op.groups > 1 and w.shape[0] // op.groups % 4:
        return f"groups of {w.shape[0] // op.groups} filters share bytes of 2-bit indices"
    return refuse(op, (x, w, op.infer(*inputs)[0]), (x.shape[1], x.shape[2]), (w.shape[1], w.shape[2]))


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
    _, sizes = _sizes(call)
    vec = vector(sizes.channels)
    costs = {}
    for tile in fitting(TILES_OF[vec], call.inputs[1].spec, device):
        if _fits(tile, sizes.conv.pool is not None):
            blocks = ceil(sizes.conv.rows / tile.bm) * ceil(sizes.filters / tile.bn) * sizes.groups
            pieces = Pieces(gathers(tile.bm + tile.bn, tile.bk, vec), vec == 1, vector(sizes.filters) < CHUNK)
            costs[tile] = cycles(tile, blocks, _stages(sizes, tile), pieces, shared_bytes(tile), device)
    return costs


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, sizes = _sizes(call)
    if sizes.conv.rows == 0:
        return []
    tile = variant or candidates(call, device)[0]
    x, w, *bias = call.inputs
    idx = call.outputs[1] if op.has_indices else None
    n_tiles = ceil(sizes.filters / tile.bn)
    args: tuple[Argument, ...] = (
        x, w, bias[0] if bias else None, call.outputs[0], idx, _problem(sizes, tile, n_tiles, op.act),
    )  # fmt: skip
    kernel = _kernel(tile, vector(sizes.channels), op.pool is not None)
    grid = (ceil(sizes.conv.rows / tile.bm) * n_tiles, sizes.groups, 1)
    return [Launch(kernel, grid, (tile.threads, 1, 1), args, shared_bytes(tile))]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    for pooled in (False, True):
        for vec, tiles in TILES_OF.items():
            yield from (_kernel(tile, vec, pooled) for tile in tiles if _fits(tile, pooled))


def _sizes(call: Call) -> tuple[ConvFprop, Grouped]:
    op = call.op
    if not isinstance(op, ConvFprop):
        raise TypeError(f"{op.name} is not a forward convolution")
    return op, Grouped.of(op, call.inputs[0].spec, call.inputs[1].spec)


def _kernel(tile: Tile, vec: int, pooled: bool) -> Kernel:
    return Kernel(SOURCE, "conv_mma_fprop", (*tile.defines, ("VEC", vec), ("POOL", int(pooled))))


def _fits(tile: Tile, pooled: bool) -> bool:
    """Whether a warp has whole windows."""
    return not pooled or tile.bm // tile.warps_m % POOLED_ROWS == 0


def _stages(sizes: Grouped, tile: Tile) -> int:
    return int(tile.steps(sizes.conv.r * sizes.conv.s, sizes.channels))


def _problem(sizes: Grouped, tile: Tile, n_tiles: int, act: str | None) -> Struct:
    """`Problem` of conv_mma_fprop.cu."""
    conv = sizes.conv
    numbers = (
        conv.rows, conv.h, conv.w, conv.c, conv.k, sizes.channels, sizes.filters, conv.r, sizes.depth, _stages(sizes, tile),
        *conv.stride, *conv.pad, *conv.dilation, POOL_CODES[conv.pool], act_code(act),
    )  # fmt: skip
    divisors = (conv.p, conv.q, sizes.channels, conv.s, n_tiles)
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors), *gate_of(act)))
