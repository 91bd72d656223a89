"""What tiles of conv_sm90.cu should cost, and which block gets which."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import ceil

from parcnn.cuda.kernels.conv_common import CYCLES_PER_US
from parcnn.cuda.kernels.conv_sm90_sizes import Sizes
from parcnn.cuda.kernels.conv_sm90_tiles import (
    Variant,
    footprint,
    items,
    partial_bytes,
    patches,
    products,
    skips,
    steps,
    taps_of_tiles,
    taps_per_load,
)
from parcnn.cuda.launch import Device

_HALF_SECTOR_CYCLES = 22  # of a pixel of eight channels, beside another class's: L2 writes 32 bytes


@dataclass(frozen=True)
class Work:
    """Estimated clock cycles of a tile: what a tap costs, and what comes once; and how many tiles run at once."""

    tap_cycles: float
    tile_cycles: float
    slots: int
    k_groups: int  # groups of channels that blocks are bound to
    k_inner: int  # groups of channels that are items of their own
    k_rounds: int  # groups of channels of an item

    @classmethod
    def of(cls, sizes: Sizes, variant: Variant, device: Device) -> Work:
        """The larger of the tensor cores' time (m64nNk16: N/2 cycles) and L2's (about 40 bytes a cycle and SM, as layers that
        it bounds were measured). An epilogue hides behind the other consumer's product where they alternate."""
        tile = footprint(sizes, variant)
        product = tile.cb / 16 * tile.pixels / 2 * ceil(variant.channels / 64)
        product *= products(sizes, variant.channels) / (sizes.r * sizes.s)
        groups = ceil(sizes.k / variant.channels)
        k_rounds = variant.rounds or (groups if variant.shared else 1)
        x_bytes = tile.x_box_bytes / taps_per_load(sizes, variant.serves) / k_rounds
        traffic = (x_bytes + (0 if variant.resident else tile.w_stage_bytes)) / 40
        tap = 20 + _overlapped(product, traffic)
        pooled = sizes.pool and (sizes.indices or sizes.window is not None)
        epilogue = 400 + (5 if pooled or variant.splits > 1 else 2.5) * tile.pixels
        if variant.channels <= 64:
            main = tap * sizes.r * sizes.s * steps(sizes, variant) / len(sizes.classes)
            epilogue = max(0, epilogue - main) / 2
        if sizes.k == 8 and sizes.spread[1] > 1:
            epilogue += _HALF_SECTOR_CYCLES * tile.pixels
        k_groups, k_inner = (ceil(groups / k_rounds), 1) if variant.resident or variant.shared else (1, groups)
        slots = min(max(1, device.sm_count // (k_groups * variant.splits)), items(sizes, variant.tile) * k_inner)
        return cls(k_rounds * tap, k_rounds * epilogue, slots, k_groups, k_inner, k_rounds)


def cycles(sizes: Sizes, variant: Variant, device: Device) -> float:
    """Estimated clock cycles of the call: its busiest block's, or memory's (about 2400 bytes a cycle)."""
    work = Work.of(sizes, variant, device)
    tile = footprint(sizes, variant)
    blocks = steps(sizes, variant)
    count = items(sizes, variant.tile) * work.k_inner
    each = (
        taps_of_tiles(sizes, variant) if skips(sizes, variant) else [r * s for r, s in (k.taps for k in sizes.classes)]
    )
    taps, most = sum(each) / len(each), max(each)
    uneven = min(each) < most
    mean, largest = (blocks * t * work.tap_cycles + work.tile_cycles for t in (taps, most))
    busiest = count / work.slots * mean + 0.3 * largest if uneven else ceil(count / work.slots) * mean
    waves = ceil(work.slots * work.k_groups * variant.splits / device.sm_count)
    start = 2500 + (blocks * sizes.r * sizes.s * tile.w_stage_bytes / 40 if variant.resident else 0)
    pixels = sizes.n * (sizes.h * sizes.w * sizes.c + sizes.p * sizes.q * sizes.k / (4 if sizes.pool else 1))
    return start + _overlapped(busiest * waves, 2 * pixels / 2400) + _sum_cycles(sizes, variant)


def _sum_cycles(sizes: Sizes, variant: Variant) -> float:
    """Of the second kernel, where there are splits (as in conv_wgrad_sm90)."""
    return 2100 + 2 * partial_bytes(sizes, variant) / 2400 if variant.splits > 1 else 0.0


def cost_us(sizes: Sizes, variant: Variant, device: Device) -> float:
    """Estimated microseconds of the call, to compare with other families.

    `cycles` ranks tiles; small calls take longer: what comes before and after, the taps' latency, and TMA's rows where
    they are short. Fitted to an H200's times of 334 variants: 16 % off in the mean.
    """
    tile, work = footprint(sizes, variant), Work.of(sizes, variant, device)
    waves = ceil(work.slots * work.k_groups * variant.splits / device.sm_count)
    rounds = ceil(items(sizes, variant.tile) * work.k_inner / work.slots) * waves
    taps = sizes.r * sizes.s / len(sizes.classes)
    if skips(sizes, variant):
        each = taps_of_tiles(sizes, variant)
        taps = sum(each) / len(each)
    loads = rounds * steps(sizes, variant) * taps
    result = 2.8 + 0.84 * cycles(sizes, variant, device) / CYCLES_PER_US + 0.074 * loads * work.k_rounds
    if sizes.c < 64:
        pixels = loads / taps_per_load(sizes, variant.serves) * tile.pitch * tile.rows * variant.tile[2]
        filters = steps(sizes, variant) * sizes.r * sizes.s if variant.resident else loads
        filter_rows = (tile.cb if sizes.flipped else variant.channels) * filters * work.k_rounds
        skipped = sizes.stride[0] * sizes.stride[1] - 1 if variant.serves == "tap" else 0
        result += 0.0016 * pixels + 0.0009 * skipped * pixels + 0.0019 * filter_rows
    return result


def deal(sizes: Sizes, variant: Variant, device: Device) -> list[list[int]] | None:
    """The items of each slot, heaviest first to the least loaded; None where all items are equal.

    An item is (class, image group, row, column, group of channels), counted in this order.
    """
    if not skips(sizes, variant):
        return None
    taps = taps_of_tiles(sizes, variant)
    if len(set(taps)) == 1:
        return None
    work = Work.of(sizes, variant, device)
    blocks = steps(sizes, variant)
    images, of_class = patches(sizes, variant.tile)[2], len(taps) // len(sizes.classes)
    costs = [
        blocks * count * work.tap_cycles + work.tile_cycles
        for first in range(0, len(taps), of_class)
        for _ in range(images)
        for count in taps[first : first + of_class]
        for _ in range(work.k_inner)
    ]
    slots: list[list[int]] = [[] for _ in range(work.slots)]
    loads = [(0.0, slot) for slot in range(work.slots)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, slot = loads[0]
        slots[slot].append(item)
        heapq.heapreplace(loads, (load + costs[item], slot))
    return slots


def _overlapped(first: float, second: float) -> float:
    """Time of two that run side by side: the longer one, and a little of the other."""
    return max(first, second) + 0.1 * min(first, second)
