"""Launcher of conv_wgrad_sm90.cu: gradient of a bf16 convolution's filters and bias on Hopper's tensor cores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, MAX_SIDE, Conv
from parcnn.cuda.kernels.conv_sm90 import CHANNEL_UNIT, image_map
from parcnn.cuda.kernels.conv_unpool import unpool
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer, Struct, TensorMap
from parcnn.cuda.tensormap import MAX_BOX, MAX_ELEMENT_STRIDE
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvWgrad,)
SOURCE = "conv_wgrad_sm90.cu"
UNPOOLS = True
MAX_STAGES = 8
BARRIER_BYTES = 16 * MAX_STAGES
STEP_PIXELS = 16  # the K of wgmma
WINDOW_WIDTH, WINDOW_TAPS = 8, 3
MOST_CANDIDATES = 8
_SUM_THREADS, _MOST_PARTS = 256, 8
_ALIGNMENT = 256  # of the partial sums behind an unpooled dy


class Form(NamedTuple):
    """A compiled kernel: a window of three by three taps an item, or one tap; the warpgroups that multiply; the columns
    of their products; the channels of a row of x in shared memory."""

    window: bool
    consumers: int
    columns: int
    cb: int

    @property
    def filters(self) -> int:
        """Of an item."""
        return 64 if self.window else 64 * self.consumers

    @property
    def channels(self) -> int:
        """Of an item."""
        return self.cb if self.window else self.columns

    @property
    def x_chunks(self) -> int:
        return self.channels // self.cb

    @property
    def dy_chunks(self) -> int:
        return self.filters // 64

    @property
    def sums_bytes(self) -> int:
        """What a block of a cluster shows the others: its products' sums and those of dy."""
        return 4 * (64 * self.consumers * self.columns + self.filters)

    def kernel(self, cluster: int) -> Kernel:
        names = ("WINDOW", "CONSUMERS", "COLUMNS", "CB", "CLUSTER")
        return Kernel(SOURCE, "conv_wgrad_sm90", tuple(zip(names, (int(self.window), *self[1:], cluster), strict=True)))


FORMS = (
    Form(True, 3, 192, 64),
    Form(True, 3, 96, 32),
    *(Form(False, consumers, columns, 64) for consumers in (1, 2) for columns in (64, 128, 256)),
    *(Form(False, consumers, 32, 32) for consumers in (1, 2)),
)
CLUSTERS = (1, 2)  # of four and eight blocks the 128 of a wave were not all there at once on an H200: twice the time
SUM_KERNEL = Kernel(SOURCE, "conv_wgrad_sm90_sum")


