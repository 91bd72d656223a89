"""The host's side of `conv_mma.cuh`: what the bf16 kernels for mma.sync take, the shapes of a block, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, MAX_SIDE, Conv, refuse_extras, refuse_window
from parcnn.cuda.launch import Device
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call

CHUNK, PAIR = 8, 2  # bf16 that are copied at once
MAX_GROUPS = 65535  # of a grid's second and third dimension
# Of the tile with the fewest outputs: what comes from memory, and not from L2, wants more bytes under way than its ring has
# (16 rows of 4096 -> 4096, H200: 26 us, of Hopper's kernel 20).
MOST_FILTER_BYTES_OF_SMALLEST = 8 << 20
_SHARED_PER_SM_BEYOND_BLOCK = 1024  # an SM has that much more than the most that one block may have
_RESERVED_SHARED_BYTES = 1024
_REGISTERS_PER_SM, _THREADS_PER_SM = 65536, 1536


class Tile(NamedTuple):
    """Shape of a block: its outputs, depth of a stage, warps along each side, stages of the ring.

    `flat`: the reduction over taps and channels is cut as one run, not tap by tap, each padded to a stage's depth.
    """

    bm: int
    bn: int
    bk: int
    warps_m: int
    warps_n: int
    stages: int
    flat: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def ring_bytes(self) -> int:
        return 2 * self.stages * self.bk * (self.bm + self.bn)

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return tuple(zip(("BM", "BN", "BK", "WARPS_M", "WARPS_N", "STAGES", "FLAT"), self, strict=True))

    def steps(self, taps: float, channels: int) -> float:
        """Stages of a reduction."""
        return max(1, ceil(taps * channels / self.bk)) if self.flat else taps * ceil(channels / self.bk)

    def resident(self, shared_bytes: int, device: Device) -> int:
        """Blocks that are on an SM at once; an estimate, as the registers are not known here."""
        sums = self.bm * self.bn // self.threads
        registers = self.threads * min(255, 93 + 7 * sums // 5)
        room = device.shared_bytes_per_block + _SHARED_PER_SM_BEYOND_BLOCK
        shared = room // (shared_bytes + _RESERVED_SHARED_BYTES)
        return max(1, min(shared, _REGISTERS_PER_SM // registers, _THREADS_PER_SM // self.threads))

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk}/{self.warps_m}x{self.warps_n}/{self.stages}" + " flat" * self.flat


SMALLEST = Tile(16, 32, 64, 1, 2, 3, 1)  # forward and of inputs' gradients: few outputs, and code that is soon there


@dataclass(frozen=True)
class Grouped:
    """A convolution's sizes, those of all groups in `conv`."""

    conv: Conv
    groups: int

    @classmethod
    def of(cls, op: ConvGeometry, image: Spec, filters: Spec) -> Grouped:
        """The convolution of `image` (N,H,W,C) with `filters` (K,R,S,C/groups)."""
        if op.groups == 1:
            return cls(Conv.of(op, image, filters), 1)
        n, h, w, c = image.shape
        k, r, s, _ = filters.shape
        p, q = op.pooled_hw(h, w, r, s)
        return cls(Conv(n, h, w, c, k, r, s, p, q, op.stride, op.pad[:2], op.dilation, op.pool), op.groups)

    @property
    def channels(self) -> int:
        """Of a group."""
        return self.conv.c // self.groups

    @property
    def filters(self) -> int:
        """Of a group."""
        return self.conv.k // self.groups

    @property
    def depth(self) -> int:
        """Elements of a filter."""
        return self.conv.r * self.conv.s * self.channels

    @property
    def outputs(self) -> tuple[int, int]:
        """Rows and columns of outputs before the pool, of those that the pool's floor keeps."""
        conv = self.conv
        return (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)


def refuse(op: ConvGeometry, tensors: Sequence[Spec], image: tuple[int, int], filter_rs: tuple[int, int]) -> str | None:
    """Why the bf16 kernels cannot run a convolution of these tensors of bf16; None where they can."""
    if reason := refuse_window(op) or refuse_extras(op):
        return reason
    for spec in tensors:
        if spec.dtype != "bf16":
            return f"the bf16 convolution kernels take bf16 operands, not {spec.dtype}"
        if spec.size * (4 if op.pool else 1) >= 2**31:
            return f"an operand has {spec.size} elements; the kernels address fewer than 2**31, a fourth behind a pool"
    if op.groups > MAX_GROUPS:
        return f"a grid has at most {MAX_GROUPS} groups, not {op.groups}"
    span = [d * (f - 1) + 1 for d, f in zip(op.dilation, filter_rs, strict=True)]
    padded = image[0] + op.pad[0] + op.pad[2], image[1] + op.pad[1] + op.pad[3]
    if max(*padded, *span, *op.stride) >= MAX_SIDE:
        return f"padded image sides, filter spans and strides must be below {MAX_SIDE}"
    return None


