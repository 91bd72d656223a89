"""Muon's directions and its updates; the products between them are in `matmul`."""

from __future__ import annotations

import numpy as np

from parcnn.cpu.workers import Scratch, ScratchSize, Workspace, scratch_bytes
from parcnn.ops.base import Op, Spec
from parcnn.ops.muon import MuonDirection, MuonUpdate, is_tall, matrix_of


def muon_direction(
    op: MuonDirection, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """Momentum in place; the direction divided by its norm, as a wide matrix among zeros."""

    def one(i: int, scratch: Scratch) -> None:
        g, buf, x = inputs[i], inputs[op.count + i], outputs[i]
        buf *= op.momentum
        buf += g
        u = scratch.take(g.shape, g.dtype)
        np.copyto(u, buf)
        if op.nesterov:
            u *= op.momentum
            u += g
        u /= np.sqrt(np.vdot(u, u)) + op.eps
        x.fill(0)
        np.copyto(_within(x, g), u.reshape(matrix_of(_spec(g))))

    workspace.each(range(op.count), one)


def muon_update(op: MuonUpdate, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """A step along the orthogonalised direction, after weight decay and, where asked for, a return to the norm sqrt(K)."""
    hyper, state = inputs[:2]
    lr = float(hyper[state[0], 3])

    def one(i: int, scratch: Scratch) -> None:
        w, x = inputs[2 + i], inputs[2 + op.count + i]
        norm = np.sqrt(np.vdot(w, w)) if op.renormalize else 0.0
        w *= (1 - lr * op.weight_decay) * (np.sqrt(len(w)) / norm if norm else 1.0)
        step = scratch.take(matrix_of(_spec(w)), w.dtype)
        np.multiply(_within(x, w), lr * op.factor(_spec(w)), out=step)
        w -= step.reshape(w.shape)

    workspace.each(range(op.count), one)


def _within(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The part of a padded direction that is the weight's, as the weight's own matrix."""
    rows, columns = matrix_of(_spec(weight))
    return x[:columns, :rows].T if is_tall(_spec(weight)) else x[:rows, :columns]


def _spec(weight: np.ndarray) -> Spec:
    return Spec(weight.shape)


def _scratch(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    weights = [s for s in inputs if s.dtype in ("f32", "f64")]
    dtype = np.float64 if weights[0].dtype == "f64" else np.float32
    return ScratchSize(per_worker=scratch_bytes([((max(s.size for s in weights),), dtype)]))


RUN = {MuonDirection: muon_direction, MuonUpdate: muon_update}
SCRATCH = {MuonDirection: _scratch, MuonUpdate: _scratch}
