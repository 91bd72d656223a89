"""Batch normalisation. Rows are pixels of all images; sums run over pieces of rows, then over pieces in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np

from parcnn.cpu.pointwise import route
from parcnn.cpu.pool import pool_dgrad, pool_fprop, pool_scratch
from parcnn.cpu.sums import RowSums, row_sums_bytes, rows_a_piece, rows_at_once
from parcnn.cpu.workers import Scratch, ScratchSize, Workspace, scratch_bytes
from parcnn.ops.base import Op, Spec
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain
from parcnn.ops.pool import PoolFprop


def batch_norm_train(
    op: BatchNormTrain, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """y = act((x - mean) * rstd * gamma + beta [+ addend]) with the batch's statistics, to which the running ones move."""
    if op.window:
        workspace.shared.rewind()
        z = workspace.shared.take(inputs[0].shape, inputs[0].dtype)
        inner = workspace.within(workspace.shared.used)
        batch_norm_train(replace(op, act=None, window=None), inputs, [z, *outputs[2:]], inner)
        pool_fprop(PoolFprop(**asdict(op.window), act=op.act), [z], outputs[:2], workspace)
        return
    x, y = _rows(inputs[0]), _rows(outputs[0])
    gamma, beta, running_mean, running_var = inputs[1:5]
    mean, rstd = outputs[1:]
    n = x.shape[0]
    if op.moments:
        mean[...], var = inputs[5][0], inputs[5][1] / n
    else:
        var = moments(x, mean, workspace) / n
    rstd[...] = 1 / np.sqrt(var + op.eps)
    running_mean += op.momentum * (mean - running_mean)
    running_var += op.momentum * (var * (n / max(n - 1, 1)) - running_var).astype(x.dtype)
    _normalise(op, x, mean, rstd * gamma, beta, inputs[5 + op.moments :], y, workspace)


def moments(x: np.ndarray, mean: np.ndarray, workspace: Workspace) -> np.ndarray:
    """Write the mean (C) of x (rows, C); return the sums of squared deviations from it, in float64."""
    sums = _sums(x, 1, workspace)
    mean[...] = sums.total(lambda rows, scratch: (x[rows],))[0] / x.shape[0]

    def squares(rows: slice, scratch: Scratch) -> tuple[np.ndarray, ...]:
        centred = np.subtract(x[rows], mean, out=scratch.take(x[rows].shape, x.dtype))
        return (np.square(centred, out=centred),)

    return sums.total(squares)[0]


