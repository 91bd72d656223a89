"""Launcher of conv_grouped.cu: fp32 convolution in groups of several channels."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple, cast

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div, refuse_dtype, refuse_size
from parcnn.cuda.kernels.conv_common import MAX_SIDE, refuse_extras
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad, ConvWgrad)
SOURCE = "conv_grouped.cu"
MAX_GROUPS = 2**16 - 1  # of a grid's third side
MAX_RUNS = 1024
BLOCKS_A_MULTIPROCESSOR = 8


class Tile(NamedTuple):
    """A block's rows, columns and depth, and a thread's."""

    bm: int
    bn: int
    bk: int
    tm: int
    tn: int

    @property
    def threads(self) -> int:
        return (self.bm // self.tm) * (self.bn // self.tn)


WIDE, NARROW = Tile(64, 32, 16, 4, 4), Tile(128, 8, 16, 4, 2)
ENTRIES: dict[type[Op], str] = {
    ConvFprop: "conv_grouped_fprop",
    ConvDgrad: "conv_grouped_dgrad",
    ConvWgrad: "conv_grouped_wgrad",
}


class Product(NamedTuple):
    """The product of matrices of a group: rows, columns, depth."""

    m: int
    n: int
    depth: int

    @property
    def tile(self) -> Tile:
        return NARROW if self.n <= NARROW.bn else WIDE

    @property
    def blocks(self) -> int:
        return ceil(self.m / self.tile.bm) * self.n_tiles

    @property
    def n_tiles(self) -> int:
        return ceil(self.n / self.tile.bn)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvGeometry):
        return f"{op.name} is no convolution"
    outputs = op.infer(*inputs)
    image, filters = _image_and_filters(op, inputs, outputs)
    (_, r, s, seen), (_, h, w, _) = filters.shape, image.shape
    if not 1 < op.groups <= MAX_GROUPS or seen == 1:
        return f"from 2 to {MAX_GROUPS} groups of several channels, not {op.groups} of {seen}"
    if op.pool:
        return "grouped convolutions in fp32 have no pool"
    if reason := refuse_extras(op):
        return reason
    if isinstance(op, ConvDgrad) and op.act not in (None, *FROM_OUTPUT):
        return f"the derivative of {op.act} does not follow from its output"
    span = [d * (side - 1) + 1 for d, side in zip(op.dilation, (r, s), strict=True)]
    if max(h, w, *span, *op.pad, *op.stride) >= MAX_SIDE:
        return f"image sides, filter spans, padding and strides must be below {MAX_SIDE}"
    return refuse_dtype(*inputs, *outputs) or refuse_size(*inputs, *outputs)


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """The partial sums of a filter gradient's runs; nothing where there is one run."""
    runs = _runs(op, inputs, outputs, device)[0]
    return 4 * runs * sum(spec.size for spec in outputs) if runs > 1 else 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch; of a filter gradient in several runs one more, which adds their sums."""
    op, inputs, outputs = call.op, call.input_specs, call.output_specs
    work = _product(op, inputs, outputs)
    runs, run_pixels = _runs(op, inputs, outputs, device)
    kernel = _kernel(ENTRIES[type(op)], work.tile)
    args: tuple[Argument, ...]
    if isinstance(op, ConvFprop):
        args = (*call.inputs[:2], call.inputs[2] if op.bias else None, call.outputs[0])
    elif isinstance(op, ConvDgrad):
        named = cast("dict[str, Slot]", op.operands(call.inputs))
        args = (named["dy"], named["w"], named.get("saved"), named.get("addend"), call.outputs[0])
    elif isinstance(op, ConvWgrad):
        x, dy = call.inputs[:2]
        dw, db = call.outputs[0], call.outputs[1] if op.bias else None
        partial = call.workspace if runs > 1 else None
        args = (x, dy, dw, db, partial)
    else:
        raise TypeError(f"{op.name} is no convolution")
    grid, block = (work.blocks, runs, op.groups), (work.tile.threads, 1, 1)
    args = (*args, _argument(op, inputs, outputs, work.n_tiles))
    if not isinstance(op, ConvWgrad):
        return [Launch(kernel, grid, block, args)]
    result = [Launch(kernel, grid, block, (*args, np.int32(run_pixels)))]
    if runs > 1:
        result.append(sum_launch(call, runs))
    return result


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name but conv_wgrad's own that adds partial sums."""
    yield from (_kernel(entry, tile) for entry in ENTRIES.values() for tile in (WIDE, NARROW))


def _image_and_filters(op: ConvGeometry, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> tuple[Spec, Spec]:
    """The images and filters that the convolution is of."""
    if isinstance(op, ConvWgrad):
        return inputs[0], outputs[0]
    return (outputs if isinstance(op, ConvDgrad) else inputs)[0], inputs[1]


def _product(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> Product:
    """The product that a group is."""
    if not isinstance(op, ConvGeometry):
        raise TypeError(f"{op.name} is no convolution")
    image, filters = _image_and_filters(op, inputs, outputs)
    k, r, s, seen = filters.shape
    if isinstance(op, ConvWgrad):
        return Product(r * s * seen, k // op.groups, inputs[1].size // k)
    if isinstance(op, ConvDgrad):
        return Product(image.size // image.shape[3], seen, r * s * k // op.groups)
    return Product(outputs[0].size // k, k // op.groups, r * s * seen)


def _runs(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> tuple[int, int]:
    """Runs of pixels that a filter gradient is added up from, as many as fill the GPU, and the pixels of one."""
    work = _product(op, inputs, outputs)
    if not isinstance(op, ConvWgrad):
        return 1, 0
    wanted = ceil(BLOCKS_A_MULTIPROCESSOR * device.sm_count / (work.blocks * op.groups))
    steps = ceil(work.depth / work.tile.bk)
    each = ceil(steps / min(steps, wanted, MAX_RUNS))
    return ceil(steps / each), each * work.tile.bk


def _argument(op: ConvGeometry, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], n_tiles: int) -> Struct:
    """`Grouped` of conv_grouped.cu."""
    image, filters = _image_and_filters(op, inputs, outputs)
    (n, h, w, c), (k, r, s, seen) = image.shape, filters.shape
    p, q = op.output_hw(h, w, r, s)
    is_dgrad, group_k = isinstance(op, ConvDgrad), k // op.groups
    rows, columns = (h, w) if is_dgrad else (p, q)
    act = op.act if isinstance(op, ConvFprop | ConvDgrad) else None
    numbers = (
        n * rows * columns, h, w, c, p, q, k, r, s, seen, group_k, *op.stride, *op.pad[:2], *op.dilation, act_code(act),
        n_tiles,
    )  # fmt: skip
    divisors = (rows, columns, group_k if is_dgrad else seen, s, *op.stride, n_tiles)
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors)))


def _kernel(entry: str, tile: Tile) -> Kernel:
    return Kernel(SOURCE, entry, tuple(zip(("BM", "BN", "BK", "TM", "TN"), tile, strict=True)))
