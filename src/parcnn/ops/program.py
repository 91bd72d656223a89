"""What a plan hands to an executor: a program of calls on tensors whose places are already chosen; and what it asks of one.

An executor never sees the graph, and the plan never sees a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from parcnn.ops.base import Op, Spec

PERSISTENT = ("weights", "copies", "optimizer")  # regions that outlive a step, of a model


@dataclass(frozen=True)
class Slot:
    """A tensor's place: `offset` bytes into the memory that is bound to `region` when the program is loaded.

    Regions: 'arena' (transient); persistent 'weights' (with running statistics), 'copies' (of filters, in bf16) and
    'optimizer' (its state); and the feeds 'state', 'hyper', 'images', 'targets', 'order', 'losses', 'corrects', 'out'
    (`parcnn.ops.feed`).
    """

    spec: Spec
    region: str
    offset: int = 0
    label: str = ""

    @property
    def end(self) -> int:
        return self.offset + self.spec.nbytes


@dataclass(frozen=True)
class Call:
    """One op on its operands. `after`: positions of the earlier calls that must be complete before this one starts."""

    op: Op
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    workspace: Slot | None = None
    layer: str = ""
    phase: str = "forward"  # 'feed', 'forward', 'backward' or 'update'
    stream: int = 0
    after: tuple[int, ...] = ()

    @property
    def input_specs(self) -> tuple[Spec, ...]:
        return tuple(s.spec for s in self.inputs)

    @property
    def output_specs(self) -> tuple[Spec, ...]:
        return tuple(s.spec for s in self.outputs)

    @property
    def written(self) -> tuple[Slot, ...]:
        """Every place that the call writes, its workspace too."""
        own = (self.workspace,) if self.workspace else ()
        return (*self.outputs, *(self.inputs[i] for i in self.op.overwritten), *own)


@dataclass(frozen=True)
class Program:
    """One step (or one batch of evaluation or prediction). Calls are in an order that is right when run one by one."""

    name: str
    calls: tuple[Call, ...]
    region_bytes: Mapping[str, int]  # least size of each region
    streams: int = 1
    replay: bool = True  # may be captured once and replayed (plan.Options.graph)
    outputs: Mapping[str, Slot] = field(default_factory=dict)


class Transfer(Protocol):
    """A copy under way."""

    def wait(self) -> np.ndarray:
        """Block until it is complete: of a read, the tensor; of a write, its array, which may now be changed."""


class Region(Protocol):
    """Memory of an executor, zero when made."""

    nbytes: int

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        """Copy a C-contiguous array to byte `offset`; complete on return."""

    def read(self, spec: Spec, offset: int = 0) -> np.ndarray:
        """A copy of the tensor at `offset`, after all steps submitted so far (packed indices, u2 and u4, come as bytes)."""

    def write_async(self, array: np.ndarray, offset: int = 0) -> Transfer:
        """Start to copy pinned memory to byte `offset`, after the steps submitted so far by programs bound to this region;
        steps that they submit later wait for it. Programs bound to other regions run beside it."""

    def free(self) -> None:
        """Give the memory back, after all steps submitted so far; the region is of no use afterwards."""


class LoadedProgram(Protocol):
    """A program bound to regions."""

    def run(self, steps: int = 1) -> None:
        """Submit `steps` steps; returns before they are complete where the device is asynchronous."""


class Executor(Protocol):
    """What the plan asks (the first methods) and what training uses."""

    name: str
    concurrent: bool  # whether calls that do not wait for each other may run at the same time

    @property
    def hardware(self) -> str:
        """What of the device decides which code runs an op, beside tables; '': nothing."""

    @property
    def tuning_digest(self) -> str:
        """Names the tables that decide which code runs an op: with others the same sums may round differently. '': none."""

    def pads_to(self, op: Op, inputs: tuple[Spec, ...]) -> int:
        """What channels are multiples of in the copies that this convolution, or its gradient, is run on; 1: it needs no
        copies. A plan then lets tensors have channels of zeros up to it."""

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """Whether the executor runs this fused form on these operands as one call."""

    def unpools(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """Whether what runs this gradient of a convolution behind a pool writes the error before the pool into its scratch
        memory first. If so, a plan lets a call of its own do it, once for all gradients that want it."""

    def workspace_bytes(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        """Scratch memory that the call needs."""

    def kernel_name(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> str:
        """What runs the call, for tables."""

    def available_bytes(self) -> int | None:
        """Memory that new regions may take (None: no limit known)."""

    def region(self, name: str, nbytes: int) -> Region:
        """New zeroed memory."""

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Host memory that `Region.write_async` copies from beside running steps."""

    def load(self, program: Program, regions: Mapping[str, Region]) -> LoadedProgram:
        """Bind a program to memory; regions must be at least `program.region_bytes`."""

    def synchronize(self) -> None:
        """Wait for everything submitted; a fault of an earlier step is raised here."""

    def close(self) -> None:
        """Free what the executor holds."""
