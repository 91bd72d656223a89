"""Launcher of conv_stem_fprop.cu and conv_stem_wgrad.cu: bf16 convolutions of few channels, such as a network's first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, MAX_SIDE, refuse_extras, refuse_window
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvFprop, ConvWgrad)
MAX_RUN = 32  # elements of a filter's row
LEAST_COLUMNS = 4  # of outputs: fewer would leave most of a unit's 16 columns empty
WARPS = 8
RESIDENT = 2  # blocks on an SM
BACKWARD_FILL_CYCLES = 3  # of a word of the image, of which the forward kernel takes one, as an H200 was measured
UNIT_COLUMNS = 16
MOST_UNITS_W, MOST_UNITS_H, MOST_CANDIDATES = 8, 16, 6
# (RUN16, RUN8) by the eights that a run takes; tiles of 8 filters of a forward block, of 16 of a backward one.
STEPS = {1: (0, 1), 2: (1, 0), 3: (1, 1), 4: (2, 0)}
FORWARD_TILES, BACKWARD_TILES = (2, 8), (1, 4)


class Variant(NamedTuple):
    """A block's tile in units of 2 rows x 16 columns of outputs."""

    units_w: int
    units_h: int

    def __str__(self) -> str:
        return f"{2 * self.units_h}x{UNIT_COLUMNS * self.units_w}"


