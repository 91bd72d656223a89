"""The null driver: a CUDA device without a device. It runs no kernel, and checks everything about each launch.

Memory is host memory, so what is written is read back. Kernels are really compiled (NVRTC needs no GPU), and each
launch is held to the cubin's parameter table, to the device's limits, and to the memory that the plan gave it. What
orders the launches of a step on several streams is followed exactly: a bit for each launch, a set of bits (an int) for
what a stream or an event comes after. So a missing event is found here, always, where a GPU would show it now and then.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from parcnn.cuda.cubin import KernelInfo, parse
from parcnn.cuda.device import SHARED_BYTES
from parcnn.cuda.driver import SHARED_BYTES_WITHOUT_OPT_IN, Allocation, BoundLaunch
from parcnn.cuda.launch import Device, LaunchError, Pointer, TensorMap
from parcnn.cuda.tensormap import NBYTES
from parcnn.errors import DeviceError
from parcnn.ops.program import Call, Slot

_FIRST_ADDRESS = 0x7F00_0000_0000
_ALIGNMENT = 512  # of cuMemAlloc
_GUARD_BYTES = 1 << 20  # nothing is mapped between two allocations
_POISON, _POISONED_BYTES = 0xCD, 4096  # fresh device memory is not zero
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
_MAX_THREADS = 1024
_REGISTERS_PER_BLOCK = 65536
_REGISTER_UNIT = 256  # registers are given to a warp in such units
_STEP_START = 1  # the bit of everything before the step


@dataclass
class Counters:
    """What was done. Launches inside a graph count each time that the graph is launched.

    `early_starts`: kernels of captured graphs that may start before their predecessor is complete.
    """

    launches: int = 0
    early_starts: int = 0
    graph_launches: int = 0
    captures: int = 0
    copies_in: int = 0
    copies_out: int = 0
    synchronizations: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0


@dataclass(eq=False)
class _Memory:
    address: int
    nbytes: int
    data: np.ndarray


@dataclass(eq=False)
class _Stream:
    after: int = 0


@dataclass(eq=False)
class _Event:
    after: int = 0
    step: int = 0  # in which step it was recorded


@dataclass(eq=False)
class _Function:
    info: KernelInfo
    dynamic_shared_bytes: int


@dataclass
class _Submitted:
    """A call of the current step: the bits of its launches."""

    call: Call
    bits: int = 0

    @property
    def name(self) -> str:
        return self.call.layer or self.call.op.name


@dataclass
class _Step:
    bits: int = _STEP_START
    calls: dict[int, _Submitted] = field(default_factory=dict)


class NullDriver:
    """Stands in for a GPU of architecture `arch` ('sm_90a') with `sm_count` multiprocessors. Raises LaunchError.

    Beside the limits of a launch it checks that nothing is allocated, freed, copied, created or waited for inside a
    step, that a step's launches are ordered as `Call.after` says, that no two calls race for memory, and that all
    streams of a step have joined its first one when it ends.
    """

    def __init__(self, arch: str = "sm_90a", sm_count: int = 132, total_bytes: int = 80 * 10**9) -> None:
        if arch not in SHARED_BYTES:
            raise DeviceError("the null driver does not know this architecture", expected=list(SHARED_BYTES), got=arch)
        self.device = Device(f"null {arch}", arch, sm_count, SHARED_BYTES[arch], total_bytes)
        self.counters = Counters()
        self._memory: dict[int, _Memory] = {}
        self._next_address = _FIRST_ADDRESS
        self._step: _Step | None = None
        self._steps = 0
        self._capturing = False

    # Memory

    def memory_info(self) -> tuple[int, int]:
        return self.device.total_bytes - self.counters.allocated_bytes, self.device.total_bytes

    def allocate(self, nbytes: int) -> Allocation:
        self._outside_step("memory is allocated")
        if nbytes <= 0:
            raise DeviceError("an allocation must have a size", expected="> 0 bytes", got=nbytes)
        if nbytes > self.memory_info()[0]:
            raise MemoryError(nbytes)
        data = np.empty(nbytes, np.uint8)
        data[:_POISONED_BYTES] = _POISON
        data[-_POISONED_BYTES:] = _POISON
        memory = _Memory(self._next_address, nbytes, data)
        self._next_address += (nbytes + _GUARD_BYTES + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        self._memory[memory.address] = memory
        self.counters.allocated_bytes += nbytes
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.counters.allocated_bytes)
        return memory

    def free(self, allocation: Allocation) -> None:
        self._outside_step("memory is freed")
        if self._memory.pop(allocation.address, None) is not allocation:
            raise LaunchError("memory is freed that is not allocated", got=hex(allocation.address))
        self.counters.allocated_bytes -= allocation.nbytes

    def pinned(self, nbytes: int) -> np.ndarray:
        self._outside_step("host memory is allocated")
        return np.empty(nbytes, np.uint8)

    def fill(self, address: int, value: int, nbytes: int, stream: Any) -> None:
        self._outside_step("memory is filled")
        memory, start = self._locate(address, nbytes)
        if value == 0 and nbytes == memory.nbytes:
            memory.data = np.zeros(nbytes, np.uint8)  # takes no memory of the host until it is written
        else:
            memory.data[start : start + nbytes] = value

    def copy_in(self, address: int, source: np.ndarray, stream: Any) -> None:
        self._outside_step("data is copied to the device")
        memory, start = self._locate(address, source.nbytes)
        memory.data[start : start + source.nbytes] = source.reshape(-1).view(np.uint8)
        self.counters.copies_in += 1

    def copy_out(self, target: np.ndarray, address: int, stream: Any) -> None:
        self._outside_step("data is copied to the host")
        memory, start = self._locate(address, target.nbytes)
        target.reshape(-1).view(np.uint8)[:] = memory.data[start : start + target.nbytes]
        self.counters.copies_out += 1

    def _locate(self, address: int, nbytes: int) -> tuple[_Memory, int]:
        """The live allocation that holds these bytes, and where in it they start."""
        starts = sorted(self._memory)
        at = bisect.bisect_right(starts, address) - 1
        if at >= 0:
            memory = self._memory[starts[at]]
            if address + nbytes <= memory.address + memory.nbytes:
                return memory, address - memory.address
        raise LaunchError("memory is touched that is not allocated", got=f"{nbytes} bytes at {address:#x}")

    # Streams, events, graphs

    def stream(self) -> _Stream:
        self._outside_step("a stream is made")
        return _Stream()

    def event(self) -> _Event:
        self._outside_step("an event is made")
        return _Event()

    def record(self, event: _Event, stream: _Stream) -> None:
        event.after, event.step = stream.after, self._steps

    def wait(self, stream: _Stream, event: _Event) -> None:
        # An event of an earlier step orders nothing in this one: the step's own start does.
        if self._step is not None and event.step == self._steps:
            stream.after |= event.after

    def reached(self, event: _Event) -> bool:
        self._outside_step("an event is asked for")
        return True

    def await_event(self, event: _Event) -> None:
        self._outside_step("an event is waited for by the host")
        self.counters.synchronizations += 1

    def synchronize(self) -> None:
        self._outside_step("the device is waited for")
        self.counters.synchronizations += 1

    @contextlib.contextmanager
    def step(self, streams: Sequence[_Stream]) -> Iterator[None]:
        self._outside_step("a step starts")
        self._steps += 1
        self._step = step = _Step()
        for stream in streams:
            stream.after = 0
        streams[0].after = _STEP_START
        try:
            yield
        finally:
            self._step = None
        loose = step.bits & ~streams[0].after
        if loose:
            names = [s.name for s in step.calls.values() if s.bits & loose]
            raise LaunchError("a step ends before all of its streams have joined", got=f"still running: {names}")

    def capture(self, stream: _Stream, submit: Callable[[], None]) -> int:
        """The graph is its number of launches."""
        self._outside_step("a graph is captured")
        if self._capturing:
            raise LaunchError("a graph is captured inside the capture of another")
        before = self.counters.launches
        self._capturing = True
        try:
            submit()
        finally:
            self._capturing = False
            nodes, self.counters.launches = self.counters.launches - before, before
        self.counters.captures += 1
        return nodes

    def launch_graph(self, graph: int, stream: _Stream) -> None:
        self._outside_step("a graph is launched")
        self.counters.launches += graph
        self.counters.graph_launches += 1

    def _outside_step(self, what: str) -> None:
        if self._step is not None:
            raise LaunchError(f"{what} inside a step", remedy="do it when the program is loaded")

    # Kernels

    def module(self, cubin: bytes) -> dict[str, KernelInfo]:
        self._outside_step("a module is loaded")
        return parse(cubin)

    def function(self, module: dict[str, KernelInfo], info: KernelInfo, dynamic_shared_bytes: int) -> _Function:
        self._outside_step("a kernel is loaded")
        return _Function(module[info.name], dynamic_shared_bytes)

    def tensor_map(self, map: TensorMap, address: int) -> bytes:
        """The address alone, where `Arguments.pointers` says that it lies."""
        return address.to_bytes(NBYTES, "little")

    def launch(self, bound: BoundLaunch, stream: _Stream) -> None:
        if self._step is None:
            raise LaunchError("a kernel is launched outside a step", where=bound.where)
        _check_limits(bound, self.device)
        self._check_arguments(bound)
        self._check_order(bound, stream, self._step)
        self.counters.launches += 1
        if bound.starts_early:
            if not bound.function.info.awaits_predecessors:
                raise LaunchError("starts early, and does not wait for what comes before it", where=bound.where)
            self.counters.early_starts += self._capturing

    def _check_arguments(self, bound: BoundLaunch) -> None:
        """Size of the block, and every pointer inside the tensor that the plan gave to this call."""
        parameters, data = bound.function.info.parameters, bound.arguments.data
        size = max((p.offset + p.nbytes for p in parameters), default=0)
        if len(data) != size:
            raise LaunchError("the argument block has the wrong size", where=bound.where, expected=size, got=len(data))
        for at, pointer in bound.arguments.pointers:
            if not any(p.offset <= at and at + 8 <= p.offset + p.nbytes for p in parameters):
                raise LaunchError("a pointer lies across two parameters", where=bound.where, got=f"offset {at}")
            self._check_pointer(pointer, int.from_bytes(data[at : at + 8], "little"), bound)

    def _check_pointer(self, pointer: Pointer, address: int, bound: BoundLaunch) -> None:
        slot = pointer.slot
        if slot not in _slots(bound.call) and not _is_part(slot, bound.call.workspace):
            raise LaunchError(
                "a pointer to a tensor that is not the call's", where=bound.where, expected=_slots(bound.call), got=slot
            )
        nbytes = slot.spec.nbytes - pointer.offset if pointer.nbytes is None else pointer.nbytes
        if pointer.offset < 0 or nbytes < 0 or pointer.offset + nbytes > slot.spec.nbytes:
            raise LaunchError(
                f"a pointer reaches out of its tensor {slot.label}",
                where=bound.where,
                expected=f"bytes 0 to {slot.spec.nbytes}",
                got=f"{pointer.offset} to {pointer.offset + nbytes}",
            )
        _, start = self._locate(address, nbytes)
        if start != slot.offset + pointer.offset:
            raise LaunchError(
                "a pointer is not where the plan put its tensor",
                where=bound.where,
                expected=f"byte {slot.offset + pointer.offset} of {slot.region}",
                got=f"byte {start}",
            )

    def _check_order(self, bound: BoundLaunch, stream: _Stream, step: _Step) -> None:
        """What `Call.after` names, and every call that shares memory with this one, must be complete."""
        if not stream.after & _STEP_START:
            raise LaunchError("a stream starts before the step does", where=bound.where, remedy="wait for its start")
        for position, earlier in step.calls.items():
            if position == bound.position or not earlier.bits & ~stream.after:
                continue
            if position in bound.call.after:
                raise LaunchError(f"does not wait for {earlier.name}, as `after` says", where=bound.where)
            shared = _conflict(earlier.call, bound.call)
            if shared:
                raise LaunchError(
                    f"races with {earlier.name}",
                    where=bound.where,
                    expected="an order between two calls of which one writes what the other uses",
                    got=f"both use {shared.label or shared.region} ({shared.region}, byte {shared.offset})",
                )
        bit = step.bits + 1  # bits are all ones below it
        step.bits |= bit
        stream.after |= bit
        step.calls.setdefault(bound.position, _Submitted(bound.call)).bits |= bit


def _check_limits(bound: BoundLaunch, device: Device) -> None:
    launch, function = bound.launch, bound.function
    for what, sizes, limits in (("grid", launch.grid, _MAX_GRID), ("block", launch.block, _MAX_BLOCK)):
        if len(sizes) != 3 or not all(1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
            raise LaunchError(f"{what} out of range", where=bound.where, expected=f"1 to {limits}", got=sizes)
    registers_per_warp = -(-function.info.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    threads, most = prod(launch.block), min(_MAX_THREADS, _REGISTERS_PER_BLOCK // registers_per_warp * 32)
    most = min(most, function.info.max_threads or most)
    if threads > most:
        raise LaunchError("more threads than the kernel allows", where=bound.where, expected=f"<= {most}", got=threads)
    shared = function.info.static_shared_bytes + launch.shared_bytes
    if launch.shared_bytes < 0 or shared > device.shared_bytes_per_block:
        raise LaunchError(
            "too much shared memory",
            where=bound.where,
            expected=f"<= {device.shared_bytes_per_block} bytes a block on {device.arch}",
            got=f"{function.info.static_shared_bytes} static + {launch.shared_bytes} dynamic",
        )
    if shared > SHARED_BYTES_WITHOUT_OPT_IN and launch.shared_bytes > function.dynamic_shared_bytes:
        raise LaunchError(
            "the kernel was not told of so much dynamic shared memory",
            where=bound.where,
            expected=f"<= {function.dynamic_shared_bytes}",
            got=launch.shared_bytes,
        )


def _slots(call: Call) -> tuple[Slot, ...]:
    return (*call.inputs, *call.outputs, *((call.workspace,) if call.workspace else ()))


def _is_part(slot: Slot, workspace: Slot | None) -> bool:
    """Whether a tensor lies in the workspace."""
    return (
        workspace is not None
        and slot.region == workspace.region
        and workspace.offset <= slot.offset
        and slot.end <= workspace.end
    )


def _conflict(first: Call, second: Call) -> Slot | None:
    """A place that one of them writes and the other uses."""
    for writer, user in ((first, second), (second, first)):
        for written in writer.written:
            for used in _slots(user):
                if used.region == written.region and used.offset < written.end and written.offset < used.end:
                    return written
    return None
