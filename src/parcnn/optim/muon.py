"""Muon: momentum whose direction is orthogonalised by a Newton-Schulz iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from parcnn.errors import ArgumentError
from parcnn.ops.base import Emit
from parcnn.ops.matmul import MatMul
from parcnn.ops.muon import ADJUSTMENTS, MuonDirection, MuonUpdate
from parcnn.optim.optimizers import SGD, Adam, AdamW, check, refuse_parameters

if TYPE_CHECKING:
    from parcnn.plan.optimizer import Group, Rule


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"), torch.optim.Muon's arguments.

    The momentum of a weight (K, ...), as the matrix (K, rest), is divided by its Frobenius norm; `ns_steps` times X becomes
    a X + (b A + c A²) X with A = X Xᵀ and (a, b, c) = `ns_coefficients`, which brings all singular values near 1; then the
    weight moves along it by lr times a factor of its shape (`adjust_lr_fn`: `parcnn.ops.muon.MuonUpdate.factor`). Products
    are of the training's precision: bf16, as in Jordan's code, in bf16.

    `others` updates the parameters of fewer than two dimensions, and those whose name matches a pattern of `exclude`
    (`fnmatch`: 'head.*'; first and last layers are often left to it); its learning rate follows the same schedule.
    `renormalize`: before each step a weight returns to the norm sqrt(K), as in Jordan's CIFAR-10 speedrun (airbench94_muon,
    with lr 0.24, momentum 0.6, ns_steps 3). Raises ArgumentError for values out of range.
    """

    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    ns_steps: int = 5
    ns_coefficients: tuple[float, ...] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    adjust_lr_fn: str = "original"
    renormalize: bool = False
    exclude: tuple[str, ...] = ()
    others: SGD | Adam = AdamW(3e-4, betas=(0.9, 0.95))  # noqa: RUF009 (frozen, so it may be shared)

    waits = True  # each of its many products is small: a group of weights takes hardly longer than one
    slots = 1
    is_elementwise = False

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Raises ArgumentError for parameters, which torch's optimizers take first."""
        refuse_parameters("Muon", values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check(self.lr > 0, "Muon.lr", "> 0", self.lr)
        check(0 <= self.momentum < 1, "Muon.momentum", "0 <= momentum < 1", self.momentum)
        check(self.weight_decay >= 0, "Muon.weight_decay", ">= 0", self.weight_decay)
        check(1 <= self.ns_steps <= 100, "Muon.ns_steps", "1 to 100", self.ns_steps)
        three = len(self.ns_coefficients) == 3 and all(self.ns_coefficients)
        check(three, "Muon.ns_coefficients", "three numbers other than 0", self.ns_coefficients)
        check(self.eps > 0, "Muon.eps", "> 0", self.eps)
        check(self.adjust_lr_fn in ADJUSTMENTS, "Muon.adjust_lr_fn", " or ".join(ADJUSTMENTS), self.adjust_lr_fn)
        check(isinstance(self.others, SGD | Adam), "Muon.others", "SGD, Adam or AdamW", self.others)

    def rules(self, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, Rule]:
        """Muon for weights, `others` for the rest. Raises ArgumentError for a pattern that no weight's name matches."""
        weights = [name for name, shape in parameters.items() if len(shape) >= 2]
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in weights):
                raise ArgumentError(
                    "a pattern that matches no weight", where="Muon.exclude", expected=", ".join(weights), got=pattern
                )
        mine = {name for name in weights if not any(fnmatchcase(name, pattern) for pattern in self.exclude)}
        return {name: self if name in mine else self.others for name in parameters}

    def emit(self, emit: Emit, group: Group) -> None:
        """Append the ops that update the group's weights. Directions are wide: A is the smaller of X's two Gram matrices."""
        count, (a, b, c) = len(group.weights), self.ns_coefficients
        direction = MuonDirection(count, self.momentum, self.nesterov, self.eps, group.dtype)
        x = emit(direction, *group.gradients, *group.buffers)
        gram = MatMul(count, transpose_b=True, symmetric=True)
        polynomial = replace(gram, alpha=c, beta=b)  # A is symmetric: A Aᵀ = A²
        for _ in range(self.ns_steps):
            grams = emit(gram, *x, *x)
            polynomials = emit(polynomial, *grams, *grams, *grams)
            x = emit(MatMul(count, beta=a), *polynomials, *x, *x)
        update = MuonUpdate(count, self.weight_decay, self.adjust_lr_fn, self.renormalize)
        emit(update, group.hyper, group.state, *group.weights, *x)

    def hyper(self, lr: np.ndarray, first_step: int) -> np.ndarray:
        """The table (steps, 4) of `parcnn.ops.update`: what `others` needs, and lr in the last column."""
        table = self.others.hyper(lr * (self.others.lr / self.lr), first_step)
        table[:, 3] = lr
        return table
