"""Reverse-mode differentiation of the graph: each op's own rule, in reverse order (Griewank & Walther 2008, ch. 3)."""

from __future__ import annotations

from collections.abc import Callable

from parcnn.ops.base import Value
from parcnn.ops.pointwise import Add
from parcnn.plan.graph import Graph, Node


def differentiate(graph: Graph, loss: Node, wanted: set[Value], ready: Callable[[Value, Value], None]) -> None:
    """Append dL/dv for every v of `wanted` (weights); `ready(weight, gradient)` is called as soon as one is complete.

    The error signal's op comes first at each layer, then the weight gradients: the chain is what everything waits for.
    """
    forward = list(graph.nodes)
    uses = dict.fromkeys(wanted, 0)
    for node in forward:
        for v in node.inputs:
            if v in uses:
                uses[v] += 1
    relevant = _depends_on(forward, wanted)
    grads: dict[Value, Value] = {}
    graph.phase = "backward"

    def contribute(value: Value, grad: Value) -> None:
        if value in grads:
            (grad,) = graph.emit(Add(), grads[value], grad)
        grads[value] = grad

    for node in reversed(forward):
        if not any(v in relevant for v in node.inputs):
            continue
        dys = tuple(grads.get(v) for v in node.outputs)
        if node is loss or any(dy is not None for dy in dys):
            graph.layer = node.layer
            for value, grad in zip(node.inputs, node.op.grad(graph.emit, node.inputs, node.outputs, dys), strict=True):
                if grad is not None and value in relevant:
                    contribute(value, grad)
        for v in node.inputs:
            if v in uses:
                uses[v] -= 1
                if uses[v] == 0 and v in grads:
                    ready(v, grads[v])


def _depends_on(nodes: list[Node], sources: set[Value]) -> set[Value]:
    """The sources and every value computed from them."""
    reached = set(sources)
    for node in nodes:
        if any(v in reached for v in node.inputs):
            reached.update(node.outputs)
    return reached
