"""Launcher of pooling on its own: windows of any size, stride and padding, and adaptive averages."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parcnn.cuda.kernels.common import fast_div, lanes_for, refuse_dtype, refuse_size, vector_width
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.pool import AdaptiveAvgDgrad, AdaptiveAvgFprop, PoolDgrad, PoolFprop, PoolWindow
from parcnn.ops.program import Call

OPS = (PoolFprop, PoolDgrad, AdaptiveAvgFprop, AdaptiveAvgDgrad)

THREADS = 256
LANES = 32  # most threads along channels where a block shares a window
# A window of at least SHARED_TAPS elements is shared by a block's threads where one thread an output would leave most
# of a multiprocessor's 2048 threads unused.
SHARED_TAPS = 16
THREADS_TO_FILL = 1024
INDEX_TYPES = {"u8": "u8", "i32": "int"}
MAX, AVG, ADAPTIVE = 0, 1, 2


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    return refuse_dtype(inputs[0]) or refuse_size(inputs[0], *op.infer(*inputs))


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch."""
    op, y = call.op, call.outputs[0]
    return [_dgrad(call) if isinstance(op, PoolDgrad | AdaptiveAvgDgrad) else _fprop(call, device, y.spec)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    for entry in ("pool_fprop", "pool_fprop_shared", "pool_dgrad"):
        for width in (1, 4):
            yield from (_kernel(entry, MAX, index, width) for index in INDEX_TYPES)
            yield from (_kernel(entry, kind, None, width) for kind in (AVG, ADAPTIVE))


def _kernel(entry: str, kind: int, index: str | None, width: int) -> Kernel:
    defines: tuple[tuple[str, int | str], ...] = (("KIND", kind), ("VEC", width))
    return Kernel("pool.cu", entry, (*defines, ("INDEX", INDEX_TYPES[index])) if index else defines)


def _kind(op: Op) -> int:
    if isinstance(op, PoolWindow):
        return MAX if op.kind == "max" else AVG
    return ADAPTIVE


def _fprop(call: Call, device: Device, y: Spec) -> Launch:
    x = call.inputs[0].spec
    n, p, q, channels = y.shape
    index = call.outputs[1] if len(call.outputs) > 1 else None
    width = vector_width(channels)
    vectors = channels // width
    count = n * p * q * vectors
    window = _window(call.op, x, y)
    kind, index_type = _kind(call.op), index.spec.dtype if index else None
    if _taps(call.op, x, y) >= SHARED_TAPS and count < device.sm_count * THREADS_TO_FILL:
        lanes_log2 = lanes_for(vectors, LANES)
        grid = (n * p * q, -(-vectors >> lanes_log2), 1)
        sizes: tuple[Argument, ...] = (np.int32(channels), np.int32(lanes_log2), fast_div(q), fast_div(p))
        entry = "pool_fprop_shared"
    else:
        grid = (-(-count // THREADS), 1, 1)
        sizes = (np.int32(count), np.int32(channels), fast_div(vectors), fast_div(q), fast_div(p))
        entry = "pool_fprop"
    args = (call.inputs[0], call.outputs[0], index, *sizes, window)
    return Launch(_kernel(entry, kind, index_type, width), grid, (THREADS, 1, 1), args)


def _dgrad(call: Call) -> Launch:
    dy, dx = call.inputs[0], call.outputs[0]
    n, h, w, channels = dx.spec.shape
    index = call.inputs[1] if len(call.inputs) > 1 else None
    width = vector_width(channels)
    vectors = channels // width
    count = n * h * w * vectors
    sizes = (np.int32(count), np.int32(channels), fast_div(vectors), fast_div(w), fast_div(h))
    kernel = _kernel("pool_dgrad", _kind(call.op), index.spec.dtype if index else None, width)
    args = (dy, index, dx, *sizes, _window(call.op, dx.spec, dy.spec))
    return Launch(kernel, (-(-count // THREADS), 1, 1), (THREADS, 1, 1), args)


def _taps(op: Op, x: Spec, y: Spec) -> int:
    """Elements of a window, of the largest where they differ."""
    if isinstance(op, PoolWindow):
        return op.kernel[0] * op.kernel[1]
    return -(-x.shape[1] // y.shape[1]) * -(-x.shape[2] // y.shape[2])


def _window(op: Op, x: Spec, y: Spec) -> Struct:
    """The kernels' `Window`: x the larger image, y the pooled one."""
    if isinstance(op, PoolWindow):
        axes = [
            _axis(x.shape[1 + a], y.shape[1 + a], op.kernel[a], op.stride[a], op.pad[a], op.dilation[a]) for a in (0, 1)
        ]
        return Struct((*axes, np.int32(op.divisor or 0), np.int32(op.count_include_pad)))
    axes = [_axis(x.shape[1 + a], y.shape[1 + a], 1, 1, 0, 1) for a in (0, 1)]
    return Struct((*axes, np.int32(0), np.int32(0)))


def _axis(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> Struct:
    numbers = (np.int32(v) for v in (size, out, kernel, stride, pad, dilation))
    return Struct((*numbers, fast_div(stride), fast_div(dilation)))
