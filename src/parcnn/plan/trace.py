"""Tracing: a model's forward() runs on symbolic tensors, which write down what is done to them.

Users see NCHW. A `Tensor` carries that logical shape; its value is physical, NHWC. A flattened image keeps its NHWC value
as long as nothing needs torch's element order: an activation does not, and a Linear takes the order into its own columns.
A value may have channels of zeros behind the tensor's own, where weights have (`parcnn.plan.channels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NoReturn

from parcnn.errors import ShapeError, UnknownNameError, UnsupportedError
from parcnn.ops.base import Value
from parcnn.ops.pointwise import Add
from parcnn.ops.pool import AdaptiveAvgFprop
from parcnn.ops.shape import Cat, ChannelPad, ChannelSlice, ToChannelsFirst, ToChannelsLast, View
from parcnn.plan.graph import Graph
from parcnn.plan.variable import Layout, Packing, Variable


class Trace:
    """One tracing of a model: the graph that grows, and the layout that its variables are bound in."""

    def __init__(self, graph: Graph, layout: Layout, paths: Mapping[Any, str] | None = None) -> None:
        self.graph, self.layout = graph, layout
        self.paths = paths or {}  # module -> its path in the model
        self.state: Value | None = None  # step counters and random key (parcnn.ops.feed), when the program has them
        self.variables: dict[Variable, Value] = {}
        self.dropouts = 0  # dropout layers met so far: each has a random stream of its own

    @property
    def training(self) -> bool:
        """Whether this is a training step."""
        return self.graph.mode == "train"

    @property
    def layer(self) -> str:
        """Path of the module being traced, for errors."""
        return self.graph.layer or "model"

    @contextmanager
    def inside(self, module: Any) -> Iterator[None]:
        """While a module's forward() runs: what it emits belongs to it."""
        outer = self.graph.layer
        self.graph.layer = self.paths.get(module, outer) or outer
        try:
            yield
        finally:
            self.graph.layer = outer

    def variable(self, variable: Variable, packing: Packing | None = None) -> Value:
        """The value of a parameter or buffer; `packing` says which filter it is seen as."""
        spec = self.layout.bind(variable, packing or Packing(), self.layer)
        if variable not in self.variables:
            self.variables[variable] = self.graph.place(
                spec, "weights", self.layout.offsets[variable], self.layout.names[variable]
            )
        return self.variables[variable]

    def emit(self, op: Any, *inputs: Value) -> tuple[Value, ...]:
        """Append a node."""
        return self.graph.emit(op, *inputs)


