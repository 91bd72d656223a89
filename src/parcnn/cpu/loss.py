"""Losses, with their gradients."""

from __future__ import annotations

import numpy as np

from parcnn.cpu.workers import Workspace
from parcnn.ops.loss import CrossEntropy, MeanSquaredError


def cross_entropy(op: CrossEntropy, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """Mean over rows of -sum_c t_c * log softmax(logits)_c, the rows predicted right, and (softmax - t) / N."""
    logits, labels = inputs
    n, classes = logits.shape
    outputs[1][0] = np.count_nonzero(logits.argmax(axis=1) == labels)
    known = (labels >= 0) & (labels < classes)
    rows, eps = np.arange(n), op.label_smoothing
    label = np.where(known, labels, 0)

    shifted = logits - logits.max(axis=1, keepdims=True)  # exp cannot overflow
    exp = np.exp(shifted)
    total = exp.sum(axis=1)
    row_loss = np.log(total) - (1 - eps) * shifted[rows, label]
    if eps:
        row_loss -= eps / classes * shifted.sum(axis=1)
    row_loss[~known] = np.nan
    outputs[0][0] = row_loss.sum() / n

    if op.train:
        dlogits = outputs[2]
        np.divide(exp, total[:, None] * n, out=dlogits)
        if eps:
            dlogits -= eps / (classes * n)
        dlogits[rows, label] -= np.where(known, (1 - eps) / n, 0)


def mean_squared_error(
    op: MeanSquaredError, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """Mean of (pred - target)^2, and its gradient 2 (pred - target) / size."""
    difference = inputs[0] - inputs[1]
    outputs[0][0] = np.square(difference).sum() / difference.size
    if op.train:
        np.multiply(difference, 2 / difference.size, out=outputs[1])


RUN = {CrossEntropy: cross_entropy, MeanSquaredError: mean_squared_error}
