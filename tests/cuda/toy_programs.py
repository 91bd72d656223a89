"""Programs of toy ops: chains, diamonds over two streams, logs."""

from __future__ import annotations

import numpy as np

from parcnn.cuda.executor import CudaExecutor, CudaRegion, LoadedCudaProgram
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call, Program, Slot
from tests.cuda.toy import ScaleAdd, SlowIncrement, WriteLog

SIZE = 1000
X = Spec((SIZE,))
STATE = Spec((8,), "i32")
PITCH = 4096  # of tensors in the arena


def tensor(index: int, spec: Spec = X) -> Slot:
    return Slot(spec, "arena", index * PITCH, f"tensor {index}")


def call(op: Op, source: int, target: int, stream: int = 0, after: tuple[int, ...] = ()) -> Call:
    return Call(
        op, (tensor(source),), (tensor(target),), layer=f"{op.name} {source}->{target}", stream=stream, after=after
    )


def program(*calls: Call, streams: int = 1, replay: bool = True, **region_bytes: int) -> Program:
    used = [s for c in calls for s in (*c.inputs, *c.outputs) if s.region == "arena"]
    sizes = {"arena": max((s.end for s in used), default=0), **region_bytes}
    return Program("toy", calls, sizes, streams=streams, replay=replay)


def load(executor: CudaExecutor, toy: Program) -> tuple[LoadedCudaProgram, dict[str, CudaRegion]]:
    regions = {name: executor.region(name, nbytes) for name, nbytes in toy.region_bytes.items()}
    return executor.load(toy, regions), regions


def logging_program(rows: int, replay: bool = True) -> Program:
    """x <- x * 1 + 1, log[step] = x[0]: after n steps the log is 1, 2, ..., n."""
    log, state = Slot(Spec((rows,)), "losses", label="log"), Slot(STATE, "state", label="state")
    x = tensor(0)
    return program(
        Call(ScaleAdd(1.0, 1), (x,), (x,), layer="count"),
        Call(WriteLog(), (state, log, x), (), layer="log"),
        replay=replay,
        state=STATE.nbytes,
        losses=log.end,
    )


def diamond(spin_ns: int = 0, missing: int | None = None, replay: bool = True) -> Program:
    """1 = 0+1; then 2 = 1+1 beside 3 = 1+1 on another stream; 4 = 3*2 there waits for it; 5 = 4+1 back on the first.

    `missing` drops the edges of the call at that position.
    """
    slow = SlowIncrement(spin_ns)
    calls = [
        call(slow, 0, 1),
        call(slow, 1, 2, after=(0,)),
        call(slow, 1, 3, stream=1, after=(0,)),
        call(ScaleAdd(2.0), 3, 4, stream=2, after=(2,)),
        call(ScaleAdd(1.0, 1), 4, 5, after=(1, 3)),
    ]
    if missing is not None:
        c = calls[missing]
        calls[missing] = Call(c.op, c.inputs, c.outputs, layer=c.layer, stream=c.stream)
    return program(*calls, streams=3, replay=replay)


def diamond_result(x: np.ndarray) -> np.ndarray:
    return (x + 2) * 2 + 1
