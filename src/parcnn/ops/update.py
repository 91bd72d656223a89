"""Optimizer updates, in place, for a group of parameters in one launch (torch.optim's equations).

hyper is a table (steps, 4): learning rate, 1-beta1^t, 1-beta2^t, Muon's learning rate; row state[0] belongs to this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from parcnn.ops.base import Op, Spec

MAX_GROUP = 24  # parameters in one update: what fits into a kernel's argument block


@dataclass(frozen=True)
class Update(Op):
    """inputs: hyper (steps,4), state (8), then `count` weights, `count` gradients, and `count` of each buffer; outputs: the
    new weights of `copies`, rounded to bf16."""

    side_branch: ClassVar[bool] = True
    count: int = 1
    copies: tuple[int, ...] = field(default=(), kw_only=True)  # positions among the weights, ascending

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return tuple(Spec(inputs[2 + i].shape, "bf16") for i in self.copies)

    @property
    def overwritten(self) -> tuple[int, ...]:
        return (*range(2, 2 + self.count), *range(2 + 2 * self.count, 2 + (2 + self.slots) * self.count))

    @property
    def slots(self) -> int:
        """State tensors that a parameter has: momentum, or Adam's m and v."""
        raise NotImplementedError

    def bytes(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        written = (*outputs, *(inputs[i] for i in self.overwritten))
        return sum(s.nbytes for s in (*inputs[2:], *written))


@dataclass(frozen=True)
class SgdUpdate(Update):
    """g += weight_decay*w; with momentum: buf = g at state[1] == 0, else momentum*buf + (1-dampening)*g;
    g = g + momentum*buf if nesterov else buf; w -= lr*g."""

    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    weight_decay: float = 0.0

    @property
    def slots(self) -> int:
        return 1 if self.momentum else 0

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 6 * sum(s.size for s in inputs[2 : 2 + self.count])


@dataclass(frozen=True)
class AdamUpdate(Update):
    """g += weight_decay*w (Adam) or w *= 1-lr*weight_decay (AdamW, `decoupled`); m += (1-beta1)*(g-m);
    v = beta2*v + (1-beta2)*g*g; w -= lr/hyper[1] * m / (sqrt(v/hyper[2]) + eps)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def slots(self) -> int:
        return 2

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 12 * sum(s.size for s in inputs[2 : 2 + self.count])
