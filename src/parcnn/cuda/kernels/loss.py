"""Launcher of the losses, forward and backward in one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, lanes_for, refuse_dtype, refuse_size
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer
from parcnn.ops.base import Op, Spec
from parcnn.ops.loss import CrossEntropy, MeanSquaredError
from parcnn.ops.program import Call

OPS = (CrossEntropy, MeanSquaredError)

WARP = 32
THREADS = 256  # of one block among many, at most
LEAST_THREADS = 64
MAX_THREADS = 1024  # of a block on its own
# One block does the whole batch where each of its threads then does no more than so many rows, or four elements of a mean
# squared error, one after the other: a second launch costs more than other blocks would save.
ROWS_OF_ONE_BLOCK, FOURS_OF_ONE_BLOCK = 2, 4
FEW_KEPT, MANY_KEPT = 4, 32  # logits that a lane keeps

_SUM = Kernel("loss.cu", "sum_partials")


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    pred, target = inputs
    wanted = "i32" if isinstance(op, CrossEntropy) else "f32"
    if target.dtype != wanted:
        return f"targets of {op.name} must be {wanted}, they are {target.dtype}"
    return refuse_dtype(pred, among=tuple(ELEMENTS)) or refuse_size(pred)


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """A partial loss, and for classes a partial count of hits, from each of several blocks."""
    blocks, _ = _blocks(op, inputs, device)
    return 0 if blocks == 1 else 4 * blocks * (2 if isinstance(op, CrossEntropy) else 1)


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch; for large batches a second one that adds the blocks' sums."""
    op, (pred, target), loss = call.op, call.inputs, call.outputs[0]
    blocks, threads = _blocks(op, call.input_specs, device)
    # One block writes the results themselves, many write partial sums.
    scratch = call.workspace if blocks > 1 else None
    sums: Argument = Pointer(scratch, 0, 4 * blocks) if scratch else loss
    args: tuple[Argument, ...]
    last: tuple[Argument, ...]
    if isinstance(op, CrossEntropy):
        rows, classes = pred.spec.shape
        correct = call.outputs[1]
        counts: Argument = Pointer(scratch, 4 * blocks, 4 * blocks) if scratch else correct
        gradient = call.outputs[2] if op.train else None
        lanes_log2, kept = _lanes(classes)
        sizes = (np.int32(rows), np.int32(classes), np.int32(lanes_log2), np.float32(op.label_smoothing))
        kernel = _cross_entropy(kept, pred.spec.dtype)
        args = (pred, target, sums, counts, gradient, *sizes)
        last = (sums, counts, loss, correct, np.int32(blocks), np.float32(rows))
    elif isinstance(op, MeanSquaredError):
        gradient = call.outputs[1] if op.train else None
        kernel = _mean_squared_error(pred.spec.dtype)
        args = (pred, target, sums, gradient, np.int64(pred.spec.size))
        last = (sums, None, loss, None, np.int32(blocks), np.float32(pred.spec.size))
    else:
        raise TypeError(op.name)
    main = Launch(kernel, (blocks, 1, 1), (threads, 1, 1), args)
    return [main] if blocks == 1 else [main, Launch(_SUM, (1, 1, 1), (THREADS, 1, 1), last)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    for dtype in ELEMENTS:
        yield from (_cross_entropy(kept, dtype) for kept in (FEW_KEPT, MANY_KEPT))
        yield _mean_squared_error(dtype)
    yield _SUM


def _cross_entropy(kept: int, dtype: str) -> Kernel:
    return Kernel("loss.cu", "cross_entropy", (("KEPT", kept), ("ELEMENT", ELEMENTS[dtype])))


def _mean_squared_error(dtype: str) -> Kernel:
    return Kernel("loss.cu", "mean_squared_error", (("ELEMENT", ELEMENTS[dtype]),))


def _lanes(classes: int) -> tuple[int, int]:
    """log2 of the lanes that share a row, and how many logits each keeps."""
    return lanes_for(-(-classes // FEW_KEPT), WARP), FEW_KEPT if classes <= FEW_KEPT * WARP else MANY_KEPT


def _blocks(op: Op, inputs: tuple[Spec, ...], device: Device) -> tuple[int, int]:
    """How many blocks, and the threads of each."""
    if isinstance(op, CrossEntropy):
        rows, classes = inputs[0].shape
        lanes_log2, kept = _lanes(classes)
        wanted, turns, most = rows << lanes_log2, ROWS_OF_ONE_BLOCK, MAX_THREADS if kept == FEW_KEPT else THREADS
    else:
        wanted, turns, most = -(-inputs[0].size // 4), FOURS_OF_ONE_BLOCK, MAX_THREADS
    if wanted <= turns * most:
        return 1, min(-(-wanted // WARP) * WARP, most)
    threads = THREADS
    while threads > LEAST_THREADS and wanted < threads * device.sm_count:
        threads //= 2
    return min(-(-wanted // threads), 4 * device.sm_count), threads
