"""Launcher of the element-by-element kernels: activations, sums, dropout, changes of the element type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import ceil

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, act_code, refuse_dtype, refuse_size
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import ACTIVATIONS, Op, Spec
from parcnn.ops.pointwise import Act, ActDgrad, Add, Cast, Dropout
from parcnn.ops.program import Call, Slot

OPS = (Act, ActDgrad, Add, Dropout, Cast)

THREADS = 256
BYTES_PER_BLOCK = 4 * 16 * THREADS
CAST_ELEMENTS_PER_BLOCK = 4 * 4 * THREADS
MAX_GROUP = 64  # tensors in one launch of `cast`: what its table holds


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    if isinstance(op, Cast):
        unknown = {op.dtype, *(x.dtype for x in inputs)} - ELEMENTS.keys()
        return f"no kernel casts from or to {', '.join(sorted(unknown))}" if unknown else refuse_size(*inputs)
    return refuse_dtype(*(inputs[:1] if isinstance(op, Dropout) else inputs), among=tuple(ELEMENTS))


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch; Cast: one for every MAX_GROUP tensors of one type."""
    op = call.op
    if isinstance(op, Cast):
        pairs = list(zip(call.inputs, call.outputs, strict=True))
        alike = [[pair for pair in pairs if pair[0].spec.dtype == dtype] for dtype in ELEMENTS]
        groups = [some[i : i + MAX_GROUP] for some in alike for i in range(0, len(some), MAX_GROUP)]
        return [_cast(group) for group in groups]
    (y,) = call.outputs
    args: tuple[Argument, ...] = (*call.inputs, y, np.int64(y.spec.size))
    if isinstance(op, Dropout):
        scale = 1 / (1 - op.p) if op.p < 1 else 0.0
        args = (*args, np.int64(ceil(op.p * 2**32)), np.float32(scale), np.uint32(op.stream))
    return [Launch(_kernel(op, y.spec.dtype), (-(-y.spec.nbytes // BYTES_PER_BLOCK), 1, 1), (THREADS, 1, 1), args)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    for dtype in ELEMENTS:
        yield from (_kernel(op(kind=kind), dtype) for op in (Act, ActDgrad) for kind in ACTIVATIONS)
        yield from (_kernel(Add(act=act), dtype) for act in (None, *ACTIVATIONS))
        yield _kernel(Dropout(), dtype)
        yield from (_cast_kernel(source, dtype) for source in ELEMENTS)


def _kernel(op: Op, dtype: str) -> Kernel:
    act = op.kind if isinstance(op, Act | ActDgrad) else op.act if isinstance(op, Add) else None
    return Kernel("pointwise.cu", op.name, (("ACT", act_code(act)), ("ELEMENT", ELEMENTS[dtype])))


def _cast_kernel(source: str, dtype: str) -> Kernel:
    return Kernel("pointwise.cu", "cast", (("FROM", ELEMENTS[source]), ("ELEMENT", ELEMENTS[dtype])))


def _cast(pairs: Sequence[tuple[Slot, Slot]]) -> Launch:
    """One launch for tensors of one type and what becomes of each."""
    rest = MAX_GROUP - len(pairs)
    sizes = [x.spec.size for x, _ in pairs]
    ends = list(accumulate(-(-size // CAST_ELEMENTS_PER_BLOCK) for size in sizes))
    tensors = Struct(tuple(Struct(pair) for pair in (*pairs, *((None, None),) * rest)))
    numbers = [
        Struct(tuple(np.int32(v) for v in values)) for values in ((*sizes, *(0,) * rest), (*ends, *(2**31 - 1,) * rest))
    ]
    kernel = _cast_kernel(pairs[0][0].spec.dtype, pairs[0][1].spec.dtype)
    return Launch(kernel, (ends[-1], 1, 1), (THREADS, 1, 1), (Struct((tensors, *numbers)),))
