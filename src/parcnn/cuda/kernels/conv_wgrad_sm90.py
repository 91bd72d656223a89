"""Launcher of conv_wgrad_sm90.cu: gradient of a bf16 convolution's filters and bias on Hopper's tensor cores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
MAX_STAGES = 8
BARRIER_BYTES = 16 * MAX_STAGES + 16
STEP_PIXELS = 16  # the K of wgmma
WINDOW_WIDTH, WINDOW_TAPS = 8, 3
MOST_CANDIDATES = 8
MOST_TILES = 2**30
MOST_LINE_PIXELS = 512  # of a window's tile as wide as the image
_TAPS_WHOLE, _NO_TAP = -2, -1
_SUM_THREADS, _MOST_PARTS = 256, 8
_MANY_SUMS = 2**19  # fours of fours of them keep a GPU busy
_ALIGNMENT = 256  # of the partial sums behind an unpooled dy


class Form(NamedTuple):
    """A compiled kernel: a window of three by three taps an item, or one tap; the warpgroups that multiply; the columns
    of their products; the channels of a row of x in shared memory; the blocks of a cluster that share x, of filters of
    their own; those that take one item, and add up their sums."""

    window: bool
    consumers: int
    columns: int
    cb: int
    sharers: int = 1
    adders: int = 1

    @property
    def filters(self) -> int:
        """Of an item."""
        return 64 * self.dy_chunks * self.sharers

    @property
    def channels(self) -> int:
        """Of an item."""
        return self.cb if self.window else self.columns

    @property
    def x_chunks(self) -> int:
        return self.channels // self.cb

    @property
    def dy_chunks(self) -> int:
        return 1 if self.window else self.consumers

    @property
    def taps(self) -> int:
        """Filter rows, and columns, of an item."""
        return WINDOW_TAPS if self.window else 1

    @property
    def sums(self) -> int:
        """Products' sums of a block, also those that hang over."""
        return 64 * self.consumers * self.columns

    @property
    def slot_size(self) -> int:
        """Floats of a block's place for partial sums: the products', and dy's."""
        return self.sums + 64 * self.dy_chunks

    @property
    def kernel(self) -> Kernel:
        names = ("WINDOW", "CONSUMERS", "COLUMNS", "CB", "SHARERS", "ADDERS")
        return Kernel(SOURCE, "conv_wgrad_sm90", tuple(zip(names, (int(self.window), *self[1:]), strict=True)))


FORMS = (
    Form(True, 3, 192, 64),
    Form(True, 3, 96, 32),
    *(Form(False, consumers, columns, 64) for consumers in (1, 2) for columns in (64, 128, 192, 256)),
    *(Form(False, consumers, 32, 32) for consumers in (1, 2)),
    *(Form(False, 2, columns, 64, sharers=2) for columns in (128, 256)),
    Form(False, 2, 128, 64, adders=2),
)
SUM_KERNELS = {eights: Kernel(SOURCE, "conv_wgrad_sm90_sum", (("EIGHTS", eights),)) for eights in (1, 4)}


@dataclass(frozen=True)
class Variant:
    """A way to run a problem: a kernel, its tile of output pixels (width, height, images), how many tiles a block takes of
    all items' (`conv_wgrad_sm90.cu` tells of the line), the stages of the ring, and whether an item begins with a block."""

    form: Form
    tile: tuple[int, int, int]
    share: int
    stages: int
    aligned: bool = False

    def __str__(self) -> str:
        kind = "window" if self.form.window else "tap"
        pair = "2x" if self.form.sharers > 1 else ""
        size = f"{pair}{self.form.filters // self.form.sharers}x{self.form.channels}"
        share = f"{'parts of' if self.aligned else 'by'} {f'{self.form.adders}x' if self.form.adders > 1 else ''}{self.share}"
        return f"{kind} {size} {'x'.join(map(str, self.tile))} {share} {self.stages}"


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
    if not _has_variant(_conv(op, x, op.infer(*inputs)[0])[1], op.bias):
        return f"the outputs of all taps make {MOST_TILES} tiles or more, in any form"
    return None


