"""Launcher of conv_wgrad.cu: gradient of a convolution with respect to its filters and bias."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels import conv_wgrad_direct
from parcnn.cuda.kernels.common import ELEMENTS
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
from parcnn.cuda.kernels.conv_wgrad_direct import DIRECTS, Direct
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvWgrad,)
SOURCE = "conv_wgrad.cu"
PARTS = 8
# Cost of copying a float of x alone (0.25 in a vector), so that 64x32 precedes 64x64 for 16 filters of 6 channels.
SCALAR_X_COPY = 1.5
RESIDENT_THREADS = 768  # of an SM: three blocks of 256 were measured to be worth their splits
HELD_THREADS = {128: 256, 64: 512, 32: 512}  # of an SM, by a thread's sums: more do not fit, or gain nothing
SUM_KERNEL = Kernel(SOURCE, "conv_wgrad_sum", (("PARTS", PARTS),))

# Filters x filter elements x pixels: from large filter banks down to LeNet-5's 6 filters of 25 elements.
TILES = (
    Tile(128, 128, 16, 16, 8, 1, 3),
    Tile(64, 128, 16, 8, 8, 1, 3),
    Tile(64, 64, 16, 8, 4, 1, 4),
    Tile(64, 32, 32, 4, 4, 2, 3),
    Tile(16, 64, 32, 4, 4, 4, 3),
    Tile(16, 16, 64, 4, 4, 8, 2),
    Tile(8, 32, 64, 4, 4, 16, 3),
    Tile(128, 64, 16, 8, 8, 1, 3),
)
# (ROUTED, VEC_K, VEC_C): tiles compiled for it. Every problem fits (ROUTED, 1, 1).
TILES_OF = {
    (0, 4, 4): (TILES[0], TILES[1], TILES[2], TILES[5], TILES[7]),
    (0, 4, 1): (TILES[2], TILES[3]),
    (0, 1, 1): (TILES[2], TILES[5], TILES[6]),
    (1, 4, 4): (TILES[1], TILES[2]),
    (1, 4, 1): (TILES[3], TILES[4]),
    (1, 1, 1): (TILES[2], TILES[6]),
}


class Variant(NamedTuple):
    """A tile or the direct kernel, and into how many runs of pixels the reduction is cut."""

    form: Tile | Direct
    splits: int

    def __str__(self) -> str:
        return f"{self.form} in {self.splits}"


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvWgrad):
        return f"{op.name} is not a convolution's filter gradient"
    x, dy = inputs[:2]
    dw = op.infer(*inputs)[0]
    reason = unsupported(op, (x, dy), (x.shape[1], x.shape[2]), op.filter)
    if reason is None and dw.size >= 2**31:
        reason = f"the filters have {dw.size} elements; the kernels address fewer than 2**31"
    if reason or x.dtype == "f32":
        return reason or refuse_columns(prod(dw.shape[1:]), "elements of a filter")
    conv = Conv.of(op, x, dw)
    if conv.k <= MOST_FILTERS and conv_wgrad_direct.fitting(conv, SMALLEST_GPU):
        return None
    return f"in {x.dtype} these kernels run only what is direct: few channels and filters behind a max-pool, stride 1"


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The splits' partial sums; nothing where there is one split."""
    op, conv = _conv(op, inputs[0], outputs[0])
    splits = (variant or _ranked(op, conv, inputs[0].dtype, device)[0]).splits
    return 4 * splits * _row_size(op, conv) if splits > 1 else 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, each tile with several numbers of splits, best estimate first."""
    x = call.inputs[0].spec
    return _ranked(*_conv(call.op, x, call.outputs[0].spec), x.dtype, device)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    x = call.inputs[0].spec
    costs = _cycles(*_conv(call.op, x, call.outputs[0].spec), x.dtype, device)
    return 2 + min(costs.values()) / CYCLES_PER_US


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch, and one more that adds the partial sums of several splits; `variant` forces one of `candidates`."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    x, dy = call.inputs[:2]
    form, splits = variant or _ranked(op, conv, x.spec.dtype, device)[0]
    idx = call.inputs[2] if op.pool == "max" else None
    dw, db = call.outputs[0], call.outputs[1] if op.bias else None
    partial = call.workspace if splits > 1 else None
    args: tuple[Argument, ...] = (x, dy, idx, dw, db, partial, conv.argument())
    if isinstance(form, Direct):
        result = [conv_wgrad_direct.launch(conv, form, x.spec.dtype, device, args)]
    else:
        chunk = np.int32(_chunk(conv, form, splits))
        grid = (ceil(conv.k / form.bm), ceil(conv.taps_c / form.bn), splits)
        shared_bytes = 4 * form.stages * form.bk * (form.bm + form.bn + 8) + 16 * form.threads
        result = [Launch(_kernel(form, _key(op, conv)), grid, (form.threads, 1, 1), (*args, chunk), shared_bytes)]
    if splits > 1:
        result.append(sum_launch(call, splits))
    return result


def sum_launch(call: Call, splits: int, offset: int = 0) -> Launch:
    """The launch that adds so many partial gradients in the workspace from `offset` on, each dw, then db, in their order."""
    dw, db = (*call.outputs, None)[:2]
    row_size = sum(spec.size for spec in call.output_specs)
    sizes = (np.int32(call.output_specs[0].size), np.int32(row_size), np.int32(splits))
    partial = Pointer(call.workspace, offset) if call.workspace else None
    args = (partial, dw, db, *sizes)
    return Launch(SUM_KERNEL, (ceil(row_size / 32), 1, 1), (32, PARTS, 1), args)


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (_kernel(tile, key) for key, tiles in TILES_OF.items() for tile in tiles)
    yield from (direct.kernel(dtype) for direct in DIRECTS for dtype in ELEMENTS)
    yield SUM_KERNEL


def _conv(op: Op, x: Spec, dw: Spec) -> tuple[ConvWgrad, Conv]:
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is not a convolution's filter gradient")
    return op, Conv.of(op, x, dw)


def _key(op: ConvWgrad, conv: Conv) -> tuple[int, int, int]:
    vec_k = 4 if conv.k % 4 == 0 else 1
    return int(op.pool is not None), vec_k, 4 if vec_k == 4 and conv.c % 4 == 0 else 1


def _kernel(tile: Tile, key: tuple[int, int, int]) -> Kernel:
    flags = tuple(zip(("ROUTED", "VEC_K", "VEC_C"), key, strict=True))
    return Kernel(SOURCE, "conv_wgrad", (*tile.defines, *flags))


def _row_size(op: ConvWgrad, conv: Conv) -> int:
    return conv.k * (conv.taps_c + op.bias)


def _chunk(conv: Conv, tile: Tile, splits: int) -> int:
    """Pixels of a split: a multiple of the tile's depth."""
    return max(1, ceil(conv.rows / tile.bk / splits)) * tile.bk


