"""Launcher of conv_depthwise.cu: depthwise convolution and its input gradient, for the filters and strides of networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, cast

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div, refuse_dtype, refuse_size
from parcnn.cuda.kernels.conv_common import refuse_extras
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad)
SOURCE = "conv_depthwise.cu"
ELEMENTS = {"f32": "float", "bf16": "bf16"}
MOST_THREADS, MOST_LANES = 128, 64
# A thread's start and end, in rows of its strip that it could have done instead.
STRIP_OVERHEAD = 4
STRIPS = (1, 2, 3, 4, 6, 8, 12, 16, 32)


class Form(NamedTuple):
    """What a thread owns (channels, columns), rows that it fetches ahead, and blocks of 128 threads on a multiprocessor."""

    vec: int
    columns: int
    ahead: int
    blocks: int

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return tuple(zip(("VEC", "COLUMNS", "AHEAD", "BLOCKS"), self, strict=True))


# (type, filter side, stride): the form that its kernels are compiled in. 7 columns: images of networks have 7 * 2^i.
FORMS = {
    ("bf16", 3, 1): Form(2, 7, 1, 4),
    ("bf16", 3, 2): Form(2, 4, 1, 4),
    ("bf16", 5, 1): Form(2, 4, 1, 3),
    ("bf16", 5, 2): Form(2, 4, 1, 3),
    ("bf16", 7, 1): Form(2, 4, 1, 3),
    ("bf16", 7, 2): Form(2, 4, 1, 3),
    ("f32", 3, 1): Form(2, 4, 1, 4),
    ("f32", 3, 2): Form(2, 4, 1, 4),
}


@dataclass(frozen=True)
class Strips:
    """Into how many strips of rows an image is cut."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} strips"