def shared_bytes(tile: Tile) -> int:
    """Of a forward convolution or an input gradient: the ring, where the outputs lie in the end."""
    return max(tile.ring_bytes, 2 * tile.bm * tile.bn)


def fitting(tiles: Iterable[Tile], filters: Spec, device: Device) -> Iterator[Tile]:
    """Those for a forward convolution or an input gradient by `filters` whose blocks the device takes."""
    for tile in tiles:
        is_fast = tile != SMALLEST or filters.nbytes <= MOST_FILTER_BYTES_OF_SMALLEST
        if is_fast and shared_bytes(tile) <= device.shared_bytes_per_block:
            yield tile


def vector(channels: int) -> int:
    """How many channels are copied at once, in runs of so many."""
    return next(count for count in (CHUNK, PAIR, 1) if channels % count == 0)


def gathers(extent: int, depth: int, vec: int, has_places: bool = False) -> float:
    """Cycles of copies of less than a chunk that bring an operand's part of a stage; `has_places`: the threads know where their
    columns lie, and need not divide."""
    return extent * depth / vec * (12 if has_places else 15 if vec > 1 else 22) / 128 if vec < CHUNK else 0


def key(op: ConvGeometry, sizes: Grouped) -> tuple[int, int, int]:
    """What kernels of gradients are compiled for: (ROUTED, VEC_A of filters, VEC_B of channels)."""
    vec_a, vec_b = vector(sizes.filters), vector(sizes.channels)
    if op.pool is None:
        return 0, vec_a, min(vec_a, vec_b)
    return (1, CHUNK, CHUNK if vec_b == CHUNK else 1) if vec_a == CHUNK else (1, 1, 1)


class Pieces(NamedTuple):
    """What a tile moves in less than chunks: cycles of copies in a stage, whether they wait in registers, rows of results; and
    whether each row of the filters' tile has a tap of its own."""

    cycles: float = 0
    in_registers: bool = False
    odd_results: bool = False
    taps_by_row: bool = False


def cycles(
    tile: Tile, blocks: int, steps: float, pieces: Pieces, shared_bytes: int, device: Device, rows: float | None = None
) -> float:
    """Estimated clock cycles of `blocks` blocks that each reduce over so many stages: what the choice of a tile rests on.
    `rows`: of the operands that a stage brings, by default the tile's.

    The larger of what the busiest SM does and of what the rounds of its resident blocks take, each at a block's own pace.
    The constants are fitted to an H200's times of 36 calls of large layers by nine variants each: 13 % off in the mean, and
    what is taken costs 1 % more than the best.
    """
    warp_m, warp_n = tile.bm // tile.warps_m, tile.bn // tile.warps_n
    warps = tile.threads // 32
    products = tile.bm * tile.bn * tile.bk / 1400
    copied = (tile.bm + tile.bn if rows is None else rows) * tile.bk
    shared = (warps * (warp_m + warp_n) * tile.bk + copied) * 2 / 128
    copies = copied * 2 / 46
    fragments = (warp_m // 16) * (warp_n // 8) + warp_m // 16 + warp_n // 16
    issue = warps * (fragments * tile.bk / 16 + copied / 8 / tile.threads + 30) / 4
    parts = (products, shared, copies, issue)
    step = (0.8 * max(parts) + 0.2 * sum(parts)) * (1.25 if pieces.taps_by_row else 1)
    step += pieces.cycles
    by_thread = 0 if pieces.in_registers else pieces.cycles * 80 / tile.threads  # more to issue for each, one by one
    beyond = (
        0 if pieces.in_registers else 2.5 * pieces.cycles * min(steps, tile.stages - 1)
    )  # copies of zeros behind the last
    outputs = tile.bm * tile.bn * (4 if pieces.odd_results else 2) / 11.4
    work = 370 + steps * step + beyond + outputs
    pace = 75 + 9 * fragments * tile.bk / 16 + 350 * pieces.taps_by_row if tile.flat else 140.0
    alone = 2400 + steps * (step + 600 if pieces.in_registers else max(pace + by_thread, step)) + beyond + outputs
    resident = tile.resident(shared_bytes, device)
    return max(ceil(blocks / device.sm_count) * work, ceil(blocks / (device.sm_count * resident)) * alone)


def microseconds(cycles: float, call: Call) -> float:
    """Of a call of so many cycles, with its start and end; memory brings about 2400 bytes a cycle."""
    nbytes = sum(spec.nbytes for spec in (*call.input_specs, *call.output_specs))
    if isinstance(call.op, ConvFprop | ConvWgrad):  # of the image only what the filters reach
        filters = call.op.filter if isinstance(call.op, ConvWgrad) else call.input_specs[1].shape[1:3]
        reached = prod(min(1.0, taps / step) for taps, step in zip(filters, call.op.stride, strict=True))
        nbytes -= int((1 - reached) * call.input_specs[0].nbytes)
    return 1.5 + 1.07 * max(cycles, nbytes / 2400) / CYCLES_PER_US
