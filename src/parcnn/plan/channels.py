"""Channels of zeros between layers, where a convolution would otherwise copy its operands to add them at each call.

Weights get them, once, behind their own: filters of zeros, zeros for the channels that such filters make, biases and scales
of zero. What layers hand to each other then has them too, and no call pads or crops. They stay zeros: their errors and their
gradients are zeros, which an update element by element leaves alone. Nothing outside sees them: a state_dict, a checkpoint,
an input, an output and a loss have the model's own channels. Only infinities tell: zero times infinity is NaN, so of an
image with an infinite pixel, or a sum that overflows, more may become NaN than without.

A tensor keeps its own channels where something reads it that more of them would change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from parcnn.ops.base import ZERO_AT_ZERO, Op, Spec, Value
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry
from parcnn.ops.feed import GatherBatch
from parcnn.ops.norm import BatchNormInfer, BatchNormTrain
from parcnn.ops.pointwise import Act, Add, Cast, Dropout
from parcnn.ops.pool import AdaptiveAvgFprop, PoolFprop, PoolWindow
from parcnn.plan.graph import Graph, Node
from parcnn.plan.optimizer import Rule
from parcnn.plan.variable import Variable

BATCH = 256  # for which convolutions are asked
MOST_ZEROS = 0.5  # of a tensor's channels: with more, everything else loses what convolutions gain

Axis = tuple[Value, int]  # a dimension of a value that counts channels


class _Spaces:
    """Axes that count the same channels: disjoint sets (Tarjan 1975), each with a mark where its count is to stay."""

    def __init__(self) -> None:
        self._parents: dict[Axis, Axis] = {}
        self._fixed: set[Axis] = set()

    def join(self, *axes: Axis) -> None:
        """Let these count the same channels."""
        first, *others = map(self.find, axes)
        for other in others:
            self._parents[other] = first
            if other in self._fixed:
                self._fixed.add(first)

    def fix(self, *axes: Axis) -> None:
        """Let the count of these stay as it is."""
        self._fixed.update(map(self.find, axes))

    def is_fixed(self, axis: Axis) -> bool:
        """Whether the count of this one stays."""
        return self.find(axis) in self._fixed

    def find(self, axis: Axis) -> Axis:
        """The axis that stands for its set."""
        while (parent := self._parents.setdefault(axis, axis)) != axis:
            self._parents[axis] = axis = self._parents[parent]
        return axis


def stored_shapes(
    graph: Graph,
    output: Value,
    weights: Mapping[Value, Variable],
    rules: Mapping[Variable, Rule],
    pads_to: Callable[[Op, tuple[Spec, ...]], int],
) -> dict[Variable, tuple[int, ...]]:
    """The shapes, with zeros, of the variables that get any.

    graph: a model's forward pass up to its output, fused as for training, of `weights` without zeros, which `rules` train;
    pads_to: `parcnn.ops.program.Executor.pads_to`.
    """
    multiples = _multiples(graph, pads_to)
    if not multiples:
        return {}
    spaces = _Spaces()
    spaces.fix(_channels(output))
    for node in graph.nodes:
        _read(node, spaces)
    for weight, variable in weights.items():
        if variable in rules and not rules[variable].is_elementwise:
            spaces.fix(*_axes_of(weight))
    wanted = {spaces.find(axis): multiple for axis, multiple in multiples.items() if not spaces.is_fixed(axis)}
    shapes = {}
    for weight, variable in weights.items():
        stored = list(weight.shape)
        for axis in _axes_of(weight):
            own, multiple = weight.shape[axis[1]], wanted.get(spaces.find(axis), 1)
            whole = -(-own // multiple) * multiple
            if whole - own <= MOST_ZEROS * whole:
                stored[axis[1]] = whole
        if stored != list(weight.shape):
            shapes[variable] = tuple(stored)
    return shapes


def _multiples(graph: Graph, pads_to: Callable[[Op, tuple[Spec, ...]], int]) -> dict[Axis, int]:
    """What the channels are padded to of each convolution that would be run on copies, or one of its gradients."""
    images = {v for node in graph.nodes if isinstance(node.op, GatherBatch) for v in node.outputs}
    multiples = {}
    for node in graph.nodes:
        if not isinstance(node.op, ConvFprop):
            continue
        x, *weights = node.inputs[: len(node.inputs) - node.op.add]
        y = node.outputs[0]
        asked = Graph(graph.mode, graph.dtype)
        # Moments are taken, and what an activation is taken of is kept, in training alone.
        op = replace(node.op, moments=False)
        op = replace(op, act=None, keep=False) if op.keep else op
        asked.emit(op, *node.inputs)
        op.grad(asked.emit, node.inputs, node.outputs, (Value(y.spec),))
        for convolution in asked.nodes:
            needless = isinstance(convolution.op, ConvDgrad) and x in images
            if isinstance(convolution.op, ConvGeometry) and not needless:
                specs = (v.spec if v in weights else _of_usual_batch(v.spec) for v in convolution.inputs)
                multiple = pads_to(convolution.op, tuple(specs))
                if multiple > 1:
                    multiples[_channels(x)] = multiples[_channels(y)] = multiple
                    break
    return multiples


def _of_usual_batch(spec: Spec) -> Spec:
    """Of a batch that no plan's own is: what is decided holds for all, and results do not depend on which came first."""
    return replace(spec, shape=(BATCH, *spec.shape[1:]))


