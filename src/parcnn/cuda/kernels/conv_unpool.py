"""Launcher of conv_unpool.cu: the error before a 2x2 pool, in bf16."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

import numpy as np

from parcnn.cuda.kernels.common import act_code, fast_div
from parcnn.cuda.launch import Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvUnpool
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvUnpool,)
THREADS, CHANNELS = 256, 8  # of a block; of a thread


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernel runs the op on these operands, else the reason why not."""
    if not isinstance(op, ConvUnpool):
        return f"{op.name} is not the way back through a convolution's pool"
    dy = inputs[0]
    if dy.dtype != "bf16":
        return f"only bf16 errors are unpooled by a call of their own, not {dy.dtype}"
    if op.act not in (None, *FROM_OUTPUT):
        return f"the derivative of {op.act} does not follow from its output"
    if dy.shape[3] % CHANNELS:
        return f"channels must be a multiple of {CHANNELS}, got {dy.shape[3]}"
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
    yield from map(_kernel, (None, *FROM_OUTPUT))


def unpool(dy: Slot, idx: Slot | None, out: Slot, saved: Slot | None = None, act: str | None = None) -> Launch:
    """The launch that spreads pooled errors dy (N,P,Q,K), of a maximum or (no idx) a mean, over their windows: out
    (N,2P,2Q,K). `act`: the activation whose derivative, from its output `saved`, they are multiplied by."""
    q, k = dy.spec.shape[2:]
    count = dy.spec.size // CHANNELS
    divisors = Struct((fast_div(k // CHANNELS), fast_div(q)))
    args = (dy, idx, saved, out, np.int32(count), divisors)
    return Launch(_kernel(act), (ceil(count / THREADS), 1, 1), (THREADS, 1, 1), args)


def _kernel(act: str | None) -> Kernel:
    return Kernel("conv_unpool.cu", "conv_unpool", (("ACT", act_code(act)),))
