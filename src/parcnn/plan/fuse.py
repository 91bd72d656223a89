"""Fusion: groups of ops that one kernel can do become one op, so that what lies between them is never written.

Forward, before differentiation (a fused op carries its own gradient rule):
    act -> max-pool, wherever it stands: then nothing of the size before the pool is kept for backward
    conv -> act -> pool, conv -> pool -> act, conv -> act, conv -> pool, batch norm -> relu, batch norm -> max-pool, add -> act,
    batch norm -> add (-> relu), conv -> add (-> act)
    conv -> batch norm in training: two ops still, but the convolution takes the moments of what it writes
Backward, after it:
    dgrad -> add (two paths join), then dgrad -> act' (the error signal passes the activation below)
    dgrad -> batch norm's: two ops still, but the convolution takes the sums of what it writes that the norm needs

A group fuses only when what lies inside it has no other reader and the executor says that it can do the fused op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from parcnn.ops.base import FROM_OUTPUT, Op, Spec, Value
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormTrain
from parcnn.ops.pointwise import Act, ActDgrad, Add
from parcnn.ops.pool import PoolFprop
from parcnn.plan.graph import Graph, Node

CanFuse = Callable[[Op, tuple[Spec, ...]], bool]


def fuse_forward(graph: Graph, can_fuse: CanFuse) -> None:
    """Merge each node into its producer where the rules above allow, until nothing changes."""
    while _pass(graph, lambda producer, node: _pool_rule(producer, node, graph.mode == "train"), can_fuse):
        pass
    while _pass(graph, lambda producer, node: _forward_rule(producer, node, graph.mode == "train"), can_fuse):
        pass
    _take_moments(graph, can_fuse)


def fuse_backward(graph: Graph, can_fuse: CanFuse) -> None:
    """The same for the error signals."""
    while _pass(graph, _backward_rule, can_fuse):
        pass


# A rule looks at a producer and the node that reads its first output; it gives the fused op and its operands.
Rule = Callable[[Node, Node], tuple[Op, tuple[Value, ...]] | None]


def _pass(graph: Graph, rule: Rule, can_fuse: CanFuse) -> bool:
    """One sweep; True when something was fused."""
    consumers = graph.consumers()
    producer_of = {v: node for node in graph.nodes for v in node.outputs}
    position = {id(node): i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for value in node.inputs:
            producer = producer_of.get(value)
            if producer is None or value is not producer.outputs[0] or len(consumers[value]) != 1:
                continue
            if any(v in consumers for v in producer.outputs[1:]):
                continue  # its indices or statistics are already wanted by somebody
            fused = rule(producer, node)
            if fused is None:
                continue
            op, inputs = fused
            first, last = position[id(producer)], position[id(node)]
            late = any(position[id(producer_of[v])] > first for v in inputs if v in producer_of)
            between = graph.nodes[first + 1 : last]
            if late and not _may_wait(producer, between):
                continue
            if not can_fuse(op, tuple(v.spec for v in inputs)):
                continue
            outputs = _outputs(op, inputs, producer, node)
            merged = Node(op, inputs, outputs, producer.layer, producer.phase)
            graph.nodes[first : last + 1] = [*between, merged] if late else [merged, *between]
            return True
    return False


def _may_wait(producer: Node, others: Sequence[Node]) -> bool:
    """Whether a node may run after these: a later update would change its weights, none may see its statistics sooner, nor
    change what it reads."""
    writes = {producer.inputs[i] for i in producer.op.overwritten}
    seen = any(v in writes for node in others for v in node.inputs)
    changed = any(node.inputs[i] in producer.inputs for node in others for i in node.op.overwritten)
    return producer.phase == "forward" and not seen and not changed


def _outputs(op: Op, inputs: tuple[Value, ...], producer: Node, node: Node) -> tuple[Value, ...]:
    """The fused op's outputs: the reader's, followed by those that only the producer had (statistics)."""
    specs = op.infer(*(v.spec for v in inputs))
    outputs = (*node.outputs, *producer.outputs[1:])[: len(specs)]
    outputs += tuple(Value(spec) for spec in specs[len(outputs) :])  # what neither had: the winners' inputs
    for value, spec in zip(outputs, specs, strict=True):
        value.spec = spec  # a fused pool packs its indices more tightly than a pool alone
        value.label = f"{producer.layer}.{op.name}"
    return outputs


def _pool_rule(producer: Node, node: Node, training: bool) -> tuple[Op, tuple[Value, ...]] | None:
    first, second = producer.op, node.op
    if isinstance(first, Act) and isinstance(second, PoolFprop) and second.kind == "max" and second.act is None:
        if second.may_miss:  # the maximum of no pixels is -inf, whatever the activation
            return None
        keep = training and first.kind not in FROM_OUTPUT
        return replace(second, act=first.kind, keep=keep), producer.inputs
    return None


def _forward_rule(producer: Node, node: Node, training: bool) -> tuple[Op, tuple[Value, ...]] | None:
    first, second = producer.op, node.op
    if isinstance(first, ConvFprop):
        if isinstance(second, Act) and first.act is None:
            # In training the derivative must follow from what is kept: the output, or else the activation's input, too.
            # After a pool the activation must commute with it, which these (monotone) do with a maximum.
            commutes = first.pool != "avg" and not (first.window and first.window.may_miss)
            if (second.kind in FROM_OUTPUT and commutes) or (not training and first.pool is None):
                return replace(first, act=second.kind), producer.inputs
            if second.kind not in FROM_OUTPUT and first.pool is None and not first.add:
                return replace(first, act=second.kind, keep=True), producer.inputs
        if isinstance(second, PoolFprop) and first.pool is None and not (first.add or first.keep or second.keep):
            pooled = replace(first, pool=second.kind, window=None if _is_2x2(second) else second.window)
            if second.act:
                return (replace(pooled, act=second.act), producer.inputs) if first.act is None else None
            if first.act and second.may_miss:
                return None
            commutes = second.kind == "max" and (first.act is None or first.act in FROM_OUTPUT)
            if commutes or (second.kind == "avg" and first.act is None) or not training:
                return pooled, producer.inputs
        if isinstance(second, Add) and first.pool is None:
            return _with_addend(producer, node)
    if isinstance(first, BatchNormTrain) and first.window is None and first.act is None and not first.add:
        if isinstance(second, PoolFprop) and second.kind == "max" and second.act in (None, "relu"):
            return replace(first, act=second.act, window=second.window), producer.inputs
    if isinstance(first, BatchNormTrain | BatchNormInfer) and first.act is None:
        if isinstance(second, Act) and second.kind == "relu":  # behind a maximum, too: they commute
            return replace(first, act="relu"), producer.inputs
        has_pool = isinstance(first, BatchNormTrain) and first.window is not None
        if isinstance(second, Add) and second.act in (None, "relu") and not has_pool:
            return _with_addend(producer, node)
    if isinstance(first, Add) and first.act is None and isinstance(second, Act) and second.kind in FROM_OUTPUT:
        return replace(first, act=second.kind), producer.inputs
    return None


def _with_addend(producer: Node, node: Node) -> tuple[Op, tuple[Value, ...]] | None:
    """A convolution or batch norm that adds what `node` adds to its output, with the activation behind that."""
    first, second = producer.op, node.op
    others = [v for v in node.inputs if v is not producer.outputs[0]]
    if not isinstance(first, ConvFprop | BatchNormTrain | BatchNormInfer) or first.act or first.add or len(others) != 1:
        return None
    act = second.act if isinstance(second, Add) else None
    return replace(first, add=True, act=act), (*producer.inputs, *others)


def _take_moments(graph: Graph, can_fuse: CanFuse) -> None:
    """Batch norms behind a convolution get its outputs' moments from it."""
    producer_of = {node.outputs[0]: node for node in graph.nodes if isinstance(node.op, ConvFprop)}
    for node in graph.nodes:
        conv = producer_of.get(node.inputs[0]) if node.inputs else None
        if (
            not isinstance(node.op, BatchNormTrain)
            or conv is None
            or not isinstance(conv.op, ConvFprop)
            or conv.op.keep
        ):
            continue
        op, specs = replace(conv.op, moments=True), tuple(v.spec for v in conv.inputs)
        moments = conv.outputs[-1] if conv.op.moments else Value(op.infer(*specs)[-1], f"{conv.layer}.moments")
        norm, inputs = replace(node.op, moments=True), (*node.inputs[:5], moments, *node.inputs[5:])
        if not can_fuse(op, specs) or not can_fuse(norm, tuple(v.spec for v in inputs)):
            continue
        node.op, node.inputs = norm, inputs
        if not conv.op.moments:
            conv.op, conv.outputs = op, (*conv.outputs, moments)