def batch_norm_infer(
    op: BatchNormInfer, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """y = act((x - running_mean) / sqrt(running_var + eps) * gamma + beta [+ addend])."""
    x, y = _rows(inputs[0]), _rows(outputs[0])
    gamma, beta, mean, var = inputs[1:5]
    _normalise(op, x, mean, gamma / np.sqrt(var + op.eps), beta, inputs[5:], y, workspace)


def batch_norm_dgrad(
    op: BatchNormDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """dbeta = sum dz, dgamma = sum dz*xhat, dx = gamma*rstd*(dz - (dbeta + xhat*dgamma)/n)."""
    if op.window:
        _, h, w, _ = inputs[1].shape
        workspace.shared.rewind()
        error = workspace.shared.take(inputs[1].shape, inputs[1].dtype)
        pool_dgrad(op.window.backward((h, w)), [inputs[0], inputs[6]], [error], workspace)
        inputs, workspace = [error, *inputs[1:6]], workspace.within(workspace.shared.used)
    dy, x, dx = _rows(inputs[0]), _rows(inputs[1]), _rows(outputs[0])
    gamma, beta, mean, rstd = inputs[2:6]
    n = x.shape[0]
    dgamma, dbeta = inputs[-2:] if op.sums else outputs[1:]
    if not op.sums:
        _parameter_gradients(op.act, dy, x, (gamma, beta, mean, rstd), outputs[1:], workspace)

    def piece(rows: slice, scratch: Scratch) -> None:
        dz, shared = _dz_centred(op.act, dy[rows], x[rows], (gamma, beta, mean, rstd), scratch)
        shared *= rstd * dgamma / n
        shared += dbeta / n
        np.subtract(dz, shared, out=dx[rows])
        dx[rows] *= gamma * rstd

    workspace.each_slice(n, piece, rows_a_piece(*x.shape))


def pass_error(
    act: str | None, error: np.ndarray, below: list[np.ndarray], sums: list[np.ndarray], workspace: Workspace
) -> None:
    """Take an error through the activation behind a batch norm of x, gamma, beta, mean, rstd, in place; write dgamma, dbeta."""
    dz, x, parameters = _rows(error), _rows(below[0]), tuple(below[1:])

    def piece(rows: slice, scratch: Scratch) -> None:
        dz[rows] = _dz_centred(act, dz[rows], x[rows], parameters, scratch)[0]

    if act:
        workspace.each_slice(len(x), piece, rows_a_piece(*x.shape))
    _parameter_gradients(None, dz, x, parameters, sums, workspace)


def batch_norm_infer_dgrad(
    op: BatchNormInferDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """dx = dz*gamma*rstd, dgamma and dbeta, with frozen statistics."""
    dy, x, dx = _rows(inputs[0]), _rows(inputs[1]), _rows(outputs[0])
    gamma, beta, mean, var = inputs[2:]
    rstd = 1 / np.sqrt(var + op.eps)
    sums = _parameter_gradients(op.act, dy, x, (gamma, beta, mean, rstd), outputs[1:], workspace)

    def piece(rows: slice, scratch: Scratch) -> None:
        dz, _ = _dz_centred(op.act, dy[rows], x[rows], (gamma, beta, mean, rstd), scratch)
        np.multiply(dz, gamma * rstd, out=dx[rows])

    workspace.each_slice(x.shape[0], piece, sums.rows_a_piece)


def _normalise(
    op: BatchNormTrain | BatchNormInfer,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    beta: np.ndarray,
    addends: list[np.ndarray],
    y: np.ndarray,
    workspace: Workspace,
) -> None:
    """Write y = act((x - mean) * scale + beta), or act(... + beta + addend), which y may lie over."""

    def piece(rows: slice, scratch: Scratch) -> None:
        z = scratch.take(y[rows].shape, y.dtype) if op.add else y[rows]
        np.subtract(x[rows], mean, out=z)
        z *= scale
        z += beta
        for addend in addends:
            np.add(z, _rows(addend)[rows], out=y[rows])
        if op.act:
            np.maximum(y[rows], 0, out=y[rows])

    workspace.each_slice(len(x), piece, rows_a_piece(*x.shape))


def _dz_centred(
    act: str | None, dy: np.ndarray, x: np.ndarray, parameters: tuple[np.ndarray, ...], scratch: Scratch
) -> tuple[np.ndarray, np.ndarray]:
    """dz = dy * act'(gamma*xhat + beta) and x - mean, in scratch (dz is dy itself without an activation)."""
    gamma, beta, mean, rstd = parameters
    dz, centred = scratch.take(x.shape, x.dtype), scratch.take(x.shape, x.dtype)
    np.subtract(x, mean, out=centred)
    if not act:
        return dy, centred
    # The forward's very operations, so that the same elements are cut off.
    np.multiply(centred, rstd * gamma, out=dz)
    dz += beta
    cut = scratch.take(x.shape, bool)
    np.less_equal(dz, 0, out=cut)
    np.logical_not(cut, out=cut)  # NaN goes through
    route(dy, cut, dz)
    return dz, centred


def _parameter_gradients(
    act: str | None,
    dy: np.ndarray,
    x: np.ndarray,
    parameters: tuple[np.ndarray, ...],
    outputs: list[np.ndarray],
    workspace: Workspace,
) -> RowSums:
    sums = _sums(x, 2, workspace)

    def terms(rows: slice, scratch: Scratch) -> tuple[np.ndarray, ...]:
        dz, centred = _dz_centred(act, dy[rows], x[rows], parameters, scratch)
        centred *= dz
        return centred, dz

    dgamma, dbeta = sums.total(terms)
    outputs[0][...] = dgamma * parameters[3]  # the sums are of dz * (x - mean)
    outputs[1][...] = dbeta
    return sums


def _sums(x: np.ndarray, count: int, workspace: Workspace) -> RowSums:
    workspace.shared.rewind()
    n, c = x.shape
    return RowSums(n, c, count, x.dtype, workspace)


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def scratch_size(count: int) -> Callable[[Op, tuple[Spec, ...], tuple[Spec, ...], int], ScratchSize]:
    """Scratch memory of an op that sums `count` terms over the rows of its first output's shape."""

    def size(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
        dtype = np.dtype(np.float64 if outputs[0].dtype == "f64" else np.float32)
        c = outputs[0].shape[-1]
        n = outputs[0].size // c
        taken = rows_at_once(n, c, workers), c
        own = scratch_bytes([(taken, dtype)] * count + [(taken, np.bool_)])
        return ScratchSize(row_sums_bytes(n, c, count, dtype), own)

    return size


def _train_scratch(
    op: BatchNormTrain, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int
) -> ScratchSize:
    x = inputs[0]
    size = scratch_size(1)(op, inputs, (x,), workers)
    if op.window is None:
        return size
    pool = pool_scratch(PoolFprop(**asdict(op.window)), (x,), outputs, workers)
    z = scratch_bytes([(x.shape, np.float64 if x.dtype == "f64" else np.float32)])
    return ScratchSize(size.shared + z, max(size.per_worker, pool.per_worker))


def _infer_scratch(
    op: BatchNormInfer, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int
) -> ScratchSize:
    return ScratchSize(0, scratch_size(1)(op, inputs, outputs, workers).per_worker if op.add else 0)


def _dgrad_scratch(
    op: BatchNormDgrad, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int
) -> ScratchSize:
    size = scratch_size(2)(op, inputs, outputs, workers)
    if op.window is None:
        return size
    dy, x, *_, idx = inputs
    _, h, w, _ = x.shape
    pool = pool_scratch(op.window.backward((h, w)), (dy, idx), (x,), workers)
    error = scratch_bytes([(x.shape, np.float64 if x.dtype == "f64" else np.float32)])
    return ScratchSize(size.shared + error, max(size.per_worker, pool.per_worker))


RUN = {
    BatchNormTrain: batch_norm_train,
    BatchNormInfer: batch_norm_infer,
    BatchNormDgrad: batch_norm_dgrad,
    BatchNormInferDgrad: batch_norm_infer_dgrad,
}
SCRATCH = {
    BatchNormTrain: _train_scratch,
    BatchNormInfer: _infer_scratch,
    BatchNormDgrad: _dgrad_scratch,
    BatchNormInferDgrad: scratch_size(2),
}
