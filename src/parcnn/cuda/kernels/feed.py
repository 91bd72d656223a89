"""Launcher of the kernels at a step's borders: the batch out of the data set, results kept, counters moved on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from math import prod

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, WORDS, fast_div, refuse_dtype, vector_width, word_bytes
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.feed import EndStep, GatherBatch, WriteOutput
from parcnn.ops.program import Call, Slot

OPS = (GatherBatch, EndStep, WriteOutput)

THREADS = 256
GROUPS = 4  # of neighbouring elements that a thread of gather_batch does
WORDS_PER_BLOCK = 4 * THREADS  # of write_output
MAX_ENTRIES = 16  # of scale and shift in the kernel's argument block
MAX_GRID_Y = 65535
IMAGE_TYPES = {"u8": "u8", "f32": "float"}

_END_STEP = Kernel("feed.cu", "end_step")


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    if isinstance(op, GatherBatch):
        images, targets = inputs[:2]
        if images.dtype not in IMAGE_TYPES or targets.dtype not in ("i32", "f32") or op.dtype not in ELEMENTS:
            return f"no kernel gathers {images.dtype} images as {op.dtype} with {targets.dtype} targets"
        if len(op.scale) != len(op.shift) or len(op.scale) not in (1, images.shape[-1]) or len(op.scale) > MAX_ENTRIES:
            return f"scale and shift must have one entry, or one a channel and at most {MAX_ENTRIES}"
        if prod(images.shape[1:]) > MAX_GRID_Y * GROUPS * THREADS:
            return f"a sample of {images.shape[1:]} is too large"
        return None
    if isinstance(op, EndStep):
        return refuse_dtype(*inputs[1:3]) if op.loss else None
    return refuse_dtype(inputs[0], inputs[2], among=tuple(ELEMENTS))


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch."""
    op = call.op
    if isinstance(op, GatherBatch):
        return [_gather_batch(op, call)]
    if isinstance(op, EndStep):
        state, *logs = call.inputs
        loss = logs[:2] if op.loss else (None, None)
        correct = logs[-2:] if op.correct else (None, None)
        args: tuple[Argument, ...] = (state, *loss, *correct, np.int32(op.batch), np.int32(op.train))
        return [Launch(_END_STEP, (1, 1, 1), (1, 1, 1), args)]
    y = call.inputs[0].spec
    row_bytes = y.nbytes // y.shape[0]
    nbytes = word_bytes(row_bytes)
    n = y.nbytes // nbytes
    args = (*call.inputs, np.int64(n), np.int32(row_bytes // nbytes))
    return [Launch(_write_kernel(nbytes), (-(-n // WORDS_PER_BLOCK), 1, 1), (THREADS, 1, 1), args)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    for images, dtype, width in product(IMAGE_TYPES, ELEMENTS, (1, 4)):
        yield from (_gather_kernel(images, dtype, width, augment) for augment in (False, True))
    yield from (_write_kernel(nbytes) for nbytes in WORDS)
    yield _END_STEP


def _gather_kernel(images: str, dtype: str, width: int, augment: bool) -> Kernel:
    defines = (("IMAGE", IMAGE_TYPES[images]), ("ELEMENT", ELEMENTS[dtype]), ("VEC", width), ("AUGMENT", int(augment)))
    return Kernel("feed.cu", "gather_batch", defines)


def _write_kernel(nbytes: int) -> Kernel:
    return Kernel("feed.cu", "write_output", (("WORD", WORDS[nbytes]),))


def _gather_batch(op: GatherBatch, call: Call) -> Launch:
    images, targets, order, state = call.inputs
    x, batch_targets = call.outputs
    shape = images.spec.shape[1:]
    height, width, channels = shape if len(shape) == 3 else (1, 1, prod(shape))
    elements = prod(shape)
    augment = op.flip or op.shift_px > 0
    vector = vector_width(width * channels if augment else elements)
    image = Struct((*(np.int32(v) for v in (height, width, channels)), fast_div(width), fast_div(channels)))
    grid = (op.batch, -(-elements // (vector * GROUPS * THREADS)), 1)
    numbers = (np.int32(_row(targets)), np.int32(op.flip), np.int32(op.shift_px))
    args = (images, targets, order, state, x, batch_targets, image, *numbers, _normalise(op))
    return Launch(_gather_kernel(images.spec.dtype, op.dtype, vector, augment), grid, (THREADS, 1, 1), args)


def _normalise(op: GatherBatch) -> Struct:
    rest = (0.0,) * (MAX_ENTRIES - len(op.scale))
    scale, shift = (Struct(tuple(np.float32(v) for v in (*values, *rest))) for values in (op.scale, op.shift))
    return Struct((np.int32(len(op.scale)), scale, shift))


def _row(tensor: Slot) -> int:
    """Elements of one sample."""
    return prod(tensor.spec.shape[1:])
