"""Launcher of pool_fprop.cu and pool_dgrad.cu: pooling on its own, by windows of any size and stride, and adaptive averages."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np

from parcnn.cuda.kernels.common import (
    ELEMENTS,
    VECTOR_WIDTHS,
    act_code,
    fast_div,
    lanes_for,
    refuse_dtype,
    refuse_size,
    vector_width,
)
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.pool import AdaptiveAvgDgrad, AdaptiveAvgFprop, PoolDgrad, PoolFprop, PoolWindow
from parcnn.ops.program import Call

OPS = (PoolFprop, PoolDgrad, AdaptiveAvgFprop, AdaptiveAvgDgrad)

WARP = 32
THREADS = 256
LEAST_LANES = 8  # along channels where a block shares a window: together they read 128 bytes
FEW_TAPS, MANY_TAPS = 4, 9  # that a thread loads before it uses the first: a 2x2 and a 3x3 window
# A window of at least SHARED_TAPS elements is shared by a block's threads where one thread an output would leave most
# of a multiprocessor's 2048 threads unused.
SHARED_TAPS = 16
THREADS_TO_FILL = 1024
INDEX_BITS = {"u2": 2, "u4": 4, "u8": 8, "i32": 32}
MAX, AVG, ADAPTIVE = 0, 1, 2
# What makes each entry a compilation of its own, and the source: a cubin is soon there that has one kernel.
ENTRIES: dict[str, tuple[str, tuple[str, int]]] = {
    "pool_fprop": ("pool_fprop.cu", ("SHARED", 0)),
    "pool_fprop_shared": ("pool_fprop.cu", ("SHARED", 1)),
    "pool_dgrad": ("pool_dgrad.cu", ("WINDOWS", 0)),
    "pool_dgrad_apart": ("pool_dgrad.cu", ("WINDOWS", 1)),
    "pool_dgrad_twos": ("pool_dgrad.cu", ("WINDOWS", 2)),
}


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    (y, *_), x = op.infer(*inputs), inputs[0]
    reason = refuse_dtype(x, among=tuple(ELEMENTS)) or refuse_size(x, y)
    if reason is None and isinstance(op, PoolFprop) and op.kind == "max" and x.dtype == "bf16":
        if op.kernel[0] * op.kernel[1] > 2**16:
            return f"maxima of bf16 are of windows of at most 65536 elements, not {op.kernel}"
    if reason is None and not isinstance(op, PoolWindow):
        for a in (1, 2):
            if (x.shape[a] + 1) * (y.shape[a] + 1) >= 2**31:
                return f"{x.shape[a]} times {y.shape[a]} pixels is 2**31 or more"
    return reason


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch."""
    return [_dgrad(call) if isinstance(call.op, PoolDgrad | AdaptiveAvgDgrad) else _fprop(call, device)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    entries = (
        *(("pool_fprop", FEW_TAPS), ("pool_fprop", MANY_TAPS), ("pool_fprop_shared", MANY_TAPS)),
        *(("pool_dgrad", None), ("pool_dgrad_apart", None), ("pool_dgrad_twos", None)),
    )
    for dtype in ELEMENTS:
        for (entry, taps), width in product(entries, VECTOR_WIDTHS[dtype]):
            indices = ("u8", "i32") if width == 1 else tuple(INDEX_BITS)
            if taps == FEW_TAPS:
                indices = indices[:1]
            elif taps:
                indices = tuple(index for index in indices if index != "u2")
            elif entry == "pool_dgrad_twos":
                indices = ("u8" if width == 1 else "u4",)
            for index in indices:
                yield _kernel(entry, dtype, MAX, index, width, taps)
                if entry == "pool_fprop":
                    yield _kernel(entry, dtype, MAX, index, width, taps, applied=True)
            yield _kernel(entry, dtype, AVG, None, width, taps)
            if entry not in ("pool_dgrad_apart", "pool_dgrad_twos"):
                yield _kernel(entry, dtype, ADAPTIVE, None, width, taps)


def _kernel(
    entry: str, dtype: str, kind: int, index: str | None, width: int, taps: int | None, applied: bool = False
) -> Kernel:
    """applied: an activation of each element."""
    defines: list[tuple[str, int | str]] = [("ELEMENT", ELEMENTS[dtype]), ("KIND", kind), ("VEC", width)]
    if index:
        defines.append(("BITS", INDEX_BITS[index]))
    if taps:
        defines.append(("BATCHED", taps))
    if applied:
        defines.append(("ACT", 1))
    source, own = ENTRIES[entry]
    return Kernel(source, entry, (*defines, own))


def _as_window(op: Op, x: Spec, y: Spec) -> PoolWindow | None:
    """The op as a pool with one window; None for an adaptive one whose windows differ. x: the larger image."""
    if isinstance(op, PoolWindow):
        return op
    (h, w), (p, q) = x.shape[1:3], y.shape[1:3]
    if h % p or w % q:
        return None
    return PoolWindow("avg", (h // p, w // q), (h // p, w // q))


def _kind(op: PoolWindow | None) -> int:
    if op is None:
        return ADAPTIVE
    return MAX if op.kind == "max" else AVG


def _fprop(call: Call, device: Device) -> Launch:
    x, y = call.inputs[0].spec, call.outputs[0].spec
    n, p, q, channels = y.shape
    index, kept = (*call.outputs[1:], None, None)[:2]
    act = call.op.act if isinstance(call.op, PoolFprop) else None
    applied = act is not None and act not in FROM_OUTPUT
    width = vector_width(channels, dtype=y.dtype)
    vectors = channels // width
    count = n * p * q * vectors
    op = _as_window(call.op, x, y)
    taps = op.kernel[0] * op.kernel[1] if op else -(-x.shape[1] // p) * -(-x.shape[2] // q)  # the most of a window
    kind, index_type = _kind(op), index.spec.dtype if index else None
    if taps >= SHARED_TAPS and not applied and count < device.sm_count * THREADS_TO_FILL:
        sharing = 1 << lanes_for(-(-taps // MANY_TAPS), THREADS)
        lanes_log2 = lanes_for(vectors, max(LEAST_LANES, THREADS // sharing))
        grid = (n * p * q, -(-vectors >> lanes_log2), 1)
        sizes: tuple[Argument, ...] = (np.int32(channels), np.int32(lanes_log2), fast_div(q), fast_div(p))
        # A comparison costs more than a sum, and more parts bring more of them: no more than the taps ask for.
        threads = min(max(sharing << lanes_log2, WARP), THREADS) if kind == MAX else THREADS
        kernel = _kernel("pool_fprop_shared", y.dtype, kind, index_type, width, MANY_TAPS)
    else:
        grid, threads = (-(-count // THREADS), 1, 1), THREADS
        sizes = (np.int32(count), np.int32(channels), fast_div(vectors), fast_div(q), fast_div(p))
        kernel = _kernel(
            "pool_fprop", y.dtype, kind, index_type, width, FEW_TAPS if taps <= FEW_TAPS else MANY_TAPS, applied
        )
    args = (call.inputs[0], call.outputs[0], index, kept, *sizes, window_of(op, x, y, act))
    return Launch(kernel, grid, (threads, 1, 1), args)


def _dgrad(call: Call) -> Launch:
    dy, dx = call.inputs[0], call.outputs[0]
    n, h, w, channels = dx.spec.shape
    index = call.inputs[1] if len(call.inputs) > 1 else None
    width = vector_width(channels, dtype=dx.spec.dtype)
    vectors = channels // width
    op = _as_window(call.op, dx.spec, dy.spec)
    if op and op.dilation == (1, 1) and op.kernel[0] <= op.stride[0] and op.kernel[1] <= op.stride[1]:
        entry, rows, cells = "pool_dgrad_apart", h, -(-(w + op.pad[1]) // op.stride[1])
    elif (
        op
        and op.dilation == (1, 1)
        and op.stride == (2, 2)
        and all(side in (3, 4) for side in op.kernel)
        and min(h, w) > 1
    ):
        entry, rows, cells = "pool_dgrad_twos", -(-(h + op.pad[0]) // 2), -(-(w + op.pad[1]) // 2)
    else:
        entry, rows, cells = "pool_dgrad", h, w
    count = n * rows * cells * vectors
    sizes = (np.int32(count), np.int32(channels), fast_div(vectors), fast_div(cells), fast_div(rows))
    kernel = _kernel(entry, dx.spec.dtype, _kind(op), index.spec.dtype if index else None, width, None)
    args = (dy, index, dx, *sizes, window_of(op, dx.spec, dy.spec))
    return Launch(kernel, (-(-count // THREADS), 1, 1), (THREADS, 1, 1), args)


def window_of(op: PoolWindow | None, x: Spec, y: Spec, act: str | None = None) -> Struct:
    """The kernels' `Window`: x the larger image, y the pooled one; of an adaptive pool without `op`."""
    if op is None:
        axes = [_axis(x.shape[1 + a], y.shape[1 + a], 1, 1, 0, 1) for a in (0, 1)]
        return Struct((*axes, *(np.int32(0) for _ in range(3))))
    axes = [
        _axis(x.shape[1 + a], y.shape[1 + a], op.kernel[a], op.stride[a], op.pad[a], op.dilation[a]) for a in (0, 1)
    ]
    numbers = (divisor_of(op, x.shape[1:3], y.shape[1:3]), op.count_include_pad, act_code(act))
    return Struct((*axes, *(np.int32(v) for v in numbers)))


def divisor_of(op: PoolWindow, image: tuple[int, ...], out: tuple[int, ...]) -> int:
    """A mean's divisor, of every window from an image (h, w) to (p, q) outputs; 0 where they differ."""
    if op.divisor:
        return op.divisor
    whole = all(
        (out[a] - 1) * op.stride[a] + op.dilation[a] * (op.kernel[a] - 1) < image[a] + 2 * op.pad[a] for a in (0, 1)
    )
    return op.kernel[0] * op.kernel[1] if whole and (op.count_include_pad or op.pad == (0, 0)) else 0


def _axis(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> Struct:
    numbers = (np.int32(v) for v in (size, out, kernel, stride, pad, dilation))
    return Struct((*numbers, *(fast_div(d) for d in (stride, dilation, size, out))))