@dataclass(frozen=True)
class Variant:
    """A way to run a problem: a kernel, its tile of output pixels (width, height, images), the runs of tiles that the
    reduction is cut into, how many of them a cluster of blocks adds up, and the stages of the ring."""

    form: Form
    tile: tuple[int, int, int]
    splits: int
    stages: int
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Of partial sums; one: the result."""
        return self.splits // self.cluster

    def __str__(self) -> str:
        kind = "window" if self.form.window else "tap"
        size = f"{self.form.filters}x{self.form.channels}"
        splits = f"{self.rows}x{self.cluster}" if self.cluster > 1 else str(self.splits)
        return f"{kind} {size} {'x'.join(map(str, self.tile))} in {splits} {self.stages}"


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvWgrad):
        return f"{op.name} is not a convolution's filter gradient"
    x, dy = inputs[:2]
    if x.dtype != "bf16" or dy.dtype != "bf16":
        return f"the tensor-core filter gradient takes bf16 operands, not {x.dtype} and {dy.dtype}"
    if op.groups != 1:
        return f"the tensor-core filter gradient has one group, not {op.groups}"
    if max(op.stride) > MAX_ELEMENT_STRIDE:
        return f"strides above {MAX_ELEMENT_STRIDE} are not copied by TMA, got {op.stride}"
    c, k = x.shape[3], dy.shape[3]
    if c % CHANNEL_UNIT or k % CHANNEL_UNIT:
        return f"channels must be multiples of {CHANNEL_UNIT}, got {c} -> {k}"
    span = [d * (f - 1) + 1 for d, f in zip(op.dilation, op.filter, strict=True)]
    if max(x.shape[1], x.shape[2], *span, *op.pad) >= MAX_SIDE:
        return f"image sides, filter spans and padding must be below {MAX_SIDE}"
    if x.size == 0 or dy.size == 0:
        return "there are no pixels to sum over"
    if max(x.size, dy.size * (4 if op.pool else 1), *(spec.size for spec in op.infer(*inputs))) >= 2**31:
        return "a tensor has 2**31 elements or more"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """dy unpooled where there is a pool, and the rows of partial sums where there are several."""
    op, conv = _conv(op, inputs[0], outputs[0])
    rows = (variant or _ranked(conv, op.bias, device)[0]).rows
    return _partial_offset(conv) + (4 * rows * _row_size(conv, op.bias) if rows > 1 else 0)


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    return list(_ranked(conv, op.bias, device))


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant, to compare with other families.

    `_cycles` ranks variants; TMA's rows take longer where they are short. Fitted to an H200's times of 176 variants: 15 %
    off in the mean.
    """
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    variant = _ranked(conv, op.bias, device)[0]
    form, (w, h, n), taps = variant.form, variant.tile, WINDOW_TAPS if variant.form.window else 1
    p, q = _outputs(conv)
    items = ceil(conv.k / form.filters) * ceil(conv.c / form.channels) * ceil(conv.r / taps) * ceil(conv.s / taps)
    tiles = ceil(items * ceil(q / w) * ceil(p / h) * ceil(conv.n / n) / device.sm_count)
    result = 1.5 + 0.87 * _cycles(conv, op.bias, variant, device) / CYCLES_PER_US + 3.0 * (conv.pool is not None)
    if conv.c < 64:
        pixels = (w + taps - 1) * (h + taps - 1) * n
        skipped = conv.stride[0] * conv.stride[1] - 1
        result += (0.0007 + 0.0006 * skipped) * tiles * form.x_chunks * pixels
    if conv.k < 64:
        result += 0.0019 * tiles * form.dy_chunks * w * h * n
    return result


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """Unpools dy where there is a pool, multiplies, and adds the rows of sums where there are several; `variant` forces one
    of `candidates`."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    chosen = variant or _ranked(conv, op.bias, device)[0]
    x, dy = call.inputs[:2]
    dw, db = call.outputs[0], call.outputs[1] if op.bias else None
    result = []
    if conv.pool:
        error = _workspace(call)
        result.append(unpool(dy, call.inputs[2] if conv.pool == "max" else None, error))
        dy = error
    row_size, partial = _row_size(conv, op.bias), None
    if chosen.rows > 1:
        partial = Pointer(_workspace(call), _partial_offset(conv), 4 * chosen.rows * row_size)
    result.append(_product(conv, chosen, row_size, x, dy, (dw, db, partial)))
    if partial:
        result.append(_sum(conv, chosen.rows, row_size, (partial, dw, db)))
    return result


def fit(
    conv: Conv, form: Form, tile: tuple[int, int, int], splits: int, device: Device, cluster: int = 1
) -> Variant | None:
    """The variant with as many stages as shared memory holds; None where there is no room for two."""
    stages = (device.shared_bytes_per_block - BARRIER_BYTES) // _Stage.of(conv, form, tile).nbytes
    return Variant(form, tile, splits, min(MAX_STAGES, stages), cluster) if stages >= 2 else None


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for `conv_unpool`'s."""
    yield from (form.kernel(cluster) for form in FORMS for cluster in CLUSTERS)
    yield SUM_KERNEL


def _conv(op: Op, x: Spec, dw: Spec) -> tuple[ConvWgrad, Conv]:
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is not a convolution's filter gradient")
    return op, Conv.of(op, x, dw)


def _workspace(call: Call) -> Slot:
    if call.workspace is None:
        raise ValueError("a filter gradient of several splits, or behind a pool, needs its workspace")
    return call.workspace


def _outputs(conv: Conv) -> tuple[int, int]:
    """Rows and columns of dy, before the pool."""
    return (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)


def _row_size(conv: Conv, bias: bool) -> int:
    """Floats of a split's sums: dw, then db."""
    return conv.k * (conv.taps_c + bias)


def _partial_offset(conv: Conv) -> int:
    return _round_up(2 * conv.rows * conv.k, _ALIGNMENT) if conv.pool else 0