@dataclass(frozen=True)
class Sizes:
    """A convolution; p and q count outputs before the pool, of those that its floor keeps."""

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
    dilation_h: int
    pool: bool

    @classmethod
    def of(cls, op: ConvGeometry, x: Spec, k: int, filter_rs: tuple[int, int]) -> Sizes:
        """Of the image x and K filters."""
        n, h, w, c = x.shape
        p, q = op.output_hw(h, w, *filter_rs)
        if op.pool:
            p, q = p // 2 * 2, q // 2 * 2
        return cls(n, h, w, c, k, *filter_rs, p, q, op.stride, op.pad[:2], op.dilation[0], op.pool is not None)

    @property
    def run(self) -> int:
        """Elements of a filter's row."""
        return self.s * self.c

    @property
    def runs(self) -> int:
        """The same in eights."""
        return ceil(self.run / 8)

    @property
    def step(self) -> int:
        """Elements from a column of outputs to the next."""
        return self.stride[1] * self.c

    def patch_rows(self, variant: Variant) -> int:
        """Rows of the image that a tile reads."""
        return (2 * variant.units_h - 1) * self.stride[0] + (self.r - 1) * self.dilation_h + 1

    def pitch(self, variant: Variant) -> int:
        """Words of such a row, in fours; a gradient's starts at an even element."""
        return 4 * ceil(
            ((UNIT_COLUMNS * variant.units_w - 1) * self.step + 8 * self.runs + self.pad[1] * self.c % 2) / 8
        )

    def patch_bytes(self, variant: Variant) -> int:
        """Of those rows."""
        return 4 * self.patch_rows(variant) * self.pitch(variant)

    def tiles(self, variant: Variant) -> tuple[int, int, int]:
        """Along the width, the height and the images."""
        return ceil(self.q / (UNIT_COLUMNS * variant.units_w)), ceil(self.p / (2 * variant.units_h)), self.n


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvWgrad):
        return f"{op.name} is neither a forward convolution nor a filter gradient"
    x, other = inputs[:2]
    if x.dtype != "bf16" or other.dtype != "bf16":
        return f"the kernels of few channels take bf16 operands, not {x.dtype} and {other.dtype}"
    if reason := refuse_window(op):
        return reason
    sizes = sizes_of(op, inputs)
    if op.groups != 1 or op.dilation[1] != 1:
        return f"the kernels of few channels have one group and no dilated width, not {op.groups} and {op.dilation[1]}"
    if sizes.run > MAX_RUN or sizes.c % 8 == 0:
        return f"a filter's row has at most {MAX_RUN} elements, not of channels by eights; got {sizes.s} x {sizes.c}"
    if sizes.q < LEAST_COLUMNS:
        return f"rows of fewer than {LEAST_COLUMNS} outputs leave the kernels of few channels idle, got {sizes.q}"
    if op.pool not in (None, "max"):
        return f"the kernels of few channels pool by the maximum, not '{op.pool}'"
    if isinstance(op, ConvFprop) and op.act not in (None, "relu"):
        return f"the kernels of few channels apply ReLU or nothing, not {op.act}"
    if reason := refuse_extras(op):
        return reason
    if isinstance(op, ConvWgrad) and sizes.r + op.bias > WARPS:
        return f"filters of more than {WARPS - op.bias} rows have more than the warps of a block, got {sizes.r}"
    if max(sizes.h, sizes.w, sizes.r * sizes.dilation_h, *op.pad, *op.stride) >= MAX_SIDE:
        return f"image sides, filter spans, padding and strides must be below {MAX_SIDE}"
    if max(x.size, sizes.n * sizes.p * sizes.q * sizes.k) >= 2**31:
        return "a tensor has 2**31 elements or more"
    if not next(_fitting(op, sizes, _SMALLEST_SHARED_BYTES), None):
        return "a row of the image does not fit into shared memory"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The partial sums of a gradient."""
    if not isinstance(op, ConvWgrad):
        return 0
    sizes = sizes_of(op, inputs)
    return 4 * _splits(op, sizes, variant or _ranked(op, sizes, device)[0], device) * _row_size(op, sizes)


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    return _ranked(call.op, sizes_of(call.op, call.input_specs), device)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    costs = _costs(call.op, sizes_of(call.op, call.input_specs), device)
    return (6.0 if isinstance(call.op, ConvWgrad) else 3.0) + min(costs.values()) / CYCLES_PER_US


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch, and for a gradient one that adds partial sums; `variant` forces one of `candidates`."""
    op, sizes = call.op, sizes_of(call.op, call.input_specs)
    if sizes.n * sizes.p == 0 and isinstance(op, ConvFprop):
        return []
    chosen = variant or _ranked(op, sizes, device)[0]
    tiles = _tiles(sizes, chosen)
    problem = problem_of(op, sizes, chosen)
    shared_bytes = _shared_bytes(op, sizes, chosen)
    grid = (max(1, min(tiles, RESIDENT * device.sm_count)), ceil(sizes.k / _filters(op, sizes.k)), 1)
    if isinstance(op, ConvFprop):
        x, w, *bias = call.inputs
        idx = call.outputs[1] if op.has_indices else None
        args: tuple[Argument, ...] = (x, w, bias[0] if op.bias else None, call.outputs[0], idx, problem)
        return [Launch(_kernel(op, sizes), grid, (32 * WARPS, 1, 1), args, shared_bytes)]
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is neither a forward convolution nor a filter gradient")
    x, dy, *routes = call.inputs
    groups, row_size = _groups(op, sizes), _row_size(op, sizes)
    args = (x, dy, routes[0] if routes else None, call.workspace, problem, np.int32(groups), np.int32(row_size))
    threads = 32 * groups * (sizes.r + op.bias)
    splits = _splits(op, sizes, chosen, device)
    return [Launch(_kernel(op, sizes), grid, (threads, 1, 1), args, shared_bytes), sum_launch(call, splits)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for conv_wgrad's sum."""
    for runs in STEPS:
        for pool in (0, 1):
            yield from (_forward_kernel(runs, tiles, pool) for tiles in FORWARD_TILES)
            yield from (_backward_kernel(runs, tiles, pool) for tiles in BACKWARD_TILES)


def _forward_kernel(runs: int, tiles: int, pool: int) -> Kernel:
    run16, run8 = STEPS[runs]
    macros = (("RUN16", run16), ("RUN8", run8), ("TILES", tiles), ("POOL", pool))
    return Kernel("conv_stem_fprop.cu", "conv_stem_fprop", macros)


def _backward_kernel(runs: int, tiles: int, pool: int) -> Kernel:
    return Kernel("conv_stem_wgrad.cu", "conv_stem_wgrad", (("RUNS", runs), ("TILES", tiles), ("POOL", pool)))


def _kernel(op: Op, sizes: Sizes) -> Kernel:
    make, width = (_forward_kernel, 8) if isinstance(op, ConvFprop) else (_backward_kernel, 16)
    return make(sizes.runs, _filters(op, sizes.k) // width, int(sizes.pool))


def _filters(op: Op, k: int) -> int:
    """Filters of a block."""
    few, many = (8 * t for t in FORWARD_TILES) if isinstance(op, ConvFprop) else (16 * t for t in BACKWARD_TILES)
    return few if k <= few else many


def sizes_of(op: Op, inputs: tuple[Spec, ...]) -> Sizes:
    """Of a forward convolution or a filter gradient on these operands."""
    if isinstance(op, ConvFprop):
        k, r, s, _ = inputs[1].shape
        return Sizes.of(op, inputs[0], k, (r, s))
    if isinstance(op, ConvWgrad):
        return Sizes.of(op, inputs[0], inputs[1].shape[3], op.filter)
    raise TypeError(f"{op.name} is neither a forward convolution nor a filter gradient")


def _row_size(op: ConvWgrad, sizes: Sizes) -> int:
    """Floats of a split's sums: dw, then db."""
    return sizes.k * (sizes.r * sizes.run + op.bias)


def _groups(op: ConvWgrad, sizes: Sizes) -> int:
    """Groups of warps in a block, each with a warp for a row of the filters and one for the bias."""
    return WARPS // (sizes.r + op.bias)


def _splits(op: ConvWgrad, sizes: Sizes, variant: Variant, device: Device) -> int:
    return max(1, min(_tiles(sizes, variant), RESIDENT * device.sm_count)) * _groups(op, sizes)


def _tiles(sizes: Sizes, variant: Variant) -> int:
    x, y, z = sizes.tiles(variant)
    return x * y * z


def _copies(op: Op, sizes: Sizes) -> int:
    """Of the image's rows: the forward kernel reads words, and pixels may start in the middle of one."""
    return 2 if isinstance(op, ConvFprop) and sizes.step % 2 else 1


def _shared_bytes(op: Op, sizes: Sizes, variant: Variant) -> int:
    patch = sizes.patch_bytes(variant) * _copies(op, sizes)
    filters = _filters(op, sizes.k)
    if isinstance(op, ConvFprop):
        run16, run8 = STEPS[sizes.runs]
        fragments = 4 * sizes.r * filters // 8 * 32 * (2 * run16 + run8)
        staging = WARPS * UNIT_COLUMNS * (2 * filters + 16)
        return fragments + staging + 4 * filters + patch
    return 2 * (2 * variant.units_h * UNIT_COLUMNS * variant.units_w * (2 * filters + 16) + patch)  # two stages


_SMALLEST_SHARED_BYTES = 101376  # of the architectures that bf16 runs on: what a block may have with opt-in


def tiles_of(sizes: Sizes) -> Iterator[Variant]:
    """Tiles of balanced widths."""
    units = ceil(sizes.q / UNIT_COLUMNS)
    widths = {ceil(units / parts) for parts in range(ceil(units / MOST_UNITS_W), units + 1)}
    for units_w in sorted(widths, reverse=True):
        for units_h in range(1, min(MOST_UNITS_H, max(1, ceil(sizes.p / 2))) + 1):
            yield Variant(units_w, units_h)


def _fitting(op: Op, sizes: Sizes, most_bytes: int) -> Iterator[Variant]:
    """Those that fit into shared memory."""
    return (variant for variant in tiles_of(sizes) if _shared_bytes(op, sizes, variant) <= most_bytes)


def _ranked(op: Op, sizes: Sizes, device: Device) -> list[Variant]:
    costs = _costs(op, sizes, device)
    return sorted(costs, key=costs.__getitem__)[:MOST_CANDIDATES]


def _costs(op: Op, sizes: Sizes, device: Device) -> dict[Variant, float]:
    """Estimated clock cycles: a block's products and its filling of shared memory, in rounds over the SMs' blocks."""
    room = (device.shared_bytes_per_block + 1024) // RESIDENT - 1024
    fitting = list(_fitting(op, sizes, room)) or list(_fitting(op, sizes, device.shared_bytes_per_block))
    filters = _filters(op, sizes.k)

    def cycles(variant: Variant) -> float:
        units = variant.units_w * variant.units_h
        fills: float = sizes.patch_rows(variant) * sizes.pitch(variant) * _copies(op, sizes)
        if isinstance(op, ConvWgrad):  # copies run beside products
            fills = (
                BACKWARD_FILL_CYCLES * fills + 2 * UNIT_COLUMNS * units * filters / 32 + 100 * sizes.patch_rows(variant)
            )
            step = 60 + 8 * filters / 16 * (sizes.runs + 2)
            work = ceil(2 * variant.units_h / _groups(op, sizes)) * (100 + variant.units_w * step)
            tile = 2500 + max(fills, work)
        else:
            work = ceil(units / WARPS) * (600 + sizes.r * sizes.runs * (30 + 5 * filters))
            tile = 1500 + fills + work
        blocks = _tiles(sizes, variant) * ceil(sizes.k / filters)
        return ceil(blocks / (RESIDENT * device.sm_count)) * tile

    return {variant: cycles(variant) for variant in fitting}


def problem_of(op: Op, sizes: Sizes, variant: Variant) -> Struct:
    """`Problem` of conv_stem.cuh."""
    rows, pitch = sizes.patch_rows(variant), sizes.pitch(variant)
    across, down, _ = sizes.tiles(variant)
    numbers = (
        sizes.h, sizes.w * sizes.c, sizes.k, sizes.p, sizes.q, sizes.run, sizes.r, sizes.step, sizes.pad[1] * sizes.c,
        sizes.stride[0], sizes.pad[0], sizes.dilation_h, *variant, rows, pitch,
        sizes.patch_bytes(variant), _tiles(sizes, variant),
        act_code(op.act) if isinstance(op, ConvFprop) else 0,
    )  # fmt: skip
    divisors = (variant.units_w, max(1, across), max(1, down), pitch // 4)
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors)))
