"""Launcher of the optimizer updates: a group of parameters in one launch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import numpy as np

from parcnn.cuda.kernels.common import refuse_dtype, refuse_size
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call
from parcnn.ops.update import MAX_GROUP, AdamUpdate, SgdUpdate, Update

OPS = (SgdUpdate, AdamUpdate)

THREADS = 256
ELEMENTS_PER_BLOCK = 4 * THREADS
BUFFERS = 2  # places for a parameter's buffers in the kernel's table

_SGD, _SGD_MOMENTUM, _ADAM = (Kernel("update.cu", entry) for entry in ("sgd", "sgd_momentum", "adam"))


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    if isinstance(op, Update) and op.count > MAX_GROUP:
        return f"a group has at most {MAX_GROUP} parameters, this one {op.count}"
    return refuse_dtype(inputs[0], *inputs[2:]) or refuse_size(*inputs[2:])


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch."""
    op, (hyper, state) = call.op, call.inputs[:2]
    args: tuple[Argument, ...]
    if isinstance(op, AdamUpdate):
        kernel = _ADAM
        betas = (np.float32(v) for v in (1 - op.beta1, op.beta2, 1 - op.beta2, op.eps))
        args = (np.float32(op.weight_decay), np.int32(op.decoupled), *betas)
    elif isinstance(op, SgdUpdate) and op.momentum:
        kernel = _SGD_MOMENTUM
        factors = (np.float32(v) for v in (op.weight_decay, op.momentum, 1 - op.dampening))
        args = (*factors, np.int32(op.nesterov))
    elif isinstance(op, SgdUpdate):
        kernel, args = _SGD, (np.float32(op.weight_decay),)
    else:
        raise TypeError(op.name)
    group, blocks = _group(op, call)
    return [Launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), (group, hyper, state, *args))]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    return _SGD, _SGD_MOMENTUM, _ADAM


def _group(op: Update, call: Call) -> tuple[Struct, int]:
    """The kernel's table of parameters, and how many blocks do them all."""
    tensors = call.inputs[2:]
    sizes = [w.spec.size for w in tensors[: op.count]]
    ends = list(accumulate(-(-size // ELEMENTS_PER_BLOCK) for size in sizes))
    copies = dict(zip(op.copies, call.outputs, strict=True))
    parameters: list[Argument] = []
    for i in range(MAX_GROUP):
        own = tensors[i :: op.count] if i < op.count else ()  # weight, gradient, buffers
        parameters.append(Struct((*own, *(None,) * (2 + BUFFERS - len(own)), copies.get(i))))
    padded = [0] * (MAX_GROUP - op.count), [2**31 - 1] * (MAX_GROUP - op.count)
    numbers = [
        Struct(tuple(np.int32(v) for v in (*values, *rest))) for values, rest in zip((sizes, ends), padded, strict=True)
    ]
    return Struct((Struct(tuple(parameters)), *numbers)), ends[-1]
