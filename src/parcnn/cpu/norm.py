"""Batch normalisation. Rows are pixels of all images; sums run over pieces of rows, then over pieces in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parcnn.cpu.pointwise import route
from parcnn.cpu.workers import PIECE, Scratch, ScratchSize, Workspace, scratch_bytes
from parcnn.ops.base import Op, Spec
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain

# BLAS adds a piece's rows one after the other: few enough that a float32 sum keeps its last digits.
MOST_ROWS = 512


def batch_norm_train(
    op: BatchNormTrain, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """y = act((x - mean) * rstd * gamma + beta) with the batch's statistics; running statistics move towards them."""
    x, y = _rows(inputs[0]), _rows(outputs[0])
    gamma, beta, running_mean, running_var = inputs[1:]
    mean, rstd = outputs[1:]
    n = x.shape[0]
    sums = _Sums(x, 1, workspace)

    sums.over_rows(lambda rows, scratch: (x[rows],))
    mean[...] = sums.total()[0] / n

    def squares(rows: slice, scratch: Scratch) -> tuple[np.ndarray, ...]:
        centred = np.subtract(x[rows], mean, out=scratch.take(x[rows].shape, x.dtype))
        return (np.square(centred, out=centred),)

    sums.over_rows(squares)
    var = sums.total()[0] / n
    rstd[...] = 1 / np.sqrt(var + op.eps)
    running_mean += op.momentum * (mean - running_mean)
    running_var += op.momentum * (var * (n / max(n - 1, 1)) - running_var).astype(x.dtype)
    workspace.each_slice(n, lambda i, _: _normalise(x[i], mean, rstd * gamma, beta, op.act, y[i]), sums.rows_a_piece)


