"""The launch of conv_dgrad_direct.cu, one of conv_dgrad's variants: max-pooled convolutions of few channels."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, fast_div
from parcnn.cuda.kernels.conv_common import Conv
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct

SOURCE = "conv_dgrad_direct.cu"
MOST_WARPS = 16
BLOCKS_PER_SM = 4
SHARED_BYTES = 72 * 1024  # of a block, so that three share an SM; where an SM has more, half of it


class Direct(NamedTuple):
    """conv_dgrad_direct with `t` floats a lane of what a window reaches."""

    t: int

    def kernel(self, dtype: str) -> Kernel:
        """For tensors of type `dtype`."""
        return Kernel(SOURCE, "conv_dgrad_direct", (("FLOATS", self.t), ("ELEMENT", ELEMENTS[dtype])))

    def __str__(self) -> str:
        return f"direct {self.t}"


DIRECTS = (Direct(4), Direct(7))


class Plan(NamedTuple):
    """How a variant cuts a problem."""

    runs: int  # of images
    groups: int  # of channels
    warps: int
    filters: int  # rounded up to a multiple of 4
    argument: Struct
    shared_bytes: int


def plan(conv: Conv, direct: Direct, device: Device) -> Plan | None:
    """How `direct` cuts the problem; None where it does not fit."""
    reach = (conv.r + 1) * (conv.s + 1)
    if conv.pool != "max" or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.rows == 0:
        return None
    if reach > 32 * direct.t:
        return None
    groups = ceil(conv.c / (32 * direct.t // reach))
    channels = ceil(conv.c / groups)
    filters, windows = ceil(conv.k / 4) * 4, conv.p * conv.q
    row = (conv.s + 1) * channels
    filter_size = reach * channels + channels
    weights_size = filters * filter_size + max(row, 32 * direct.t - conv.r * row)
    shared_bytes = 4 * (2 * windows * filters + windows * 32 * direct.t + weights_size)
    if shared_bytes > min(max(SHARED_BYTES, device.shared_bytes_per_block // 2), device.shared_bytes_per_block):
        return None
    warps = ceil(windows / ceil(windows / MOST_WARPS))
    runs = ceil(conv.n / ceil(conv.n / (BLOCKS_PER_SM * device.sm_count)))
    group_size = conv.r * conv.s * channels
    pixels = conv.h * conv.w * channels
    numbers = (
        conv.n, windows, filters, channels, row, row + channels, filter_size, weights_size, group_size, pixels,
    )  # fmt: skip
    divisors = (filters, group_size, channels, conv.w)
    argument = Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors)))
    return Plan(runs, groups, warps, filters, argument, shared_bytes)


def fitting(conv: Conv, device: Device) -> dict[Direct, Plan]:
    """The variants that run a problem, and how they cut it."""
    plans = {direct: plan(conv, direct, device) for direct in DIRECTS}
    return {direct: cut for direct, cut in plans.items() if cut}


def cycles(conv: Conv, direct: Direct, cut: Plan, device: Device) -> float:
    """Estimated clock cycles, comparable with `tile_cycles`: reads of shared memory, 32 floats a cycle."""
    windows, images = conv.p * conv.q, ceil(conv.n / cut.runs)
    image = windows * (cut.filters * (direct.t + 1) + 4 * direct.t) + conv.h * conv.w * conv.c / cut.groups
    blocks = ceil(cut.runs * cut.groups / device.sm_count)
    alone = 3000 + images * (1500 + ceil(windows / cut.warps) * cut.filters * 16)
    return max(alone, blocks * images * image)


def launch(conv: Conv, direct: Direct, dtype: str, device: Device, args: Sequence[Argument]) -> Launch:
    """The launch; `args`: the tensors, of type `dtype`, and the convolution. ValueError where the variant does not fit."""
    cut = plan(conv, direct, device)
    if cut is None:
        raise ValueError(f"variant {direct} cannot run {conv}")
    grid, block = (cut.runs, cut.groups, 1), (32 * cut.warps, 1, 1)
    return Launch(direct.kernel(dtype), grid, block, (*args, cut.argument), cut.shared_bytes)