def unpools(call: Call, device: Device, variant: Variant | None = None) -> bool:
    """True: tensor maps know no indices."""
    return True


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """dy unpooled where there is a pool, and the partial sums of the blocks where items do not begin and end with them."""
    op, conv = _conv(op, inputs[0], outputs[0])
    return _partial_offset(conv) + _line(conv, op.bias, variant or _ranked(conv, op.bias, device)[0]).partial_bytes


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    return list(_ranked(conv, op.bias, device))


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant, to compare with other families.

    `_cycles` ranks variants; TMA's rows take longer where they are short. Fitted to an H200's times of 355 variants: 21 %
    off (root of the mean square).
    """
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    variant = _ranked(conv, op.bias, device)[0]
    form, stage = variant.form, _Stage.of(conv, variant.form, variant.tile)
    tiles = min(variant.share, _line(conv, op.bias, variant).tiles)
    result = 2.75 + 0.975 * _cycles(conv, op.bias, variant, device) / CYCLES_PER_US + 3.0 * (conv.pool is not None)
    if conv.c < 64:
        skipped = 0 if form.window else conv.stride[0] * conv.stride[1] - 1
        pixels = form.x_chunks * stage.x_box_bytes / (2 * form.cb)
        result += (0.0007 + 0.0006 * skipped) * tiles * pixels
    if conv.k < 64:
        result += 0.0019 * tiles * form.dy_chunks * stage.dy_box_bytes / 128
    return result


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """Unpools dy where there is a pool, multiplies, and adds up the sums of items that several blocks have; `variant` forces
    one of `candidates`."""
    op, conv = _conv(call.op, call.inputs[0].spec, call.outputs[0].spec)
    chosen = variant or _ranked(conv, op.bias, device)[0]
    line = _line(conv, op.bias, chosen)
    x, dy = call.inputs[:2]
    result = []
    if conv.pool:
        error = _workspace(call)
        result.append(unpool(dy, call.inputs[2] if conv.pool == "max" else None, error))
        dy = error
    partial = Pointer(_workspace(call), _partial_offset(conv), line.partial_bytes) if line.partial_bytes else None
    gradients = (call.outputs[0], call.outputs[1] if op.bias else None, partial)
    result.append(_product(conv, chosen, line, x, dy, gradients))
    if partial:
        result.append(_sum(chosen.form, line, gradients))
    return result


def fit(conv: Conv, bias: bool, form: Form, tile: tuple[int, int, int], device: Device) -> Variant | None:
    """The variant with as many stages as shared memory holds, with a share for each multiprocessor, or half an item where
    two add up one; None where there is no room for two stages, or too many tiles, or such an item has not all taps."""
    stages = (device.shared_bytes_per_block - BARRIER_BYTES) // _Stage.of(conv, form, tile).nbytes
    line, adds = _Line.of(conv, form, tile, bias, 1), form.adders > 1
    tiles = line.tiles
    pairs_of_rows = form.window and tile[0] == WINDOW_WIDTH and tile[2] == 1  # whose steps take two
    if stages < 2 or tiles >= MOST_TILES or (pairs_of_rows and tile[1] % 2) or (adds and not line.taps_alone):
        return None
    share = ceil(line.tiles_each / form.adders) if adds else ceil(tiles / (device.sm_count // form.sharers))
    return Variant(form, tile, share, min(MAX_STAGES, stages), adds)


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for `conv_unpool`'s."""
    yield from (form.kernel for form in FORMS)
    yield from SUM_KERNELS.values()


def _conv(op: Op, x: Spec, dw: Spec) -> tuple[ConvWgrad, Conv]:
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is not a convolution's filter gradient")
    return op, Conv.of(op, x, dw)


@lru_cache(maxsize=1024)
def _has_variant(conv: Conv, bias: bool) -> bool:
    any_hopper = Device("", "sm_90a", 1)  # its shared memory; how many multiprocessors there are makes no difference
    return any(fit(conv, bias, form, tile, any_hopper) for form in FORMS for tile in _shapes(conv, form))


def _workspace(call: Call) -> Slot:
    if call.workspace is None:
        raise ValueError("a filter gradient of several splits, or behind a pool, needs its workspace")
    return call.workspace


def _outputs(conv: Conv) -> tuple[int, int]:
    """Rows and columns of dy, before the pool."""
    return (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)


def _partial_offset(conv: Conv) -> int:
    return _round_up(2 * conv.rows * conv.k, _ALIGNMENT) if conv.pool else 0


