"""Launcher of conv_padded.cu: convolutions on Hopper's tensor cores whose channels are no multiples of 8.

TMA copies rows of 16 bytes, so what has other rows is copied into the workspace with channels of zeros, `conv_sm90` or
`conv_wgrad_sm90` runs there, and its results lose the surplus channels again: two passes at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from parcnn.cuda.kernels import conv_sm90, conv_wgrad_sm90
from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_sm90_tiles import Variant as Sm90Variant
from parcnn.cuda.kernels.conv_wgrad_sm90 import Variant as WgradVariant
from parcnn.cuda.launch import Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad, ConvWgrad)
KERNEL = Kernel("conv_padded.cu", "conv_padded")
THREADS, CHUNK_BYTES = 256, 16
MOST_COPIES = 5  # twin of conv_padded.cu's
UNIT = conv_sm90.CHANNEL_UNIT
_ALIGNMENT = 256  # of tensors in the workspace
_PASS_US, _BYTES_PER_US = 2.0, 2.6e6  # of a pass: its start, and what it reads and writes
Variant: TypeAlias = Sm90Variant | WgradVariant


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvDgrad | ConvWgrad):
        return f"{op.name} is not a convolution"
    if op.groups != 1:
        return f"padded convolutions have one group, not {op.groups}"
    outputs, padded = op.infer(*inputs), _padded(op, inputs)
    if padded == inputs:
        return "no channels need padding"
    reason = _inner(op).supports(op, padded)
    if reason is not None:
        return reason
    if max(spec.nbytes // _unit(spec) for spec in (*inputs, *outputs, *padded, *op.infer(*padded))) >= 2**31:
        return "a tensor has 2**31 elements or more"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The padded tensors, and what the convolution of them needs."""
    call = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in outputs))
    parts = _Parts.of(call, device, variant)
    return parts.scratch_offset + (parts.call.workspace.spec.nbytes if parts.call.workspace else 0)


def candidates(call: Call, device: Device) -> Sequence[Variant]:
    """Variants of the padded convolution, best first."""
    return _inner(call.op).candidates(_Parts.of(call, device).call, device)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    parts = _Parts.of(call, device)
    passes = [copies for copies in (parts.before, parts.after) if copies]
    nbytes = sum(a.spec.nbytes + b.spec.nbytes for copies in passes for a, b in copies)
    return _inner(call.op).cost_us(parts.call, device) + len(passes) * _PASS_US + nbytes / _BYTES_PER_US


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """A pass that pads, the convolution, a pass that crops where a result needs it; `variant` forces one of `candidates`."""
    parts = _Parts.of(call, device, variant)
    product = _inner(call.op).launches(parts.call, device, variant)
    return [*_copies(parts.before), *product, *_copies(parts.after)] if product else []


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for those of the families that run the padded convolution."""
    yield KERNEL


class _Parts(NamedTuple):
    """The convolution of padded tensors, and the copies (from, to) before and after it."""

    call: Call
    before: list[tuple[Slot, Slot]]
    after: list[tuple[Slot, Slot]]
    scratch_offset: int  # in the workspace, of the convolution's own

    @classmethod
    def of(cls, call: Call, device: Device, variant: Variant | None = None) -> _Parts:
        op, whole = call.op, call.workspace or Slot(Spec((0,), "u8"), "arena")
        end = 0

        def place(slot: Slot, spec: Spec) -> Slot:
            nonlocal end
            if spec == slot.spec:
                return slot
            padded = Slot(spec, whole.region, whole.offset + end, slot.label)
            end += ceil(spec.nbytes / _ALIGNMENT) * _ALIGNMENT
            return padded

        specs = _padded(op, call.input_specs)
        inputs = tuple(place(*pair) for pair in zip(call.inputs, specs, strict=True))
        outputs = tuple(place(*pair) for pair in zip(call.outputs, op.infer(*specs), strict=True))
        nbytes = _inner(op).workspace_bytes(op, specs, op.infer(*specs), device, variant)
        scratch = Slot(Spec((nbytes,), "u8"), whole.region, whole.offset + end) if nbytes else None
        before = [pair for pair in zip(call.inputs, inputs, strict=True) if pair[0] is not pair[1]]
        after = [pair for pair in zip(outputs, call.outputs, strict=True) if pair[0] is not pair[1]]
        return cls(replace(call, inputs=inputs, outputs=outputs, workspace=scratch), before, after, end)


def _inner(op: Op) -> Any:
    """The family that runs the padded convolution."""
    return conv_wgrad_sm90 if isinstance(op, ConvWgrad) else conv_sm90


def _padded(op: Op, inputs: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """The operands with channels, and filters, of multiples of 8."""
    result = [replace(spec, shape=(*spec.shape[:-1], _round_up(spec.shape[-1]))) for spec in inputs]
    if isinstance(op, ConvGeometry) and not isinstance(op, ConvWgrad):
        result[1] = replace(result[1], shape=(_round_up(inputs[1].shape[0]), *result[1].shape[1:]))
    return tuple(result)


def _round_up(channels: int) -> int:
    return ceil(channels / UNIT) * UNIT


def _unit(spec: Spec) -> int:
    """Bytes that the rows of a tensor are multiples of, as the kernel counts."""
    return 1 if spec.dtype == "u2" else 2


def _copies(pairs: Sequence[tuple[Slot, Slot]]) -> list[Launch]:
    """One launch that copies each tensor's rows into those of the other."""
    copies, blocks = [], 0
    for source, target in pairs:
        row_bytes = [Spec(slot.spec.shape[-1:], slot.spec.dtype).nbytes for slot in (source, target)]
        unit, nbytes = _unit(target.spec), target.spec.nbytes
        if nbytes == 0:
            continue
        copies.append(
            Struct(
                (
                    source, target, np.uint64(source.spec.nbytes), np.uint64(nbytes),
                    *(np.int32(v) for v in (*row_bytes, unit, blocks)), fast_div(row_bytes[1] // unit),
                )
            )
        )  # fmt: skip
        blocks += ceil(nbytes / (CHUNK_BYTES * THREADS))
    if not copies:
        return []
    none = Struct((None, None, np.uint64(0), np.uint64(0), *(np.int32(v) for v in (0, 0, 1, 2**31 - 1)), fast_div(1)))
    copies += [none] * (MOST_COPIES - len(copies))
    return [Launch(KERNEL, (blocks, 1, 1), (THREADS, 1, 1), (Struct(tuple(copies)),))]
