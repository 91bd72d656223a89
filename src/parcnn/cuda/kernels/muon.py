"""Launcher of muon.cu: Muon's directions and its updates, for a group of weights each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import ceil
from types import MappingProxyType

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, refuse_dtype, refuse_size
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.muon import MuonDirection, MuonUpdate, matrix_of
from parcnn.ops.program import Call, Slot
from parcnn.ops.update import MAX_GROUP

OPS: tuple[type[Op], ...] = (MuonDirection, MuonUpdate)
SOURCE = "muon.cu"
THREADS = 256
ELEMENTS_PER_BLOCK = 4 * THREADS

_MOMENTUM, _NORM = (Kernel(SOURCE, entry) for entry in ("muon_momentum", "muon_norm"))


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    if not isinstance(op, MuonDirection | MuonUpdate):
        return f"{op.name} is not a part of Muon"
    if op.count > MAX_GROUP:
        return f"a group has at most {MAX_GROUP} parameters, this one {op.count}"
    if isinstance(op, MuonDirection):
        directions, weights = op.infer(*inputs), inputs
    else:
        directions, weights = inputs[2 + op.count :], (inputs[0], *inputs[2 : 2 + op.count])
    return (
        refuse_dtype(*weights) or refuse_dtype(*directions, among=tuple(ELEMENTS)) or refuse_size(*weights, *directions)
    )


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """A sum for each block that adds up squares."""
    if isinstance(op, MuonDirection):
        return 4 * sum(_blocks(g) for g in inputs[: op.count])
    return 4 * sum(_blocks(w) for w in inputs[2 : 2 + op.count]) if isinstance(op, MuonUpdate) and op.renormalize else 0


def launches(call: Call, device: Device) -> list[Launch]:
    """The pass over the directions or the weights; before it, one that adds up squares where a norm is needed."""
    op, partial = call.op, call.workspace
    if isinstance(op, MuonDirection):
        gradients, buffers = call.inputs[: op.count], call.inputs[op.count :]
        none, factors = (None,) * op.count, [0.0] * op.count
        momentum = np.float32(op.momentum), np.int32(op.nesterov)
        group, blocks = _group(buffers, gradients, none, gradients, factors)
        sums = Launch(_MOMENTUM, (blocks, 1, 1), (THREADS, 1, 1), (group, partial, *momentum))
        group, blocks = _group(buffers, gradients, call.outputs, call.outputs, factors)
        args: tuple[Argument, ...] = (group, partial, *momentum, np.float32(op.eps))
        kernel = _kernel("muon_direction", call.outputs[0].spec.dtype)
        return [sums, Launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), args)]
    if not isinstance(op, MuonUpdate):
        raise TypeError(op.name)
    (hyper, state), weights, directions = call.inputs[:2], call.inputs[2 : 2 + op.count], call.inputs[2 + op.count :]
    none = (None,) * op.count
    copies = dict(zip(op.copies, call.outputs, strict=True))
    group, blocks = _group(weights, none, directions, weights, [op.factor(w.spec) for w in weights], copies)
    args = (group, hyper, state, partial, np.float32(op.weight_decay))
    kernel = _kernel("muon_update", directions[0].spec.dtype)
    update = Launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), args)
    if not op.renormalize:
        return [update]
    group, blocks = _group(weights, none, none, weights, [0.0] * op.count)
    return [Launch(_NORM, (blocks, 1, 1), (THREADS, 1, 1), (group, partial)), update]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    yield from (_MOMENTUM, _NORM)
    yield from (_kernel(entry, dtype) for entry in ("muon_direction", "muon_update") for dtype in ELEMENTS)


def _kernel(entry: str, dtype: str) -> Kernel:
    return Kernel(SOURCE, entry, (("ELEMENT", ELEMENTS[dtype]),))


def _blocks(tensor: Spec) -> int:
    return ceil(tensor.size / ELEMENTS_PER_BLOCK)


def _group(
    written: Sequence[Slot],
    others: Sequence[Slot | None],
    directions: Sequence[Slot | None],
    walked: Sequence[Slot],
    factors: Sequence[float],
    copies: Mapping[int, Slot] = MappingProxyType({}),
) -> tuple[Struct, int]:
    """`Group` of muon.cu for blocks that walk over the tensors `walked`, and how many blocks these are."""
    rest = MAX_GROUP - len(written)
    tensors = enumerate(zip(written, others, directions, strict=True))
    own: list[Argument] = [Struct((*some, copies.get(i))) for i, some in tensors]
    parameters = Struct((*own, *[Struct((None,) * 4)] * rest))
    rows, columns = zip(*(matrix_of(slot.spec) for slot in written), strict=True)
    ends = list(accumulate(_blocks(slot.spec) for slot in walked))
    sums = list(accumulate(_blocks(slot.spec) for slot in written))
    numbers = ([*rows, *[0] * rest], [*columns, *[0] * rest], [*ends, *[2**31 - 1] * rest], [*sums, *[0] * rest])
    fields = [Struct(tuple(np.int32(v) for v in row)) for row in numbers]
    scales = Struct(tuple(np.float32(v) for v in (*factors, *[0.0] * rest)))
    return Struct((parameters, *fields, scales)), ends[-1]
