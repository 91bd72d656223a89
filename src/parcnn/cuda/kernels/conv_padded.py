"""Launcher of conv_padded.cu: convolutions on Hopper whose channels are no multiples of 8.

TMA copies rows of 16 bytes, so what has other rows is copied into the workspace with channels of zeros, another family runs
there, and its results lose the surplus channels again: two passes at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from parcnn.cuda.kernels import conv_mma_dgrad, conv_mma_fprop, conv_mma_wgrad, conv_sm90, conv_wgrad_sm90
from parcnn.cuda.kernels.common import fast_div
from parcnn.cuda.kernels.conv_common import refuse_extras, refuse_window
from parcnn.cuda.launch import Device, Kernel, Launch, Struct, UnpoolingLauncher
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad, ConvWgrad)
KERNEL = Kernel("conv_padded.cu", "conv_padded")
THREADS, CHUNK_BYTES = 256, 16
MOST_COPIES = 5  # twin of conv_padded.cu's
PADS_TO = conv_sm90.CHANNEL_UNIT
_ALIGNMENT = 256  # of tensors in the workspace
_PASS_US, _BYTES_PER_US = 2.0, 2.6e6  # of a pass: its start, and what it reads and writes
FAMILIES: dict[type[Op], tuple[Any, ...]] = {
    ConvFprop: (conv_sm90, conv_mma_fprop),
    ConvDgrad: (conv_sm90, conv_mma_dgrad),
    ConvWgrad: (conv_wgrad_sm90, conv_mma_wgrad),
}


class Variant(NamedTuple):
    """The family that runs the padded convolution, and its variant."""

    family: Any
    variant: Any

    def __str__(self) -> str:
        return f"{self.family.__name__.rpartition('.')[2]} {self.variant}"


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvDgrad | ConvWgrad):
        return f"{op.name} is not a convolution"
    if reason := refuse_window(op) or refuse_extras(op):
        return reason
    if op.groups != 1:
        return f"padded convolutions have one group, not {op.groups}"
    outputs, padded = op.infer(*inputs), _padded(op, inputs)
    if padded == inputs:
        return "no channels need padding"
    if not all(spec.size for spec in (*inputs, *outputs)):
        return "there is nothing to pad"
    reasons = [family.supports(op, padded) for family in FAMILIES[type(op)]]
    if None not in reasons:
        return "; ".join(reason for reason in reasons if reason)
    if max(spec.nbytes // _unit(spec) for spec in (*inputs, *outputs, *padded, *op.infer(*padded))) >= 2**31:
        return "a tensor has 2**31 elements or more"
    return None


def unpools(call: Call, device: Device, variant: Variant | None = None) -> bool:
    """Where the family does that runs the padded convolution, and dy needs no padding before."""
    padded = _Parts.of(call).call
    dy = 1 if isinstance(call.op, ConvWgrad) else 0
    family = variant.family if variant else _families(padded, device)[0]
    is_whole = call.input_specs[dy] == padded.input_specs[dy]
    return is_whole and isinstance(family, UnpoolingLauncher) and family.unpools(padded, device)


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The padded tensors, and what the convolution of them needs."""
    call = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in outputs))
    parts = _Parts.of(call)
    return parts.end + _scratch_bytes(parts, variant or _best(call, device), device)


def candidates(call: Call, device: Device) -> Sequence[Variant]:
    """Variants of the padded convolution, of the family first whose estimate is the best."""
    padded = _Parts.of(call).call
    return [Variant(family, v) for family in _families(padded, device) for v in family.candidates(padded, device)]


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    parts = _Parts.of(call)
    passes = [copies for copies in (parts.before, parts.after) if copies]
    nbytes = sum(a.spec.nbytes + b.spec.nbytes for copies in passes for a, b in copies)
    inner: float = _families(parts.call, device)[0].cost_us(parts.call, device)
    return inner + len(passes) * _PASS_US + nbytes / _BYTES_PER_US


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """A pass that pads, the convolution, a pass that crops where a result needs it; `variant` forces one of `candidates`."""
    parts, whole = _Parts.of(call), call.workspace
    if whole is None:
        raise ValueError("a padded convolution needs its workspace")
    chosen = variant or _best(call, device)
    nbytes = _scratch_bytes(parts, chosen, device)
    scratch = Slot(Spec((nbytes,), "u8"), whole.region, whole.offset + parts.end) if nbytes else None
    product = chosen.family.launches(replace(parts.call, workspace=scratch), device, chosen.variant)
    return [*_copies(parts.before), *product, *_copies(parts.after)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for those of the families that run the padded convolution."""
    yield KERNEL


class _Parts(NamedTuple):
    """The convolution of padded tensors, without scratch memory of its own; the copies (from, to) before and after it; where
    the padded tensors end in the workspace."""

    call: Call
    before: list[tuple[Slot, Slot]]
    after: list[tuple[Slot, Slot]]
    end: int

    @classmethod
    def of(cls, call: Call) -> _Parts:
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
        before = [pair for pair in zip(call.inputs, inputs, strict=True) if pair[0] is not pair[1]]
        after = [pair for pair in zip(outputs, call.outputs, strict=True) if pair[0] is not pair[1]]
        return cls(replace(call, inputs=inputs, outputs=outputs, workspace=None), before, after, end)


def _families(padded: Call, device: Device) -> list[Any]:
    """Those that run the padded convolution, the best estimate first."""
    able = [f for f in FAMILIES[type(padded.op)] if f.supports(padded.op, padded.input_specs) is None]
    return sorted(able, key=lambda family: family.cost_us(padded, device))


def _best(call: Call, device: Device) -> Variant:
    """The first of the candidates; where there are none, as no tap meets a pixel, what the family does then."""
    found = candidates(call, device)
    return found[0] if found else Variant(_families(_Parts.of(call).call, device)[0], None)


def _scratch_bytes(parts: _Parts, variant: Variant, device: Device) -> int:
    """What the padded convolution needs."""
    padded = parts.call
    nbytes: int = variant.family.workspace_bytes(
        padded.op, padded.input_specs, padded.output_specs, device, variant.variant
    )
    return nbytes


def _padded(op: Op, inputs: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """The operands with channels, and filters, of multiples of 8."""
    result = [replace(spec, shape=(*spec.shape[:-1], _round_up(spec.shape[-1]))) for spec in inputs]
    if isinstance(op, ConvGeometry) and not isinstance(op, ConvWgrad):
        result[1] = replace(result[1], shape=(_round_up(inputs[1].shape[0]), *result[1].shape[1:]))
    return tuple(result)


def _round_up(channels: int) -> int:
    return ceil(channels / PADS_TO) * PADS_TO


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
