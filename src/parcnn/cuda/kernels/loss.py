"""Launcher of the losses, forward and backward in one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parcnn.cuda.kernels.common import lanes_for, refuse_dtype, refuse_size
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer
from parcnn.ops.base import Op, Spec
from parcnn.ops.loss import CrossEntropy, MeanSquaredError
from parcnn.ops.program import Call

OPS = (CrossEntropy, MeanSquaredError)

WARP = 32
THREADS = 256  # of one block among many
MAX_THREADS = 1024  # of a block on its own
# Up to so many elements one block does the whole batch: a second launch costs more than other blocks would save.
MOST_OF_ONE_BLOCK = 16384

_CROSS_ENTROPY, _MEAN_SQUARED_ERROR, _SUM = (
    Kernel("loss.cu", entry) for entry in ("cross_entropy", "mean_squared_error", "sum_partials")
)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    floats = inputs[:1] if isinstance(op, CrossEntropy) else inputs
    if isinstance(op, CrossEntropy) and inputs[1].dtype != "i32":
        return f"labels must be i32, they are {inputs[1].dtype}"
    return refuse_dtype(*floats) or refuse_size(*floats)


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
        sizes = (np.int32(rows), np.int32(classes), np.int32(lanes_for(classes, WARP)), np.float32(op.label_smoothing))
        kernel, args = _CROSS_ENTROPY, (pred, target, sums, counts, gradient, *sizes)
        last = (sums, counts, loss, correct, np.int32(blocks), np.float32(rows))
    elif isinstance(op, MeanSquaredError):
        gradient = call.outputs[1] if op.train else None
        kernel, args = _MEAN_SQUARED_ERROR, (pred, target, sums, gradient, np.int64(pred.spec.size))
        last = (sums, None, loss, None, np.int32(blocks), np.float32(pred.spec.size))
    else:
        raise TypeError(op.name)
    main = Launch(kernel, (blocks, 1, 1), (threads, 1, 1), args)
    return [main] if blocks == 1 else [main, Launch(_SUM, (1, 1, 1), (THREADS, 1, 1), last)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    return _CROSS_ENTROPY, _MEAN_SQUARED_ERROR, _SUM


def _blocks(op: Op, inputs: tuple[Spec, ...], device: Device) -> tuple[int, int]:
    """How many blocks, and the threads of each."""
    pred = inputs[0]
    if isinstance(op, CrossEntropy):
        rows, classes = pred.shape
        wanted = rows << lanes_for(classes, WARP)
    else:
        wanted = -(-pred.size // 4)
    if max(pred.size, wanted) <= MOST_OF_ONE_BLOCK:
        return 1, min(-(-wanted // WARP) * WARP, MAX_THREADS)
    return min(-(-wanted // THREADS), 4 * device.sm_count), THREADS
