"""Launcher of conv_unpool.cu: the error before a 2x2 pool."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from math import ceil

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, act_code, fast_div, refuse_dtype
from parcnn.cuda.launch import Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvUnpool
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvUnpool,)
THREADS = 256
CHANNELS = {"bf16": 8, "f32": 4}  # of a thread: 16 bytes
ALIGNMENT = 256  # of what lies behind an unpooled error in a workspace
# What the pass takes beside a gradient's own kernels: its start, and bytes a microsecond of an H200.
START_US, BYTES_PER_US = 2.0, 3.6e6


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernel runs the op on these operands, else the reason why not."""
    if not isinstance(op, ConvUnpool):
        return f"{op.name} is not the way back through a convolution's pool"
    dy = inputs[0]
    if reason := refuse_dtype(dy, *inputs[len(inputs) - bool(op.act) :], among=tuple(CHANNELS)):
        return reason
    if op.act not in (None, *FROM_OUTPUT):
        return f"the derivative of {op.act} does not follow from its output"
    if dy.shape[3] % CHANNELS[dy.dtype]:
        return f"channels must be a multiple of {CHANNELS[dy.dtype]} in {dy.dtype}, got {dy.shape[3]}"
    if 4 * dy.size >= 2**31:
        return "a tensor has 2**31 elements or more"
    return None


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch."""
    op = call.op
    if not isinstance(op, ConvUnpool):
        raise TypeError(f"{op.name} is not the way back through a convolution's pool")
    idx = call.inputs[1] if op.pool == "max" else None
    return [unpool(call.inputs[0], idx, call.outputs[0], call.inputs[-1] if op.act else None, op.act)]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (_kernel(dtype, act) for dtype, act in product(CHANNELS, (None, *FROM_OUTPUT)))


def unpool(dy: Slot, idx: Slot | None, out: Slot, saved: Slot | None = None, act: str | None = None) -> Launch:
    """The launch that spreads pooled errors dy (N,P,Q,K), of a maximum or (no idx) a mean, over their windows: out
    (N,2P,2Q,K). `act`: the activation whose derivative, from its output `saved`, they are multiplied by."""
    q, k = dy.spec.shape[2:]
    channels = CHANNELS[dy.spec.dtype]
    count = dy.spec.size // channels
    divisors = Struct((fast_div(k // channels), fast_div(q)))
    args = (dy, idx, saved, out, np.int32(count), divisors)
    return Launch(_kernel(dy.spec.dtype, act), (ceil(count / THREADS), 1, 1), (THREADS, 1, 1), args)


def unpooled(dy: Spec, pool: str | None) -> Spec:
    """The error before the pool, if there is one, of the error behind it."""
    n, p, q, k = dy.shape
    return Spec((n, 2 * p, 2 * q, k), dy.dtype) if pool else dy


def scratch_bytes(dy: Spec, pool: str | None) -> int:
    """What the error before a pool takes of a workspace, at its start; none without a pool."""
    return ceil(unpooled(dy, pool).nbytes / ALIGNMENT) * ALIGNMENT if pool else 0


def pass_us(dy: Spec, pool: str | None) -> float:
    """Estimated microseconds of the launch, none without a pool: five times dy's bytes."""
    return START_US + 5 * dy.nbytes / BYTES_PER_US if pool else 0.0


def _kernel(dtype: str, act: str | None) -> Kernel:
    return Kernel("conv_unpool.cu", "conv_unpool", (("ELEMENT", ELEMENTS[dtype]), ("ACT", act_code(act))))