def _product(
    conv: Conv, variant: Variant, row_size: int, x: Slot, dy: Slot, outputs: tuple[Slot, Slot | None, Pointer | None]
) -> Launch:
    form, (w, h, n) = variant.form, variant.tile
    stage = _Stage.of(conv, form, variant.tile)
    columns, rows, images = _tiles(conv, variant.tile)
    grid = _items(conv, form)
    items = grid[0] * grid[1] * grid[2] * grid[3]
    swizzle = 1 if form.cb == 64 else 2
    numbers = (
        conv.k, conv.r, conv.s, conv.c, *conv.stride, *conv.pad, *conv.dilation,
        n, h, w, columns * rows * images, variant.splits,
        conv.k * conv.taps_c, row_size, w * h * n // STEP_PIXELS,
    )  # fmt: skip
    descriptors = (
        stage.x_group_bytes >> 4 | swizzle << 30, stage.x_leading_bytes, stage.x_step_bytes >> 4,
        stage.dy_group_bytes >> 4 | 1 << 30, stage.dy_step_bytes >> 4,
    )  # fmt: skip
    sizes = (stage.x_chunk_bytes, stage.dy_chunk_bytes, stage.load_bytes, stage.nbytes, variant.stages)
    divisors = (columns, rows, items, grid[3], grid[2], grid[1])
    problem = Struct(
        (
            *(np.int32(v) for v in numbers),
            *(np.uint32(v) for v in descriptors),
            *(np.int32(v) for v in sizes),
            *(fast_div(d) for d in divisors),
        )
    )
    args: tuple[Argument, ...] = (_x_map(x, conv, variant), _dy_map(dy, conv, variant), *outputs, problem)
    threads = 128 * (form.consumers + 1)
    shared_bytes = variant.stages * stage.nbytes + BARRIER_BYTES
    if variant.cluster > 1:
        shared_bytes = max(shared_bytes, form.sums_bytes)
    return Launch(form.kernel(variant.cluster), (items * variant.splits, 1, 1), (threads, 1, 1), args, shared_bytes)


def _sum(conv: Conv, rows: int, row_size: int, places: tuple[Pointer, Slot, Slot | None]) -> Launch:
    """Few rows are added by one thread each element, more by several."""
    parts = 1
    while parts < _MOST_PARTS and rows > 8 * parts:
        parts *= 2
    threads = _SUM_THREADS // parts
    sizes = (np.int32(conv.k * conv.taps_c), np.int32(row_size), np.int32(rows))
    return Launch(SUM_KERNEL, (ceil(row_size / (4 * threads)), 1, 1), (threads, parts, 1), (*places, *sizes))


def _x_map(x: Slot, conv: Conv, variant: Variant) -> TensorMap:
    cb, (w, h, n) = variant.form.cb, variant.tile
    dims = (conv.c, conv.w, conv.h, conv.n)
    if variant.form.window:
        return image_map(x, dims, (cb, w + WINDOW_TAPS - 1, h + WINDOW_TAPS - 1, n), (), cb)
    stride_h, stride_w = conv.stride
    return image_map(x, dims, (cb, w * stride_w, h * stride_h, n), (1, stride_w, stride_h, 1), cb)


def _dy_map(dy: Slot, conv: Conv, variant: Variant) -> TensorMap:
    p, q = _outputs(conv)
    return image_map(dy, (conv.k, q, p, conv.n), (64, *variant.tile), (), 64)


class _Stage(NamedTuple):
    """Bytes of a stage, and of the ways through it: between groups of eight pixels, spans of channels, steps of 16 pixels."""

    x_group_bytes: int
    x_leading_bytes: int
    x_step_bytes: int
    dy_group_bytes: int
    dy_step_bytes: int
    x_chunk_bytes: int
    dy_chunk_bytes: int
    load_bytes: int
    nbytes: int

    @classmethod
    def of(cls, conv: Conv, form: Form, tile: tuple[int, int, int]) -> _Stage:
        w, h, n = tile
        x_row, dy_row = 2 * form.cb, 128  # of a pixel
        dy_chunk = w * h * n * dy_row
        if form.window:
            pitch = (w + WINDOW_TAPS - 1) * x_row
            image = (h + WINDOW_TAPS - 1) * pitch
            x_box, x_leading = n * image, x_row
            # Sixteen pixels are two rows of an image, or a row of two images.
            x_group, x_step = (pitch, 2 * pitch) if n == 1 else (image, pitch)
            dy_group, dy_step = (w * dy_row, 2 * w * dy_row) if n == 1 else (h * w * dy_row, w * dy_row)
        else:
            x_box = w * h * n * x_row
            x_leading, x_group, x_step = x_box, 8 * x_row, STEP_PIXELS * x_row
            dy_group, dy_step = 8 * dy_row, STEP_PIXELS * dy_row
        x_chunk = _round_up(x_box, 1024)
        loads = form.x_chunks * x_box + form.dy_chunks * dy_chunk
        nbytes = form.x_chunks * x_chunk + form.dy_chunks * dy_chunk
        return cls(x_group, x_leading, x_step, dy_group, dy_step, x_chunk, dy_chunk, loads, nbytes)


