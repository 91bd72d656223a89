"""What outlives a step: weights, running statistics, optimizer state, and where they lie on a device.

A weight has two forms. On the host and in checkpoints it is torch's: KCRS for filters, (out, in) for matrices. On a
device a filter is KRSC, and a Linear that follows a flattened image is the filter (out, H, W, C) that covers the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from parcnn.errors import ShapeError
from parcnn.ops.base import ITEM_BYTES, Spec
from parcnn.plan.optimizer import Optimizer, Rule

ALIGNMENT = 256  # bytes; every tensor starts at a multiple of it


def align(nbytes: int) -> int:
    """Round up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Variable:
    """A named tensor of a model, in torch's layout. `data` is replaced through `assign` only."""

    def __init__(self, data: np.ndarray, requires_grad: bool) -> None:
        self.data = np.asarray(data, order="C")
        self.requires_grad = requires_grad
        self.version = 0  # counts changes made on the host, so that a device copy knows when it is old

    def assign(self, data: np.ndarray) -> None:
        """Replace the values. Raises ShapeError when the shape differs."""
        data = np.asarray(data)
        if data.shape != self.data.shape:
            raise ShapeError("a tensor of another shape", expected=self.data.shape, got=data.shape)
        self.data = np.array(data, self.data.dtype, order="C")
        self.version += 1

    def widen(self) -> None:
        """Be float64 from now on, with the same values: what is trained in fp64 then loses no bits on the host."""
        self.data = self.data.astype(np.float64)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def numel(self) -> int:
        """Number of elements."""
        return self.data.size


@dataclass(frozen=True)
class Packing:
    """How a variable lies on a device: `logical` is its shape seen as KCRS, stored as KRSC; () keeps it as it is.

    `stored` is its shape on the device where zeros are behind its channels, () where none are (`parcnn.plan.channels`).
    """

    logical: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()

    def spec(self, variable: Variable, dtype: str) -> Spec:
        """Shape on the device."""
        return Spec(self.stored or self._shape(variable.shape), dtype)

    def pack(self, array: np.ndarray) -> np.ndarray:
        """torch's layout -> the device's."""
        if self.logical:
            array = array.reshape(self.logical).transpose(0, 2, 3, 1)
        if self.stored:
            array = np.pad(array, [(0, whole - own) for whole, own in zip(self.stored, array.shape, strict=True)])
        return np.ascontiguousarray(array)

    def unpack(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The device's layout -> torch's."""
        own = self._shape(shape)
        array = array.reshape(self.stored or own)[tuple(map(slice, own))]
        if self.logical:
            array = array.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(array).reshape(shape)

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The device's, without zeros, of a variable of torch's `shape`."""
        if not self.logical:
            return shape
        k, c, r, s = self.logical
        return k, r, s, c


@dataclass
class Layout:
    """Offsets of a model's variables in the region 'weights' and of its optimizer's state in the region 'optimizer'.

    All plans of a model share one layout. Integer variables (BatchNorm's batch counter) stay on the host. With the first
    plan it is settled which variables have channels of zeros behind their own; before that, offsets are not final.
    """

    dtype: str
    offsets: dict[Variable, int] = field(default_factory=dict)
    names: dict[Variable, str] = field(default_factory=dict)
    packings: dict[Variable, Packing] = field(default_factory=dict)
    weights_bytes: int = 0
    rules: dict[Variable, Rule] = field(default_factory=dict)
    state_offsets: dict[Variable, tuple[int, ...]] = field(default_factory=dict)
    optimizer_bytes: int = 0
    is_settled: bool = False

    @classmethod
    def of(cls, variables: Iterable[tuple[str, Variable]], dtype: str) -> Layout:
        """Lay out named variables in order; a variable with two names is kept once."""
        layout = cls(dtype)
        for name, variable in variables:
            if variable.data.dtype.kind == "f":
                layout.names.setdefault(variable, name)
        layout._place()
        return layout

    def copy_offset(self, offset: int, dtype: str) -> int:
        """Where in the region 'copies' a copy lies, in type `dtype`, of the weight at `offset`."""
        return offset * ITEM_BYTES[dtype] // ITEM_BYTES[self.dtype]

    def copies_bytes(self, dtype: str) -> int:
        """Size of the region 'copies' for plans whose tensors have type `dtype`; 0 where the weights serve."""
        return self.copy_offset(self.weights_bytes, dtype) if dtype != self.dtype else 0

    def add_state(self, optimizer: Optimizer) -> None:
        """Reserve the optimizer's tensors for each trainable variable, and keep the rule that updates it."""
        trained = {name: variable for variable, name in self.names.items() if variable.requires_grad}
        rules = optimizer.rules({name: variable.shape for name, variable in trained.items()})
        self.rules = {variable: rules[name] for name, variable in trained.items()}
        self._place()

    def settle(self, stored: Mapping[Variable, tuple[int, ...]]) -> None:
        """Fix the shapes, with zeros, of variables that are bound; offsets are final from now on."""
        for variable, shape in stored.items():
            self.packings[variable] = replace(self.packings[variable], stored=shape)
        self._place()
        self.is_settled = True

    def _place(self) -> None:
        """Lay out variables and optimizer state in order."""
        self.weights_bytes = self.optimizer_bytes = 0
        self.state_offsets = {}
        for variable in self.names:
            self.offsets[variable] = self.weights_bytes
            self.weights_bytes += self._step(variable)
        for variable, rule in self.rules.items():
            step = self._step(variable)
            self.state_offsets[variable] = tuple(self.optimizer_bytes + i * step for i in range(rule.slots))
            self.optimizer_bytes += rule.slots * step

    def _step(self, variable: Variable) -> int:
        """Bytes from a variable to the next."""
        return align(self.packings.get(variable, Packing()).spec(variable, self.dtype).nbytes)

    def bind(self, variable: Variable, packing: Packing, layer: str = "") -> Spec:
        """Fix how a variable is packed for its use in `layer`, and give its spec on the device.

        Raises ShapeError when it is not the model's own, or when two uses disagree.
        """
        if variable not in self.offsets:
            raise ShapeError(
                "a parameter that is not the model's own was used in forward()",
                where=layer,
                remedy="assign it to an attribute of a Module, so that it is trained and saved",
            )
        known = self.packings.setdefault(variable, packing)
        if known.logical != packing.logical:
            raise ShapeError(
                "one weight is used as two filters of different shape",
                where=self.names[variable],
                expected=known.logical or "a matrix",
                got=packing.logical or "a matrix",
                remedy="give each use a layer of its own, or keep to one image size",
            )
        return known.spec(variable, self.dtype)
