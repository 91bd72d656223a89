"""Ops that only tests have, their kernels (`toy.cu`) and their launcher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from parcnn.cuda.kernels import Registry
from parcnn.cuda.launch import Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call

SOURCE = "toy.cu"
FOLDER = Path(__file__).parent
BLOCK = 256
ENTRIES = ("scale_add", "slow_increment", "write_log", "mix", "stamp", "no_parameters", "fault")


@dataclass(frozen=True)
class ScaleAdd(Op):
    """y = x * factor + add."""

    factor: float = 1.0
    add: int = 0

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)


@dataclass(frozen=True)
class SlowIncrement(Op):
    """y = x + 1, after a while."""

    spin_ns: int = 0
    shared_bytes: int = 4 * BLOCK

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)


@dataclass(frozen=True)
class WriteLog(Op):
    """inputs: state, log, x: log[state[0]] = x[0]; state[0] += 1."""

    @property
    def overwritten(self) -> tuple[int, ...]:
        return (0, 1)

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return ()


@dataclass(frozen=True)
class Mix(Op):
    """y[i] = x[(i + shift) % n] * 1664525 + i in `count` elements of 32 bits. It waits for what comes before it itself."""

    count: int
    shift: int = 0

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (Spec((self.count,), "u32"),)


@dataclass(frozen=True)
class Stamp(Op):
    """Three times, in ns: of the start, of the end of the wait for the input, and `spin_ns` later."""

    spin_ns: int = 0

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (Spec((3,), "u32"),)


@dataclass(frozen=True)
class Custom(Op):
    """Launches whatever it is told to."""

    launches: tuple[Launch, ...] = ()

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)


def kernel(entry: str) -> Kernel:
    return Kernel(SOURCE, entry)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    return None if inputs[0].dtype != "f64" else "toys are single precision"


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    op, first = call.op, call.inputs[0]
    n = first.spec.size
    grid, block = (-(-n // BLOCK), 1, 1), (BLOCK, 1, 1)
    if isinstance(op, ScaleAdd):
        pair = Struct((Struct((first, np.int32(n), np.float32(op.factor))), None))
        return [Launch(kernel("scale_add"), grid, block, (call.outputs[0], pair, np.int32(n), np.int64(op.add)))]
    if isinstance(op, SlowIncrement):
        args = (call.outputs[0], first, np.int32(n), np.uint32(op.spin_ns))
        return [Launch(kernel("slow_increment"), grid, block, args, op.shared_bytes)]
    if isinstance(op, WriteLog):
        state, log, x = call.inputs
        return [Launch(kernel("write_log"), (1, 1, 1), (1, 1, 1), (state, log, x, np.int32(log.spec.size)))]
    if isinstance(op, Mix):
        args = (call.outputs[0], first, np.int32(op.count), np.int32(n), np.int32(op.shift))
        return [Launch(kernel("mix"), (-(-op.count // BLOCK), 1, 1), block, args)]
    if isinstance(op, Stamp):
        return [Launch(kernel("stamp"), (1, 1, 1), (1, 1, 1), (call.outputs[0], np.uint32(op.spin_ns)))]
    assert isinstance(op, Custom)
    return list(op.launches)


def variants() -> Iterable[Kernel]:
    return [kernel(entry) for entry in ENTRIES]


OPS = (ScaleAdd, SlowIncrement, WriteLog, Mix, Stamp, Custom)
LAUNCHER = SimpleNamespace(
    OPS=OPS, supports=supports, workspace_bytes=workspace_bytes, launches=launches, variants=variants
)
REGISTRY = Registry([LAUNCHER], FOLDER)