class Tensor:
    """A symbolic tensor inside forward(): a shape, and the value that will hold it. It has no numbers."""

    def __init__(self, trace: Trace, value: Value, shape: tuple[int, ...]) -> None:
        self.trace, self.value, self.shape = trace, value, tuple(shape)

    def __repr__(self) -> str:
        return f"Tensor{self.shape} of {self.trace.layer}"

    def with_value(self, value: Value) -> Tensor:
        """The same logical shape on another value."""
        return Tensor(self.trace, value, self.shape)

    # -- torch.Tensor's names ------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def contiguous(self) -> Tensor:
        """Itself: layout is the plan's business."""
        return self

    def view(self, *shape: Any) -> Tensor:
        """The same elements under another shape: (N, C, H, W) <-> (N, C*H*W). Raises ShapeError, UnsupportedError."""
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> Tensor:
        """See `view`."""
        sizes = _resolve(self, tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)
        if sizes == self.shape:
            return self
        if sizes[0] == self.shape[0] and len(sizes) == 2:
            return Tensor(self.trace, self.value, sizes)
        if sizes[0] == self.shape[0] and len(sizes) == 4 and self.ndim == 2:
            n, c, h, w = sizes
            if self.value.shape[:-1] == (n, h, w):  # then its own channels are as many, too
                return Tensor(self.trace, self.value, sizes)
            flat = self.in_user_order()
            (value,) = self.trace.emit(ToChannelsLast(image=(h, w, c)), flat)
            return Tensor(self.trace, value, sizes)
        raise UnsupportedError(
            "this change of shape is not known",
            where=self.trace.layer,
            expected="(N, C, H, W) -> (N, C*H*W), or back",
            got=f"{self.shape} -> {sizes}",
            remedy="keep the batch as the first dimension",
        )

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        """Join dimensions start_dim..end_dim; the batch must stay apart (start_dim=1)."""
        if not (-self.ndim <= start_dim < self.ndim and -self.ndim <= end_dim < self.ndim):
            raise ShapeError(
                "flatten over dimensions that the tensor does not have",
                where=self.trace.layer,
                expected=f"dimensions of {self.shape}",
                got=f"start_dim={start_dim}, end_dim={end_dim}",
                remedy="flatten(1) joins all but the batch",
            )
        start, end = start_dim % self.ndim, end_dim % self.ndim
        joined = prod(self.shape[start : end + 1])
        return self.reshape(*self.shape[:start], joined, *self.shape[end + 1 :])

    def mean(self, dim: Any = None, keepdim: bool = False) -> Tensor:
        """Mean over (2, 3), the global average pool. Raises UnsupportedError for other dimensions."""
        dims = tuple(sorted(d % self.ndim for d in (dim if isinstance(dim, Sequence) else (dim,)) if d is not None))
        if self.ndim != 4 or dims != (2, 3):
            raise UnsupportedError(
                "this mean is not known",
                where=self.trace.layer,
                expected="the mean of (N, C, H, W) over (2, 3)",
                got=f"the mean of {self.shape} over {dim}",
                remedy="use mean((2, 3)) on an image, or AvgPool2d",
            )
        n, c = self.shape[:2]
        (value,) = self.trace.emit(AdaptiveAvgFprop(out=(1, 1)), self.value)
        return Tensor(self.trace, value, (n, c, 1, 1) if keepdim else (n, c))

    def __add__(self, other: object) -> Tensor:
        return add(self, other)

    __radd__ = __add__
    __iadd__ = __add__

    def _no_arithmetic(self, *_: object) -> NoReturn:
        raise UnsupportedError(
            "arithmetic on tensors other than the sum of two",
            where=self.trace.layer,
            remedy="express it by layers, or by +, cat and the functions of parcnn.nn.functional",
        )

    __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __matmul__ = _no_arithmetic
    __neg__ = __getitem__ = _no_arithmetic

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnknownNameError(
            f"a tensor has no {name!r}",
            where=self.trace.layer,
            expected="size, shape, ndim, dim, numel, view, reshape, flatten, mean, contiguous",
            remedy="use a layer of parcnn.nn or a function of parcnn.nn.functional",
        )

    def __bool__(self) -> bool:
        raise UnsupportedError(
            "a condition on a tensor's values",
            where=self.trace.layer,
            remedy="forward() is traced, with shapes only; branch on shapes or on attributes of the module",
        )

    # -- the physical side ---------------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        """Channels of the value that are the tensor's own; those behind them are zeros."""
        return self.numel() // prod(self.value.shape[:-1])

    def with_channels(self, channels: int) -> Value:
        """The value, with so many channels: its own, and zeros behind them."""
        value = self.value
        if channels < value.shape[-1]:
            (value,) = self.trace.emit(ChannelSlice(0, channels), value)
        elif channels > value.shape[-1]:
            (value,) = self.trace.emit(ChannelPad(channels), value)
        return value

    @property
    def exact(self) -> Value:
        """The value, with the tensor's own channels alone."""
        return self.with_channels(self.channels)

    def image(self, channels: int) -> Value:
        """The value as (N, H, W, channels), see `with_channels`; a plain (N, F) counts as N images of 1x1."""
        value = self.with_channels(channels)
        if len(value.shape) == 2:
            (value,) = self.trace.emit(View(shape=(self.shape[0], 1, 1, channels)), value)
        return value

    def in_user_order(self) -> Value:
        """The value of a (N, F) tensor as (N, F) in torch's order."""
        value = self.exact
        if len(value.shape) == 2:
            return value
        n, h, w, c = value.shape
        if h * w > 1 and c > 1:
            (value,) = self.trace.emit(ToChannelsFirst(), value)
        (value,) = self.trace.emit(View(shape=(n, h * w * c)), value)
        return value


