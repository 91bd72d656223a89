"""The seam between the executor and a kernel family: what a launcher says of a call.

Each family is a `.cu` file in `kernels/` beside a launcher `.py` of the same name, a module that is a `Launcher`. All
its functions are pure functions of the problem and the device's description: they import no CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from parcnn.errors import DeviceError
from parcnn.ops.base import ITEM_BYTES, Op, Spec
from parcnn.ops.program import Call, Slot


class LaunchError(DeviceError):
    """A launch that breaks a rule: its arguments, its sizes, the memory it points to, or its order among the others."""


@dataclass(frozen=True)
class Device:
    """What launchers may know of a GPU, and what records of measurements say of it."""

    name: str
    arch: str  # NVRTC's name: 'sm_90a'
    sm_count: int
    shared_bytes_per_block: int = 232448  # with opt-in
    total_bytes: int = 0
    driver: str = ""  # NVIDIA's driver: '580.65.06'
    cuda: str = ""  # newest CUDA that the driver speaks: '13.0'


@dataclass(frozen=True)
class Kernel:
    """One compiled variant: a source file in `kernels/`, an extern "C" entry, and macros (never problem sizes)."""

    source: str
    entry: str
    defines: tuple[tuple[str, int | str], ...] = ()

    @property
    def label(self) -> str:
        """Name for tables: the entry and the values of its macros."""
        return self.entry + "".join(f"_{v}" for _, v in self.defines)


@dataclass(frozen=True)
class Pointer:
    """The address of `slot` plus `offset` bytes; the kernel may touch `nbytes` from there (None: to the slot's end)."""

    slot: Slot
    offset: int = 0
    nbytes: int | None = None


@dataclass(frozen=True)
class Struct:
    """A struct passed by value: fields in order, each aligned to its own size as C does."""

    fields: tuple[Argument, ...]


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine of sm_90 and later (TMA) sees a slot: a CUtensorMap, passed by value.

    Dimensions are innermost first, and so are `strides_bytes`, of all but the innermost. A copy moves `box` elements of
    which it takes every `element_strides`-th along a dimension (none given: each). `swizzle`: '64B', '128B' or None.
    `l2_bytes`: what a miss brings into L2 (0, 64, 128, 256). `offset`: bytes from the slot's start.
    """

    slot: Slot
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...] = ()
    swizzle: str | None = None
    dtype: str = "bf16"
    l2_bytes: int = 256
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        steps = sum((dim - 1) * stride for dim, stride in zip(self.dims[1:], self.strides_bytes, strict=True))
        return steps + self.dims[0] * ITEM_BYTES[self.dtype]


# A Slot stands for Pointer(slot). Scalars carry their C type: np.int32, np.uint32, np.int64, np.float32. `bytes` are a
# whole parameter as it lies in memory, such as an array in a struct. None is a null pointer.
Argument = Slot | Pointer | Struct | TensorMap | np.generic | bytes | None


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[Argument, ...] = field(default=())
    shared_bytes: int = 0  # dynamic shared memory


class Launcher(Protocol):
    """What a module of `kernels/` has."""

    @property
    def OPS(self) -> tuple[type[Op], ...]:
        """The ops that it runs."""

    def supports(self, op: Op, inputs: tuple[Spec, ...]) -> str | None:
        """None, or the reason why it does not run the op on these operands."""

    def workspace_bytes(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
        """Scratch memory of the call."""

    def launches(self, call: Call, device: Device) -> list[Launch]:
        """The kernels that run the call, in order."""

    def variants(self) -> Iterable[Kernel]:
        """Every kernel that `launches` may name, for ahead-of-time checks."""


@runtime_checkable
class EstimatingLauncher(Launcher, Protocol):
    """A launcher of a family that others compete with."""

    def cost_us(self, call: Call, device: Device) -> float:
        """Estimated microseconds of the call by the variant that the family's own rule takes."""


@runtime_checkable
class TunableLauncher(Launcher, Protocol):
    """A launcher with several ways to run a call. Its `workspace_bytes` and `launches` take `variant=`, one of them."""

    def candidates(self, call: Call, device: Device) -> Sequence[Any]:
        """Variants that can run the call, the best by the family's own rule first; each has a name of its own, its str()."""


@runtime_checkable
class WeighingLauncher(Launcher, Protocol):
    """A launcher that runs fused forms which are slower than their parts on some operands."""

    def gains(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """Whether the op is no slower than its parts."""


@runtime_checkable
class UnpoolingLauncher(Launcher, Protocol):
    """A launcher of gradients that behind a pool may first write the error before the pool into its workspace."""

    def unpools(self, call: Call, device: Device) -> bool:
        """Whether it would, of a call behind a pool, where one call may do so for both gradients. Takes `variant=`, too."""


@runtime_checkable
class PaddingLauncher(Launcher, Protocol):
    """A launcher that runs a call on copies of its operands, with channels of zeros."""

    @property
    def PADS_TO(self) -> int:
        """What the copies' channels are multiples of."""