def _product(
    conv: Conv, variant: Variant, line: _Line, x: Slot, dy: Slot, gradients: tuple[Slot, Slot | None, Pointer | None]
) -> Launch:
    form, n = variant.form, variant.tile[2]
    stage = _Stage.of(conv, form, variant.tile)
    ring_bytes = variant.stages * stage.nbytes
    if form.adders > 1:  # half the other's sums come there last, and those of its dy
        ring_bytes = max(ring_bytes, 2 * form.sums + 256 * form.dy_chunks)
    swizzle = 1 if form.cb == 64 else 2
    descriptors = (
        stage.x_group_bytes >> 4 | swizzle << 30, stage.x_leading_bytes, stage.x_step_bytes >> 4,
        stage.dy_group_bytes >> 4 | 1 << 30, stage.dy_step_bytes >> 4,
    )  # fmt: skip
    sizes = (
        stage.x_row_bytes, stage.x_box_bytes, stage.dy_box_bytes,
        stage.x_chunk_bytes, stage.dy_chunk_bytes, stage.load_bytes, stage.nbytes, variant.stages, ring_bytes,
    )  # fmt: skip
    problem = Struct(
        (
            line.argument(),
            *(np.int32(v) for v in (n, line.places, form.slot_size, stage.steps)),
            *(np.uint32(v) for v in descriptors),
            *(np.int32(v) for v in sizes),
            fast_div(line.blocks_each),
        )
    )
    args: tuple[Argument, ...] = (*_x_maps(x, conv, variant), _dy_map(dy, conv, variant), *gradients, problem)
    return Launch(
        form.kernel,
        (line.blocks * form.sharers, 1, 1),
        (128 * (form.consumers + 1), 1, 1),
        args,
        ring_bytes + BARRIER_BYTES,
    )


def _sum(form: Form, line: _Line, gradients: tuple[Slot, Slot | None, Pointer | None]) -> Launch:
    """Few blocks' sums are added by one thread each element, or four of them where there are enough; more by several."""
    parts = 1
    while parts < _MOST_PARTS and line.most_blocks > 8 * parts:
        parts *= 2
    eights = 4 if parts == 1 and line.items * form.sharers * form.sums >= _MANY_SUMS else 1
    threads, own = _SUM_THREADS // parts, form.sums // (4 * eights)
    chunks = ceil((own + (16 * form.dy_chunks if gradients[1] else 0)) / threads)
    rows, columns = line.rows.items, line.columns.items
    sizes = (int(form.window), form.cb, form.slot_size, own, form.sharers)
    divisors = (fast_div(d) for d in (128 * form.consumers, chunks, rows, columns))
    problem = Struct((line.argument(), *(np.int32(v) for v in sizes), *divisors))
    dw, db, partial = gradients
    return Launch(
        SUM_KERNELS[eights],
        (line.items * form.sharers * chunks, 1, 1),
        (threads, parts, 1),
        (partial, dw, db, problem),
    )


def _x_maps(x: Slot, conv: Conv, variant: Variant) -> list[TensorMap]:
    """Of windows of stride 2: x's even rows and columns, even and odd, odd and even, odd and odd. Else four times the same."""
    cb, (w, h, n) = variant.form.cb, variant.tile
    dims = (conv.c, conv.w, conv.h, conv.n)
    if not variant.form.window:
        stride_h, stride_w = conv.stride
        return [image_map(x, dims, (cb, w * stride_w, h * stride_h, n), (1, stride_w, stride_h, 1), cb)] * 4
    whole = image_map(x, dims, (cb, _pitches(conv, w)[0], h + WINDOW_TAPS - 1, n), (), cb)
    pixel, row, image = whole.strides_bytes
    down, right = conv.stride

    def part(first_row: int, first_column: int) -> TensorMap:
        part_dims = (conv.c, ceil((conv.w - first_column) / right), ceil((conv.h - first_row) / down), conv.n)
        strides = (right * pixel, down * row, image)
        return replace(whole, dims=part_dims, strides_bytes=strides, offset=first_row * row + first_column * pixel)

    return [part(r % down, s % right) for r in (0, 1) for s in (0, 1)]


def _dy_map(dy: Slot, conv: Conv, variant: Variant) -> TensorMap:
    p, q = _outputs(conv)
    w, h, n = variant.tile
    width = _pitches(conv, w)[1] if variant.form.window else w
    return image_map(dy, (conv.k, q, p, conv.n), (64, width, h, n), (), 64)


def _pitches(conv: Conv, width: int) -> tuple[int, int]:
    """Pixels from row to row of a window's tile: of x, of dy. The same where a tile is a line of pixels."""
    if width == WINDOW_WIDTH:
        return width + WINDOW_TAPS - 1, width
    pad = conv.pad[1]
    # The padding of both sides: a zero for both.
    between = conv.stride[1] == 1 and conv.s <= WINDOW_TAPS and pad >= 1 and width + 1 - pad >= conv.w
    return (width + 1,) * 2 if between else (width + WINDOW_TAPS - 1,) * 2


