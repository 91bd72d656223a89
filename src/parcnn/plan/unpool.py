"""The error behind a pool. A batch norm's backward spreads it over the pool's windows in its own passes. Where the kernels of a
convolution's gradients would each spread it first, one call does so for all of them, with the activation's derivative on the
way.

Other kernels route the pooled error by its indices while they load it. Then nothing changes here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from parcnn.ops.base import FROM_OUTPUT, Spec, Value, image_of
from parcnn.ops.conv import ConvDgrad, ConvUnpool, ConvWgrad
from parcnn.ops.norm import BatchNormDgrad
from parcnn.ops.pointwise import ActDgrad
from parcnn.ops.pool import PoolDgrad
from parcnn.plan.fuse import CanFuse
from parcnn.plan.graph import Graph, Node

Unpools = Callable[[ConvDgrad | ConvWgrad, tuple[Spec, ...]], bool]


def unpool_in_norms(graph: Graph, can_fuse: CanFuse) -> None:
    """Let batch norms take the error behind a maximum as it is, so that it is never written in the size before the pool."""
    consumers = graph.consumers()
    pools = {node.outputs[0]: node for node in graph.nodes if isinstance(node.op, PoolDgrad) and node.op.kind == "max"}
    for node in list(graph.nodes):
        if not isinstance(node.op, BatchNormDgrad) or len(consumers[node.inputs[0]]) != 1:
            continue
        pool = pools.get(node.inputs[0])
        if pool is None or not isinstance(pool.op, PoolDgrad):
            continue
        op, inputs = replace(node.op, window=pool.op.window), (pool.inputs[0], *node.inputs[1:], pool.inputs[1])
        if can_fuse(op, tuple(v.spec for v in inputs)):
            node.op, node.inputs = op, inputs
            graph.nodes.remove(pool)


def unpool_once(graph: Graph, unpools: Unpools) -> None:
    """Give gradients that all unpool their error (`Executor.unpools`) one that is unpooled already."""
    groups: dict[tuple[Value, ...], list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.op, ConvDgrad | ConvWgrad) and node.op.pool:
            groups.setdefault(_error(node), []).append(node)
    for error, nodes in groups.items():
        if all(unpools(node.op, tuple(v.spec for v in node.inputs)) for node in nodes):  # type: ignore[arg-type]
            _unpool(graph, error, nodes)


def _error(node: Node) -> tuple[Value, ...]:
    """What a gradient knows of its error: dy, and idx of a maximum."""
    if isinstance(node.op, ConvDgrad):
        return (node.inputs[0], *node.inputs[2 : 2 + (node.op.pool == "max")])
    return node.inputs[1:]


def _unpool(graph: Graph, error: tuple[Value, ...], nodes: list[Node]) -> None:
    """Insert the call before its first reader, in place of the activation's derivative where nobody else reads that."""
    first = graph.nodes.index(nodes[0])
    op, inputs = ConvUnpool("max" if len(error) == 2 else "avg"), error
    below = next((node for node in graph.nodes if error[0] in node.outputs), None)
    if below is not None and isinstance(below.op, ActDgrad) and below.op.kind in FROM_OUTPUT:
        readers = graph.consumers()[error[0]]
        if all(any(node is one for one in nodes) and node.inputs.count(error[0]) == 1 for node in readers):
            dy, saved = below.inputs
            op, inputs = replace(op, act=below.op.kind), (dy, *error[1:], saved)
            first = graph.nodes.index(below)
            del graph.nodes[first]
    (spec,) = op.infer(*(v.spec for v in inputs))
    unpooled = Value(spec, f"{nodes[0].layer}.{op.name}")
    graph.nodes.insert(first, Node(op, inputs, (unpooled,), nodes[0].layer, nodes[0].phase))
    for node in nodes:
        _read(node, unpooled)


def _read(node: Node, unpooled: Value) -> None:
    """Let a gradient read the error before the pool."""
    if isinstance(node.op, ConvDgrad):
        _, w, *rest = node.inputs
        node.op, taps = node.op.before_pool(*node.op.image, *image_of(w)), rest[node.op.pool == "max" :]
        node.inputs = (unpooled, w, *taps)
    elif isinstance(node.op, ConvWgrad):
        x = node.inputs[0]
        node.op = node.op.before_pool(*image_of(x), *node.op.filter)
        node.inputs = (x, unpooled)
