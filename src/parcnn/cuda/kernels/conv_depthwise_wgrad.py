"""Launcher of conv_depthwise_wgrad.cu: gradients of a depthwise convolution's filters and bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np

from parcnn.cuda.kernels.conv_depthwise import (
    ELEMENTS,
    MOST_THREADS,
    STRIP_OVERHEAD,
    STRIPS,
    Form,
    Pass,
    refuse,
)
from parcnn.cuda.kernels.conv_wgrad import sum_launch
from parcnn.cuda.launch import Device, Kernel, Launch
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvWgrad
from parcnn.ops.program import Call

OPS: tuple[type[Op], ...] = (ConvWgrad,)
SOURCE = "conv_depthwise_wgrad.cu"
# As FORMS of conv_depthwise.py.
FORMS = {
    ("bf16", 3, 1): Form(2, 7, 1, 3),
    ("bf16", 3, 2): Form(2, 4, 1, 4),
    ("bf16", 5, 1): Form(1, 4, 1, 3),
    ("bf16", 5, 2): Form(1, 4, 1, 3),
    ("bf16", 7, 1): Form(1, 4, 1, 3),
    ("bf16", 7, 2): Form(1, 4, 1, 3),
    ("f32", 3, 1): Form(2, 4, 1, 4),
    ("f32", 3, 2): Form(2, 4, 1, 4),
}


@dataclass(frozen=True)
class Variant:
    """Strips that an image is cut into, and runs of items whose sums are added at the end."""

    strips: int
    runs: int

    def __str__(self) -> str:
        return f"{self.strips} strips in {self.runs}"


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvWgrad):
        return f"{op.name} is not a convolution's filter gradient"
    x, dy = inputs[:2]
    return refuse(op, x, Spec(op.infer(*inputs)[0].shape, x.dtype), (dy,))


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The runs' partial sums; nothing where there is one run."""
    runs = (variant or _ranked(op, inputs, outputs, device)[0]).runs
    return 4 * runs * sum(spec.size for spec in outputs) if runs > 1 else 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that differ, best estimate first."""
    return _ranked(call.op, call.input_specs, call.output_specs, device)


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch, and one more that adds the partial sums of several runs; `variant` forces one of `candidates`."""
    op, work, form, side = _pass(call.op, call.input_specs, call.output_specs)
    chosen = variant or candidates(call, device)[0]
    cut, runs = work.cut(form, chosen.strips), chosen.runs
    x, dy = call.inputs[:2]
    dw, db = call.outputs[0], call.outputs[1] if op.bias else None
    partial = call.workspace if runs > 1 else None
    shared_bytes = 4 * side * cut.threads * form.vec
    args = (x, dy, dw, db, partial, work.argument(cut), np.int32(runs))
    grid, block = (runs * cut.slices, 1, 1), (cut.lanes, cut.block_items, 1)
    result = [Launch(_kernel(x.spec.dtype, side, op.stride[0]), grid, block, args, shared_bytes)]
    if runs > 1:
        result.append(sum_launch(call, runs))
    return result


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name but conv_wgrad's own that adds partial sums."""
    yield from (_kernel(*key) for key in FORMS)


def _pass(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> tuple[ConvWgrad, Pass, Form, int]:
    """The op, its walk, its kernels' form, and the filter's side."""
    if not isinstance(op, ConvWgrad):
        raise TypeError(f"{op.name} is not a convolution's filter gradient")
    x, (_, p, q, _), side = inputs[0], inputs[1].shape, op.filter[0]
    n, h, w, c = x.shape
    return op, Pass(n, h, w, c, p, q, *op.pad[:2]), FORMS[x.dtype, side, op.stride[0]], side


def _ranked(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> list[Variant]:
    """Each number of strips with the runs that fill the GPU's multiprocessors once; least rows a thread first."""
    _, work, form, side = _pass(op, inputs, outputs)
    costs: dict[Variant, int] = {}
    for strips in STRIPS:
        cut = work.cut(form, strips)
        resident = device.sm_count * form.blocks * MOST_THREADS // cut.threads
        each = ceil(cut.groups / max(1, min(cut.groups, resident // cut.slices)))
        costs[Variant(cut.strips, ceil(cut.groups / each))] = each * (cut.rows + side - 1 + STRIP_OVERHEAD)
    return sorted(costs, key=costs.__getitem__)


def _kernel(dtype: str, side: int, stride: int) -> Kernel:
    form = FORMS[dtype, side, stride]
    return Kernel(
        SOURCE,
        "conv_depthwise_wgrad",
        (("ELEMENT", ELEMENTS[dtype]), ("FILTER", side), ("STRIDE", stride), *form.defines),
    )
