"""Runs programs on a CUDA device: memory regions, binding of calls to kernels, streams, and the replay of a step.

Order of things. All steps start and end on one main stream; inside a step, calls on other streams are ordered by
events. Asynchronous copies (`write_async`, `read_async`) have two more streams, and events order them against steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from parcnn.cuda.arguments import pack
from parcnn.cuda.compiler import Compiler, Cubin, default_cache
from parcnn.cuda.driver import Allocation, BoundLaunch, Driver
from parcnn.cuda.kernels import REGISTRY, Registry, family_name
from parcnn.cuda.launch import Kernel, Launch, LaunchError, PaddingLauncher, UnpoolingLauncher
from parcnn.cuda.null import NullDriver
from parcnn.cuda.runtime import PycudaDriver
from parcnn.cuda.tuning import REMEDY, Choice, Tuning, problem_key, user_folder
from parcnn.errors import ArgumentError, DeviceError, OutOfMemoryError, TuningError
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call, Program, Region, Slot

# Steps in the larger of a program's two graphs: launching a graph costs the host and the device a few microseconds,
# which a network of LeNet's size would feel at every step.
STEPS_PER_GRAPH = 8
_DTYPES = {
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,  # bit patterns
    "i32": np.int32,
    "u32": np.uint32,
    "u8": np.uint8,
    "u2": np.uint8,  # packed: four indices a byte
    "u4": np.uint8,
}


def _placeless(op: Op, inputs: Sequence[Spec], outputs: Sequence[Spec], scratch_bytes: int = 0) -> Call:
    """The call as a launcher sees it, in no place yet."""
    scratch = Slot(Spec((scratch_bytes,), "u8"), "arena") if scratch_bytes else None
    return Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in outputs), scratch)


class Transfer:
    """A copy under way. It keeps its host array alive."""

    def __init__(self, driver: Driver, event: Any, finish: Callable[[], np.ndarray]) -> None:
        self._driver, self._event, self._finish = driver, event, finish
        self._result: np.ndarray | None = None

    def ready(self) -> bool:
        """Whether the copy is complete; does not block."""
        return self._result is not None or self._driver.reached(self._event)

    def wait(self) -> np.ndarray:
        """Block until the copy is complete. Of a read: the tensor. Of a write: its array, which may now be changed."""
        if self._result is None:
            self._driver.await_event(self._event)
            self._result = self._finish()
        return self._result


class CudaRegion:
    """Memory of the device, zero when made; freed with this object or by `free`."""

    def __init__(self, executor: CudaExecutor, name: str, allocation: Allocation | None) -> None:
        self.name = name
        self.nbytes = allocation.nbytes if allocation else 0
        self.address = allocation.address if allocation else 0
        self.users: weakref.WeakSet[LoadedCudaProgram] = weakref.WeakSet()
        self._executor = executor
        self._written: Any = None  # event of the latest write_async that the main stream does not wait for yet
        self._read: Any = None  # event of the latest read_async
        self._release = weakref.finalize(self, executor.release, allocation)
        self._release.atexit = False  # the context is gone by then

    @property
    def is_freed(self) -> bool:
        return not self._release.alive

    def free(self) -> None:
        """Give the memory back, after the work that uses it. Programs bound to it refuse to run from now on."""
        self._release()

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        """Copy `array` to byte `offset`, after all that was submitted; complete on return."""
        data = self._checked_bytes(array, offset)
        if data.nbytes:
            executor = self._executor
            executor.synchronize()
            executor.driver.copy_in(self.address + offset, data, executor.main_stream)
            executor.synchronize()

    def read(self, spec: Spec, offset: int = 0) -> np.ndarray:
        """A copy of the tensor at `offset`, after all that was submitted. u2 and u4 come as bytes (`Spec.stored_shape`)."""
        result = np.empty(spec.stored_shape, _DTYPES[spec.dtype])
        self._check_range(offset, result.nbytes)
        if result.nbytes:
            executor = self._executor
            executor.synchronize()
            executor.driver.copy_out(result, self.address + offset, executor.main_stream)
            executor.synchronize()
        return result

    def write_async(self, array: np.ndarray, offset: int = 0) -> Transfer:
        """Copy `array` to byte `offset` without waiting; returns when the copy is enqueued.

        It starts when the steps submitted so far by programs bound to *this region* are complete, and earlier copies
        to and from the region; steps that such programs submit later start when it is complete. Programs bound to
        other regions run beside it: to prefetch, load the program once for each of two regions, and write one while
        the other is in use. `array` comes from `CudaExecutor.pinned`, and must not change until the transfer is ready
        (other memory works too, but the driver then copies it before this returns).
        """
        executor = self._executor
        driver, stream = executor.driver, executor.write_stream
        data = self._checked_bytes(array, offset)
        for event in (*(program.done for program in self.users), self._read):
            if event is not None:
                driver.wait(stream, event)
        if data.nbytes:
            driver.copy_in(self.address + offset, data, stream)
        self._written = driver.event()
        driver.record(self._written, stream)
        return Transfer(driver, self._written, lambda: array)

    def read_async(self, spec: Spec, offset: int = 0) -> Transfer:
        """Copy the tensor at `offset` to the host without waiting, after all steps submitted so far.

        Steps submitted later do not wait for it: of bytes that they write, it may see either state. So read what later
        steps leave alone: the rows of a log that are already written.
        """
        executor = self._executor
        driver, stream = executor.driver, executor.read_stream
        self._check_range(offset, spec.nbytes)
        staging = executor.take_staging(spec.nbytes)
        if self._written is not None:
            driver.wait(stream, self._written)
        driver.record(executor.submitted, executor.main_stream)
        driver.wait(stream, executor.submitted)
        if spec.nbytes:
            driver.copy_out(staging, self.address + offset, stream)
        self._read = driver.event()
        driver.record(self._read, stream)

        def finish() -> np.ndarray:
            result = staging.view(_DTYPES[spec.dtype]).reshape(spec.stored_shape).copy()
            executor.return_staging(staging)
            return result

        return Transfer(driver, self._read, finish)

    def order_before_steps(self) -> None:
        """Make the main stream wait for a `write_async` that is under way."""
        if self._written is not None:
            self._executor.driver.wait(self._executor.main_stream, self._written)
            self._written = None

    def _checked_bytes(self, array: np.ndarray, offset: int) -> np.ndarray:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._check_range(offset, data.nbytes)
        return data

    def _check_range(self, offset: int, nbytes: int) -> None:
        if self.is_freed:
            raise ArgumentError("the region is freed", where=f"region '{self.name}'")
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ArgumentError(
                "out of the region's range",
                where=f"region '{self.name}'",
                expected=f"bytes 0 to {self.nbytes}",
                got=f"{offset} to {offset + nbytes}",
            )


@dataclass(frozen=True)
class _BoundCall:
    """A call ready to be submitted: what its stream waits for first, and the event that others wait for."""

    stream: Any
    waits: tuple[Any, ...]
    launches: tuple[BoundLaunch, ...]
    complete: Any


class LoadedCudaProgram:
    """A program bound to regions. Its first step is launched kernel by kernel; later ones, with `replay`, as graphs."""

    def __init__(
        self,
        executor: CudaExecutor,
        program: Program,
        regions: Sequence[CudaRegion],
        launches: Sequence[Sequence[BoundLaunch]],
    ) -> None:
        self.program, self._executor, self._driver = program, executor, executor.driver
        self._regions = tuple(regions)
        driver = self._driver
        self.done = driver.event()  # reached when the latest submitted steps are complete
        self._start = driver.event()
        used = sorted({0} | {call.stream for call in program.calls})
        self._streams = [executor.stream(i) for i in used]
        self._joins = [(executor.stream(i), driver.event()) for i in used[1:]]
        awaited = {j for call in program.calls for j in call.after if program.calls[j].stream != call.stream}
        complete = {j: driver.event() for j in sorted(awaited)}
        self._calls = [
            _BoundCall(
                stream=executor.stream(call.stream),
                waits=tuple(complete[j] for j in call.after if program.calls[j].stream != call.stream),
                launches=tuple(bound),
                complete=complete.get(i),
            )
            for i, (call, bound) in enumerate(zip(program.calls, launches, strict=True))
        ]
        self._has_run = False
        self._graphs: dict[int, Any] = {}
        for region in self._regions:
            region.users.add(self)

    def run(self, steps: int = 1) -> None:
        """Submit `steps` steps; returns before they are complete."""
        if steps < 0:
            raise ArgumentError("steps must not be negative", where=self.program.name, expected=">= 0", got=steps)
        for region in self._regions:
            if region.is_freed:
                raise DeviceError(f"its region '{region.name}' is freed", where=self.program.name)
            region.order_before_steps()
        if steps and not self._has_run:
            # Before any capture: it loads the kernels' code, and shows a refused launch where it happens.
            self._submit()
            self._has_run = True
            steps -= 1
        if self.program.replay:
            for count in (STEPS_PER_GRAPH, 1):
                for _ in range(steps // count):
                    self._driver.launch_graph(self._graph(count), self._executor.main_stream)
                steps %= count
        else:
            for _ in range(steps):
                self._submit()
        self._driver.record(self.done, self._executor.main_stream)

    def _graph(self, steps: int) -> Any:
        """The graph of so many steps, captured when first asked for."""
        if steps not in self._graphs:

            def submit() -> None:
                for _ in range(steps):
                    self._submit()

            self._graphs[steps] = self._driver.capture(self._executor.main_stream, submit)
        return self._graphs[steps]

    def _submit(self) -> None:
        """One step. Side streams fork from the main one when it starts and join it when it ends."""
        driver, (main, *sides) = self._driver, self._streams
        with driver.step(self._streams):
            if sides:
                driver.record(self._start, main)
            for side in sides:
                driver.wait(side, self._start)
            for call in self._calls:
                for event in call.waits:
                    driver.wait(call.stream, event)
                for launch in call.launches:
                    driver.launch(launch, call.stream)
                if call.complete is not None:
                    driver.record(call.complete, call.stream)
            for side, event in self._joins:
                driver.record(event, side)
                driver.wait(main, event)


class CudaExecutor:
    """Runs programs by our own kernels (`parcnn.cuda.kernels`) on the GPU number `device`.

    `memory_limit` (bytes) bounds what all regions take together. `cache` is the folder of compiled kernels. `tuning` says
    which variants of kernels run; by default what ships for the GPU, and the user's own table before it. Assign another
    one only between programs: a plan's scratch memory is that of the variants it was made for. `overlap`: kernels of a
    graph start while those before them end, where they wait for them themselves (`KernelInfo.awaits_predecessors`).
    `driver` and `registry` are for tests. Raises DeviceError where GPU, driver, PyCUDA or NVRTC lack, each with its
    remedy, and TuningError for a damaged table. Belongs to the main thread (see `parcnn.cuda.runtime`).
    """

    name = "cuda"
    concurrent = True

    def __init__(
        self,
        driver: Driver | None = None,
        device: int = 0,
        memory_limit: int | None = None,
        registry: Registry | None = None,
        cache: Path | None = None,
        tuning: Tuning | None = None,
        overlap: bool = True,
    ) -> None:
        self.driver: Driver = driver if driver is not None else PycudaDriver(device)
        self.device = self.driver.device
        self.memory_limit = memory_limit
        self.overlap = overlap
        self.allocated_bytes = 0
        self.registry = (registry if registry is not None else REGISTRY).on(self.device.arch)
        self.tuning = tuning if tuning is not None else Tuning.of(self.device, user_folder())
        self._compiler = Compiler(self.device.arch, self.registry.folder, cache or default_cache())
        self._regions: weakref.WeakSet[CudaRegion] = weakref.WeakSet()
        self._modules: dict[Cubin, Any] = {}
        self._functions: dict[Kernel, tuple[Any, int]] = {}
        self._staging: dict[int, list[np.ndarray]] = {}
        self._streams = [self.driver.stream()]
        self.main_stream = self._streams[0]
        self.read_stream, self.write_stream = self.driver.stream(), self.driver.stream()
        self.submitted = self.driver.event()

    @classmethod
    def null(
        cls,
        arch: str = "sm_90a",
        sm_count: int = 132,
        memory_limit: int | None = None,
        registry: Registry | None = None,
    ) -> CudaExecutor:
        """An executor that runs no kernel and checks every launch (`NullDriver`); it needs NVRTC but no GPU.

        Of tables it has what ships, never the user's.
        """
        driver = NullDriver(arch, sm_count)
        return cls(driver, memory_limit=memory_limit, registry=registry, tuning=Tuning.of(driver.device))

    # What the plan asks

    def pads_to(self, op: Op, inputs: tuple[Spec, ...]) -> int:
        """What the family that runs this op pads channels to multiples of at each call; 1: it does not."""
        if not any(isinstance(launcher, PaddingLauncher) for launcher in self.registry.tunable(op, inputs).values()):
            return 1
        launcher, _ = self._choose(_placeless(op, inputs, op.infer(*inputs)))
        return launcher.PADS_TO if isinstance(launcher, PaddingLauncher) else 1

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """Whether a kernel family runs this form of the op on these operands, and it is no slower than the op's parts."""
        return self.registry.supports(op, inputs)

    def unpools(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """Whether the family that runs this gradient writes the error before its pool into scratch memory first."""
        call = _placeless(op, inputs, op.infer(*inputs))
        launcher, chosen = self._choose(call)
        return isinstance(launcher, UnpoolingLauncher) and launcher.unpools(call, self.device, **chosen)

    def workspace_bytes(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        """Scratch memory that the call needs. Raises UnsupportedError where no kernel runs it, and TuningError."""
        launcher, variant = self._choose(_placeless(op, inputs, outputs))
        return launcher.workspace_bytes(op, inputs, outputs, self.device, **variant)

    def kernel_name(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> str:
        """The call's kernels in order, each once, joined by ' + '."""
        call = _placeless(op, inputs, outputs, self.workspace_bytes(op, inputs, outputs))
        return " + ".join(dict.fromkeys(launch.kernel.label for launch in self._launches(call)))

    def choices(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> list[Choice]:
        """Every variant of every family that runs the call; first the one that runs it by the tables or by the rules.

        Empty where the op has no variants.
        """
        call = _placeless(op, inputs, outputs)
        families = self.registry.tunable(op, inputs)
        chosen, tuned = self._choose(call)
        names = sorted(families, key=lambda name: name != family_name(chosen))  # what runs first, else as they are
        found = [Choice(name, str(v)) for name in names for v in families[name].candidates(call, self.device)]
        if tuned:
            found.insert(0, Choice(family_name(chosen), str(tuned["variant"])))
        return list(dict.fromkeys(found))

    def kernels(self, call: Call) -> list[Kernel]:
        """The kernels that run the call, in order."""
        return [launch.kernel for launch in self._launches(call)]

    def compile(self, kernels: Iterable[Kernel]) -> None:
        """Compile kernels ahead of the programs that use them, all in parallel. Raises KernelCompileError."""
        self._compiler.compile(kernels)

    @property
    def hardware(self) -> str:
        """The architecture and its multiprocessors: choices follow from them."""
        return f"{self.device.arch} with {self.device.sm_count} multiprocessors"

    @property
    def tuning_digest(self) -> str:
        """Names the tables that decide which variants run; '' where they are silent."""
        return self.tuning.digest

    def available_bytes(self) -> int:
        """Memory that new regions may take: what is free, and within `memory_limit`."""
        free, _ = self.driver.memory_info()
        return free if self.memory_limit is None else max(0, min(free, self.memory_limit - self.allocated_bytes))

    # Memory

    def region(self, name: str, nbytes: int) -> CudaRegion:
        """New zeroed memory. Raises OutOfMemoryError."""
        if nbytes < 0:
            raise ArgumentError("a size must not be negative", where=f"region '{name}'", expected=">= 0", got=nbytes)
        allocation = self._allocate(name, nbytes) if nbytes else None
        region = CudaRegion(self, name, allocation)
        self._regions.add(region)
        return region

    def _allocate(self, name: str, nbytes: int) -> Allocation:
        available = self.available_bytes()
        try:
            if nbytes > available:
                raise MemoryError(nbytes)
            allocation = self.driver.allocate(nbytes)
        except MemoryError as fault:
            taken = ", ".join(f"{r.name} {r.nbytes:,}" for r in self._regions if not r.is_freed)
            limit = "" if self.memory_limit is None else f" (limit {self.memory_limit:,})"
            raise OutOfMemoryError(
                "the device's memory does not hold it",
                where=f"region '{name}'",
                expected=f"{nbytes:,} bytes",
                got=f"{available:,} bytes available{limit}; regions so far: {taken or 'none'}",
                remedy="a smaller batch, or another program's GPU memory given back (`nvidia-smi` shows it)",
            ) from fault
        self.allocated_bytes += nbytes
        self.driver.fill(allocation.address, 0, nbytes, self.main_stream)
        self.driver.synchronize()
        return allocation

    def release(self, allocation: Allocation | None) -> None:
        """Free a region's memory (`CudaRegion.free` calls it, once)."""
        if allocation is not None:
            self.driver.free(allocation)
            self.allocated_bytes -= allocation.nbytes

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """Page-locked host memory, uninitialised: the source of a `write_async` that does not hold the host up.

        Raises OutOfMemoryError.
        """
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        try:
            memory = self.driver.pinned(nbytes) if nbytes else np.empty(0, np.uint8)
        except MemoryError as fault:
            raise OutOfMemoryError(
                "the host has not so much memory that it can lock",
                expected=f"{nbytes:,} bytes",
                remedy="a smaller batch, or a higher limit of locked memory (`ulimit -l`)",
            ) from fault
        return memory.view(dtype).reshape(shape)

    def take_staging(self, nbytes: int) -> np.ndarray:
        """A page-locked buffer out of those that earlier reads have given back, or a new one."""
        free = self._staging.get(nbytes)
        return free.pop() if free else self.pinned((nbytes,), np.uint8)

    def return_staging(self, buffer: np.ndarray) -> None:
        """Keep a buffer for the next read of its size."""
        self._staging.setdefault(buffer.nbytes, []).append(buffer)

    # Programs

    def load(self, program: Program, regions: Mapping[str, Region]) -> LoadedCudaProgram:
        """Bind a program to memory: compile its kernels, resolve their arguments, make its events.

        Raises ArgumentError where a region lacks or is too small, UnsupportedError where no kernel runs a call,
        KernelCompileError, LaunchError where arguments do not fit their kernel.
        """
        bound_regions = {name: self._own_region(program, name, regions) for name in program.region_bytes}
        for i, call in enumerate(program.calls):
            if not (0 <= call.stream < program.streams and all(0 <= j < i for j in call.after)):
                raise LaunchError(
                    f"call {i} is out of order",
                    where=call.layer or call.op.name,
                    expected=f"a stream below {program.streams}, and only earlier calls in `after`",
                    got=f"stream {call.stream}, after {call.after}",
                )
        launches = [self._launches(call) for call in program.calls]
        cubins = self._compiler.compile(launch.kernel for call in launches for launch in call)
        for kernel, cubin in cubins.items():
            shared = max(launch.shared_bytes for call in launches for launch in call if launch.kernel == kernel)
            self._prepare(kernel, cubin, shared)

        def address(slot: Slot) -> int:
            region = bound_regions.get(slot.region)
            if region is None or slot.offset < 0 or slot.end > region.nbytes:
                raise ArgumentError(
                    "a tensor lies outside the memory bound to the program",
                    where=f"{program.name}: {slot.label or slot.spec}",
                    expected=f"bytes of {', '.join(f'{r} (0 to {m.nbytes})' for r, m in bound_regions.items())}",
                    got=f"{slot.region}, {slot.offset} to {slot.end}",
                )
            return region.address + slot.offset

        def bind(position: int, call: Call, launch: Launch) -> BoundLaunch:
            info = cubins[launch.kernel].kernels[launch.kernel.entry]
            where = f"{call.layer or call.op.name}: {launch.kernel.label}"
            arguments = pack(launch.args, info.parameters, address, self.driver.tensor_map, where)
            starts_early = self.overlap and info.awaits_predecessors
            return BoundLaunch(self._functions[launch.kernel][0], launch, arguments, call, position, starts_early)

        bound = [
            [bind(i, call, launch) for launch in of_call]
            for i, (call, of_call) in enumerate(zip(program.calls, launches, strict=True))
        ]
        return LoadedCudaProgram(self, program, tuple(bound_regions.values()), bound)

    def _own_region(self, program: Program, name: str, regions: Mapping[str, Region]) -> CudaRegion:
        region, needed = regions.get(name), program.region_bytes[name]
        if not isinstance(region, CudaRegion) or region not in self._regions or region.is_freed:
            raise ArgumentError(
                f"region '{name}' is missing", where=program.name, expected="a region of this executor", got=region
            )
        if region.nbytes < needed:
            raise ArgumentError(
                f"region '{name}' is too small",
                where=program.name,
                expected=f">= {needed:,} bytes",
                got=f"{region.nbytes:,}",
            )
        return region

    def _launches(self, call: Call) -> list[Launch]:
        launcher, variant = self._choose(call)
        return launcher.launches(call, self.device, **variant)

    def _choose(self, call: Call) -> tuple[Any, dict[str, Any]]:
        """The launcher that runs the call, and `variant=` where a table says which.

        What ships may lag behind the kernels: a variant that is gone leaves the choice to the family. The user's table
        was made on purpose: there it is a TuningError.
        """
        op, inputs = call.op, call.input_specs
        choice = self.tuning.find(op, inputs)
        if choice is not None:
            launcher = self.registry.tunable(op, inputs).get(choice.family)
            for variant in launcher.candidates(call, self.device) if launcher else ():
                if str(variant) == choice.variant:
                    return launcher, {"variant": variant}
            if self.tuning.is_users(op, inputs):
                raise TuningError(
                    "the table names a kernel that there is no longer",
                    where=str(self.tuning.path),
                    expected=f"one of the variants that run {problem_key(op, inputs)}",
                    got=choice,
                    remedy=REMEDY,
                )
        return self.registry.find(op, inputs, self.device, call.layer), {}

    def _prepare(self, kernel: Kernel, cubin: Cubin, dynamic_shared_bytes: int) -> None:
        """Load the kernel, or raise its dynamic shared memory, which never sinks: older programs rely on it."""
        known = self._functions.get(kernel)
        if known is None or known[1] < dynamic_shared_bytes:
            if cubin not in self._modules:
                self._modules[cubin] = self.driver.module(cubin.data)
            info = cubin.kernels[kernel.entry]
            function = self.driver.function(self._modules[cubin], info, dynamic_shared_bytes)
            self._functions[kernel] = (function, dynamic_shared_bytes)

    def stream(self, index: int) -> Any:
        """The index-th stream of programs; 0 is the main one."""
        while len(self._streams) <= index:
            self._streams.append(self.driver.stream())
        return self._streams[index]

    def synchronize(self) -> None:
        """Wait for everything submitted; a fault of an earlier step is raised here, as DeviceError."""
        self.driver.synchronize()

    def close(self) -> None:
        """Free all regions; their programs refuse to run from now on."""
        for region in list(self._regions):
            region.free()
        self._staging.clear()
