"""A CUDA device through PyCUDA; graphs, which PyCUDA lacks, through NVIDIA's bindings on the same context and handles.

The only file that imports them, and only when a `PycudaDriver` is made. The device's primary context is entered once a
process and left at exit: PyCUDA aborts a process that ends with a context on its stack. That stack is kept for each
thread, so a driver belongs to the main thread, and its objects should not end up in reference cycles, which any thread
may come to collect.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from parcnn.cuda.cubin import KernelInfo
from parcnn.cuda.device import arch_name, bindings_missing, device_count, driver_version, pycuda_missing
from parcnn.cuda.driver import SHARED_BYTES_WITHOUT_OPT_IN, Allocation, BoundLaunch
from parcnn.cuda.launch import Device, TensorMap
from parcnn.cuda.tensormap import encode
from parcnn.errors import DeviceError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit order with the default stream

_entered: dict[int, Any] = {}  # PyCUDA's context by device, while it is on the stack

P = ParamSpec("P")
R = TypeVar("R")


def _typed(method: Callable[Concatenate[PycudaDriver, P], R]) -> Callable[Concatenate[PycudaDriver, P], R]:
    """PyCUDA's errors as DeviceError."""

    @functools.wraps(method)
    def call(self: PycudaDriver, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except self._cuda.Error as fault:
            raise DeviceError(
                f"{method.__name__} failed: {fault}",
                where=self.device.name,
                remedy="a fault of an earlier kernel shows here too: the option graph=False narrows it down",
            ) from fault

    return call


class _Allocation:
    def __init__(self, memory: Any, nbytes: int) -> None:
        self.memory, self.address, self.nbytes = memory, int(memory), nbytes


class _Graph:
    """An executable graph, destroyed with this object."""

    def __init__(self, executable: Any, destroy: Callable[[Any], object]) -> None:
        self.executable = executable
        # Not at exit: by then the context, and the graph with it, may be gone.
        weakref.finalize(self, destroy, executable).atexit = False


class PycudaDriver:
    """The CUDA device `index`. Raises DeviceError where anything that it needs is missing."""

    def __init__(self, index: int = 0) -> None:
        count = device_count()
        if not 0 <= index < count:
            raise DeviceError(
                "no such GPU",
                expected=f"a number from 0 to {count - 1}",
                got=index,
                remedy="`nvidia-smi -L` lists them; CUDA_VISIBLE_DEVICES hides some",
            )
        try:
            import pycuda.driver as cuda
        except ImportError as fault:
            raise pycuda_missing(fault) from fault
        try:
            from cuda.bindings import driver as bindings
        except ImportError as fault:
            raise bindings_missing(fault) from fault
        self._cuda, self._bindings = cuda, bindings
        self._capturing = False
        try:
            cuda.init()
            gpu = cuda.Device(index)
            attribute = cuda.device_attribute
            cuda_version = cuda.get_driver_version()
            self.device = Device(
                name=gpu.name(),
                arch=arch_name(gpu.compute_capability(), gpu.name()),
                sm_count=gpu.get_attribute(attribute.MULTIPROCESSOR_COUNT),
                shared_bytes_per_block=gpu.get_attribute(attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                total_bytes=gpu.total_memory(),
                driver=driver_version(),
                cuda=f"{cuda_version // 1000}.{cuda_version % 1000 // 10}",
            )
            _enter_primary_context(gpu, index)
        except cuda.Error as fault:
            raise DeviceError(f"GPU {index} cannot be used: {fault}", remedy="check `nvidia-smi`") from fault

    @_typed
    def memory_info(self) -> tuple[int, int]:
        free, total = self._cuda.mem_get_info()
        return free, total

    @_typed
    def allocate(self, nbytes: int) -> Allocation:
        try:
            return _Allocation(self._cuda.mem_alloc(nbytes), nbytes)
        except self._cuda.MemoryError as fault:
            raise MemoryError(nbytes) from fault

    @_typed
    def free(self, allocation: Allocation) -> None:
        allocation.memory.free()  # type: ignore[attr-defined]

    @_typed
    def pinned(self, nbytes: int) -> np.ndarray:
        try:
            return self._cuda.pagelocked_empty((nbytes,), np.uint8)
        except self._cuda.MemoryError as fault:
            raise MemoryError(nbytes) from fault

    @_typed
    def fill(self, address: int, value: int, nbytes: int, stream: Any) -> None:
        self._cuda.memset_d8_async(address, value, nbytes, stream)

    @_typed
    def copy_in(self, address: int, source: np.ndarray, stream: Any) -> None:
        self._cuda.memcpy_htod_async(address, source, stream)

    @_typed
    def copy_out(self, target: np.ndarray, address: int, stream: Any) -> None:
        self._cuda.memcpy_dtoh_async(target, address, stream)

    @_typed
    def stream(self) -> Any:
        return self._cuda.Stream(_NON_BLOCKING)

    @_typed
    def event(self) -> Any:
        return self._cuda.Event(self._cuda.event_flags.DISABLE_TIMING)

    @_typed
    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    @_typed
    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_for_event(event)

    @_typed
    def reached(self, event: Any) -> bool:
        return event.query()

    @_typed
    def await_event(self, event: Any) -> None:
        event.synchronize()

    @_typed
    def synchronize(self) -> None:
        self._cuda.Context.synchronize()

    @_typed
    def module(self, cubin: bytes) -> Any:
        return self._cuda.module_from_buffer(cubin)

    @_typed
    def function(self, module: Any, info: KernelInfo, dynamic_shared_bytes: int) -> Any:
        function = module.get_function(info.name)
        if info.static_shared_bytes + dynamic_shared_bytes > SHARED_BYTES_WITHOUT_OPT_IN:
            limit = self._cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
            function.set_attribute(limit, dynamic_shared_bytes)
        # PyCUDA sees one argument: the packed block, which it passes to cuLaunchKernel as it is.
        block_bytes = max((p.offset + p.nbytes for p in info.parameters), default=0)
        return function.prepare([f"{block_bytes}s"] if block_bytes else [])

    def tensor_map(self, map: TensorMap, address: int) -> bytes:
        return encode(self._bindings, map, address)

    def step(self, streams: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def launch(self, bound: BoundLaunch, stream: Any) -> None:
        launch, data = bound.launch, bound.arguments.data
        if self._capturing and bound.starts_early:
            self._start_early(stream)
        try:
            bound.function.prepared_async_call(
                launch.grid, launch.block, stream, *((data,) if data else ()), shared_size=launch.shared_bytes
            )
        except self._cuda.Error as fault:
            raise DeviceError(f"launch failed: {fault}", where=bound.where) from fault

    def capture(self, stream: Any, submit: Callable[[], None]) -> _Graph:
        bindings = self._bindings
        # Relaxed: memory that Python frees while the step is recorded does not void the recording.
        self._check(
            bindings.cuStreamBeginCapture(stream.handle, bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        )
        self._capturing = True
        try:
            submit()
        except BaseException:
            bindings.cuStreamEndCapture(stream.handle)  # leaves the stream usable; what was recorded is void
            raise
        finally:
            self._capturing = False
        graph = self._check(bindings.cuStreamEndCapture(stream.handle))
        try:
            executable = self._check(bindings.cuGraphInstantiate(graph, 0))
        finally:
            bindings.cuGraphDestroy(graph)
        return _Graph(executable, bindings.cuGraphExecDestroy)

    def _start_early(self, stream: Any) -> None:
        """Where the stream's next node comes after one kernel alone: let it start while that one ends.

        "Programmatic dependent launch" of the CUDA C++ Programming Guide. A kernel that waits is complete only after its
        own predecessors, so that its successors need not wait for those.
        """
        bindings = self._bindings
        _, _, _, nodes, _, count = self._check(bindings.cuStreamGetCaptureInfo(stream.handle))
        if count == 1:
            edge = bindings.CUgraphEdgeData()
            edge.from_port = bindings.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
            edge.type = bindings.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.value
            replace = bindings.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES.value
            self._check(bindings.cuStreamUpdateCaptureDependencies(stream.handle, nodes, [edge], 1, replace))

    def launch_graph(self, graph: _Graph, stream: Any) -> None:
        self._check(self._bindings.cuGraphLaunch(graph.executable, stream.handle))

    def _check(self, result: tuple[Any, ...]) -> Any:
        """What a call of the bindings returns after its status."""
        status, *values = result
        if status.value:
            raise DeviceError(f"CUDA graph: {status.name}", where=self.device.name)
        return values[0] if len(values) == 1 else values


def _enter_primary_context(gpu: Any, index: int) -> None:
    """Make the device's primary context current until the process ends."""
    if index in _entered:
        return
    if _entered:
        raise DeviceError(
            "a process uses one GPU",
            expected=f"GPU {next(iter(_entered))}",
            got=f"GPU {index}",
            remedy="start one process for each GPU",
        )
    if threading.current_thread() is not threading.main_thread():
        raise DeviceError(
            "the first use of the GPU must be in the main thread, where its context is left at exit",
            expected=threading.main_thread().name,
            got=threading.current_thread().name,
            remedy="make the executor, or the Trainer, in the main thread and use it there",
        )
    context = gpu.retain_primary_context()
    context.push()
    _entered[index] = context
    atexit.register(_leave_primary_context, context)


def _leave_primary_context(context: Any) -> None:
    """At exit. PyCUDA's objects that live on find their context dead, and leave their memory to the driver."""
    context.pop()
    context.detach()
    _entered.clear()
