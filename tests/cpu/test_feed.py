"""The borders of a step, and the ops that only move elements."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.ops.feed import EndStep, GatherBatch, WriteOutput
from parcnn.ops.shape import Cat, ChannelSlice, ToChannelsFirst, ToChannelsLast
from tests import reference
from tests.op_runner import run_op

STATE = np.array([2, 40, 3, -7, 9, 0, 0, 0], np.int32)
KEY = (-7 & 0xFFFFFFFF, 9)


@pytest.mark.parametrize("images_dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift_px", [0, 2, 9])
@pytest.mark.parametrize("channels", [1, 3])
def test_gather(
    cpu: CpuExecutor, random: np.random.Generator, images_dtype: type, flip: bool, shift_px: int, channels: int
) -> None:
    images = random.integers(0, 256, (30, 5, 7, channels)).astype(images_dtype)
    targets = random.integers(0, 10, 30).astype(np.int32)
    order = random.permutation(30).astype(np.int32)
    scale, shift = (0.5, 0.25, 2.0)[:channels], (-1.0, 1.0, 0.5)[:channels]
    op = GatherBatch(21, "f32", scale, shift, flip, shift_px)
    x, batch_targets = run_op(cpu, op, [images, targets, order, STATE])
    for i in range(21):
        image = images[order[3 + i]].astype(np.float64) * scale + shift
        words = reference.philox4x32((3 + i, 0x41554721, 40, 0), KEY)
        if flip and words[0] % 2:
            image = image[:, ::-1]
        rows, columns = (words[j] % (2 * shift_px + 1) - shift_px for j in (1, 2))
        expected = np.zeros(image.shape)
        for h, w in np.ndindex(5, 7):
            if 0 <= h - rows < 5 and 0 <= w - columns < 7:
                expected[h, w] = image[h - rows, w - columns]
        np.testing.assert_array_equal(x[i], expected)  # exact: the numbers are small multiples of 1/4
        assert batch_targets[i] == targets[order[3 + i]]


def test_gather_float64_and_vector_targets(cpu: CpuExecutor, random: np.random.Generator) -> None:
    images = random.integers(0, 256, (9, 2, 3, 1)).astype(np.uint8)
    targets = random.standard_normal((9, 4))
    order = np.arange(9, dtype=np.int32)[::-1].copy()
    x, batch_targets = run_op(cpu, GatherBatch(4, "f64"), [images, targets, order, STATE])
    np.testing.assert_array_equal(x, images[[5, 4, 3, 2]])
    np.testing.assert_array_equal(batch_targets, targets[[5, 4, 3, 2]])


@pytest.mark.parametrize("train", [False, True])
def test_end_step(cpu: CpuExecutor, train: bool) -> None:
    losses, corrects = np.zeros(5, np.float32), np.zeros(5, np.int32)
    arrays = [STATE, losses, np.array([2.5], np.float32), corrects, np.array([7], np.int32)]
    state, losses, corrects = run_op(cpu, EndStep(batch=11, train=train), arrays, steps=2)
    np.testing.assert_array_equal(state, [4, 42 if train else 40, 25, -7, 9, 0, 0, 0])
    np.testing.assert_array_equal(losses, [0, 0, 2.5, 2.5, 0])
    np.testing.assert_array_equal(corrects, [0, 0, 7, 7, 0])


def test_end_step_without_logs(cpu: CpuExecutor) -> None:
    (state,) = run_op(cpu, EndStep(batch=4, loss=False, correct=False), [STATE])
    np.testing.assert_array_equal(state, [3, 41, 7, -7, 9, 0, 0, 0])
    arrays = [STATE, np.zeros(3, np.float32), np.ones(1, np.float32)]
    state, losses = run_op(cpu, EndStep(batch=4, correct=False), arrays)
    np.testing.assert_array_equal(losses, [0, 0, 1])


def test_write_output(cpu: CpuExecutor, random: np.random.Generator) -> None:
    y, out = random.standard_normal((4, 3)), random.standard_normal((9, 3))
    (written,) = run_op(cpu, WriteOutput(), [y, STATE, out])
    np.testing.assert_array_equal(written[3:7], y)
    np.testing.assert_array_equal(written[[0, 1, 2, 7, 8]], out[[0, 1, 2, 7, 8]])


def test_shape_ops(cpu: CpuExecutor, random: np.random.Generator) -> None:
    parts = [random.standard_normal((2, 3, 5, c)) for c in (1, 24, 3)]
    (joined,) = run_op(cpu, Cat(), parts)
    np.testing.assert_array_equal(joined, np.concatenate(parts, axis=3))
    (middle,) = run_op(cpu, ChannelSlice(1, 25), [joined])
    np.testing.assert_array_equal(middle, parts[1])
    (first,) = run_op(cpu, ToChannelsFirst(), [joined])
    assert first[1, 4 * 15 + 2 * 5 + 3] == joined[1, 2, 3, 4]
    np.testing.assert_array_equal(first, np.moveaxis(joined, 3, 1).reshape(2, -1))
    (back,) = run_op(cpu, ToChannelsLast((3, 5, 28)), [first])
    np.testing.assert_array_equal(back, joined)
