"""The executor: memory is NumPy byte buffers, a loaded program a list of calls whose views are made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt

import numpy as np
from threadpoolctl import ThreadpoolController

from parcnn.cpu import conv, feed, loss, matmul, muon, norm, pointwise, pool, shape, update
from parcnn.cpu.memory import available_bytes
from parcnn.cpu.workers import ALIGNMENT, ScratchSize, Workers, Workspace
from parcnn.errors import ArgumentError, OutOfMemoryError, UnsupportedError
from parcnn.ops.base import PACKED, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry
from parcnn.ops.norm import BatchNormDgrad, BatchNormInferDgrad, BatchNormTrain
from parcnn.ops.pool import PoolDgrad, PoolFprop
from parcnn.ops.program import Call, Program, Region, Slot
from parcnn.ops.update import AdamUpdate, SgdUpdate

Arrays = list[np.ndarray]
# What runs an op: run(op, inputs, outputs, workspace). An output may share memory with an input where op.inplace() says so.
Run = Callable[..., None]

FAMILIES = (conv, pool, pointwise, norm, shape, loss, update, matmul, muon, feed)
RUN: dict[type[Op], Run] = {op: run for family in FAMILIES for op, run in family.RUN.items()}
SCRATCH: dict[type[Op], Callable[..., ScratchSize]] = {
    op: size for family in (conv, pool, norm, update, matmul, muon) for op, size in family.SCRATCH.items()
}
TIME_US: dict[type[Op], Callable[..., float]] = dict((*conv.TIME_US.items(), *matmul.TIME_US.items()))
# Bytes a microsecond on one thread, for the time of calls that BLAS does not compute.
BYTES_A_US = {
    Op: 4000, BatchNormTrain: 2500, BatchNormDgrad: 2000, BatchNormInferDgrad: 2000, PoolFprop: 500, PoolDgrad: 1000,
    SgdUpdate: 16000, AdamUpdate: 8000,
}  # fmt: skip
# What a thread more costs the others of a call: it is woken, and each of its NumPy calls takes the interpreter's lock once.
THREAD_US = 200
DTYPES = {
    "f32": np.float32,
    "f64": np.float64,
    "i32": np.int32,
    "u32": np.uint32,
    "u8": np.uint8,
    **dict.fromkeys(PACKED, np.uint8),
}


@dataclass(frozen=True)
class Copied:
    """A copy that is complete."""

    array: np.ndarray

    def wait(self) -> np.ndarray:
        """The array."""
        return self.array


class CpuRegion:
    """Memory of the CPU executor: a zeroed byte buffer at a multiple of 64 bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        buffer = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT
        self.memory = buffer[start : start + nbytes]

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        """Copy a C-contiguous array to byte `offset`."""
        data = array.reshape(-1).view(np.uint8)
        self.memory[offset : offset + data.size] = data

    def read(self, spec: Spec, offset: int = 0) -> np.ndarray:
        """A copy of the tensor at `offset` (u2 and u4 indices: bytes, `Spec.stored_shape`)."""
        return self.view(spec, offset).copy()

    def write_async(self, array: np.ndarray, offset: int = 0) -> Copied:
        """The same as `write`: run() returns when its steps are complete, so there is nothing to run beside."""
        self.write(array, offset)
        return Copied(array)

    def free(self) -> None:
        """Let go of the memory; it is returned when the last program bound to it goes."""
        self.nbytes = 0
        self.memory = np.empty(0, np.uint8)

    def view(self, spec: Spec, offset: int = 0) -> np.ndarray:
        """The tensor at `offset` itself."""
        return self.memory[offset : offset + spec.nbytes].view(DTYPES[spec.dtype]).reshape(spec.stored_shape)


class CpuProgram:
    """A program bound to memory."""

    def __init__(self, steps: list[Callable[[], None]], blas: ThreadpoolController) -> None:
        self._steps = steps
        self._blas = blas

    def run(self, steps: int = 1) -> None:
        """Run `steps` steps; complete on return."""
        # BLAS keeps to the calling thread: all parallelism is ours, over pieces that do not depend on the thread count.
        with self._blas.limit(limits=1, user_api="blas"), np.errstate(all="ignore"):
            for _ in range(steps):
                for call in self._steps:
                    call()


