"""Launcher of the element-by-element kernels: activations, sums, dropout."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

import numpy as np

from parcnn.cuda.kernels.common import act_code, refuse_dtype
from parcnn.cuda.launch import Argument, Device, Kernel, Launch
from parcnn.ops.base import ACTIVATIONS, Op, Spec
from parcnn.ops.pointwise import Act, ActDgrad, Add, Dropout
from parcnn.ops.program import Call

OPS = (Act, ActDgrad, Add, Dropout)

THREADS = 256
ELEMENTS_PER_BLOCK = 16 * THREADS


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    return refuse_dtype(*(inputs[:1] if isinstance(op, Dropout) else inputs))


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch."""
    op, (y,) = call.op, call.outputs
    n = y.spec.size
    args: tuple[Argument, ...] = (*call.inputs, y, np.int64(n))
    if isinstance(op, Dropout):
        scale = 1 / (1 - op.p) if op.p < 1 else 0.0
        args = (*args, np.int64(ceil(op.p * 2**32)), np.float32(scale), np.uint32(op.stream))
    return [Launch(_kernel(op), (-(-n // ELEMENTS_PER_BLOCK), 1, 1), (THREADS, 1, 1), args)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    yield from (_kernel(op(kind=kind)) for op in (Act, ActDgrad) for kind in ACTIVATIONS)
    yield from (_kernel(Add(act=act)) for act in (None, *ACTIVATIONS))
    yield _kernel(Dropout())


def _kernel(op: Op) -> Kernel:
    act = op.kind if isinstance(op, Act | ActDgrad) else op.act if isinstance(op, Add) else None
    return Kernel("pointwise.cu", op.name, (("ACT", act_code(act)),))
