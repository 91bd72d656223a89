"""What is special to the optimizer Muon: its directions, as matrices, before their products, and the update after them.

A weight (K, ...) is the matrix (K, rest). Its direction lies in memory as the *wide* one of that matrix and its transpose,
rows <= columns, both rounded up to multiples of 8 by zeros: products of it are then aligned, and as good as without.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from parcnn.ops.base import Op, Spec
from parcnn.ops.update import Update

PADDING = 8  # sides of directions are multiples of it
ADJUSTMENTS = ("original", "match_rms_adamw")


def matrix_of(weight: Spec) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix."""
    return weight.shape[0], weight.size // weight.shape[0]


def is_tall(weight: Spec) -> bool:
    """Whether the direction is the matrix's transpose."""
    rows, columns = matrix_of(weight)
    return rows > columns


def direction_shape(weight: Spec) -> tuple[int, int]:
    """Rows and columns of a weight's direction in memory."""
    rows, columns = sorted(matrix_of(weight))
    return -(-rows // PADDING) * PADDING, -(-columns // PADDING) * PADDING


@dataclass(frozen=True)
class MuonDirection(Op):
    """buf = momentum*buf + g; u = g + momentum*buf (nesterov) or buf; X = u / (|u| + eps), |u| being Frobenius' norm.

    inputs: `count` gradients, and as many buffers, which are overwritten; outputs: the X, in `dtype`, of `direction_shape`.
    """

    side_branch: ClassVar[bool] = True
    count: int = 1
    momentum: float = 0.95
    nesterov: bool = True
    eps: float = 1e-7
    dtype: str = "f32"

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return tuple(Spec(direction_shape(g), self.dtype) for g in inputs[: self.count])

    @property
    def overwritten(self) -> tuple[int, ...]:
        return tuple(range(self.count, 2 * self.count))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 7 * sum(g.size for g in inputs[: self.count])


@dataclass(frozen=True)
class MuonUpdate(Update):
    """w *= 1 - lr*weight_decay; w -= lr * factor(w) * X, lr being hyper[3]; `renormalize`: first w *= sqrt(K) / |w|.

    inputs: hyper, state, `count` weights, `count` directions X (of `direction_shape`).
    """

    weight_decay: float = 0.0
    adjustment: str = "original"
    renormalize: bool = False

    @property
    def slots(self) -> int:
        return 0

    def factor(self, weight: Spec) -> float:
        """Of the learning rate, for a weight's shape (torch.optim.Muon's adjust_lr_fn).

        'original': sqrt(max(1, rows/columns)), as Jordan's code has it; 'match_rms_adamw': 0.2 * sqrt(max(rows, columns)), with
        which an update is as large as AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training").
        """
        rows, columns = matrix_of(weight)
        return 0.2 * sqrt(max(rows, columns)) if self.adjustment == "match_rms_adamw" else sqrt(max(1, rows / columns))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return (6 if self.renormalize else 3) * sum(s.size for s in inputs[2 : 2 + self.count])
