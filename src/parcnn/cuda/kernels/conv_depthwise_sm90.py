"""Launcher of conv_depthwise_sm90.cu and conv_depthwise_sm90_wgrad.cu: depthwise 3x3 convolutions in bf16 on Hopper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, gcd
from typing import NamedTuple

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div
from parcnn.cuda.kernels.conv_common import refuse_extras
from parcnn.cuda.kernels.conv_depthwise import refuse
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct, TensorMap
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad, ConvWgrad)
SOURCE, WGRAD_SOURCE = "conv_depthwise_sm90.cu", "conv_depthwise_sm90_wgrad.cu"
SIDE = 3
WARP = 32  # threads
MOST_BLOCK_THREADS, MOST_STAGES, MOST_CANDIDATES = 384, 16, 12
MOST_BOX = 256  # elements of a tensor copy along a dimension
SHARED_BYTES = 220 << 10  # of a multiprocessor, for rings
# What is under way to all blocks of a multiprocessor hides the latency of memory: forward so much of x, of wgrad of x and dy.
X_BYTES, XDY_BYTES = 48 << 10, 96 << 10
STATIC_BYTES = 2048  # of a block: barriers, what thread 0 fetches, what the system keeps


class Form(NamedTuple):
    """What a thread owns (channels, columns), and threads on a multiprocessor; forward with those that copy.

    whole_rows: the columns are a row of the image, and of outputs with padding of one: nothing is multiplied with padding.
    """

    vec: int
    columns: int
    threads: int
    whole_rows: bool = False

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        numbers = (("VEC", self.vec), ("COLUMNS", self.columns), ("THREADS", self.threads))
        return (*numbers, ("WHOLE_ROWS", int(self.whole_rows)))

    def fits(self, walk: Walk) -> bool:
        return not self.whole_rows or (walk.left == 1 and walk.w == walk.q == self.columns)


FORMS = (Form(4, 4, 512), Form(2, 7, 640), Form(4, 7, 384), Form(2, 7, 640, whole_rows=True))
WGRAD_FORMS = (
    Form(4, 7, 384),
    Form(4, 7, 256),
    Form(4, 4, 512),
    Form(2, 7, 512),
    Form(2, 7, 512, whole_rows=True),
    Form(4, 7, 256, whole_rows=True),
)
# Forward and input gradients of fewer pixels an image are left to `conv_depthwise`. On an H200 256 images take 5.8 us here,
# not 9.9 (3x3x1024), 7.5, not 11.8 (4x4x1024), 7.4, not 9.8 (6x6x512); smaller ones were not measured.
LEAST_PIXELS = 9
FULL_WARPS = 16  # of a multiprocessor, that hide what others wait for; with fewer it takes longer
LINE_BYTES = 128  # of memory: what blocks have in parts costs more


@dataclass(frozen=True)
class Walk:
    """A walk over images (N,H,W,C) that gives outputs (N,P,Q,C), or meets them (wgrad: dy).

    Of dgrad, the images are dy and the outputs dx.
    """

    n: int
    h: int
    w: int
    c: int
    p: int
    q: int
    top: int
    left: int
    wgrad: bool


@dataclass(frozen=True)
class Variant:
    """A thread's form; a block's channel vectors, pieces of a row and images; its ring's stages; blocks on a multiprocessor."""

    form: Form
    lanes: int
    pieces: int
    images: int
    stages: int
    resident: int

    @property
    def width(self) -> int:
        """Columns of outputs."""
        return self.pieces * self.form.columns

    @property
    def seen(self) -> int:
        """Columns of the image that are brought for them."""
        return self.width if self.form.whole_rows else self.width + SIDE - 1

    @property
    def busy(self) -> int:
        """Threads of a block that multiply."""
        return self.lanes * self.pieces * self.images

    @property
    def threads(self) -> int:
        """Those in whole warps."""
        return ceil(self.busy / WARP) * WARP

    def __str__(self) -> str:
        vec, columns, threads, whole_rows = self.form
        form = f"{vec}x{columns} of {threads}{' in whole rows' if whole_rows else ''}"
        return f"{self.lanes * vec}x{self.width}x{self.images} by {form}, {self.stages} stages x{self.resident}"