def batch_norm_infer(
    op: BatchNormInfer, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """y = act((x - running_mean) / sqrt(running_var + eps) * gamma + beta)."""
    x, y = _rows(inputs[0]), _rows(outputs[0])
    gamma, beta, mean, var = inputs[1:]
    scale = gamma / np.sqrt(var + op.eps)
    workspace.each_slice(
        x.shape[0], lambda i, _: _normalise(x[i], mean, scale, beta, op.act, y[i]), _rows_a_piece(*x.shape)
    )


def batch_norm_dgrad(
    op: BatchNormDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """dbeta = sum dz, dgamma = sum dz*xhat, dx = gamma*rstd*(dz - (dbeta + xhat*dgamma)/n)."""
    dy, x, dx = _rows(inputs[0]), _rows(inputs[1]), _rows(outputs[0])
    gamma, beta, mean, rstd = inputs[2:]
    n = x.shape[0]
    sums = _parameter_gradients(op.act, dy, x, (gamma, beta, mean, rstd), outputs[1:], workspace)
    dgamma, dbeta = outputs[1:]

    def piece(rows: slice, scratch: Scratch) -> None:
        dz, xhat = _dz_xhat(op.act, dy[rows], x[rows], (gamma, beta, mean, rstd), scratch)
        xhat *= dgamma / n
        xhat += dbeta / n
        np.subtract(dz, xhat, out=dx[rows])
        dx[rows] *= gamma * rstd

    workspace.each_slice(n, piece, sums.rows_a_piece)


def batch_norm_infer_dgrad(
    op: BatchNormInferDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """dx = dz*gamma*rstd, dgamma and dbeta, with frozen statistics."""
    dy, x, dx = _rows(inputs[0]), _rows(inputs[1]), _rows(outputs[0])
    gamma, beta, mean, var = inputs[2:]
    rstd = 1 / np.sqrt(var + op.eps)
    sums = _parameter_gradients(op.act, dy, x, (gamma, beta, mean, rstd), outputs[1:], workspace)

    def piece(rows: slice, scratch: Scratch) -> None:
        dz, _ = _dz_xhat(op.act, dy[rows], x[rows], (gamma, beta, mean, rstd), scratch)
        np.multiply(dz, gamma * rstd, out=dx[rows])

    workspace.each_slice(x.shape[0], piece, sums.rows_a_piece)


def _normalise(
    x: np.ndarray, mean: np.ndarray, scale: np.ndarray, beta: np.ndarray, act: str | None, out: np.ndarray
) -> None:
    np.subtract(x, mean, out=out)
    out *= scale
    out += beta
    if act:
        np.maximum(out, 0, out=out)


def _dz_xhat(
    act: str | None, dy: np.ndarray, x: np.ndarray, parameters: tuple[np.ndarray, ...], scratch: Scratch
) -> tuple[np.ndarray, np.ndarray]:
    """dz = dy * act'(gamma*xhat + beta) and xhat, in scratch (dz is dy itself without an activation)."""
    gamma, beta, mean, rstd = parameters
    dz, xhat = scratch.take(x.shape, x.dtype), scratch.take(x.shape, x.dtype)
    if act:
        # The forward's very operations, so that the same elements are cut off.
        _normalise(x, mean, rstd * gamma, beta, None, dz)
        route(dy, ~(dz <= 0), dz)
    else:
        np.copyto(dz, dy)
    np.subtract(x, mean, out=xhat)
    xhat *= rstd
    return dz, xhat


def _parameter_gradients(
    act: str | None,
    dy: np.ndarray,
    x: np.ndarray,
    parameters: tuple[np.ndarray, ...],
    outputs: list[np.ndarray],
    workspace: Workspace,
) -> _Sums:
    sums = _Sums(x, 2, workspace)

    def terms(rows: slice, scratch: Scratch) -> tuple[np.ndarray, ...]:
        dz, xhat = _dz_xhat(act, dy[rows], x[rows], parameters, scratch)
        xhat *= dz
        return xhat, dz

    sums.over_rows(terms)
    for out, total in zip(outputs, sums.total(), strict=True):
        out[...] = total
    return sums


class _Sums:
    """Sums over all rows, per channel: each piece's in the tensor's type by BLAS, the pieces' in float64 and in order."""

    def __init__(self, x: np.ndarray, count: int, workspace: Workspace) -> None:
        self.rows_a_piece = _rows_a_piece(*x.shape)
        self._workspace = workspace
        n, c = x.shape
        workspace.shared.rewind()
        self._partial = workspace.shared.take((-(-n // self.rows_a_piece), count, c), x.dtype)
        self._ones = workspace.shared.take((self.rows_a_piece,), x.dtype)
        self._ones.fill(1)
        self._n = n

    def over_rows(self, terms: Callable[[slice, Scratch], tuple[np.ndarray, ...]]) -> None:
        """Sum the arrays (rows, C) that terms(rows, scratch) returns for each piece of rows."""

        def piece(rows: slice, scratch: Scratch) -> None:
            partial = self._partial[rows.start // self.rows_a_piece]
            for out, term in zip(partial, terms(rows, scratch), strict=True):
                np.matmul(self._ones[: term.shape[0]], term, out=out)

        self._workspace.each_slice(self._n, piece, self.rows_a_piece)

    def total(self) -> np.ndarray:
        """The sums (count, C) in float64."""
        return self._partial.sum(axis=0, dtype=np.float64)


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _rows_a_piece(n: int, c: int) -> int:
    return max(1, min(PIECE // c, MOST_ROWS, n))


def _scratch(count: int) -> Callable[[Op, tuple[Spec, ...], tuple[Spec, ...]], ScratchSize]:
    def size(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> ScratchSize:
        dtype = np.dtype(np.float64 if outputs[0].dtype == "f64" else np.float32)
        c = outputs[0].shape[-1]
        n = outputs[0].size // c
        rows = _rows_a_piece(n, c)
        shared = scratch_bytes([((-(-n // rows), count, c), dtype), ((rows,), dtype)])
        return ScratchSize(shared, scratch_bytes([((rows, c), dtype)] * count))

    return size


RUN = {
    BatchNormTrain: batch_norm_train,
    BatchNormInfer: batch_norm_infer,
    BatchNormDgrad: batch_norm_dgrad,
    BatchNormInferDgrad: batch_norm_infer_dgrad,
}
SCRATCH = {BatchNormTrain: _scratch(1), BatchNormDgrad: _scratch(2), BatchNormInferDgrad: _scratch(2)}
