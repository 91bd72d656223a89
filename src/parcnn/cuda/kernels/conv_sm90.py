"""Launcher of conv_sm90.cu: bf16 convolution on Hopper's tensor cores, forward and input gradient."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

import numpy as np

from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_common import MAX_SIDE, Conv
from parcnn.cuda.kernels.conv_sm90_tiles import Footprint, Sizes, Variant, Work
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct, TensorMap
from parcnn.cuda.tensormap import MAX_ELEMENT_STRIDE
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad)
SOURCE, UNPOOL_SOURCE = "conv_sm90.cu", "conv_unpool.cu"
THREADS, UNPOOL_THREADS = 384, 256
# Twins of conv_sm90.cuh's.
ORDER_ENTRIES, NO_ITEM = 1536, 0xFFFF
CHANNEL_UNIT = 8  # strides of tensor maps are multiples of 16 bytes
_NEGATIVE_INFINITIES = 0xFF80FF80  # two bf16


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvDgrad):
        return f"{op.name} is neither a forward convolution nor an input gradient"
    x, w = inputs[:2]
    if x.dtype != "bf16" or w.dtype != "bf16":
        return f"the tensor-core convolutions take bf16 operands, not {x.dtype} and {w.dtype}"
    if op.groups != 1:
        return f"the tensor-core convolutions have one group, not {op.groups}"
    if op.pool not in (None, "max"):
        return f"the tensor-core convolutions pool by the maximum, not '{op.pool}'"
    if isinstance(op, ConvFprop):
        if op.bias and inputs[2].dtype != "f32":
            return f"the bias must be f32, not {inputs[2].dtype}"
        if op.act not in (None, "relu"):
            return f"the tensor-core convolutions apply ReLU or nothing, not {op.act}"
        if max(op.stride) > MAX_ELEMENT_STRIDE:
            return f"strides above {MAX_ELEMENT_STRIDE} are not copied by TMA, got {op.stride}"
        image = (x.shape[1], x.shape[2])
    else:
        if op.act is not None or op.add:
            return "the tensor-core input gradient has no activation's derivative and no addend yet"
        if op.stride != (1, 1):
            return f"the tensor-core input gradient has stride 1, not {op.stride}"
        image = op.image
    k, r, s, c = w.shape
    if c % CHANNEL_UNIT or k % CHANNEL_UNIT:
        return f"channels must be multiples of {CHANNEL_UNIT}, got {c} -> {k}"
    span = [d * (f - 1) + 1 for d, f in zip(op.dilation, (r, s), strict=True)]
    if max(*image, *span, *op.pad) >= MAX_SIDE:
        return f"image sides, filter spans and padding must be below {MAX_SIDE}"
    if max(spec.size for spec in (*inputs, *op.infer(*inputs))) >= 2**31:
        return "a tensor has 2**31 elements or more"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """dgrad behind a pool needs dy unpooled."""
    if isinstance(op, ConvDgrad) and op.pool:
        return 4 * inputs[0].nbytes
    return 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best first (`conv_sm90_tiles.candidates`)."""
    return list(tiles.candidates(_sizes(call), device))


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """The convolution, behind a pass that unpools dy where there is a pool; `variant` forces one of `candidates`."""
    if 0 in call.outputs[0].spec.shape:
        return []
    sizes = _sizes(call)
    chosen = variant or tiles.candidates(sizes, device)[0]
    if isinstance(call.op, ConvFprop):
        x, w, *bias = call.inputs
        return [_convolution(sizes, chosen, device, call.outputs, x, w, bias[0] if bias else None, call.op.act)]
    dy, w, *idx = call.inputs
    if not idx:
        return [_convolution(sizes, chosen, device, call.outputs, dy, w)]
    if call.workspace is None:
        raise ValueError("an input gradient behind a pool needs its workspace")
    return [unpool(dy, idx[0], call.workspace), _convolution(sizes, chosen, device, call.outputs, call.workspace, w)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    for (channels, cb), pixels in tiles.PIXELS.items():
        for count in pixels:
            yield _kernel(count, cb, channels, 0, False)
            yield _kernel(count, cb, channels, 0, True)
            yield _kernel(count, cb, channels, 1, False)
            if tiles.pools_in_registers(True, 8, channels) and count % 16 == 0:
                yield _kernel(count, cb, channels, 2, False)
    yield UNPOOL


UNPOOL = Kernel(UNPOOL_SOURCE, "conv_unpool")


def _kernel(pixels: int, cb: int, channels: int, pool: int, flipped: bool) -> Kernel:
    names = ("PIXELS", "CB", "CHANNELS", "POOL", "FLIPPED")
    return Kernel(SOURCE, "conv_sm90", tuple(zip(names, (pixels, cb, channels, pool, int(flipped)), strict=True)))


def _sizes(call: Call) -> Sizes:
    op, filters = call.op, call.inputs[1].spec
    if isinstance(op, ConvFprop):
        conv = Conv.of(op, call.inputs[0].spec, filters)
        p, q = (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)
        return Sizes(
            conv.n, conv.h, conv.w, conv.c, conv.k, conv.r, conv.s, p, q, conv.stride, conv.pad, conv.dilation,
            conv.pool is not None,
        )  # fmt: skip
    if isinstance(op, ConvDgrad):
        conv = Conv.of(op, call.outputs[0].spec, filters)
        p, q = (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)
        pad = (conv.dilation[0] * (conv.r - 1) - conv.pad[0], conv.dilation[1] * (conv.s - 1) - conv.pad[1])
        return Sizes(
            conv.n, p, q, conv.k, conv.c, conv.r, conv.s, conv.h, conv.w, (1, 1), pad, conv.dilation, False,
            flipped=True,
        )  # fmt: skip
    raise TypeError(f"{op.name} is neither a forward convolution nor an input gradient")


def _convolution(
    sizes: Sizes,
    variant: Variant,
    device: Device,
    outputs: tuple[Slot, ...],
    x: Slot,
    w: Slot,
    bias: Slot | None = None,
    act: str | None = None,
) -> Launch:
    tile = Footprint.of(sizes, variant.serves, variant.tile, variant.channels)
    if tile is None:
        raise ValueError(f"variant {variant} cannot run {sizes}")
    work = Work.of(sizes, variant, device)
    in_registers = tiles.pools_in_registers(sizes.pool, variant.tile[0], variant.channels)
    kernel = _kernel(tile.pixels, tile.cb, variant.channels, sizes.pool + in_registers, sizes.flipped)
    order = _order(sizes, variant, device)
    stage_bytes = tile.x_stage_bytes(variant.own_staging)
    weights = ceil(sizes.c / tile.cb) * sizes.r * sizes.s if variant.resident else variant.w_stages
    staging_offset = variant.x_stages * stage_bytes + weights * tile.w_stage_bytes
    barrier_offset = staging_offset + (2 * tile.staging_bytes if variant.own_staging else 0)
    problem = _problem(sizes, variant, tile, work, order, (staging_offset, barrier_offset), act)
    y: tuple[Argument, ...] = outputs if sizes.pool else (_y_map(outputs[0], sizes, variant),)
    args: tuple[Argument, ...] = (
        _x_map(x, sizes, variant, tile), _w_map(w, sizes, variant, tile), *y, bias, problem, order or bytes(2 * ORDER_ENTRIES),
    )  # fmt: skip
    grid = (work.slots * work.k_groups, 1, 1)
    return Launch(kernel, grid, (THREADS, 1, 1), args, barrier_offset + tiles.BARRIER_BYTES)


def _order(sizes: Sizes, variant: Variant, device: Device) -> bytes | None:
    """`Order` of conv_sm90.cuh, [round][slot]; None where the kernel may count, for items are alike or too many to list."""
    dealt = tiles.deal(sizes, variant, device)
    if dealt is None:
        return None
    rounds = max(map(len, dealt))
    if rounds * len(dealt) > ORDER_ENTRIES:
        return None
    table = np.full(ORDER_ENTRIES, NO_ITEM, np.uint16)
    for slot, items in enumerate(dealt):
        table[slot : rounds * len(dealt) : len(dealt)][: len(items)] = items
    return table.tobytes()


def _problem(
    sizes: Sizes,
    variant: Variant,
    tile: Footprint,
    work: Work,
    order: bytes | None,
    offsets: tuple[int, int],
    act: str | None,
) -> Struct:
    """`Problem` of conv_sm90.cuh."""
    w, h, n = variant.tile
    x_tiles, y_tiles, z_tiles = tiles.patches(sizes, variant.tile)
    items = x_tiles * y_tiles * z_tiles * work.k_inner
    if order is not None:
        items = int(np.flatnonzero(np.frombuffer(order, np.uint16) != NO_ITEM)[-1]) + 1
    row_bytes = 2 * tile.cb
    taps_per_load = {"tap": 1, "column": sizes.r, "window": sizes.r * sizes.s}[variant.serves]
    blocks = ceil(sizes.c / tile.cb)
    p, q = (sizes.p // 2, sizes.q // 2) if sizes.pool else (sizes.p, sizes.q)
    group_bytes = (tile.pitch if variant.serves == "window" else 8) * row_bytes
    swizzle = 1 if tile.cb == 64 else 2
    before = (
        sizes.h, sizes.w, sizes.r, sizes.s, sizes.k, sizes.n, p, q,
        *sizes.stride, *sizes.pad, *sizes.dilation,
        blocks, n, h, w, items, work.slots, work.k_groups, int(order is not None),
        taps_per_load, blocks * sizes.r * sizes.s // taps_per_load,
        0 if variant.serves == "tap" else tile.pitch * row_bytes, row_bytes if variant.serves == "window" else 0,
    )  # fmt: skip
    after = (
        tile.x_box_bytes, tile.x_stage_bytes(variant.own_staging), variant.x_stages,
        variant.w_stages, int(variant.resident), int(variant.own_staging), *offsets,
    )  # fmt: skip
    divisors = (work.k_inner, x_tiles, y_tiles, max(1, w // 2), max(1, h // 2))
    return Struct(
        (
            *(np.int32(v) for v in before),
            np.uint32(group_bytes >> 4 | swizzle << 30),
            *(np.int32(v) for v in after),
            np.uint32(0 if act == "relu" else _NEGATIVE_INFINITIES),
            *(fast_div(d) for d in divisors),
        )
    )


def _x_map(x: Slot, sizes: Sizes, variant: Variant, tile: Footprint) -> TensorMap:
    box = (tile.cb, tile.pitch * sizes.stride[1], tile.rows * sizes.stride[0], variant.tile[2])
    return image_map(x, (sizes.c, sizes.w, sizes.h, sizes.n), box, (1, *sizes.stride[::-1], 1), tile.cb)


def _y_map(y: Slot, sizes: Sizes, variant: Variant) -> TensorMap:
    return image_map(y, (sizes.k, sizes.q, sizes.p, sizes.n), (64, *variant.tile), (), 64)


def image_map(
    slot: Slot, dims: tuple[int, int, int, int], box: tuple[int, ...], element_strides: tuple[int, ...], channels: int
) -> TensorMap:
    """Of a tensor NHWC; a box's rows of channels are swizzled over their own width."""
    c, w, h, _ = dims
    swizzle = "128B" if channels == 64 else "64B"
    return TensorMap(slot, dims, (2 * c, 2 * w * c, 2 * h * w * c), box, element_strides, swizzle)


def _w_map(w: Slot, sizes: Sizes, variant: Variant, tile: Footprint) -> TensorMap:
    """Of filters (K,RS,C): rows of reduction channels, or where they are exchanged, rows of 64 output channels."""
    taps = sizes.r * sizes.s
    outer, inner = (sizes.c, sizes.k) if sizes.flipped else (sizes.k, sizes.c)
    box = (64, 1, tile.cb) if sizes.flipped else (tile.cb, 1, variant.channels)
    swizzle = "128B" if box[0] == 64 else "64B"
    return TensorMap(w, (inner, taps, outer), (2 * inner, 2 * inner * taps), box, (), swizzle)


def unpool(dy: Slot, idx: Slot, out: Slot) -> Launch:
    """The launch that spreads pooled errors dy (N,P,Q,K) over their windows: out (N,2P,2Q,K), bf16."""
    q, k = dy.spec.shape[2:]
    chunks = dy.spec.size // CHANNEL_UNIT
    divisors = Struct((fast_div(k // CHANNEL_UNIT), fast_div(q)))
    return Launch(
        UNPOOL,
        (ceil(chunks / UNPOOL_THREADS), 1, 1),
        (UNPOOL_THREADS, 1, 1),
        (dy, idx, out, np.int32(chunks), divisors),
    )