def _resolve(x: Tensor, shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape with its -1 filled in. Raises ShapeError."""
    sizes = [int(s) for s in shape]
    if sizes.count(-1) == 1:
        rest = -prod(sizes)
        if rest > 0 and x.numel() % rest == 0:
            sizes[sizes.index(-1)] = x.numel() // rest
    if prod(sizes) != x.numel() or min(sizes, default=0) < 1:
        raise ShapeError(
            "a view needs the same number of elements",
            where=x.trace.layer,
            expected=f"{x.numel()} elements, as in {x.shape}",
            got=tuple(shape),
            remedy="view(x.size(0), -1) or flatten(1) fits any image size",
        )
    return tuple(sizes)


def add(a: Tensor, b: object) -> Tensor:
    """a + b for two tensors of one shape. Raises ShapeError, UnsupportedError."""
    if not isinstance(b, Tensor):
        raise UnsupportedError(
            "a sum of a tensor and something else",
            where=a.trace.layer,
            expected="two tensors",
            got=type(b).__name__,
            remedy="write a + b, and a layer with a bias to add constants",
        )
    if a.shape != b.shape:
        raise ShapeError(
            "the two sides of + have different shapes",
            where=a.trace.layer,
            expected=a.shape,
            got=b.shape,
            remedy="bring both to one shape, e.g. by a 1x1 convolution with the same stride",
        )
    left, right = a.value, b.value
    if left.shape[:-1] != right.shape[:-1]:
        left, right = a.in_user_order(), b.in_user_order()
    elif left.shape != right.shape:
        left, right = a.exact, b.exact
    (value,) = a.trace.emit(Add(), left, right)
    return a.with_value(value)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate along dimension 1: channels of images, features of matrices. Raises ShapeError, UnsupportedError."""
    tensors = tuple(tensors)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise UnsupportedError(
            "cat of something else than tensors",
            where=next((t.trace.layer for t in tensors if isinstance(t, Tensor)), "cat"),
            expected="a sequence of at least one tensor of forward()",
            got=[type(t).__name__ for t in tensors],
            remedy="call it inside a Module's forward(), as cat([a, b], 1)",
        )
    first = tensors[0]
    if dim not in (1, 1 - first.ndim):
        raise UnsupportedError(
            "cat along another dimension than 1",
            where=first.trace.layer,
            expected="dim=1: channels of images, features of matrices",
            got=f"dim={dim} of {first.shape}",
            remedy="pass dim=1",
        )
    for t in tensors[1:]:
        if (t.shape[0], *t.shape[2:]) != (first.shape[0], *first.shape[2:]):
            raise ShapeError(
                "cat along 1 needs all other dimensions equal",
                where=first.trace.layer,
                expected=(first.shape[0], "any", *first.shape[2:]),
                got=t.shape,
                remedy="pool or flatten all to one size first",
            )
    values = [t.exact if t.ndim == 4 else t.in_user_order() for t in tensors]
    (value,) = first.trace.emit(Cat(), *values)
    return Tensor(first.trace, value, (first.shape[0], sum(t.shape[1] for t in tensors), *first.shape[2:]))


def flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """x.flatten(start_dim, end_dim)."""
    return x.flatten(start_dim, end_dim)


def input_tensor(trace: Trace, value: Value, sample: tuple[int, ...]) -> Tensor:
    """The model's input: logical shape (N, *sample) on a value that is NHWC for images."""
    return Tensor(trace, value, (value.shape[0], *sample))


def physical(sample: tuple[int, ...]) -> tuple[int, ...]:
    """A sample's shape (C,H,W) or (F,) as it lies in memory: (H,W,C) or (F,)."""
    return (sample[1], sample[2], sample[0]) if len(sample) == 3 else sample