# What was the fastest on an H200, by rows, columns and channels of the outputs, and whether it is a filter gradient.
MEASURED = {
    (112, 112, 32, False): Variant(FORMS[1], 16, 8, 1, 5, 4),
    (56, 56, 96, False): Variant(FORMS[1], 48, 4, 1, 5, 2),
    (28, 28, 144, False): Variant(FORMS[1], 72, 4, 1, 4, 2),
    (14, 14, 384, False): Variant(FORMS[1], 64, 2, 1, 5, 4),
    (7, 7, 512, False): Variant(FORMS[3], 64, 1, 2, 6, 4),
    (112, 112, 32, True): Variant(WGRAD_FORMS[0], 8, 8, 4, 3, 1),
    (56, 56, 96, True): Variant(WGRAD_FORMS[0], 8, 8, 4, 3, 1),
    (28, 28, 144, True): Variant(WGRAD_FORMS[2], 36, 7, 1, 4, 2),
    (14, 14, 384, True): Variant(WGRAD_FORMS[3], 96, 2, 2, 4, 1),
    (7, 7, 512, True): Variant(WGRAD_FORMS[4], 32, 1, 4, 3, 4),
}


@dataclass(frozen=True)
class Cut:
    """A walk cut for a variant: slices of the channels, also of the columns, rows in all, blocks that share them; a stage.

    A stage holds a row of x, and a row of outputs (wgrad: of dy) from `y_at` on.
    """

    slices: int
    units: int
    count: int
    parts: int
    x_bytes: int
    y_at: int
    y_bytes: int
    stage_bytes: int

    @property
    def runs(self) -> int:
        """Blocks that add up a filter gradient of the same channels."""
        return self.parts * self.units // self.slices


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if isinstance(op, ConvFprop):
        image, filters, others = inputs[0], inputs[1], op.infer(*inputs)[:1]
        if op.act not in (None, "relu"):
            return f"{op.act} is not fused to a depthwise convolution"
        if op.bias and inputs[2].dtype != "f32":
            return f"the bias must be f32, not {inputs[2].dtype}"
    elif isinstance(op, ConvDgrad):
        image, filters, others = op.infer(*inputs)[0], inputs[1], inputs[:1]
        if op.act or op.add:
            return "the input gradient is fused with nothing"
    elif isinstance(op, ConvWgrad):
        image, filters, others = inputs[0], Spec(op.infer(*inputs)[0].shape, inputs[0].dtype), inputs[1:2]
    else:
        return f"{op.name} is no convolution"
    if filters.dtype != "bf16" or filters.shape[1] != SIDE or op.stride != (1, 1):
        return f"only 3x3 filters of stride 1 in bf16, not {filters.shape[1]}, stride {op.stride} in {filters.dtype}"
    if image.shape[3] % 8:
        return f"channels must be a multiple of 8, not {image.shape[3]}"
    if not isinstance(op, ConvWgrad) and others[0].shape[1] * others[0].shape[2] < LEAST_PIXELS:
        return f"an image of fewer than {LEAST_PIXELS} pixels is faster without a ring"
    if max(op.pad) >= SIDE:
        return f"padding must be less than the filter's side, not {op.pad}"
    return refuse_extras(op) or refuse(op, image, filters, others)


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The blocks' sums, of a filter gradient by several."""
    if not isinstance(op, ConvWgrad):
        return 0
    walk = _walk(op, inputs, outputs)
    runs = cut(walk, variant or _ranked(walk, device)[0], device).runs
    return 4 * runs * sum(spec.size for spec in outputs) if runs > 1 else 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that differ, best estimate first."""
    return _ranked(_walk(call.op, call.input_specs, call.output_specs), device)


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch, and one more that adds the blocks' filter gradients; `variant` forces one of `candidates`."""
    op, walk = call.op, _walk(call.op, call.input_specs, call.output_specs)
    chosen = variant or _ranked(walk, device)[0]
    own = cut(walk, chosen, device)
    image = _map(call.inputs[0], chosen, chosen.seen)
    act = act_code(op.act if isinstance(op, ConvFprop) else None)
    numbers = (
        walk.h, walk.c, walk.n, walk.p, walk.q, chosen.lanes, chosen.pieces, chosen.images, walk.top, walk.left,
        *divmod(own.count, own.parts), chosen.stages, own.stage_bytes, own.x_bytes, own.y_at, own.y_bytes, act,
    )  # fmt: skip
    divisors = (walk.p, own.units, own.slices, chosen.lanes, chosen.pieces)
    argument = Struct((*(np.int32(v) for v in numbers), *(fast_div(v) for v in divisors)))
    grid = (own.parts * own.units, 1, 1)
    block = (chosen.lanes, chosen.pieces, chosen.images) if walk.wgrad else (chosen.threads + WARP, 1, 1)
    shared_bytes = _shared_bytes(walk, chosen, own)
    args: tuple[Argument, ...]
    if isinstance(op, ConvFprop):
        outputs, bias = _map(call.outputs[0], chosen, chosen.width), call.inputs[2] if op.bias else None
        args = (image, outputs, call.inputs[1], bias, argument)
        return [Launch(_kernel("conv_depthwise_sm90_fprop", chosen.form), grid, block, args, shared_bytes)]
    if isinstance(op, ConvDgrad):
        args = (image, _map(call.outputs[0], chosen, chosen.width), call.inputs[1], argument)
        return [Launch(_kernel("conv_depthwise_sm90_dgrad", chosen.form), grid, block, args, shared_bytes)]
    dw, db = call.outputs[0], call.outputs[1] if len(call.outputs) > 1 else None
    partial = call.workspace if own.runs > 1 else None
    args = (image, _map(call.inputs[1], chosen, chosen.width), dw, db, partial, argument)
    result = [Launch(_kernel("conv_depthwise_sm90_wgrad", chosen.form), grid, block, args, shared_bytes)]
    if own.runs > 1:
        result.append(sum_launch(call, own.runs))
    return result


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name but conv_wgrad's own that adds partial sums."""
    for form in FORMS:
        yield _kernel("conv_depthwise_sm90_fprop", form)
        yield _kernel("conv_depthwise_sm90_dgrad", form)
    for form in WGRAD_FORMS:
        yield _kernel("conv_depthwise_sm90_wgrad", form)