def take_sums(graph: Graph, can_fuse: CanFuse) -> None:
    """Batch norms' backward gets its sums from the convolution whose input gradient is their error, which then also sees to
    the activation between them."""
    consumers = graph.consumers()
    producer_of = {node.outputs[0]: node for node in graph.nodes if isinstance(node.op, ConvDgrad)}
    for node in list(graph.nodes):
        if not isinstance(node.op, BatchNormDgrad) or node.op.window:
            continue
        conv = producer_of.get(node.inputs[0])
        if conv is None or not isinstance(conv.op, ConvDgrad) or conv.op.act or len(consumers[conv.outputs[0]]) != 1:
            continue
        dz, *below = node.inputs
        end = len(conv.inputs) - conv.op.add
        op, inputs = replace(conv.op, sums=True, act=node.op.act), (*conv.inputs[:end], *below, *conv.inputs[end:])
        norm, rest = replace(node.op, act=None, sums=True), (*node.inputs, *node.outputs[1:])
        if can_fuse(op, tuple(v.spec for v in inputs)) and can_fuse(norm, tuple(v.spec for v in rest)):
            conv.op, conv.inputs, conv.outputs = op, inputs, (dz, *node.outputs[1:])
            node.op, node.inputs, node.outputs = norm, rest, node.outputs[:1]
            if node.outputs[0] not in consumers:  # below is nothing that learns: its sums were all that was wanted
                graph.nodes.remove(node)


