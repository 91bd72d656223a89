"""SGD, Adam and AdamW with torch.optim's arguments and equations, and what an optimizer is to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from parcnn.errors import ArgumentError
from parcnn.ops.base import Emit
from parcnn.ops.update import AdamUpdate, SgdUpdate, Update

if TYPE_CHECKING:
    from parcnn.plan.optimizer import Group


class OneRule:
    """Base of optimizers that update every parameter alike, by one op: they are their own rule (`parcnn.plan.optimizer`)."""

    waits = False
    is_elementwise = True

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Raises ArgumentError for parameters, which torch's optimizers take first."""
        refuse_parameters(cls.__name__, values)
        return super().__new__(cls)

    def rules(self, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, Self]:
        """The same rule for all."""
        return dict.fromkeys(parameters, self)

    def update(self, count: int) -> Update:
        """The op that updates `count` parameters."""
        raise NotImplementedError(type(self).__name__)

    def emit(self, emit: Emit, group: Group) -> None:
        """Append the op that updates the group's weights."""
        operands = (*group.weights, *group.gradients, *group.buffers)
        emit(self.update(len(group.weights)), group.hyper, group.state, *operands)


@dataclass(frozen=True)
class SGD(OneRule):
    """Stochastic gradient descent (torch.optim.SGD). Raises ArgumentError for values out of range."""

    lr: float = 0.01
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check(self.lr >= 0, "SGD.lr", ">= 0", self.lr)
        check(0 <= self.momentum < 1, "SGD.momentum", "0 <= momentum < 1", self.momentum)
        check(self.weight_decay >= 0, "SGD.weight_decay", ">= 0", self.weight_decay)
        plain = self.momentum > 0 and self.dampening == 0
        check(not self.nesterov or plain, "SGD.nesterov", "momentum > 0 and dampening 0", self)

    @property
    def slots(self) -> int:
        """State tensors a parameter."""
        return 1 if self.momentum else 0

    def update(self, count: int) -> SgdUpdate:
        """The op that updates `count` parameters."""
        return SgdUpdate(count, self.momentum, self.nesterov, self.dampening, self.weight_decay)

    def hyper(self, lr: np.ndarray, first_step: int) -> np.ndarray:
        """The table (steps, 4) of `parcnn.ops.update` for learning rates lr (steps,), from step `first_step` on."""
        return np.stack([lr, np.ones_like(lr), np.ones_like(lr), np.zeros_like(lr)], axis=1)


@dataclass(frozen=True)
class Adam(OneRule):
    """Adam (Kingma & Ba 2015; torch.optim.Adam). Raises ArgumentError for values out of range."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    _decoupled = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check(self.lr >= 0, f"{name}.lr", ">= 0", self.lr)
        check(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"{name}.betas", "two in [0, 1)", self.betas
        )
        check(self.eps > 0, f"{name}.eps", "> 0", self.eps)
        check(self.weight_decay >= 0, f"{name}.weight_decay", ">= 0", self.weight_decay)

    @property
    def slots(self) -> int:
        """State tensors a parameter: first and second moment."""
        return 2

    def update(self, count: int) -> AdamUpdate:
        """The op that updates `count` parameters."""
        return AdamUpdate(count, *self.betas, self.eps, self.weight_decay, self._decoupled)

    def hyper(self, lr: np.ndarray, first_step: int) -> np.ndarray:
        """The table (steps, 4) of `parcnn.ops.update`: lr and the bias corrections of steps first_step + 1, ..."""
        t = np.arange(first_step + 1, first_step + 1 + len(lr), dtype=np.float64)
        corrections = [-np.expm1(t * np.log(b)) if b else np.ones_like(t) for b in self.betas]
        return np.stack([lr, *corrections, np.zeros_like(lr)], axis=1)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019; torch.optim.AdamW)."""

    weight_decay: float = 1e-2

    _decoupled = True


def refuse_parameters(name: str, values: Sequence[object]) -> None:
    """Raise ArgumentError where the first value is no number: torch's optimizers take parameters there."""
    if values and not isinstance(values[0], Real):
        raise ArgumentError(
            "an optimizer takes no parameters: the Trainer gives it the model's", where=name,
            expected="a learning rate", got=type(values[0]).__name__, remedy=f"{name}(0.1), or {name}(lr=0.1)",
        )  # fmt: skip


def check(good: bool, where: str, expected: str, got: object) -> None:
    """Raise ArgumentError unless `good`."""
    if not good:
        raise ArgumentError("a value out of range", where=where, expected=expected, got=got)
