"""The launch of conv_wgrad_direct.cu, one of conv_wgrad's variants: max-pooled convolutions of few channels."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, fast_div
from parcnn.cuda.kernels.conv_common import Conv
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct

SOURCE = "conv_wgrad_direct.cu"
MOST_WARPS = 16
MOST_IMAGES = 4  # at a time in a block
MOST_TAPS_C = 160  # elements of a filter: with more, a tile's dense product reads less of shared memory for each FMA
SHARED_BYTES = 100 * 1024  # of a block, so that two share an SM


class Direct(NamedTuple):
    """conv_wgrad_direct with `kg` filters a warp, `t` of a filter's elements a lane."""

    kg: int
    t: int

    def kernel(self, dtype: str) -> Kernel:
        """For tensors of type `dtype`."""
        macros = (("KG", self.kg), ("FLOATS", self.t), ("ELEMENT", ELEMENTS[dtype]))
        return Kernel(SOURCE, "conv_wgrad_direct", macros)

    def __str__(self) -> str:
        return f"direct {self.kg}x{self.t}"


DIRECTS = (Direct(6, 1), Direct(8, 1), Direct(4, 5), Direct(8, 5))


class Plan(NamedTuple):
    """How a variant cuts a problem."""

    runs: int  # of images: rows of partial sums
    blocks_k: int  # that share the filters
    blocks_j: int  # that share a filter's elements
    groups: int  # of filters in a block
    parts: int  # warps that share a filter's windows
    images: int  # at a time in a block
    argument: Struct
    shared_bytes: int

    @property
    def warps(self) -> int:
        return self.groups * self.parts


def plan(conv: Conv, direct: Direct, device: Device) -> Plan | None:
    """How `direct` cuts the problem; None where it does not fit."""
    if conv.pool != "max" or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.rows == 0:
        return None
    if conv.taps_c > MOST_TAPS_C:
        return None
    windows = conv.p * conv.q
    patch_h, patch_row = 2 * conv.p + conv.r - 1, (2 * conv.q + conv.s - 1) * conv.c
    pitch = patch_row + (conv.s * conv.c - patch_row) % 32  # s * c modulo 32: lanes on two rows read different banks
    image_size = patch_h * pitch + 32
    # The images of two blocks an SM; where there are fewer, several blocks share the filters of an image.
    images = max(1, min(MOST_IMAGES, conv.n // (2 * device.sm_count)))
    chunks = ceil(conv.n / images)
    runs = ceil(chunks / ceil(chunks / (2 * device.sm_count)))
    all_groups = ceil(conv.k / direct.kg)

    def shared_bytes(groups: int) -> int:
        filters = groups * direct.kg
        at_the_end = max(filters * 32 * direct.t, 32 * MOST_WARPS)
        return 4 * max(images * (2 * windows * filters + image_size), at_the_end)

    most_groups = min(MOST_WARPS, ceil(all_groups / max(1, device.sm_count // runs)))
    while shared_bytes(most_groups) > min(SHARED_BYTES, device.shared_bytes_per_block):
        most_groups -= 1
        if most_groups == 0:
            return None
    blocks_k = ceil(all_groups / most_groups)
    groups = ceil(all_groups / blocks_k)
    filters, parts = groups * direct.kg, MOST_WARPS // groups
    numbers = (conv.n, images, windows, filters, groups, parts, patch_h, patch_row, pitch, image_size)
    argument = Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in (filters, windows, patch_h, patch_row))))
    blocks_j = ceil(conv.taps_c / (32 * direct.t))
    return Plan(runs, blocks_k, blocks_j, groups, parts, images, argument, shared_bytes(groups))


def fitting(conv: Conv, device: Device) -> dict[Direct, Plan]:
    """The variants that run a problem, and how they cut it."""
    plans = {direct: plan(conv, direct, device) for direct in DIRECTS}
    return {direct: cut for direct, cut in plans.items() if cut}


def cycles(conv: Conv, direct: Direct, cut: Plan, device: Device) -> float:
    """Estimated clock cycles, comparable with `tile_cycles`: reads of shared memory, 25 floats a cycle, and the fills between
    them that four blocks on an SM do at once."""
    filters = cut.groups * direct.kg
    windows, rounds = cut.images * conv.p * conv.q, ceil(conv.n / cut.images / cut.runs)
    chunk = windows * filters * (direct.t + 1) + 2 * cut.images * conv.h * conv.w * conv.c / 32
    blocks = ceil(cut.runs * cut.blocks_k * cut.blocks_j / device.sm_count)
    turn = direct.kg * (4 * direct.t + 6)
    alone = 3000 + rounds * (1500 + ceil(windows / cut.parts) * turn) + cut.parts * direct.kg * direct.t * 8
    return max(alone, rounds * (1.3 * blocks * chunk + 2000 * ceil(blocks / 4)))


def launch(conv: Conv, direct: Direct, dtype: str, device: Device, args: Sequence[Argument]) -> Launch:
    """The launch; `args`: the tensors, of type `dtype`, and the convolution. ValueError where the variant does not fit."""
    cut = plan(conv, direct, device)
    if cut is None:
        raise ValueError(f"variant {direct} cannot run {conv}")
    grid, block = (cut.runs, cut.blocks_k, cut.blocks_j), (32 * cut.warps, 1, 1)
    return Launch(direct.kernel(dtype), grid, block, (*args, cut.argument), cut.shared_bytes)
