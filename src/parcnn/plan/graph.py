"""The graph: ops on values with static shapes, in topological order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from parcnn.ops.base import Op, Spec, Value


@dataclass(eq=False)
class Node:
    """One op of the graph."""

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    layer: str
    phase: str


@dataclass(eq=False)
class Graph:
    """Nodes in an order in which they can run one by one.

    `places` names the memory of values that outlive a step: region and byte offset. All other values are transient.
    """

    mode: str  # 'train', 'eval' or 'predict'
    dtype: str = "f32"
    nodes: list[Node] = field(default_factory=list)
    places: dict[Value, tuple[str, int]] = field(default_factory=dict)
    layer: str = ""  # path of the module being traced
    phase: str = "forward"

    def emit(self, op: Op, *inputs: Value) -> tuple[Value, ...]:
        """Append a node and return its outputs."""
        outputs = tuple(Value(spec, f"{self.layer}.{op.name}") for spec in op.infer(*(v.spec for v in inputs)))
        self.nodes.append(Node(op, inputs, outputs, self.layer, self.phase))
        return outputs

    def place(self, spec: Spec, region: str, offset: int, label: str) -> Value:
        """A value that lives in `region` at `offset`."""
        value = Value(spec, label)
        self.places[value] = (region, offset)
        return value

    def consumers(self) -> dict[Value, list[Node]]:
        """The nodes that read each value."""
        readers: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                readers.setdefault(value, []).append(node)
        return readers

    def drop_dead(self, results: Iterable[Value] = ()) -> None:
        """Remove nodes that overwrite nothing and whose outputs nobody reads; `results` are still to be read."""
        wanted = set(results)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if node.op.overwritten or any(v in wanted for v in node.outputs):
                wanted.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
