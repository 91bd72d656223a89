"""Launcher of conv_mma_wgrad.cu: gradient of a bf16 convolution's filters and bias on the tensor cores of sm_80 and later."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_common import POOL_CODES
from parcnn.cuda.kernels.conv_mma import Grouped, Pieces, Tile, cycles, gathers, key, microseconds, refuse
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvWgrad,)
SOURCE = "conv_mma_wgrad.cu"
MAX_SPLITS = 65535  # of a grid's second dimension

_PAIRS = (Tile(64, 64, 64, 2, 2, 3), Tile(64, 128, 32, 1, 2, 4), Tile(16, 128, 32, 1, 4, 4))
_GATHERED, _FLAT_GATHERED = Tile(64, 64, 32, 2, 2, 3), Tile(16, 64, 64, 1, 4, 3)
# (ROUTED, VEC_A, VEC_B): tiles compiled for it. Every problem fits (ROUTED, 1, 1).
TILES_OF = {
    (0, 8, 8): (
        Tile(256, 128, 64, 4, 2, 3),
        Tile(128, 128, 64, 2, 2, 3),
        Tile(64, 256, 32, 1, 4, 4),
        Tile(64, 128, 32, 1, 2, 4),
        Tile(128, 64, 32, 2, 1, 4),
        Tile(64, 64, 64, 2, 2, 3),
        Tile(32, 128, 32, 1, 4, 4),
        Tile(16, 128, 32, 1, 4, 4),
    ),
    (0, 8, 2): _PAIRS,
    (0, 2, 2): _PAIRS,
    (0, 8, 1): (_GATHERED, _FLAT_GATHERED),
    (0, 2, 1): (_GATHERED, _FLAT_GATHERED),
    (0, 1, 1): (_GATHERED, _FLAT_GATHERED),
    (1, 8, 8): (Tile(128, 128, 32, 2, 4, 3), _GATHERED),
    (1, 8, 1): (_GATHERED,),
    (1, 1, 1): (_GATHERED, _FLAT_GATHERED),
}


class Variant(NamedTuple):
    """A tile, and into how many runs of pixels the reduction is cut."""

    tile: Tile
    splits: int

    def __str__(self) -> str:
        return f"{self.tile} in {self.splits}"


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvWgrad):
        return f"{op.name} is not a convolution's filter gradient"
    x, dy = inputs[:2]
    dw = op.infer(*inputs)[0]
    if dw.size >= 2**31:
        return f"the filters have {dw.size} elements; the kernels address fewer than 2**31"
    return refuse(op, (x, dy), (x.shape[1], x.shape[2]), op.filter)


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The splits' partial sums; nothing where there is one split."""
    op, sizes = _sizes(op, inputs[0], outputs[0])
    splits = (variant or _ranked(op, sizes, device)[0]).splits
    return 4 * splits * _row_size(op, sizes) if splits > 1 else 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, each tile with several numbers of splits, best estimate first."""
    return _ranked(*_sizes(call.op, call.inputs[0].spec, call.outputs[0].spec), device)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    costs = _costs(*_sizes(call.op, call.inputs[0].spec, call.outputs[0].spec), device)
    return microseconds(min(costs.values()), call)


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch, and one more that adds the partial sums of several splits; `variant` forces one of `candidates`."""
    op, sizes = _sizes(call.op, call.inputs[0].spec, call.outputs[0].spec)
    tile, splits = variant or _ranked(op, sizes, device)[0]
    x, dy, *idx = call.inputs
    dw, db = call.outputs[0], call.outputs[1] if op.bias else None
    partial = call.workspace if splits > 1 else None
    n_tiles = ceil(sizes.depth / tile.bn)
    problem = _problem(sizes, _chunk(sizes, tile, splits), n_tiles)
    args: tuple[Argument, ...] = (x, dy, idx[0] if idx else None, dw, db, partial, problem)
    grid = (ceil(sizes.filters / tile.bm) * n_tiles, splits, sizes.groups)
    result = [Launch(_kernel(tile, key(op, sizes)), grid, (tile.threads, 1, 1), args, _shared_bytes(tile))]
    if splits > 1:
        result.append(sum_launch(call, splits))
    return result


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for conv_wgrad's sum."""
    yield from (_kernel(tile, kind) for kind, tiles in TILES_OF.items() for tile in tiles)


