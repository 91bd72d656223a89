"""How conv_wgrad_sm90.cu cuts a filter gradient: kernels' forms, tiles of pixels, and the line of them that blocks share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_common import Conv
from parcnn.cuda.launch import Device, Kernel, Struct

SOURCE = "conv_wgrad_sm90.cu"
MAX_STAGES = 8
BARRIER_BYTES = 16 * MAX_STAGES + 16
STEP_PIXELS = 16  # the K of wgmma
WINDOW_WIDTH, WINDOW_TAPS = 8, 3
MOST_TILES = 2**30
_TAPS_WHOLE, _NO_TAP = -2, -1


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


def fit(conv: Conv, bias: bool, form: Form, tile: tuple[int, int, int], device: Device) -> Variant | None:
    """The variant with as many stages as shared memory holds, with a share for each multiprocessor, or half an item where
    two add up one; None where there is no room for two stages, or too many tiles, or such an item has not all taps."""
    stages = (device.shared_bytes_per_block - BARRIER_BYTES) // Stage.of(conv, form, tile).nbytes
    line, adds = Line.of(conv, form, tile, bias, 1), form.adders > 1
    tiles = line.tiles
    pairs_of_rows = form.window and tile[0] == WINDOW_WIDTH and tile[2] == 1  # whose steps take two
    if stages < 2 or tiles >= MOST_TILES or (pairs_of_rows and tile[1] % 2) or (adds and not line.taps_alone):
        return None
    share = ceil(line.tiles_each / form.adders) if adds else ceil(tiles / (device.sm_count // form.sharers))
    return Variant(form, tile, share, min(MAX_STAGES, stages), adds)


def outputs_of(conv: Conv) -> tuple[int, int]:
    """Rows and columns of dy, before the pool."""
    return (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)


def pitches(conv: Conv, width: int) -> tuple[int, int]:
    """Pixels from row to row of a window's tile: of x, of dy. The same where a tile is a line of pixels."""
    if width == WINDOW_WIDTH:
        return width + WINDOW_TAPS - 1, width
    pad = conv.pad[1]
    # The padding of both sides: a zero for both.
    between = conv.stride[1] == 1 and conv.s <= WINDOW_TAPS and pad >= 1 and width + 1 - pad >= conv.w
    return (width + 1,) * 2 if between else (width + WINDOW_TAPS - 1,) * 2


class Stage(NamedTuple):
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
    def of(cls, conv: Conv, form: Form, tile: tuple[int, int, int]) -> Stage:
        w, h, n = tile
        x_pixel, dy_pixel = 2 * form.cb, 128
        x_group, x_step, dy_group, dy_step = 8 * x_pixel, STEP_PIXELS * x_pixel, 8 * dy_pixel, STEP_PIXELS * dy_pixel
        if form.window:
            x_pitch, dy_pitch = pitches(conv, w)
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
        x_chunk, dy_chunk = round_up(x_chunk, 1024), round_up(dy_chunk, 1024)
        loads = form.x_chunks * x_box + form.dy_chunks * dy_box
        nbytes = form.x_chunks * x_chunk + form.dy_chunks * dy_chunk
        ways = (x_group, x_leading, x_step, dy_group, dy_step)
        return cls(*ways, row, x_box, dy_box, x_chunk, dy_chunk, loads, nbytes, steps)


class Axis(NamedTuple):
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
    def of(cls, conv: Conv, axis: int, form: Form, tile: int, bias: bool) -> Axis:
        """Of the rows (0) or columns (1)."""
        size, taps = ((conv.h, conv.r), (conv.w, conv.s))[axis]
        pad, stride, dilation = conv.pad[axis], conv.stride[axis], conv.dilation[axis]
        middle = min(max(pad // dilation, 0), taps - 1)  # of an ordinary filter it reaches all outputs anyway
        whole = _TAPS_WHOLE if form.window else middle if bias else _NO_TAP
        halves = stride if form.window else 1
        return _axis(size, outputs_of(conv)[axis], tile, pad, stride, dilation, taps, form.taps, halves, whole)

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
) -> Axis:
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
    return Axis(*numbers, ceil(out / tile), sum(spans), len(spans), max(spans))


def line_of(conv: Conv, bias: bool, variant: Variant) -> Line:
    """Of a variant's tiles."""
    return Line.of(conv, variant.form, variant.tile, bias, variant.share, variant.aligned)


class Line(NamedTuple):
    """The tiles of all items one after the other, as blocks share them: `Items` of the .cu."""

    rows: Axis
    columns: Axis
    c: int
    k: int
    form: Form
    image_tiles: int
    share: int
    aligned: bool

    @classmethod
    def of(
        cls, conv: Conv, form: Form, tile: tuple[int, int, int], bias: bool, share: int, aligned: bool = False
    ) -> Line:
        w, h, n = tile
        rows, columns = (Axis.of(conv, axis, form, size, bias) for axis, size in enumerate((h, w)))
        return cls(rows, columns, conv.c, conv.k, form, ceil(conv.n / n), share, aligned)

    @property
    def tiles_each(self) -> int:
        """Of the items of the same filters and channels."""
        return self.rows.all_tiles * self.columns.all_tiles * self.image_tiles

    @property
    def pitch(self) -> int:
        """From the first tile of filters and channels to that of the next."""
        return round_up(self.tiles_each, self.reach) if self.aligned else self.tiles_each

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


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below the value."""
    return ceil(value / multiple) * multiple