class CpuExecutor:
    """Runs programs on the CPU with NumPy. `threads`: how many (None: as many as there are cores).

    threads=1 is the sequential implementation. The results are the same bits for every number of threads.
    """

    name = "cpu"
    concurrent = False  # a call uses all threads
    hardware = tuning_digest = ""  # each op has one way to run

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ArgumentError(
                "too few threads", where="CpuExecutor", expected="at least 1, or None for all cores", got=threads
            )
        self.threads = threads or len(os.sched_getaffinity(0))
        self._threads = Workers(self.threads)
        self._blas = ThreadpoolController()

    def pads_to(self, op: Op, inputs: tuple[Spec, ...]) -> int:
        """1: any number of channels is as good."""
        return 1

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """True of every fused form that an op can express, but of grouped convolutions only those without a pool, an addend, a
        kept input; and of pools only 2x2 ones: with others convolution and pool run one after the other in any case. Likewise
        batch norm and pool, and a batch norm's sums, which take a pass of their own over a convolution's input gradient."""
        pooled_groups = isinstance(op, ConvGeometry) and op.groups > 1 and op.pool is not None
        added_groups = isinstance(op, ConvFprop) and op.groups > 1 and (op.add or op.keep)
        other_window = isinstance(op, ConvFprop | BatchNormTrain | BatchNormDgrad) and op.window is not None
        sums = isinstance(op, ConvDgrad | BatchNormDgrad) and op.sums
        return type(op) in RUN and not (pooled_groups or added_groups or other_window or sums)

    def unpools(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """False: blocks route the error while they are in cache."""
        return False

    def workspace_bytes(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        """Scratch memory of the call: what is shared, and a part for each thread that works on it."""
        workers = self._workers_for(op, inputs, outputs)
        size = _scratch_size(op, inputs, outputs, workers)
        return size.shared + workers * size.per_worker

    def kernel_name(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> str:
        """What runs the call, for tables."""
        return conv.kernel_name(op, inputs, outputs) if type(op) in conv.RUN else "numpy"

    def available_bytes(self) -> int | None:
        """Memory that can be had now, None where the system does not say."""
        return available_bytes()

    def region(self, name: str, nbytes: int) -> CpuRegion:
        """New zeroed memory. Raises OutOfMemoryError."""
        try:
            return CpuRegion(nbytes)
        except MemoryError as fault:
            raise OutOfMemoryError(
                "the machine's memory does not hold it",
                where=f"region '{name}'",
                expected=f"{nbytes:,} bytes",
                got=f"{self.available_bytes() or 0:,} bytes available",
                remedy="a smaller batch, or other programs closed",
            ) from fault

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Plain memory."""
        return np.empty(shape, dtype)

    def load(self, program: Program, regions: Mapping[str, Region]) -> CpuProgram:
        """Bind a program to memory.

        Raises ArgumentError where a region is missing or too small, UnsupportedError for an op that is not known.
        """
        for name, nbytes in program.region_bytes.items():
            region = regions.get(name)
            if not isinstance(region, CpuRegion) or region.nbytes < nbytes:
                got = f"{region.nbytes} bytes" if isinstance(region, CpuRegion) else type(region).__name__
                raise ArgumentError(
                    f"region {name!r} does not fit",
                    where=f"program {program.name}",
                    expected=f"a region of this executor with at least {nbytes} bytes",
                    got=got,
                    remedy="make it with executor.region()",
                )
        memory = {name: region for name, region in regions.items() if isinstance(region, CpuRegion)}
        return CpuProgram([self._bind(call, memory) for call in program.calls], self._blas)

    def _bind(self, call: Call, memory: Mapping[str, CpuRegion]) -> Callable[[], None]:
        run = RUN.get(type(call.op))
        if run is None:
            raise UnsupportedError("the CPU executor does not know this op", where=call.layer, got=call.op.name)
        problem = call.op, call.input_specs, call.output_specs
        workers = self._workers_for(*problem)
        size = _scratch_size(*problem, workers)
        needed = self.workspace_bytes(*problem)
        given = call.workspace.spec.nbytes if call.workspace else 0
        if given < needed:
            raise ArgumentError(
                "workspace too small",
                where=call.layer or call.op.name,
                expected=f"{needed} bytes",
                got=f"{given} bytes",
                remedy="ask executor.workspace_bytes()",
            )

        def view(slot: Slot) -> np.ndarray:
            return memory[slot.region].view(slot.spec, slot.offset)

        scratch = view(call.workspace) if call.workspace else np.empty(0, np.uint8)
        inputs, outputs = [view(s) for s in call.inputs], [view(s) for s in call.outputs]
        return partial(run, call.op, inputs, outputs, Workspace(scratch, size, self._threads, workers))

    def _workers_for(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        """How many threads make the call shortest: the least of time / threads + threads * THREAD_US."""
        if type(op) in TIME_US:
            us = TIME_US[type(op)](op, inputs, outputs)
        else:
            us = op.bytes(inputs, outputs) / BYTES_A_US.get(type(op), BYTES_A_US[Op])
        return max(1, min(self.threads, int(sqrt(us / THREAD_US))))

    def synchronize(self) -> None:
        """Nothing to wait for: run() returns when its steps are complete."""

    def close(self) -> None:
        """End the threads."""
        self._threads.close()


def _scratch_size(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    size = SCRATCH.get(type(op))
    return size(op, inputs, outputs, workers) if size else ScratchSize()
