"""Launcher of conv_stem_fprop.cu's form for Hopper: bf16 convolution forward of few channels by `wgmma`."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from parcnn.cuda.kernels.conv_common import CYCLES_PER_US
from parcnn.cuda.kernels.conv_stem import (
    MOST_CANDIDATES,
    RESIDENT,
    STEPS,
    UNIT_COLUMNS,
    WARPS,
    Sizes,
    Variant,
    problem_of,
    sizes_of,
    tiles_of,
)
from parcnn.cuda.kernels.conv_stem import supports as portable_supports
from parcnn.cuda.launch import Argument, Device, Kernel, Launch
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvFprop
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvFprop,)
FILTERS = 64  # of a block: the N of wgmma
SHARED_BYTES = 227 * 1024  # a block's, on Hopper
_EIGHT_BYTES = 16 * FILTERS  # of eight elements of every filter's row


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernel runs the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop):
        return f"{op.name} is no forward convolution"
    if reason := portable_supports(op, inputs):
        return reason
    sizes = sizes_of(op, inputs)
    if not any(_shared_bytes(sizes, variant) <= SHARED_BYTES for variant in tiles_of(sizes)):
        return f"{FILTERS} filters of {sizes.r} rows do not fit in shared memory beside a tile's image"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """None is needed."""
    return 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best estimate first."""
    costs = _costs(sizes_of(call.op, call.input_specs), device)
    return sorted(costs, key=costs.__getitem__)[:MOST_CANDIDATES]


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    return 3.0 + min(_costs(sizes_of(call.op, call.input_specs), device).values()) / CYCLES_PER_US


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, sizes = call.op, sizes_of(call.op, call.input_specs)
    if not isinstance(op, ConvFprop):
        raise TypeError(f"{op.name} is no forward convolution")
    if sizes.n * sizes.p == 0:
        return []
    chosen = variant or candidates(call, device)[0]
    x, y, z = sizes.tiles(chosen)
    grid = (min(x * y * z, RESIDENT * device.sm_count), ceil(sizes.k / FILTERS), 1)
    image, w, *bias = call.inputs
    idx = call.outputs[1] if op.has_indices else None
    args: tuple[Argument, ...] = (image, w, bias[0] if op.bias else None, call.outputs[0], idx)
    shared_bytes = _shared_bytes(sizes, chosen)
    kernel = _kernel(sizes.runs, sizes.pool)
    return [Launch(kernel, grid, (32 * WARPS, 1, 1), (*args, problem_of(op, sizes, chosen)), shared_bytes)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (_kernel(runs, pool) for runs in STEPS for pool in (False, True))


def _kernel(runs: int, pool: bool) -> Kernel:
    names = ("RUN16", "RUN8", "TILES", "POOL", "WGMMA")
    values = (*STEPS[runs], FILTERS // 8, int(pool), 1)
    return Kernel("conv_stem_fprop.cu", "conv_stem_fprop", tuple(zip(names, values, strict=True)))


def _steps(sizes: Sizes) -> int:
    """Of 16 elements: where runs are an odd number of eights, rows of filters go in twos."""
    rows = sizes.r + sizes.r % 2 if sizes.runs % 2 else sizes.r
    return rows * sizes.runs // 2


def _copies(sizes: Sizes) -> int:
    """Of the image's rows: words are read, and pixels may start in the middle of one."""
    return 2 if sizes.step % 2 else 1


def _shared_bytes(sizes: Sizes, variant: Variant) -> int:
    filters = 2 * _steps(sizes) * _EIGHT_BYTES + 4 * FILTERS
    staging = WARPS * UNIT_COLUMNS * (2 * FILTERS + 16)
    return filters + staging + sizes.patch_bytes(variant) * _copies(sizes)


def _costs(sizes: Sizes, device: Device) -> dict[Variant, float]:
    """Estimated clock cycles, of tiles of which two are on an SM at once where there are such; as an H200 was measured."""

    def fitting(room: int) -> list[Variant]:
        return [variant for variant in tiles_of(sizes) if _shared_bytes(sizes, variant) <= room]

    def cycles(variant: Variant) -> float:
        fills = sizes.patch_rows(variant) * sizes.pitch(variant) * _copies(sizes)
        work = ceil(variant.units_w * variant.units_h / WARPS) * (900 + 530 * _steps(sizes))
        blocks = ceil(sizes.k / FILTERS)
        for count in sizes.tiles(variant):
            blocks *= count
        return ceil(blocks / (RESIDENT * device.sm_count)) * (1500 + fills + work)

    room = (device.shared_bytes_per_block + 1024) // RESIDENT - 1024
    return {variant: cycles(variant) for variant in fitting(room) or fitting(device.shared_bytes_per_block)}
