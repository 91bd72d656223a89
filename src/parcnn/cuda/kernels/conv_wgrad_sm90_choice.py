"""Which tiles of conv_wgrad_sm90.cu are tried, the best first, and what they should cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import ceil, gcd

from parcnn.cuda.kernels.conv_common import CYCLES_PER_US, Conv
from parcnn.cuda.kernels.conv_wgrad_sm90_tiles import (
    FORMS,
    STEP_PIXELS,
    WINDOW_TAPS,
    WINDOW_WIDTH,
    Form,
    Stage,
    Variant,
    fit,
    line_of,
    outputs_of,
    round_up,
)
from parcnn.cuda.launch import Device
from parcnn.cuda.tensormap import MAX_BOX

MOST_CANDIDATES = 8
MOST_LINE_PIXELS = 512  # of a window's tile as wide as the image


@lru_cache(maxsize=1024)
def ranked(conv: Conv, bias: bool, device: Device) -> tuple[Variant, ...]:
    """The best variants of each kernel by `cycles`, best first."""
    costs: dict[Variant, float] = {}
    for form in FORMS:
        own: dict[Variant, float] = {}
        for tile in _shapes(conv, form):
            own |= {v: cycles(conv, bias, v, device) for v in _shares(conv, bias, form, tile, device)}
        costs |= {v: own[v] for v in sorted(own, key=own.__getitem__)[:2]}
    return tuple(sorted(costs, key=costs.__getitem__)[:MOST_CANDIDATES])


def cost_us(conv: Conv, bias: bool, device: Device) -> float:
    """Estimated microseconds of the best variant, to compare with other families.

    `cycles` ranks variants; TMA's rows take longer where they are short. Fitted to an H200's times of 355 variants: 21 %
    off (root of the mean square).
    """
    variant = ranked(conv, bias, device)[0]
    form, stage = variant.form, Stage.of(conv, variant.form, variant.tile)
    tiles = min(variant.share, line_of(conv, bias, variant).tiles)
    result = 2.75 + 0.975 * cycles(conv, bias, variant, device) / CYCLES_PER_US + 3.0 * (conv.pool is not None)
    if conv.c < 64:
        skipped = 0 if form.window else conv.stride[0] * conv.stride[1] - 1
        pixels = form.x_chunks * stage.x_box_bytes / (2 * form.cb)
        result += (0.0007 + 0.0006 * skipped) * tiles * pixels
    if conv.k < 64:
        result += 0.0019 * tiles * form.dy_chunks * stage.dy_box_bytes / 128
    return result


@lru_cache(maxsize=1024)
def has_variant(conv: Conv, bias: bool) -> bool:
    """Whether any tile of any form fits."""
    any_hopper = Device("", "sm_90a", 1)  # its shared memory; how many multiprocessors there are makes no difference
    return any(fit(conv, bias, form, tile, any_hopper) for form in FORMS for tile in _shapes(conv, form))


def _shares(conv: Conv, bias: bool, form: Form, tile: tuple[int, int, int], device: Device) -> Iterator[Variant]:
    """A block for each multiprocessor, or fewer of whole items or whole parts of items, so that less is to be added."""
    even = fit(conv, bias, form, tile, device)
    if not even:
        return
    line = line_of(conv, bias, even)
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
        yield replace(even, share=round_up(even.share, line.longest))
    if 2 * even.share <= line.tiles:
        yield replace(even, share=2 * even.share)


def _shapes(conv: Conv, form: Form) -> Iterator[tuple[int, int, int]]:
    """Tiles that the form takes."""
    p, q = outputs_of(conv)
    if form.cb == 32 and conv.c > 32:
        return
    if form.window:
        strides_fit = all(stride <= min(2, size) for stride, size in zip(conv.stride, (conv.h, conv.w), strict=True))
        if not strides_fit or conv.dilation != (1, 1) or conv.r * conv.s == 1:
            return
        heights = {ceil(p / parts) for parts in range(1, p + 1) if ceil(p / parts) <= 32}
        for h in sorted(heights):
            yield WINDOW_WIDTH, round_up(h, 2), 1
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


def cycles(conv: Conv, bias: bool, variant: Variant, device: Device) -> float:
    """Estimated clock cycles of the call: its busiest SM's, or memory's (about 2400 bytes a cycle), and the sum's.

    A product m64nNk16 takes N/2 cycles; L2 brings about 42 bytes a cycle to an SM (as `conv_sm90_cost.Work` has it). Fitted
    to an H200's times.
    """
    form = variant.form
    stage, line = Stage.of(conv, form, variant.tile), line_of(conv, bias, variant)
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
    p, q = outputs_of(conv)
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
