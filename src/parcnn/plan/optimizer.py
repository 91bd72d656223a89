"""What a plan needs of an optimizer (`parcnn.optim`): for each parameter a rule, and the ops that a rule's update is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from parcnn.ops.base import Emit, Value


@dataclass(frozen=True)
class Group:
    """Parameters that are updated together.

    hyper: the table of what changes from step to step; state: the step's number and key (`parcnn.ops.feed`); buffers: the
    first state tensor of each weight, then the second of each; dtype: of tensors between layers, which products of matrices
    may use, too.
    """

    hyper: Value
    state: Value
    weights: Sequence[Value]
    gradients: Sequence[Value]
    buffers: Sequence[Value]
    dtype: str


class Rule(Protocol):
    """How some parameters are updated. Equal rules update together."""

    @property
    def slots(self) -> int:
        """State tensors a parameter, each of the parameter's shape and zero before the first step."""

    @property
    def waits(self) -> bool:
        """Whether an update costs about the same for one parameter as for many, so that gradients wait for each other."""

    @property
    def is_elementwise(self) -> bool:
        """Whether elements of a parameter are updated apart: zeros around it, whose gradients are zero, then change nothing."""

    def emit(self, emit: Emit, group: Group) -> None:
        """Append the ops that update the group's weights."""


class Optimizer(Protocol):
    """An optimizer."""

    def rules(self, parameters: Mapping[str, tuple[int, ...]]) -> Mapping[str, Rule]:
        """The rule of each parameter, by its name, for parameters of these shapes (torch's)."""
