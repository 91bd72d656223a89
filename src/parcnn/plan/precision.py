"""Which type the tensors of each precision have, and where a plan in bf16 goes from one type to another.

Weights, statistics and the optimizer's state stay in the accumulator's type (f32 for bf16; `parcnn.ops.base.accumulator`).
Convolutions in bf16 read copies of their filters, which whatever writes a filter writes too: the update, and the host.
(Micikevicius et al., "Mixed Precision Training", ICLR 2018; bf16 has the exponents of f32, so no loss scale is needed.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from parcnn.errors import ArgumentError
from parcnn.ops.base import Value
from parcnn.ops.conv import ConvFprop
from parcnn.ops.pointwise import Cast
from parcnn.ops.program import Executor
from parcnn.ops.update import Update
from parcnn.plan.graph import Graph, Node
from parcnn.plan.variable import Layout

TENSOR_TYPES = {"fp32": "f32", "fp64": "f64", "bf16": "bf16"}


def check_precision(executor: Executor, precision: str) -> None:
    """Raises ArgumentError for a precision that the executor does not run in."""
    known = ("fp32", "fp64") if executor.name == "cpu" else ("fp32", "bf16")
    if precision not in known:
        raise ArgumentError(
            f"the {executor.name} executor has no such precision",
            expected=f"one of {known}",
            got=precision,
            remedy="fp64 runs on the CPU, bf16 on the GPU: choose the device by device= or --device",
        )


def tensor_type(precision: str) -> str:
    """The type that tensors between layers have. Raises ArgumentError for an unknown precision."""
    if precision not in TENSOR_TYPES:
        raise ArgumentError("unknown precision", where="precision", expected=", ".join(TENSOR_TYPES), got=precision)
    return TENSOR_TYPES[precision]


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


def keep_copies(graph: Graph, layout: Layout) -> None:
    """Put what the casts of filters make into the region 'copies', where it outlives the step: updates write it with their
    weights, and no step casts. Called last: the gradients of casts lead to the weights, and fusing looks at who makes a
    value."""
    copies: dict[Value, Value] = {}
    nodes = []
    for node in graph.nodes:
        region, offset = graph.places.get(node.inputs[0], ("", 0)) if isinstance(node.op, Cast) else ("", 0)
        if region != "weights":
            nodes.append(node)
            continue
        (w,), (copy,) = node.inputs, node.outputs
        copies[w] = copy
        graph.places[copy] = "copies", layout.copy_offset(offset, copy.dtype)
    graph.nodes = nodes
    for node in nodes:
        if isinstance(node.op, Update):
            weights = node.inputs[2 : 2 + node.op.count]
            node.op = replace(node.op, copies=tuple(i for i, w in enumerate(weights) if w in copies))
            node.outputs = tuple(copies[w] for w in weights if w in copies)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 values as the bit patterns of bf16, rounded to the nearest, ties to even, as the device rounds."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (words + (0x7FFF + (words >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
