"""The borders of a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parcnn.cuda.kernels import feed
from parcnn.ops.base import Spec
from parcnn.ops.feed import EndStep, GatherBatch, WriteOutput
from parcnn.ops.program import Executor
from tests.cuda.bf16 import stored
from tests.cuda.compare import executors, normal, on_cpu, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(feed)
element = pytest.mark.parametrize("element", ["f32", "bf16"])

STATE = np.array([2, 40, 3, -7, 9, 0, 0, 0], np.int32)


def same_bits(executor: Executor, op: GatherBatch, inputs: list[np.ndarray]) -> None:
    """The floats of the CPU executor, rounded to what the op gives."""
    x, targets = on_cpu(replace(op, dtype="f32"), inputs)
    got_x, got_targets = run_op(executor, op, inputs)
    assert got_targets.dtype == inputs[1].dtype
    np.testing.assert_array_equal(got_targets, targets)
    np.testing.assert_array_equal(got_x, stored(x, op.dtype))


@element
@pytest.mark.parametrize("images_dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("augmentation", [(False, 0), (True, 0), (False, 2), (True, 9)], ids=str)
@pytest.mark.parametrize("image", [(1, 1, 1), (5, 7, 1), (6, 6, 3), (28, 28, 1), (5, 8, 16), (40, 37, 4)], ids=str)
def test_gather(
    executor: Executor,
    random: np.random.Generator,
    images_dtype: type,
    augmentation: tuple[bool, int],
    image: tuple[int, int, int],
    element: str,
) -> None:
    images = random.integers(0, 256, (30, *image)).astype(images_dtype)
    targets, order = random.integers(0, 10, 30).astype(np.int32), random.permutation(30).astype(np.int32)
    scale, shift = (tuple(float(v) for v in random.uniform(-2, 2, image[-1])) for _ in range(2))
    same_bits(executor, GatherBatch(9, element, scale, shift, *augmentation), [images, targets, order, STATE])


@element
@pytest.mark.parametrize("augmentation", [(False, 0), (True, 1)], ids=str)
def test_gather_with_one_scale_for_all_channels(
    executor: Executor, random: np.random.Generator, augmentation: tuple[bool, int], element: str
) -> None:
    images, order = random.integers(0, 256, (8, 3, 4, 20)).astype(np.uint8), np.arange(8, dtype=np.int32)
    targets = normal(random, 8, 301)  # more than a block's threads
    same_bits(executor, GatherBatch(5, element, (0.3,), (-0.7,), *augmentation), [images, targets, order, STATE])


@element
def test_gather_of_vectors(executor: Executor, random: np.random.Generator, element: str) -> None:
    images, order = normal(random, 8, 13), np.arange(8, dtype=np.int32)[::-1].copy()
    images[4] = (np.nan, np.inf, -np.inf) + (1 + 2.0**-8,) * 10
    same_bits(executor, GatherBatch(5, element), [images, normal(random, 8, 2), order, STATE])


@pytest.mark.parametrize("train", [True, False])
def test_end_step(executor: Executor, train: bool) -> None:
    losses, corrects = np.full(5, -1, np.float32), np.full(5, -1, np.int32)
    inputs = [STATE, losses, np.array([0.25], np.float32), corrects, np.array([17], np.int32)]
    state, losses, corrects = run_op(executor, EndStep(batch=32, train=train), inputs)
    np.testing.assert_array_equal(state, [3, 40 + train, 35, -7, 9, 0, 0, 0])
    np.testing.assert_array_equal(losses, np.array([-1, -1, 0.25, -1, -1], np.float32))
    np.testing.assert_array_equal(corrects, [-1, -1, 17, -1, -1])


def test_end_step_keeps_what_there_is(executor: Executor) -> None:
    (state,) = run_op(executor, EndStep(4, loss=False, correct=False), [STATE])
    np.testing.assert_array_equal(state[:3], [3, 41, 7])
    state, losses = run_op(
        executor, EndStep(4, correct=False), [STATE, np.zeros(5, np.float32), np.array([0.5], np.float32)]
    )
    np.testing.assert_array_equal(losses, np.array([0, 0, 0.5, 0, 0], np.float32))


@element
@pytest.mark.parametrize("row", [(1,), (6,), (10,), (12,), (84,), (120,), (3, 5, 8), (33, 31), (64, 40)], ids=str)
def test_write_output(executor: Executor, random: np.random.Generator, row: tuple[int, ...], element: str) -> None:
    y, out = stored(normal(random, 4, *row), element), stored(normal(random, 9, *row), element)
    (written,) = run_op(executor, WriteOutput(), [y, STATE, out])
    out[3:7] = y
    np.testing.assert_array_equal(written, out)


def test_refuses() -> None:
    images, targets, order, state = Spec((9, 2, 2, 20), "u8"), Spec((9,), "i32"), Spec((9,), "i32"), Spec((8,), "i32")
    entries = (1.0,) * 20
    assert "16" in (feed.supports(GatherBatch(2, "f32", entries, entries), (images, targets, order, state)) or "")
    assert "f64" in (feed.supports(GatherBatch(2, "f64"), (images, targets, order, state)) or "")
    assert "bf16 and f32" in (feed.supports(WriteOutput(), (Spec((2, 3), "bf16"), state, Spec((4, 3)))) or "")
    assert "bf16" in (feed.supports(EndStep(), (state, Spec((4,), "bf16"), Spec((1,), "bf16"))) or "")
    assert "f64" in (feed.supports(WriteOutput(), (Spec((2, 3), "f64"), state, Spec((4, 3), "f64"))) or "")
