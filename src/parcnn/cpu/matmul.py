"""Products of matrices, by BLAS, in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parcnn.cpu.workers import Scratch, ScratchSize, Workspace, scratch_bytes
from parcnn.ops.base import Op, Spec
from parcnn.ops.matmul import MatMul

# Rows of a result that a thread computes at once. The same for every number of threads: BLAS may add in another order
# for another number of rows.
ROWS = 128
FLOPS_A_US = 40_000  # of a thread


def matmul(op: MatMul, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """D = alpha * op(A) op(B) + beta * C for each product of the group."""
    blocks = [(i, row) for i, d in enumerate(outputs) for row in range(0, d.shape[0], ROWS)]

    def block(item: tuple[int, int], scratch: Scratch) -> None:
        i, row = item
        a, b, *c = inputs[i :: op.count]
        rows = slice(row, row + ROWS)
        d = outputs[i][rows]
        np.matmul(a[:, rows].T if op.transpose_a else a[rows], b.T if op.transpose_b else b, out=d)
        if op.alpha != 1:
            d *= op.alpha
        if c:
            scaled = scratch.take(d.shape, d.dtype)
            np.multiply(c[0][rows], op.beta, out=scaled)
            d += scaled

    workspace.each(blocks, block)


def _scratch(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    dtype = np.float64 if outputs[0].dtype == "f64" else np.float32
    widest = max(d.shape[1] for d in outputs)
    return ScratchSize(per_worker=scratch_bytes([((ROWS, widest), dtype)]))


def _time_us(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> float:
    return op.flops(inputs, outputs) / FLOPS_A_US


RUN = {MatMul: matmul}
SCRATCH = {MatMul: _scratch}
TIME_US: dict[type[Op], Callable[..., float]] = {MatMul: _time_us}