def cut(walk: Walk, variant: Variant, device: Device) -> Cut:
    """How the walk is shared among blocks."""
    form = variant.form
    slices = ceil(walk.c // form.vec / variant.lanes)
    units = slices * ceil(walk.q / variant.width)
    groups = ceil(walk.n / variant.images)
    count = groups * walk.p
    parts = max(1, min(count, variant.resident * device.sm_count // units))
    each = ceil(groups / parts)
    if groups % each == 0 and each * walk.p < count / parts + SIDE - 1:  # whole images, whose borders are read once
        parts = groups // each
    pixel_bytes = 2 * variant.lanes * form.vec * variant.images
    x_bytes, y_bytes = pixel_bytes * variant.seen, pixel_bytes * variant.width
    y_at = ceil(x_bytes / 128) * 128
    return Cut(slices, units, count, parts, x_bytes, y_at, y_bytes, y_at + ceil(y_bytes / 128) * 128)


def _ranked(walk: Walk, device: Device) -> list[Variant]:
    """What was measured, if it fits, then by estimated cost."""
    known = MEASURED.get((walk.p, walk.q, walk.c, walk.wgrad))
    first = [known] if known and known.images <= walk.n and known.form.fits(walk) else []
    found = sorted(_all(walk, device), key=lambda variant: _cost(walk, variant, device))
    return [*first, *(variant for variant in found if variant not in first)][:MOST_CANDIDATES]


def _all(walk: Walk, device: Device) -> Iterator[Variant]:
    for form in filter(lambda form: form.fits(walk), WGRAD_FORMS if walk.wgrad else FORMS):
        vectors, pieces = walk.c // form.vec, ceil(walk.q / form.columns)
        for slices in range(1, vectors + 1):
            lanes = ceil(vectors / slices)
            if lanes * form.vec > MOST_BOX or lanes * form.vec % 8 or ceil(vectors / lanes) != slices:
                continue
            if slices > 1 and lanes * form.vec < 32:
                break
            for tiles in range(1, pieces + 1):
                of_row = ceil(pieces / tiles)
                if of_row * form.columns + SIDE - 1 > MOST_BOX or ceil(pieces / of_row) != tiles:
                    continue
                for images in (1, 2, 3, 4, 6, 8):
                    variant = _with_ring(walk, form, lanes, of_row, images, device)
                    if variant and images <= walk.n:
                        yield variant


def _with_ring(walk: Walk, form: Form, lanes: int, pieces: int, images: int, device: Device) -> Variant | None:
    """The variant with as many stages as keep enough under way; None where the block is too large or far too small."""
    variant = Variant(form, lanes, pieces, images, 1, 1)
    threads = variant.threads + (0 if walk.wgrad else WARP)
    if threads > min(MOST_BLOCK_THREADS, form.threads) or (variant.busy <= 64 and images * 2 <= min(8, walk.n)):
        return None
    for resident in range(form.threads // threads, 0, -1):
        own = cut(walk, replace(variant, resident=resident), device)
        if walk.wgrad:
            stages = max(3, round(XDY_BYTES / (resident * own.stage_bytes)))
        else:
            stages = 2 + ceil(X_BYTES / (resident * own.x_bytes))
        room = SHARED_BYTES // resident - STATIC_BYTES
        stages = min(MOST_STAGES, stages, room // own.stage_bytes)
        found = replace(variant, stages=stages, resident=resident)
        if stages >= 3 and _shared_bytes(walk, found, own) <= room:
            return found
    return None


def _cost(walk: Walk, variant: Variant, device: Device) -> float:
    """Cycles of a multiprocessor: what is issued, most of it under the copies forward, and what is moved.

    Forward several blocks fill each other's gaps; of wgrad few are better, whose sums are added at the end.
    """
    form, own = variant.form, cut(walk, variant, device)
    warps = ceil(variant.busy / WARP)
    blocks = ceil(own.parts * own.units / device.sm_count)
    issued = (13 * form.vec * form.columns + 80) * warps / 4
    moved = (own.x_bytes + own.y_bytes) / 16
    if walk.wgrad:
        return (own.count / own.parts + 1.5 * (SIDE - 1)) * blocks * (issued + moved) * (1 + 0.02 * blocks)
    if own.slices > 1:
        run_bytes = 2 * variant.lanes * form.vec
        moved *= 1 + 0.2 * (LINE_BYTES - gcd(run_bytes, LINE_BYTES)) / run_bytes  # lines that a run has in part
    rows = own.count / own.parts
    halo = 0 if own.count % own.parts == 0 and rows % walk.p == 0 else SIDE - 1
    hidden = 1 + 0.1 / blocks + 0.015 * max(0, FULL_WARPS - warps * variant.resident)
    return (rows * (1 + 1 / walk.p) + halo + 2) * blocks * (0.3 * issued + moved) * hidden


def _shared_bytes(walk: Walk, variant: Variant, own: Cut) -> int:
    """The ring; wgrad's sums, of each thread, take its place at the end: of each tap, then the bias, banks apart."""
    sums = 4 * (SIDE * SIDE + 1) * (variant.form.vec * variant.busy + WARP) if walk.wgrad else 0
    return max(variant.stages * own.stage_bytes, sums)


def _map(image: Slot, variant: Variant, columns: int) -> TensorMap:
    """A row of the block's channels and columns."""
    n, h, w, c = image.spec.shape
    box = (variant.lanes * variant.form.vec, columns, 1, variant.images)
    return TensorMap(image, (c, w, h, n), (2 * c, 2 * w * c, 2 * h * w * c), box)


def _walk(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> Walk:
    if not isinstance(op, ConvGeometry):
        raise TypeError(f"{op.name} is no convolution")
    wgrad = isinstance(op, ConvWgrad)
    (n, h, w, c), (_, p, q, _) = inputs[0].shape, (inputs[1] if wgrad else outputs[0]).shape
    top, left = op.pad[:2]
    if isinstance(op, ConvDgrad):
        top, left = SIDE - 1 - top, SIDE - 1 - left
    return Walk(n, h, w, c, p, q, top, left, wgrad)


def _kernel(entry: str, form: Form) -> Kernel:
    source = WGRAD_SOURCE if entry.endswith("wgrad") else SOURCE
    return Kernel(source, entry, (("ELEMENT", "bf16"), ("FILTER", SIDE), ("STRIDE", 1), *form.defines))
