"""Which type the tensors of each precision have, and where a plan in bf16 goes from one type to another.

Weights, statistics and the optimizer's state stay in the accumulator's type (f32 for bf16; `parcnn.ops.base.accumulator`).
Convolutions in bf16 read copies of their filters, made once a step, all in one launch. (Micikevicius et al., "Mixed
Precision Training", ICLR 2018; bf16 has the exponents of f32, so no loss scale is needed.)
"""

from __future__ import annotations

from parcnn.ops.base import Value
from parcnn.ops.conv import ConvFprop
from parcnn.ops.pointwise import Cast
from parcnn.ops.update import MAX_GROUP
from parcnn.plan.graph import Graph, Node

TENSOR_TYPES = {"fp32": "f32", "fp64": "f64", "bf16": "bf16"}


def cast_filters(graph: Graph) -> None:
    """Put a Cast before the first convolution that reads a filter of another type than its image."""
    copies: dict[Value, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node.op, ConvFprop) and node.inputs[1].dtype != node.inputs[0].dtype:
            x, w, *rest = node.inputs
            if w not in copies:
                copies[w] = Value(Cast(x.dtype).infer(w.spec)[0], f"{w.label}.{x.dtype}")
                nodes.append(Node(Cast(x.dtype), (w,), (copies[w],), node.layer, "feed"))
            node.inputs = (x, copies[w], *rest)
        nodes.append(node)
    graph.nodes = nodes


def cast_filters_together(graph: Graph) -> None:
    """Make the casts of filters one node a group, at the front. Called after differentiation: each filter's gradient is
    complete, and its update may run, as soon as its own convolution's backward has."""
    casts = [node for node in graph.nodes if isinstance(node.op, Cast) and node.inputs[0] in graph.places]
    groups = []
    for first in range(0, len(casts), MAX_GROUP):
        group = casts[first : first + MAX_GROUP]
        inputs, outputs = ([v for node in group for v in getattr(node, side)] for side in ("inputs", "outputs"))
        groups.append(Node(group[0].op, tuple(inputs), tuple(outputs), "filters", "feed"))
    graph.nodes = groups + [node for node in graph.nodes if node not in casts]