def drop_unread(graph: Graph) -> None:
    """Let convolutions that pool by a 2x2 maximum not say which elements won, and others not store what their activation is
    taken of, where nobody reads it: without a backward pass."""
    consumers = graph.consumers()
    for node in graph.nodes:
        op = node.op
        if isinstance(op, ConvFprop) and op.has_indices and op.window is None and node.outputs[1] not in consumers:
            node.op, node.outputs = replace(op, indices=False), (node.outputs[0], *node.outputs[2:])
        elif isinstance(op, ConvFprop) and op.keep and node.outputs[-1] not in consumers:
            node.op, node.outputs = replace(op, keep=False), node.outputs[:-1]


def _is_2x2(pool: PoolFprop) -> bool:
    """A 2x2 pool of stride 2 whose windows lie inside the image: what every convolution's epilogue does."""
    plain = pool.kernel == (2, 2) and pool.stride == (2, 2) and pool.pad == (0, 0) and pool.dilation == (1, 1)
    return plain and not pool.ceil_mode and pool.divisor is None


def _backward_rule(producer: Node, node: Node) -> tuple[Op, tuple[Value, ...]] | None:
    first, second, value = producer.op, node.op, producer.outputs[0]
    if not isinstance(first, ConvDgrad) or first.act is not None:
        return None
    if isinstance(second, ActDgrad) and node.inputs[0] is value:
        end = len(producer.inputs) - first.add  # `saved` stands before `addend`
        return replace(first, act=second.kind), (*producer.inputs[:end], node.inputs[1], *producer.inputs[end:])
    if isinstance(second, Add) and second.act is None and not first.add and node.phase == "backward":
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        if other is not value:
            return replace(first, add=True), (*producer.inputs, other)
    return None
