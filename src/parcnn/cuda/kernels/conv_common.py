"""The host's side of `conv_common.cuh`: a convolution's sizes, and the cost of a tile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, act_code, fast_div, refuse_dtype
from parcnn.cuda.launch import Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry
from parcnn.ops.program import Call

POOL_CODES = {None: 0, "max": 1, "avg": 2}
MAX_SIDE = 2**14
MAX_ELEMENTS = 2**31 - 2**16  # of a tensor: the index of what a tile has beyond the end is an int, too
MAX_GRID_YZ = 65535  # blocks along the second and the third side of a grid
MAX_COLUMNS = 64 * MAX_GRID_YZ  # a tile 64 columns wide is there for every problem
CYCLES_PER_US = 1755.0  # of an H200 at work
MOST_FILTERS = 16  # of the direct kernels in bf16: more fill the tiles of tensor cores
SMALLEST_GPU = Device("any GPU", "sm_80", 1, shared_bytes_per_block=101376)  # what each that bf16 runs on has


@dataclass(frozen=True)
class Conv:
    """Sizes of a convolution; p and q count outputs after the pool."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride: tuple[int, int]
    pad: tuple[int, int]  # top, left
    dilation: tuple[int, int]
    pool: str | None

    @classmethod
    def of(cls, op: ConvGeometry, image: Spec, filters: Spec) -> Conv:
        """The convolution of `image` (N,H,W,C) with `filters` (K,R,S,C); of a matrix product, each row is a 1x1 image."""
        n, h, w, c = image.shape
        k, r, s, _ = filters.shape
        p, q = op.pooled_hw(h, w, r, s)
        conv = cls(n, h, w, c, k, r, s, p, q, op.stride, op.pad[:2], op.dilation, op.pool)
        if any(op.pad) or op.pool:
            return conv
        if (r, s, p, q) == (h, w, 1, 1) and op.dilation == (1, 1):
            return replace(conv, h=1, w=1, c=h * w * c, r=1, s=1)
        if (r, s, *op.stride) == (1, 1, 1, 1):
            return replace(conv, n=n * h * w, h=1, w=1, p=1, q=1)
        return conv

    @property
    def rows(self) -> int:
        """Outputs that are computed, of one filter."""
        return self.n * self.p * self.q * (4 if self.pool else 1)

    @property
    def taps_c(self) -> int:
        """Elements of a filter."""
        return self.r * self.s * self.c

    def argument(self, act: str | None = None) -> Struct:
        """`Conv` of conv_common.cuh."""
        numbers = (
            self.rows, self.h, self.w, self.c, self.k, self.r, self.s, self.taps_c, self.p, self.q,
            *self.stride, *self.pad, *self.dilation, POOL_CODES[self.pool], act_code(act),
        )  # fmt: skip
        divisors = (self.p, self.q, self.c, self.s)
        return Struct((*(np.int32(v) for v in numbers), *(fast_div(max(d, 1)) for d in divisors)))


