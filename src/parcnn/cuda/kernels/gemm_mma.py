"""Launcher of gemm_mma.cu: groups of bf16 matrix products on the tensor cores of sm_80 and later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil

import numpy as np

from parcnn.cuda.kernels.conv_mma import Pieces, Tile, cycles, gathers
from parcnn.cuda.kernels.gemm import TRANSPOSES, group, refuse, rows_are_multiples, sizes_of, tiles_of
from parcnn.cuda.launch import Device, Kernel, Launch
from parcnn.ops.base import Op, Spec
from parcnn.ops.matmul import MatMul
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (MatMul,)
SOURCE = "gemm_mma.cu"
# Elements that rows are multiples of: tiles compiled for it.
TILES_OF = {
    8: (
        Tile(128, 128, 64, 2, 4, 3),
        Tile(64, 128, 64, 2, 2, 3),
        Tile(64, 64, 64, 2, 2, 4),
        Tile(32, 64, 64, 2, 2, 5),
        Tile(32, 32, 64, 2, 2, 6),
    ),
    1: (Tile(64, 64, 32, 2, 2, 3),),
}


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why the kernel does not run `op`."""
    return refuse(op, inputs, "bf16")


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Tile | None = None
) -> int:
    """None is needed."""
    return 0


def candidates(call: Call, device: Device) -> list[Tile]:
    """Tiles that can run the call, best estimate first."""
    op, sizes = sizes_of(call.op, call.input_specs)
    width = _width(call)
    fits = (tile for tile in TILES_OF[width] if tile.ring_bytes <= device.shared_bytes_per_block)
    tiles = [tile for tile in fits if tile.bm == tile.bn or not op.symmetric]
    return sorted(tiles, key=lambda tile: _cycles(op, tile, sizes, width, device))


def launches(call: Call, device: Device, variant: Tile | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, sizes = sizes_of(call.op, call.input_specs)
    tile = variant or candidates(call, device)[0]
    table, tiles = group(op, call, sizes, tile.bm, tile.bn)
    args = (table, np.float32(op.alpha), np.float32(op.beta), np.int32(op.symmetric))
    kernel = _kernel(tile, _width(call), int(op.transpose_a), int(op.transpose_b))
    return [Launch(kernel, (tiles, 1, 1), (tile.threads, 1, 1), args, tile.ring_bytes)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    for width, tiles in TILES_OF.items():
        yield from (_kernel(tile, width, a, b) for tile in tiles for a, b in TRANSPOSES)


def _width(call: Call) -> int:
    return 8 if rows_are_multiples(call, 8) else 1


def _kernel(tile: Tile, width: int, transpose_a: int, transpose_b: int) -> Kernel:
    macros = tuple((name, value) for name, value in tile.defines if name != "FLAT")
    flags = (("VEC", width), ("TRANSPOSE_A", transpose_a), ("TRANSPOSE_B", transpose_b))
    return Kernel(SOURCE, "gemm_mma", (*macros, *flags))


def _cycles(op: MatMul, tile: Tile, sizes: Sequence[tuple[int, int, int]], width: int, device: Device) -> float:
    """An estimate, as if all tiles had the longest product's reduction."""
    blocks = sum(tiles_of(op, m, n, tile.bm, tile.bn) for m, n, _ in sizes)
    steps = max(ceil(k / tile.bk) for _, _, k in sizes)
    pieces = Pieces(gathers(tile.bm + tile.bn, tile.bk, width, has_places=True), in_registers=width == 1)
    return cycles(tile, blocks, max(1, steps), pieces, tile.ring_bytes, device)
