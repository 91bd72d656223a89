"""What every op is: attributes, output shapes, gradient rule, FLOPs and least bytes. Nothing here computes a tensor.

Shapes are *physical*: images are NHWC, filters KRSC, matrices row-major. Users see NCHW and KCRS; the tracer
(`parcnn.plan.trace`) is where the two meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import ClassVar

from parcnn.errors import ArgumentError

# Indices of a pool that share a byte: neighbouring channels, the first in its lowest bits; each pixel starts a byte.
PACKED = {"u2": 4, "u4": 2}
# Bytes of one element of the other types.
# `bf16` is the upper half of an f32; on the host its bit patterns are uint16, as NumPy has no such type.
ITEM_BYTES = {"f32": 4, "f64": 8, "bf16": 2, "i32": 4, "u32": 4, "u8": 1}
# What sums, statistics and masters of weights are kept in, for tensors of each type.
ACCUMULATORS = {"f32": "f32", "f64": "f64", "bf16": "f32"}
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
# Activations whose derivative follows from their output: backward keeps that, never the input. All are monotone, so
# they commute with a maximum.
FROM_OUTPUT = ("relu", "tanh", "sigmoid")
ZERO_AT_ZERO = ("relu", "gelu", "gelu_tanh", "silu", "tanh")  # channels of zeros stay zeros


@dataclass(frozen=True)
class Spec:
    """Shape (physical) and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: str = "f32"

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in memory: of PACKED types, whose elements share bytes, that of the bytes."""
        if self.dtype not in PACKED:
            return self.shape
        return (*self.shape[:-1], -(-self.shape[-1] // PACKED[self.dtype]))

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in memory."""
        return prod(self.stored_shape) * (1 if self.dtype in PACKED else ITEM_BYTES[self.dtype])


def accumulator(dtype: str) -> str:
    """The type that statistics, gradients of weights and losses have, for data of type `dtype`."""
    return ACCUMULATORS[dtype]


@dataclass(eq=False)
class Value:
    """A tensor of the graph: what it is, and a name for people."""

    spec: Spec
    label: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> str:
        return self.spec.dtype


# emit(op, *inputs) appends a node to the graph and returns its outputs.
Emit = Callable[..., tuple[Value, ...]]
Grads = tuple[Value | None, ...]


@dataclass(frozen=True)
class Op:
    """Base of all ops. An op is its attributes; two equal ops on equal shapes run the same code."""

    # True: not on the chain of error signals, so it may run beside it (weight gradients, updates).
    side_branch: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name for tables, e.g. `conv_fprop`."""
        return "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        """Specs of the outputs for the specs of the inputs."""
        raise NotImplementedError(self.name)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        """Append the gradient's nodes; return dL/d(input) for each input (None: no gradient flows there).

        `dys` holds dL/d(output), None where an output reached no loss. `dys[i]` may be overwritten by nobody.
        """
        raise NotImplementedError(f"{self.name} has no gradient")

    def inplace(self) -> tuple[tuple[int, int], ...]:
        """Pairs (output, input) that may share memory when that input has no later reader."""
        return ()

    @property
    def overwritten(self) -> tuple[int, ...]:
        """Input positions that the op writes in place: running statistics, weights, logs."""
        return ()

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        """Floating-point operations (a multiply and an add are two); 0 for ops that only move bytes."""
        return 0

    def bytes(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        """Fewest bytes to move: every input read once, every output written once."""
        written = [inputs[i] for i in self.overwritten]
        return sum(s.nbytes for s in (*inputs, *outputs, *written))


def pair(value: int | Sequence[int], where: str = "") -> tuple[int, int]:
    """An int or a pair as a pair (torch's convention for kernel, stride, padding). Raises ArgumentError."""
    sizes = (value, value) if isinstance(value, Integral) else tuple(value) if isinstance(value, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, Integral) for size in sizes):
        raise ArgumentError("not a size of an image", where=where, expected="an int or a pair of ints", got=value)
    return int(sizes[0]), int(sizes[1])


def image_of(value: Value) -> tuple[int, int]:
    """Height and width of a value (N,H,W,C); of a filter (K,R,S,C), R and S."""
    _, h, w, _ = value.shape
    return h, w