class Forced:
    """A convolution family held to one of its `candidates`, as a launcher: to test and to time each of them."""

    def __init__(self, family: Any, variant: object) -> None:
        self.family, self.variant = family, variant
        self.OPS: tuple[type[Op], ...] = family.OPS

    def supports(self, op: Op, inputs: tuple[Spec, ...]) -> str | None:
        return self.family.supports(op, inputs)

    def workspace_bytes(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
        return self.family.workspace_bytes(op, inputs, outputs, device, self.variant)

    def launches(self, call: Call, device: Device) -> list[Launch]:
        return self.family.launches(call, device, self.variant)

    def variants(self) -> Iterable[Kernel]:
        return self.family.variants()


def refuse_window(op: ConvGeometry) -> str | None:
    """Why kernels that pool by 2x2 only cannot run a convolution; None where they can."""
    return "of pools only 2x2 of stride 2 is fused here" if isinstance(op, ConvFprop) and op.window else None


def refuse_extras(op: ConvGeometry) -> str | None:
    """Why kernels that sum nothing that they write, and forward add nothing, cannot run a convolution; None where they can."""
    sums = op.moments if isinstance(op, ConvFprop) else isinstance(op, ConvDgrad) and op.sums
    if sums:
        return "the kernels take no sums of what they write for a batch norm"
    if isinstance(op, ConvFprop) and op.keep:
        return "the kernels do not store what the activation is taken of"
    return "forward the kernels have no addend" if isinstance(op, ConvFprop) and op.add else None


def unsupported(
    op: ConvGeometry, tensors: Sequence[Spec], image: tuple[int, int], filter_rs: tuple[int, int]
) -> str | None:
    """Why the kernels of tiles and of few channels cannot run a convolution of these tensors; None where they can."""
    if reason := refuse_window(op) or refuse_dtype(*tensors, among=tuple(ELEMENTS)):
        return reason
    for spec in tensors:
        if spec.size > MAX_ELEMENTS:
            return f"an operand has {spec.size} elements; the kernels address 2**31 - 2**16"
    if op.groups != 1:
        return f"these convolution kernels have one group, not {op.groups}"
    if reason := refuse_extras(op):
        return reason
    span = [d * (f - 1) + 1 for d, f in zip(op.dilation, filter_rs, strict=True)]
    if max(*image, *span, *op.pad, *op.stride) >= MAX_SIDE:
        return f"image sides, filter spans, padding and strides must be below {MAX_SIDE}"
    return None


def refuse_columns(count: int, what: str) -> str | None:
    """Why a grid of tiles cannot have so many columns; None where it can."""
    return f"a grid of tiles has at most {MAX_COLUMNS} {what}, not {count}" if count > MAX_COLUMNS else None


class Tile(NamedTuple):
    """Shape of a block: its outputs, depth of a step, a thread's outputs, lanes that share them, tiles in flight."""

    bm: int
    bn: int
    bk: int
    tm: int
    tn: int
    slices: int
    stages: int

    def blocks(self, m: int, n: int) -> int:
        """Blocks that cover m x n outputs."""
        return ceil(m / self.bm) * ceil(n / self.bn)

    def covers(self, n: int) -> bool:
        """Whether a grid, along whose second side the columns go, has room for n of them."""
        return ceil(n / self.bn) <= MAX_GRID_YZ

    @property
    def threads(self) -> int:
        return self.slices * (self.bm // self.tm) * (self.bn // self.tn)

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return tuple(zip(("BM", "BN", "BK", "TM", "TN", "SLICES", "STAGES"), self, strict=True))

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk}/{self.tm}x{self.tn}/{self.slices}/{self.stages}"


def tile_cycles(
    tile: Tile, blocks: int, depth: int, copies: float, sm_count: int, resident_threads: int = 320
) -> float:
    """Estimated clock cycles of `blocks` blocks that each reduce over `depth`: what the choice of a tile rests on.

    The larger of two bounds. Throughput: what the busiest SM does, its arithmetic (128 FMA a cycle), its reads of shared
    memory, its copies (`copies` instructions a warp for every 32 floats). Latency: what one block needs alone, times the
    rounds of blocks that gain from being on an SM at once, `resident_threads` together. The constants are fitted to an
    H200's times of every tile on LeNet-5's and cifarnet's layers, pooled as they are, at batches of 64 to 4096: 15 % off
    in the mean, and the tile taken costs 2 % more than the best.
    """
    steps = ceil(depth / tile.bk)
    warps = tile.threads / 32
    inner = warps * tile.bk / 4 / tile.slices  # products of 4-deep fragments, by warps, in a step
    arithmetic, reads = inner * tile.tm * tile.tn, 2.8 * inner * (tile.tm + tile.tn)
    copy = 6.9 * copies * (tile.bm + tile.bn) * tile.bk / 32
    work = 650 + steps * (max(arithmetic, reads) + 0.65 * min(arithmetic, reads) + copy)
    own_pace = max(1.0, warps / 4) * tile.bk / 4 / tile.slices * (4 * tile.tm * tile.tn + 6 * (tile.tm + tile.tn))
    alone = 425 + steps * (own_pace + copy + 234)
    resident = max(1, resident_threads // tile.threads)
    return max(ceil(blocks / sm_count) * work, ceil(blocks / (sm_count * resident)) * alone)
