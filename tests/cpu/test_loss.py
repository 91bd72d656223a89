"""Losses and their gradients."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.ops.loss import CrossEntropy, MeanSquaredError
from tests import reference
from tests.op_runner import run_op


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 10), (7, 3), (64, 65)])
def test_cross_entropy(cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, int], smoothing: float) -> None:
    logits = 4 * random.standard_normal(shape)
    labels = random.integers(0, shape[1], shape[0]).astype(np.int32)
    loss, correct, dlogits = run_op(cpu, CrossEntropy(smoothing), [logits, labels])
    assert loss[0] == pytest.approx(reference.cross_entropy(logits, labels, smoothing), rel=1e-12, abs=1e-14)
    assert correct[0] == sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    if logits.size < 100:
        f = lambda v: np.array(reference.cross_entropy(v, labels, smoothing))  # noqa: E731
        expected = reference.numeric_gradient(f, logits, np.array(1.0))
        np.testing.assert_allclose(dlogits, expected, rtol=1e-6, atol=1e-9)
    in_place = run_op(cpu, CrossEntropy(smoothing), [logits, labels], alias=((2, 0),))
    for a, b in zip(in_place, (loss, correct, dlogits), strict=True):
        np.testing.assert_array_equal(a, b)
    without = run_op(cpu, CrossEntropy(smoothing, train=False), [logits, labels])
    assert without[0] == loss
    assert without[1] == correct


def test_cross_entropy_of_large_logits_and_ties(cpu: CpuExecutor) -> None:
    logits = np.array([[1e4, -1e4, 0], [5, 5, 1]], np.float32)
    loss, correct, dlogits = run_op(cpu, CrossEntropy(), [logits, np.array([0, 1], np.int32)])
    assert np.isfinite(loss)
    assert np.isfinite(dlogits).all()
    assert correct[0] == 1  # the first of equals counts as the prediction


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_makes_the_loss_nan(cpu: CpuExecutor, label: int) -> None:
    loss, *_ = run_op(cpu, CrossEntropy(), [np.zeros((2, 3), np.float32), np.array([1, label], np.int32)])
    assert np.isnan(loss[0])


@pytest.mark.parametrize("shape", [(1, 1), (7, 5)])
def test_mean_squared_error(cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, int]) -> None:
    pred, target = random.standard_normal(shape), random.standard_normal(shape)
    loss, dpred = run_op(cpu, MeanSquaredError(), [pred, target])
    assert loss[0] == pytest.approx(((pred - target) ** 2).mean())
    f = lambda v: np.array(((v - target) ** 2).mean())  # noqa: E731
    np.testing.assert_allclose(dpred, reference.numeric_gradient(f, pred, np.array(1.0)), rtol=1e-6, atol=1e-9)
    (in_place,) = run_op(cpu, MeanSquaredError(), [pred, target], alias=((1, 0),))[1:]
    np.testing.assert_array_equal(in_place, dpred)
