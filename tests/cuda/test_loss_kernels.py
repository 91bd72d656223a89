"""Losses and their gradients, by one block and by many."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.kernels import loss
from parcnn.ops.base import Spec
from parcnn.ops.loss import CrossEntropy, MeanSquaredError
from parcnn.ops.program import Executor
from tests.cuda.bf16 import stored, values_of
from tests.cuda.compare import check, executors, normal, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(loss)
element = pytest.mark.parametrize("element", ["f32", "bf16"])

# (rows, classes): one block, one block in turns, many blocks, many blocks in turns, the most classes of each form and one
# more, rows that are not kept whole
PROBLEMS = [(1, 1), (1, 2), (64, 10), (70, 17), (400, 10), (1100, 10), (1031, 16), (2500, 10), (5, 128), (37, 129)]
PROBLEMS += [(5, 1000), (37, 517), (3, 1024), (2, 1025), (9, 2500)]


@element
@pytest.mark.parametrize("rows_classes", PROBLEMS, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("train", [True, False])
def test_cross_entropy(
    executor: Executor,
    random: np.random.Generator,
    rows_classes: tuple[int, int],
    smoothing: float,
    train: bool,
    element: str,
) -> None:
    rows, classes = rows_classes
    logits, labels = (
        stored(3 * normal(random, rows, classes), element),
        random.integers(0, classes, rows).astype(np.int32),
    )
    op = CrossEntropy(smoothing, train)
    check(executor, op, [logits, labels])
    if train:
        check(executor, op, [logits, labels], alias=[(2, 0)])


@element
def test_first_largest_logit_counts(executor: Executor, random: np.random.Generator, element: str) -> None:
    logits = random.integers(0, 30, (500, 40)).astype(np.float32)  # the largest is shared by one to four
    labels = logits.argmax(1).astype(np.int32)
    labels[::2] = 39 - logits[::2, ::-1].argmax(1)  # the last largest
    hits = int((logits.argmax(1) == labels).sum())
    assert 250 < hits < 500
    assert check(executor, CrossEntropy(), [stored(logits, element), labels])[1][0] == hits


def test_logits_that_bf16_cannot_tell_apart_count_as_equal(executor: Executor) -> None:
    logits = stored(np.tile([1.0, 1.0 + 2.0**-9, 1.0 + 2.0**-8], (64, 1)), "bf16")
    for label, hits in ((0, 64), (1, 0), (2, 0)):
        assert check(executor, CrossEntropy(), [logits, np.full(64, label, np.int32)])[1][0] == hits


@element
def test_large_logits_do_not_overflow(executor: Executor, random: np.random.Generator, element: str) -> None:
    logits, labels = stored(1e4 * normal(random, 64, 10), element), random.integers(0, 10, 64).astype(np.int32)
    value, _, gradient = check(executor, CrossEntropy(), [logits, labels])
    assert np.isfinite(value).all()
    assert np.isfinite(values_of(gradient)).all()


@pytest.mark.parametrize("rows", [64, 2500])
@pytest.mark.parametrize("label", [-1, 10, 2**31 - 1])
def test_label_out_of_range_makes_the_loss_nan(
    executor: Executor, random: np.random.Generator, label: int, rows: int
) -> None:
    logits, labels = normal(random, rows, 10), random.integers(0, 10, rows).astype(np.int32)
    labels[rows // 2] = label
    assert np.isnan(check(executor, CrossEntropy(), [logits, labels])[0][0])


@element
def test_nan_and_infinite_logits(executor: Executor, random: np.random.Generator, element: str) -> None:
    labels = random.integers(0, 10, 6).astype(np.int32)
    for row in (np.nan, np.inf, -np.inf):
        logits = normal(random, 6, 10)
        logits[4, 3] = row
        check(executor, CrossEntropy(), [stored(logits, element), labels])
        logits[4] = row
        check(executor, CrossEntropy(), [stored(logits, element), labels])


@element
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 84), (64, 10), (127, 129), (129, 129), (700, 96)], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_mean_squared_error(
    executor: Executor, random: np.random.Generator, shape: tuple[int, int], train: bool, element: str
) -> None:
    pred, target = stored(normal(random, *shape), element), normal(random, *shape)
    check(executor, MeanSquaredError(train), [pred, target])
    if train:
        check(executor, MeanSquaredError(), [pred, target], alias=[(1, 0)])


def test_nan_and_infinite_predictions(executor: Executor, random: np.random.Generator) -> None:
    for value in (np.nan, np.inf, -np.inf):
        pred = normal(random, 5, 7)
        pred[4, 6] = value  # behind the last whole vector
        for inputs in ([pred, normal(random, 5, 7)], [stored(pred, "bf16"), normal(random, 5, 7)]):
            check(executor, MeanSquaredError(), inputs)


@element
def test_the_same_bits_every_time(executor: Executor, random: np.random.Generator, element: str) -> None:
    inputs = [stored(normal(random, 2500, 10), element), random.integers(0, 10, 2500).astype(np.int32)]
    first, again = (run_op(executor, CrossEntropy(), inputs) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_refuses() -> None:
    assert "u8" in (loss.supports(CrossEntropy(), (Spec((4, 2)), Spec((4,), "u8"))) or "")
    assert "f64" in (loss.supports(CrossEntropy(), (Spec((4, 2), "f64"), Spec((4,), "i32"))) or "")
    targets = loss.supports(MeanSquaredError(), (Spec((4, 2), "bf16"), Spec((4, 2), "bf16")))
    assert "f32" in (targets or "")
    assert "bf16" in (targets or "")
    assert "f64" in (loss.supports(MeanSquaredError(), (Spec((4, 2), "f64"), Spec((4, 2), "f64"))) or "")