def _tiles(conv: Conv, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tiles along the width, the height and the images."""
    p, q = _outputs(conv)
    return ceil(q / tile[0]), ceil(p / tile[1]), ceil(conv.n / tile[2])


def _items(conv: Conv, form: Form) -> tuple[int, int, int, int]:
    """Items along the filters, the channels, the filter's rows and its columns."""
    taps = WINDOW_TAPS if form.window else 1
    return ceil(conv.k / form.filters), ceil(conv.c / form.channels), ceil(conv.r / taps), ceil(conv.s / taps)


@lru_cache(maxsize=1024)
def _ranked(conv: Conv, bias: bool, device: Device) -> tuple[Variant, ...]:
    """The best variants of each kernel by `_cycles`, best first."""
    costs: dict[Variant, float] = {}
    for form in FORMS:
        shapes = list(_shapes(conv, form))
        # Clusters of one tap of several took up to half as long again on an H200, without any gain in traffic.
        for cluster in CLUSTERS if form.window or conv.r * conv.s == 1 else (1,):
            own: dict[Variant, float] = {}
            for tile in shapes:
                for splits in _splits(conv, form, tile, device, cluster):
                    variant = fit(conv, form, tile, splits, device, cluster)
                    if variant:
                        own[variant] = _cycles(conv, bias, variant, device)
            costs |= {v: own[v] for v in sorted(own, key=own.__getitem__)[:2]}
    return tuple(sorted(costs, key=costs.__getitem__)[:MOST_CANDIDATES])


def _splits(conv: Conv, form: Form, tile: tuple[int, int, int], device: Device, cluster: int) -> set[int]:
    """None, and those that fill a wave of blocks or a few, in whole clusters; none of the splits is empty."""
    k, c, r, s = _items(conv, form)
    x, y, z = _tiles(conv, tile)
    waves = {min(device.sm_count * wave // (k * c * r * s), x * y * z) for wave in (1, 2, 3)}
    return {1} | {max(1, splits) for splits in waves} if cluster == 1 else {v // cluster * cluster for v in waves} - {0}


def _shapes(conv: Conv, form: Form) -> Iterator[tuple[int, int, int]]:
    """Tiles that the form takes."""
    p, q = _outputs(conv)
    if form.cb == 32 and conv.c > 32:
        return
    if form.window:
        if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.r * conv.s == 1:
            return
        heights = {ceil(p / parts) for parts in range(1, p + 1) if ceil(p / parts) <= 32}
        for h in sorted(heights):
            yield WINDOW_WIDTH, _round_up(h, 2), 1
            if conv.n > 1 and h <= 16:
                yield WINDOW_WIDTH, h, 2
        return
    if (form.consumers == 2 and conv.k <= 64) or (form.columns > 64 and form.columns // 2 >= conv.c):
        return
    for w in sorted({ceil(q / parts) for parts in range(1, q + 1)} | {8, 16}):
        for h in sorted({ceil(p / parts) for parts in range(1, p + 1)}):
            if w * h > MAX_BOX or w * conv.stride[1] > MAX_BOX or h * conv.stride[0] > MAX_BOX:
                continue
            unit = STEP_PIXELS // gcd(w * h, STEP_PIXELS)
            for pixels in (64, 128, 256):
                n = pixels // (w * h * unit) * unit
                if 0 < n <= MAX_BOX:
                    yield w, h, n


def _cycles(conv: Conv, bias: bool, variant: Variant, device: Device) -> float:
    """Estimated clock cycles of the call: its busiest SM's, or memory's (about 2400 bytes a cycle), and the sum's.

    A product m64nNk16 takes N/2 cycles; L2 brings about 40 bytes a cycle to an SM (as `conv_sm90_tiles.Work` has it).
    """
    form, (w, h, n) = variant.form, variant.tile
    stage = _Stage.of(conv, form, variant.tile)
    product = w * h * n / STEP_PIXELS * form.consumers * form.columns / 2
    traffic = stage.load_bytes / 40
    few_stages = 1 + 0.03 * max(0, 4 - variant.stages)
    tile = 60 + few_stages * (max(product, traffic) + 0.1 * min(product, traffic))
    x, y, z = _tiles(conv, variant.tile)
    k, c, r, s = _items(conv, form)
    blocks = k * c * r * s * variant.splits
    busiest = ceil(blocks / device.sm_count) * (3500 + ceil(x * y * z / variant.splits) * tile)
    p, q = _outputs(conv)
    pixels = min(conv.h, p * conv.r) * min(conv.w, q * conv.s)  # of x that are read
    memory = 2 * conv.n * (pixels * conv.c + p * q * conv.k) / 2400
    row_bytes = 4 * _row_size(conv, bias)
    total = 2100 + 2 * variant.rows * row_bytes / 2400 if variant.rows > 1 else 0.0
    if variant.cluster > 1:
        total += 800 + form.sums_bytes / 30
    return max(busiest, memory) + 0.1 * min(busiest, memory) + total


def _round_up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple
