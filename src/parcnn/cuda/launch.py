"""The seam between the executor and a kernel family: what a launcher says of a call.

Each family is a `.cu` file in `kernels/` beside a launcher `.py` of the same name, a module with

    OPS: tuple[type[Op], ...]                                   the ops that it runs
    supports(op, inputs) -> str | None                          None, or the reason why not
    workspace_bytes(op, inputs, outputs, device) -> int         scratch memory of the call
    launches(call, device) -> list[Launch]                      the kernels that run the call, in order
    variants() -> Iterable[Kernel]                              every kernel that launches() may name, for ahead-of-time checks

All are pure functions of the problem and the device's description: they import no CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from parcnn.ops.program import Slot


@dataclass(frozen=True)
class Device:
    """What launchers may know of a GPU."""

    name: str
    arch: str  # NVRTC's name: 'sm_90a'
    sm_count: int
    shared_bytes_per_block: int = 232448  # with opt-in
    total_bytes: int = 0


@dataclass(frozen=True)
class Kernel:
    """One compiled variant: a source file in `kernels/`, an extern "C" entry, and its macros. Problem sizes are never macros."""

    source: str
    entry: str
    defines: tuple[tuple[str, int | str], ...] = ()

    @property
    def label(self) -> str:
        """Name for tables: the entry and the values of its macros."""
        return self.entry + "".join(f"_{v}" for _, v in self.defines)


@dataclass(frozen=True)
class Pointer:
    """The address of `slot` plus `offset` bytes; `nbytes` from there are what the kernel may touch (None: to the slot's end)."""

    slot: Slot
    offset: int = 0
    nbytes: int | None = None


@dataclass(frozen=True)
class Struct:
    """A struct passed by value: fields in order, each aligned to its own size as C does."""

    fields: tuple[Argument, ...]


# A Slot stands for Pointer(slot). Scalars carry their C type: np.int32, np.uint32, np.int64, np.float32.
Argument = Slot | Pointer | Struct | np.generic | None  # None is a null pointer


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[Argument, ...] = field(default=())
    shared_bytes: int = 0  # dynamic shared memory
