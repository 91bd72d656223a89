"""Optimizer updates in place (torch.optim's equations), in pieces that stay in cache."""

from __future__ import annotations

import numpy as np

from parcnn.cpu.workers import PIECE, Scratch, ScratchSize, Workspace, scratch_bytes, together
from parcnn.ops.base import Spec
from parcnn.ops.update import AdamUpdate, SgdUpdate, Update


def sgd_update(op: SgdUpdate, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """w -= lr * g, with weight decay, momentum and Nesterov's look-ahead."""
    hyper, state = inputs[:2]
    lr, first = float(hyper[state[0], 0]), state[1] == 0

    def piece(part: list[np.ndarray], scratch: Scratch) -> None:
        w, g = part[:2]
        step = scratch.take(w.shape, w.dtype)
        if op.weight_decay:
            np.multiply(w, op.weight_decay, out=step)
            step += g
        else:
            np.copyto(step, g)
        if op.momentum:
            buf = part[2]
            if first:
                np.copyto(buf, step)
            else:
                damped = scratch.take(w.shape, w.dtype)
                np.multiply(step, 1 - op.dampening, out=damped)
                buf *= op.momentum
                buf += damped
            if op.nesterov:
                ahead = scratch.take(w.shape, w.dtype)
                np.multiply(buf, op.momentum, out=ahead)
                step += ahead
            else:
                np.copyto(step, buf)
        step *= lr
        w -= step

    workspace.each(_pieces(op, inputs, workspace.workers), piece)


def adam_update(op: AdamUpdate, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """Adam (Kingma & Ba 2015), or AdamW (Loshchilov & Hutter 2019) where the decay is decoupled."""
    hyper, state = inputs[:2]
    lr, correction1, correction2 = (float(v) for v in hyper[state[0], :3])

    def piece(part: list[np.ndarray], scratch: Scratch) -> None:
        w, g, m, v = part
        a, b = scratch.take(w.shape, w.dtype), scratch.take(w.shape, w.dtype)
        np.copyto(a, g)
        if op.decoupled:
            w *= 1 - lr * op.weight_decay
        elif op.weight_decay:
            np.multiply(w, op.weight_decay, out=b)
            a += b
        np.subtract(a, m, out=b)
        b *= 1 - op.beta1
        m += b
        np.square(a, out=a)
        a *= 1 - op.beta2
        v *= op.beta2
        v += a
        np.divide(v, correction2, out=a)
        np.sqrt(a, out=a)
        a += op.eps
        np.divide(m, a, out=b)
        b *= lr / correction1
        w -= b

    workspace.each(_pieces(op, inputs, workspace.workers), piece)


def _pieces(op: Update, inputs: list[np.ndarray], workers: int) -> list[list[np.ndarray]]:
    """The parameters as pieces: weights, gradients and buffers of the same elements."""
    pieces = []
    size = _at_once([t.size for t in inputs[2 : 2 + op.count]], workers)
    for i in range(op.count):
        flat = [t.reshape(-1) for t in inputs[2 + i :: op.count]]
        pieces += [[t[start : start + size] for t in flat] for start in range(0, flat[0].size, size)]
    return pieces


def _at_once(sizes: list[int], workers: int) -> int:
    """Elements that one of so many threads takes in one go."""
    return PIECE * together(sum(sizes) // PIECE, workers)


def _scratch(op: Update, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], workers: int) -> ScratchSize:
    sizes = [s.size for s in inputs[2 : 2 + op.count]]
    largest = min(_at_once(sizes, workers), max(sizes))
    dtype = np.float64 if inputs[2].dtype == "f64" else np.float32
    return ScratchSize(per_worker=scratch_bytes([((largest,), dtype)] * 3))


RUN = {SgdUpdate: sgd_update, AdamUpdate: adam_update}
SCRATCH = {SgdUpdate: _scratch, AdamUpdate: _scratch}