class _Stage(NamedTuple):
    """Bytes of a stage, and of the ways through it: between groups of eight pixels, spans of channels, steps of 16 pixels."""

    x_group_bytes: int
    x_leading_bytes: int
    x_step_bytes: int
    dy_group_bytes: int
    dy_step_bytes: int
    x_row_bytes: int
    x_box_bytes: int
    dy_box_bytes: int
    x_chunk_bytes: int
    dy_chunk_bytes: int
    load_bytes: int
    nbytes: int
    steps: int

    @classmethod
    def of(cls, conv: Conv, form: Form, tile: tuple[int, int, int]) -> _Stage:
        w, h, n = tile
        x_pixel, dy_pixel = 2 * form.cb, 128
        x_group, x_step, dy_group, dy_step = 8 * x_pixel, STEP_PIXELS * x_pixel, 8 * dy_pixel, STEP_PIXELS * dy_pixel
        if form.window:
            x_pitch, dy_pitch = _pitches(conv, w)
            row, image = x_pitch * x_pixel, (h + WINDOW_TAPS - 1) * x_pitch * x_pixel
            x_box, dy_box, x_leading = n * image, n * h * dy_pitch * dy_pixel, x_pixel
            steps = ceil(n * h * dy_pitch / STEP_PIXELS)
            last = steps * STEP_PIXELS + (WINDOW_TAPS - 1) * (x_pitch + 1)  # pixel of x that is read, of a line
            if w != WINDOW_WIDTH:
                x_chunk, dy_chunk = max(x_box, last * x_pixel), steps * dy_step
            else:
                x_chunk, dy_chunk = x_box, dy_box
                # Sixteen pixels are two rows of an image, or a row of two images.
                x_group, x_step = (row, 2 * row) if n == 1 else (image, row)
                if n == 2:
                    dy_group, dy_step = h * w * dy_pixel, w * dy_pixel
        else:
            row, steps = 0, w * h * n // STEP_PIXELS
            x_box = x_leading = x_chunk = w * h * n * x_pixel
            dy_box = dy_chunk = w * h * n * dy_pixel
        x_chunk, dy_chunk = _round_up(x_chunk, 1024), _round_up(dy_chunk, 1024)
        loads = form.x_chunks * x_box + form.dy_chunks * dy_box
        nbytes = form.x_chunks * x_chunk + form.dy_chunks * dy_chunk
        ways = (x_group, x_leading, x_step, dy_group, dy_step)
        return cls(*ways, row, x_box, dy_box, x_chunk, dy_chunk, loads, nbytes, steps)


