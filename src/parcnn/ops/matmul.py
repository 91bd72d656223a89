"""Products of matrices: a group of them, of whatever sizes, in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from parcnn.errors import ShapeError
from parcnn.ops.base import Op, Spec


@dataclass(frozen=True)
class MatMul(Op):
    """D_i = alpha * op(A_i) op(B_i) + beta * C_i for i = 0 .. count-1, op(X) being X or its transpose (BLAS's GEMM).

    inputs: `count` of A, of B, and where beta is not 0 of C, each a matrix; the same tensor may be several of them. Sizes may
    differ from product to product. Sums are kept in the accumulator's type and rounded once. `symmetric` promises that every
    D is (a matrix times its own transpose; C as well), so that one of two halves need be computed.
    """

    side_branch: ClassVar[bool] = True  # the optimizer's products; layers are convolutions
    count: int = 1
    transpose_a: bool = False
    transpose_b: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    symmetric: bool = False

    def sizes(self, *inputs: Spec) -> tuple[tuple[int, int, int], ...]:
        """(M, N, K) of each product: D is (M, N), the reduction K long. Raises ShapeError for operands that do not fit."""
        if len(inputs) != self.count * self.operands or any(len(s.shape) != 2 for s in inputs):
            raise ShapeError(
                "not the operands of matrix products",
                where=self.name,
                expected=f"{self.count * self.operands} matrices",
                got=[s.shape for s in inputs],
            )
        return tuple(self._size(*inputs[i :: self.count]) for i in range(self.count))

    def _size(self, a: Spec, b: Spec, c: Spec | None = None) -> tuple[int, int, int]:
        m, k = reversed(a.shape) if self.transpose_a else a.shape
        depth, n = reversed(b.shape) if self.transpose_b else b.shape
        square = m == n or not self.symmetric
        if depth != k or (c is not None and c.shape != (m, n)) or not square:
            raise ShapeError(
                "matrices that do not fit together",
                where=self.name,
                expected="op(A) (M, K), op(B) (K, N), C (M, N)" + ", M = N" * self.symmetric,
                got=[s.shape for s in (a, b, c) if s is not None],
            )
        return m, n, k

    @property
    def operands(self) -> int:
        """Of each product."""
        return 3 if self.beta else 2

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return tuple(Spec((m, n), a.dtype) for (m, n, _), a in zip(self.sizes(*inputs), inputs, strict=False))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return sum((m * (m + 1) if self.symmetric else 2 * m * n) * k for m, n, k in self.sizes(*inputs))