def _channels(value: Value) -> Axis:
    return value, len(value.shape) - 1


def _axes_of(weight: Value) -> list[Axis]:
    """Those of a filter (K,R,S,C), or of a vector, that count channels."""
    return [(weight, 0), (weight, 3)] if len(weight.shape) == 4 else [_channels(weight)]


def _read(node: Node, spaces: _Spaces) -> None:
    """Note what a node says about channels."""
    op = node.op
    if isinstance(op, ConvFprop):
        (x, w, *rest), y = node.inputs, node.outputs[0]
        spaces.join(_channels(y), (w, 0), *map(_channels, (*rest, *node.outputs[1:])))
        spaces.join(_channels(x), (w, 3) if op.groups == 1 else (w, 0))
        if op.groups != 1:
            spaces.fix((w, 3))
            if not op.groups == x.shape[-1] == y.shape[-1]:
                spaces.fix(_channels(x), _channels(y))
        if not _is_zero_at_zero(op.act, op.window):
            spaces.fix(_channels(y))
    elif isinstance(op, Cast):
        for x, y in zip(node.inputs, node.outputs, strict=True):
            for (_, of_x), (_, of_y) in zip(_axes_of(x), _axes_of(y), strict=True):
                spaces.join((x, of_x), (y, of_y))
    elif _keeps_zeros(node):
        others = node.inputs[1:] if not isinstance(op, Dropout) else ()  # its state has no channels
        spaces.join(_channels(node.inputs[0]), _channels(node.outputs[0]), *map(_channels, others))
    else:
        spaces.fix(*(_channels(v) for v in (*node.inputs, *node.outputs) if v.shape))


def _keeps_zeros(node: Node) -> bool:
    """Whether channels of zeros stay zeros, and change nothing in the others."""
    match node.op:
        case Act(kind):
            return _is_zero_at_zero(kind)
        case Add(act):
            return _is_zero_at_zero(act)
        case PoolFprop() as pool:
            return _is_zero_at_zero(pool.act, pool)
        case BatchNormTrain() | BatchNormInfer() as norm:
            window = norm.window if isinstance(norm, BatchNormTrain) else None
            return norm.eps > 0 and _is_zero_at_zero(norm.act, window)
    return isinstance(node.op, AdaptiveAvgFprop | Dropout)


def _is_zero_at_zero(act: str | None, window: PoolWindow | None = None) -> bool:
    """Whether zeros stay zeros. (The maximum of no pixels is -inf.)"""
    return (act is None or act in ZERO_AT_ZERO) and not (window and window.may_miss)
