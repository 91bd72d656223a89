"""What the executor asks of a CUDA driver: PyCUDA's (`runtime`) and the one that only checks (`null`) answer alike.

Streams, events, modules, functions and graphs are opaque handles that go back to the driver that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from parcnn.cuda.arguments import Arguments
from parcnn.cuda.cubin import KernelInfo
from parcnn.cuda.launch import Device, Launch, TensorMap
from parcnn.ops.program import Call

# Static and dynamic shared memory beyond this needs the kernel's opt-in (CUDA C++ Programming Guide, "Shared Memory").
SHARED_BYTES_WITHOUT_OPT_IN = 48 * 1024


@dataclass(frozen=True)
class BoundLaunch:
    """A launch with its kernel loaded and its addresses resolved, on behalf of `call`, the program's `position`-th.

    With `starts_early` it may start, in a graph, before the one kernel that it comes after is complete: it waits itself.
    """

    function: Any
    launch: Launch
    arguments: Arguments
    call: Call
    position: int
    starts_early: bool = False

    @property
    def where(self) -> str:
        """Layer (or op) and kernel, for messages."""
        return f"{self.call.layer or self.call.op.name}: {self.launch.kernel.label}"


class Allocation(Protocol):
    """Device memory."""

    address: int
    nbytes: int


class Driver(Protocol):
    """A CUDA device. Every method may raise DeviceError; faults of earlier asynchronous work surface in any."""

    device: Device

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the device."""

    def allocate(self, nbytes: int) -> Allocation:
        """Device memory (not initialised). Raises MemoryError where there is not enough."""

    def free(self, allocation: Allocation) -> None:
        """Give memory back, after the work that uses it."""

    def pinned(self, nbytes: int) -> np.ndarray:
        """Page-locked host memory (nbytes,) uint8, freed with the array."""

    def fill(self, address: int, value: int, nbytes: int, stream: Any) -> None:
        """Set bytes, in stream order."""

    def copy_in(self, address: int, source: np.ndarray, stream: Any) -> None:
        """Host to device in stream order; `source` must stay as it is until then where it is page-locked."""

    def copy_out(self, target: np.ndarray, address: int, stream: Any) -> None:
        """Device to host in stream order."""

    def stream(self) -> Any:
        """New stream that does not wait for the default stream."""

    def event(self) -> Any:
        """New event, without timing."""

    def record(self, event: Any, stream: Any) -> None:
        """The event is reached when the stream's work so far is complete."""

    def wait(self, stream: Any, event: Any) -> None:
        """Later work of the stream starts after the event's latest record."""

    def reached(self, event: Any) -> bool:
        """Whether the event's latest record is reached; does not block."""

    def await_event(self, event: Any) -> None:
        """Block until the event's latest record is reached."""

    def synchronize(self) -> None:
        """Block until the device has done all work."""

    def module(self, cubin: bytes) -> Any:
        """Load a cubin."""

    def function(self, module: Any, info: KernelInfo, dynamic_shared_bytes: int) -> Any:
        """A kernel of a module, ready for launches with up to `dynamic_shared_bytes`."""

    def tensor_map(self, map: TensorMap, address: int) -> bytes:
        """The 128 bytes of the CUtensorMap of a checked map at an address."""

    def step(self, streams: Sequence[Any]) -> AbstractContextManager[None]:
        """Encloses the launches of one step, which starts and ends on streams[0]."""

    def launch(self, bound: BoundLaunch, stream: Any) -> None:
        """Submit a kernel."""

    def capture(self, stream: Any, submit: Callable[[], None]) -> Any:
        """A graph of what `submit` submits to the stream and to those that join it by events; nothing of it runs."""

    def launch_graph(self, graph: Any, stream: Any) -> None:
        """Submit a graph."""