def _ranked(op: ConvWgrad, conv: Conv, dtype: str, device: Device) -> list[Variant]:
    costs = _cycles(op, conv, dtype, device)
    return sorted(costs, key=costs.__getitem__)


def _cycles(op: ConvWgrad, conv: Conv, dtype: str, device: Device) -> dict[Variant, float]:
    """Estimated clock cycles of the variants that can run the problem."""
    _, vec_k, vec_c = key = _key(op, conv)
    costs: dict[Variant, float] = {}
    for tile in TILES_OF[key] if dtype == "f32" else ():
        if not tile.covers(conv.taps_c):
            continue
        dy_copies, x_copies = tile.bm * (0.25 if vec_k == 4 else 1.0), tile.bn * (0.25 if vec_c == 4 else SCALAR_X_COPY)
        copies = (dy_copies + x_copies) / (tile.bm + tile.bn)
        blocks = tile.blocks(conv.k, conv.taps_c)
        steps = max(1, ceil(conv.rows / tile.bk))
        for waves in (1, 2, 3, 4, 6):
            each = ceil(steps / max(1, min(steps, waves * device.sm_count // blocks)))
            splits = ceil(steps / each)  # none is empty
            costs[Variant(tile, splits)] = _tile_cycles(tile, conv, blocks * splits, each, copies, device)
            costs[Variant(tile, splits)] += _sum_cycles(op, conv, splits)
        costs[Variant(tile, 1)] = _tile_cycles(tile, conv, blocks, steps, copies, device)
    for direct, cut in conv_wgrad_direct.fitting(conv, device).items():
        cycles = conv_wgrad_direct.cycles(conv, direct, cut, device)
        costs[Variant(direct, cut.runs)] = cycles + _sum_cycles(op, conv, cut.runs)
    return costs


def _tile_cycles(tile: Tile, conv: Conv, blocks: int, steps: int, copies: float, device: Device) -> float:
    """`tile_cycles`, 1 or 2 % less where more than three blocks on an SM hide each other's waits.

    Measured on an H200, of tiles whose rows the filters fill.
    """
    cycles = tile_cycles(tile, blocks, steps * tile.bk, copies, device.sm_count, RESIDENT_THREADS)
    held = HELD_THREADS.get(tile.tm * tile.tn, 0) // tile.threads if conv.k >= tile.bm else 0
    together = min(held, ceil(blocks / device.sm_count))
    return cycles * (0.94 + 0.18 / together if together > 3 else 1)


def _sum_cycles(op: ConvWgrad, conv: Conv, splits: int) -> float:
    """Of the kernel that adds the splits (fitted as `tile_cycles`): its start, and its reads at 915 bytes a cycle."""
    return 2100 + 4 * splits * _row_size(op, conv) / 915 if splits > 1 else 0