@dataclass(frozen=True)
class Pass:
    """A walk over images (N,H,W,C) that gives outputs (N,P,Q,C); of dgrad, the images are dy and the outputs dx.

    lattice: outputs that a filter starts at are so many apart, `top`, `left` before the first; strips and pieces start there.
    """

    n: int
    h: int
    w: int
    c: int
    p: int
    q: int
    top: int
    left: int
    lattice: int = 1

    def cut(self, form: Form, strips: int) -> Cut:
        """The pass in that many strips an image, or a few less where rows run out."""
        first_p, first_q = -(self.top % self.lattice), -(self.left % self.lattice)
        height = self.p - first_p
        rows = ceil(ceil(height / strips) / self.lattice) * self.lattice
        strips, pieces = ceil(height / rows), ceil((self.q - first_q) / form.columns)
        slices, lanes, items = block_shape(self.c // form.vec)
        return Cut(rows, strips, pieces, self.n * strips * pieces, slices, lanes, items, first_p, first_q)

    def argument(self, cut: Cut, act: str | None = None) -> Struct:
        """`Depthwise` of conv_depthwise.cuh."""
        numbers = (
            self.h, self.w, self.c, self.p, self.q, self.top, self.left, cut.rows, cut.items, cut.first_p, cut.first_q,
            act_code(act),
        )  # fmt: skip
        return Struct((*(np.int32(v) for v in numbers), *(fast_div(v) for v in (cut.pieces, cut.strips, cut.slices))))


@dataclass(frozen=True)
class Cut:
    """Rows of a strip, strips of an image, pieces of a row, items in all, slices of channels; lanes and items of a block."""

    rows: int
    strips: int
    pieces: int
    items: int
    slices: int
    lanes: int
    block_items: int
    first_p: int = 0
    first_q: int = 0

    @property
    def threads(self) -> int:
        return self.lanes * self.block_items

    @property
    def groups(self) -> int:
        """Blocks that a slice of the channels has work for."""
        return ceil(self.items / self.block_items)


def block_shape(vectors: int) -> tuple[int, int, int]:
    """Slices of `vectors` channel vectors, and a block's vectors and items: few idle lanes, then large blocks of long rows."""
    shapes = []
    fewest = ceil(vectors / MOST_LANES)
    for slices in range(fewest, 3 * fewest + 1):
        lanes = ceil(vectors / slices)
        for items in range(max(1, MOST_THREADS // 2 // lanes), MOST_THREADS // lanes + 1):
            threads = lanes * items
            busy = vectors / (slices * lanes) * threads / (ceil(threads / 32) * 32)
            shapes.append((round(busy, 2), lanes, items, slices))
    _, lanes, items, slices = max(shapes)
    return slices, lanes, items


def refuse(op: ConvGeometry, image: Spec, filters: Spec, tensors: Iterable[Spec]) -> str | None:
    """Why the kernels cannot run this convolution on these tensors of its data; None where they can."""
    (k, r, s, seen), c = filters.shape, image.shape[3]
    if op.groups == 1 or seen != 1 or k != c:
        return f"not a depthwise convolution: {op.groups} groups, {c} channels, {k} filters of {seen}"
    if op.pool:
        return "depthwise convolutions have no pool"
    form = FORMS.get((filters.dtype, r, op.stride[0]))
    if form is None or s != r or op.stride[0] != op.stride[1] or op.dilation != (1, 1):
        return f"no kernel for filters {r}x{s}, stride {op.stride}, dilation {op.dilation} in {filters.dtype}"
    if c % form.vec:
        return f"channels must be a multiple of {form.vec}, not {c}"
    tensors = (image, filters, *tensors)
    return refuse_dtype(*tensors, among=tuple(ELEMENTS)) or refuse_size(*tensors)


def refuse_epilogue(op: ConvGeometry, inputs: tuple[Spec, ...]) -> str | None:
    """Why depthwise kernels cannot do what the op does to its outputs; None where they can."""
    if reason := refuse_extras(op):
        return reason
    if isinstance(op, ConvFprop):
        # Of the others the code, in every row of a walk, costs more registers than the pass of their own costs time.
        if op.act not in (None, "relu"):
            return f"{op.act} is not fused to a depthwise convolution"
        if op.bias and inputs[2].dtype != "f32":
            return f"the bias must be f32, not {inputs[2].dtype}"
    if isinstance(op, ConvDgrad) and op.act not in (None, *FROM_OUTPUT):
        return f"the derivative of {op.act} does not follow from its output"
    return None


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if isinstance(op, ConvFprop):
        return refuse_epilogue(op, inputs) or refuse(op, inputs[0], inputs[1], op.infer(*inputs)[:1])
    if isinstance(op, ConvDgrad):
        return refuse_epilogue(op, inputs) or refuse(op, op.infer(*inputs)[0], inputs[1], (inputs[0], *inputs[2:]))
    return f"{op.name} is neither a forward convolution nor an input gradient"


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Strips | None = None
) -> int:
    """None is needed."""
    return 0


def candidates(call: Call, device: Device) -> list[Strips]:
    """Numbers of strips that differ, best estimate first: rows that are done one after the other, in rounds of blocks."""
    _, work, form, side = _pass(call)
    cuts = {cut.strips: cut for cut in (work.cut(form, strips) for strips in STRIPS)}
    return [Strips(count) for count in sorted(cuts, key=lambda count: cycles(cuts[count], form, side, device))]


def launches(call: Call, device: Device, variant: Strips | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    op, work, form, side = _pass(call)
    x, w = call.inputs[:2]
    cut = work.cut(form, (variant or candidates(call, device)[0]).count)
    args: tuple[Argument, ...]
    if isinstance(op, ConvFprop):
        entry, args = "conv_depthwise_fprop", (x, w, call.inputs[2] if op.bias else None, call.outputs[0])
    else:
        named = cast("dict[str, Slot]", op.operands(call.inputs))
        entry, args = "conv_depthwise_dgrad", (x, w, named.get("saved"), named.get("addend"), call.outputs[0])
    kernel = _kernel(entry, w.spec.dtype, side, op.stride[0])
    shared_bytes = 4 * side * side * cut.lanes * form.vec if side > 3 else 0
    grid, block = (cut.groups * cut.slices, 1, 1), (cut.lanes, cut.block_items, 1)
    return [Launch(kernel, grid, block, (*args, work.argument(cut, op.act)), shared_bytes)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    for key in FORMS:
        yield _kernel("conv_depthwise_fprop", *key)
        yield _kernel("conv_depthwise_dgrad", *key)


def cycles(cut: Cut, form: Form, side: int, device: Device) -> float:
    """Rows that a multiprocessor does one after the other: what the choice of strips rests on."""
    resident = device.sm_count * form.blocks * MOST_THREADS / cut.threads
    rounds = max(1.0, cut.groups * cut.slices / resident + 0.5)  # half a round: the last one is not full
    return rounds * (cut.rows + side - 1 + STRIP_OVERHEAD)


def _pass(call: Call) -> tuple[ConvFprop | ConvDgrad, Pass, Form, int]:
    """The op, its walk, its kernels' form, and the filter's side."""
    op, image, w = call.op, call.inputs[0].spec.shape, call.inputs[1].spec
    if not isinstance(op, ConvFprop | ConvDgrad):
        raise TypeError(f"{op.name} is neither a forward convolution nor an input gradient")
    (n, h, width, c), (_, p, q, _) = image, call.outputs[0].spec.shape
    side, stride, top, left = w.shape[1], op.stride[0], op.pad[0], op.pad[1]
    form = FORMS[w.dtype, side, stride]
    if isinstance(op, ConvDgrad) and stride == 1:
        top, left = side - 1 - top, side - 1 - left
    lattice = stride if isinstance(op, ConvDgrad) else 1
    return op, Pass(n, h, width, c, p, q, top, left, lattice), form, side


def _kernel(entry: str, dtype: str, side: int, stride: int) -> Kernel:
    form = FORMS[dtype, side, stride]
    return Kernel(SOURCE, entry, (("ELEMENT", ELEMENTS[dtype]), ("FILTER", side), ("STRIDE", stride), *form.defines))