def _sizes(op: Op, x: Spec, dw: Spec) -> tuple[ConvWgrad, Grouped]:
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is not a convolution's filter gradient")
    return op, Grouped.of(op, x, dw)


def _kernel(tile: Tile, kind: tuple[int, int, int]) -> Kernel:
    flags = tuple(zip(("ROUTED", "VEC_A", "VEC_B"), kind, strict=True))
    return Kernel(SOURCE, "conv_mma_wgrad", (*tile.defines, *flags))


def _shared_bytes(tile: Tile) -> int:
    """The ring, and where the receptive fields of its pixels start."""
    return tile.ring_bytes + 8 * tile.stages * tile.threads


def _row_size(op: ConvWgrad, sizes: Grouped) -> int:
    """Floats of a split's sums: dw, then db."""
    return sizes.conv.k * (sizes.depth + op.bias)


def _chunk(sizes: Grouped, tile: Tile, splits: int) -> int:
    """Pixels of a split: a multiple of the tile's depth."""
    return max(1, ceil(sizes.conv.rows / tile.bk / splits)) * tile.bk


def _problem(sizes: Grouped, chunk: int, n_tiles: int) -> Struct:
    """`Problem` of conv_mma_wgrad.cu."""
    conv = sizes.conv
    numbers = (
        conv.rows, chunk, conv.h, conv.w, conv.c, conv.k, sizes.channels, sizes.filters, sizes.depth,
        *conv.stride, *conv.pad, *conv.dilation, POOL_CODES[conv.pool], n_tiles,
    )  # fmt: skip
    divisors = (max(1, conv.p), max(1, conv.q), sizes.channels, conv.s)
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors)))


def _ranked(op: ConvWgrad, sizes: Grouped, device: Device) -> list[Variant]:
    costs = _costs(op, sizes, device)
    return sorted(costs, key=costs.__getitem__)


def _costs(op: ConvWgrad, sizes: Grouped, device: Device) -> dict[Variant, float]:
    """Estimated cycles of each tile with several numbers of splits."""
    routed, vec_a, vec_b = kind = key(op, sizes)
    costs: dict[Variant, float] = {}
    for tile in TILES_OF[kind]:
        shared_bytes = _shared_bytes(tile)
        if shared_bytes > device.shared_bytes_per_block:
            continue
        pieces = Pieces(gathers(tile.bm, tile.bk, vec_a, True) + gathers(tile.bn, tile.bk, vec_b, True), vec_b == 1)
        blocks = ceil(sizes.filters / tile.bm) * ceil(sizes.depth / tile.bn) * sizes.groups
        steps = max(1, ceil(sizes.conv.rows / tile.bk))
        resident = tile.resident(shared_bytes, device)
        for waves in (0, 1, 2, 4):
            wanted = waves * resident * device.sm_count // blocks
            each = ceil(steps / max(1, min(steps, wanted, MAX_SPLITS)))
            splits = ceil(steps / each)  # none is empty
            estimate = cycles(tile, blocks * splits, each, pieces, shared_bytes, device)
            costs[Variant(tile, splits)] = estimate * (1.2 if routed else 1) + _sum_cycles(op, sizes, splits)
    return costs


def _sum_cycles(op: ConvWgrad, sizes: Grouped, splits: int) -> float:
    """Of the kernel that adds the splits (as conv_wgrad has it): its start, and its reads at 915 bytes a cycle."""
    return 2100 + 4 * splits * _row_size(op, sizes) / 915 if splits > 1 else 0