class _Axis(NamedTuple):
    """Filter rows, or columns: `Axis` of the .cu. `whole`: the tap that takes all outputs, or _TAPS_WHOLE."""

    size: int
    out: int
    tile: int
    pad: int
    stride: int
    dilation: int
    taps: int
    taps_per_item: int
    halves: int
    whole: int
    tiles: int  # along all outputs
    all_tiles: int  # of all taps together
    items: int  # of all taps
    longest: int  # tiles of one

    @classmethod
    def of(cls, conv: Conv, axis: int, form: Form, tile: int, bias: bool) -> _Axis:
        """Of the rows (0) or columns (1)."""
        size, taps = ((conv.h, conv.r), (conv.w, conv.s))[axis]
        pad, stride, dilation = conv.pad[axis], conv.stride[axis], conv.dilation[axis]
        middle = min(max(pad // dilation, 0), taps - 1)  # of an ordinary filter it reaches all outputs anyway
        whole = _TAPS_WHOLE if form.window else middle if bias else _NO_TAP
        halves = stride if form.window else 1
        return _axis(size, _outputs(conv)[axis], tile, pad, stride, dilation, taps, form.taps, halves, whole)

    def argument(self) -> Struct:
        return Struct((*(np.int32(v) for v in self[:-2]), fast_div(self.stride), fast_div(self.tile)))


@lru_cache(maxsize=4096)
def _axis(
    size: int,
    out: int,
    tile: int,
    pad: int,
    stride: int,
    dilation: int,
    taps: int,
    taps_per_item: int,
    halves: int,
    whole: int,
) -> _Axis:
    def span(tap: int) -> int:
        """Twin of `span_of`: tiles along the outputs that the tap reaches."""
        if whole in (tap, _TAPS_WHOLE):
            return ceil(out / tile)
        shift = pad - tap * dilation
        first = min(ceil(max(shift, 0) / stride), out - 1)
        end = min(max(shift + size - 1, 0) // stride + 1, out)
        return ceil(max(end - first, 1) / tile)

    spans = [span(tap) for half in range(halves) for tap in range(half, taps, halves * taps_per_item)]
    numbers = (size, out, tile, pad, stride, dilation, taps, taps_per_item, halves, whole)
    return _Axis(*numbers, ceil(out / tile), sum(spans), len(spans), max(spans))


def _line(conv: Conv, bias: bool, variant: Variant) -> _Line:
    return _Line.of(conv, variant.form, variant.tile, bias, variant.share, variant.aligned)


class _Line(NamedTuple):
    """The tiles of all items one after the other, as blocks share them: `Items` of the .cu."""

    rows: _Axis
    columns: _Axis
    c: int
    k: int
    form: Form
    image_tiles: int
    share: int
    aligned: bool

    @classmethod
    def of(
        cls, conv: Conv, form: Form, tile: tuple[int, int, int], bias: bool, share: int, aligned: bool = False
    ) -> _Line:
        w, h, n = tile
        rows, columns = (_Axis.of(conv, axis, form, size, bias) for axis, size in enumerate((h, w)))
        return cls(rows, columns, conv.c, conv.k, form, ceil(conv.n / n), share, aligned)

    @property
    def tiles_each(self) -> int:
        """Of the items of the same filters and channels."""
        return self.rows.all_tiles * self.columns.all_tiles * self.image_tiles

    @property
    def pitch(self) -> int:
        """From the first tile of filters and channels to that of the next."""
        return _round_up(self.tiles_each, self.reach) if self.aligned else self.tiles_each

    @property
    def reach(self) -> int:
        """Tiles whose sums have one place."""
        return self.share * self.form.adders

    @property
    def places(self) -> int:
        """Of an item's sums, where each begins with a block; else 0."""
        return self.pitch // self.reach if self.aligned else 0

    @property
    def taps_alone(self) -> bool:
        """Whether an item has all taps."""
        return self.rows.items * self.columns.items == 1

    @property
    def blocks_each(self) -> int:
        """Of filters and channels, which have all taps each."""
        return ceil(self.k / self.form.filters) * ceil(self.c / self.form.channels)

    @property
    def items(self) -> int:
        return self.blocks_each * self.rows.items * self.columns.items

    @property
    def tiles(self) -> int:
        return self.blocks_each * self.pitch

    @property
    def blocks(self) -> int:
        """That share the tiles, or pairs of them that share x."""
        return ceil(self.tiles / self.share)

    @property
    def longest(self) -> int:
        """Tiles of the longest item."""
        return self.rows.longest * self.columns.longest * self.image_tiles

    @property
    def alike(self) -> bool:
        """Whether all items have as many tiles."""
        return self.longest * self.items == self.blocks_each * self.tiles_each

    @property
    def most_blocks(self) -> int:
        """That may have a part of an item."""
        return min(self.blocks, ceil((self.longest - 1) / self.reach) + 1)

    @property
    def partial_bytes(self) -> int:
        """0 where each item lies in one block, or pair of them."""
        if self.blocks == 1 or self.share % (self.longest if self.alike else self.tiles_each) == 0:
            return 0
        if self.aligned and self.reach >= self.tiles_each:
            return 0
        return 4 * ceil(self.tiles / self.reach) * self.form.sharers * self.form.slot_size

    def argument(self) -> Struct:
        form, c_blocks = self.form, ceil(self.c / self.form.channels)
        most = self.tiles_each if self.aligned else MOST_TILES
        numbers = (self.c, self.k, form.filters, form.channels, self.image_tiles, self.share, self.tiles, most)
        divisors = (fast_div(d) for d in (self.reach, self.pitch, c_blocks))
        return Struct((self.rows.argument(), self.columns.argument(), *(np.int32(v) for v in numbers), *divisors))


@lru_cache(maxsize=1024)
def _ranked(conv: Conv, bias: bool, device: Device) -> tuple[Variant, ...]:
    """The best variants of each kernel by `_cycles`, best first."""
    costs: dict[Variant, float] = {}
    for form in FORMS:
        own: dict[Variant, float] = {}
        for tile in _shapes(conv, form):
            own |= {v: _cycles(conv, bias, v, device) for v in _shares(conv, bias, form, tile, device)}
        costs |= {v: own[v] for v in sorted(own, key=own.__getitem__)[:2]}
    return tuple(sorted(costs, key=costs.__getitem__)[:MOST_CANDIDATES])


def _shares(conv: Conv, bias: bool, form: Form, tile: tuple[int, int, int], device: Device) -> Iterator[Variant]:
    """A block for each multiprocessor, or fewer of whole items or whole parts of items, so that less is to be added."""
    even = fit(conv, bias, form, tile, device)
    if not even:
        return
    line = _line(conv, bias, even)
    if form.adders > 1:
        if line.blocks <= device.sm_count:
            yield even
        return
    most = device.sm_count // form.sharers
    if line.taps_alone and line.blocks_each <= most:
        for parts in {most // line.blocks_each, max(1, most // line.blocks_each // 2), 1}:
            if parts <= line.tiles_each:
                yield replace(even, share=ceil(line.tiles_each / parts), aligned=True)
    yield even
    if line.alike and even.share >= line.longest:
        yield replace(even, share=_round_up(even.share, line.longest))
    if 2 * even.share <= line.tiles:
        yield replace(even, share=2 * even.share)


def _shapes(conv: Conv, form: Form) -> Iterator[tuple[int, int, int]]:
    """Tiles that the form takes."""
    p, q = _outputs(conv)
    if form.cb == 32 and conv.c > 32:
        return
    if form.window:
        strides_fit = all(stride <= min(2, size) for stride, size in zip(conv.stride, (conv.h, conv.w), strict=True))
        if not strides_fit or conv.dilation != (1, 1) or conv.r * conv.s == 1:
            return
        heights = {ceil(p / parts) for parts in range(1, p + 1) if ceil(p / parts) <= 32}
        for h in sorted(heights):
            yield WINDOW_WIDTH, _round_up(h, 2), 1
            if conv.n > 1 and h <= 16:
                yield WINDOW_WIDTH, h, 2
        if WINDOW_WIDTH < q <= MAX_BOX - WINDOW_TAPS:
            yield from ((q, h, 1) for h in sorted(heights) if q * h <= MOST_LINE_PIXELS)
        return
    if (form.filters > 64 and form.filters // 2 >= conv.k) or (form.columns > 64 and form.columns // 2 >= conv.c):
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

    A product m64nNk16 takes N/2 cycles; L2 brings about 42 bytes a cycle to an SM (as `conv_sm90_cost.Work` has it). Fitted
    to an H200's times.
    """
    form = variant.form
    stage, line = _Stage.of(conv, form, variant.tile), _line(conv, bias, variant)
    product = 1.08 * stage.steps * form.consumers * form.columns / 2
    shared = form.x_chunks * stage.x_box_bytes / 2 if form.sharers > 1 else 0.0  # what the other block copies
    traffic = (stage.load_bytes - shared) / (58 if form.adders > 1 else 42)
    ahead = (variant.stages - 1) * stage.nbytes / 1024  # KB
    few_stages = 1 + 0.0012 * max(0.0, 128 - ahead)
    tile = 58 + few_stages * (max(product, traffic) + 0.125 * min(product, traffic)) + (30 if form.sharers > 1 else 0)
    share = min(variant.share, line.tiles_each if variant.aligned else line.tiles)
    items = 1 if variant.aligned else ceil(share / line.longest)  # that a block has something of
    waves = ceil(line.blocks * form.sharers / device.sm_count)
    busiest = waves * (4500 + items * form.sums / 7 + share * tile)
    if form.adders > 1:
        busiest += 160 + form.sums / 26
    p, q = _outputs(conv)
    pixels = min(conv.h, p * conv.r) * min(conv.w, q * conv.s)  # of x that are read
    elements = (conv.n * pixels * conv.c, conv.n * p * q * conv.k)
    if variant.aligned or not line.taps_alone or form.window:
        memory = 2 * sum(elements) / (2400 if variant.aligned else 2150)
    else:  # items of a 1x1 layer that do not begin with a block are at different images at a time
        readers = ceil(conv.k / form.filters), ceil(conv.c / form.channels)
        memory = 2 * sum(size * each for size, each in zip(elements, readers, strict=True)) / 2400
    if form.columns == 256 and form.consumers == 1:
        memory *= 1.04  # than by two blocks beside each other, of 128 columns each
    total = 200 + 2 * (line.partial_bytes + 4 * conv.k * conv.taps_c) / 3000 if line.partial_bytes else 0.0
    return max(busiest, memory) + 0.2 * min(busiest, memory) + total


def _round_up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple
