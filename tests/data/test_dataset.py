from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from parcnn.data import Dataset, from_arrays
from parcnn.errors import ArgumentError, DataError, LabelError, ShapeError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (11, 3, 5, 4), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])


def dataset(**changes: object) -> Dataset:
    fields = {
        "name": "set", "split": "train", "images": PIXELS, "labels": LABELS.astype(np.int32),
        "classes": ("a", "b", "c"), "mean": (0.5,) * 3, "std": (0.2,) * 3, "source": "memory",
    } | changes  # fmt: skip
    return Dataset(**fields)  # type: ignore[arg-type]


def test_length_shape_and_subset() -> None:
    whole = dataset()
    assert len(whole) == 11
    assert whole.shape == (3, 5, 4)
    part = whole.subset(4)
    np.testing.assert_array_equal(part.images, PIXELS[:4])
    np.testing.assert_array_equal(part.labels, LABELS[:4])
    assert (part.mean, part.std, part.classes) == (whole.mean, whole.std, whole.classes)
    assert len(whole.subset(11)) == 11


@pytest.mark.parametrize("n", [0, -1, 12])
def test_subset_refuses_a_size_that_is_not_there(n: int) -> None:
    with pytest.raises(ArgumentError, match=rf"1\.\.11(.|\n)*{n}"):
        dataset().subset(n)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"split": "val"}, ArgumentError, "'val'"),
        ({"images": PIXELS.astype(np.float64)}, DataError, "float64"),
        ({"images": PIXELS.astype(np.int32)}, DataError, "int32"),
        ({"images": PIXELS[0]}, ShapeError, r"\(3, 5, 4\)"),
        ({"images": PIXELS[:0], "labels": np.zeros(0, np.int32)}, DataError, "no images"),
        ({"images": PIXELS[:, :, :0]}, DataError, "no images"),
        ({"labels": np.zeros(10, np.int32)}, DataError, "10 labels"),
        ({"labels": np.zeros((11, 1), np.int32)}, ShapeError, r"\(11, 1\)"),
        ({"classes": ("a", "b")}, LabelError, "label 2 at index 2, and 3 such"),
        ({"labels": np.full(11, -1, np.int32)}, LabelError, "label -1 at index 0"),
        ({"mean": (0.5,)}, ShapeError, "mean needs one value a channel"),
        ({"std": (0.5,) * 4}, ShapeError, "std needs one value a channel"),
        ({"std": (0.5, 0.0, 0.5)}, DataError, "cannot be normalised"),
        ({"mean": (0.5, float("nan"), 0.5)}, DataError, "cannot be normalised"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataset(**changes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 11, 4097])  # one image, and more than a chunk of the statistics
def test_uint8_arrays_get_the_statistics_of_their_pixels(channels: int, count: int) -> None:
    images = RNG.integers(0, 200, (count, channels, 5, 4), dtype=np.uint8)
    made = from_arrays(images, np.zeros(count, np.int64))
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(made.mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(made.std, scaled.std(axis=(0, 2, 3)), rtol=1e-12)
    assert made.images is images or np.shares_memory(made.images, images)
    assert made.labels.dtype == np.int32
    assert made.classes == ("0",)


def test_given_statistics_are_kept() -> None:
    made = from_arrays(PIXELS, LABELS, split="test", mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    assert (made.split, made.mean, made.std) == ("test", (0.1, 0.2, 0.3), (1, 2, 3))


def test_images_without_channels_get_one() -> None:
    assert from_arrays(PIXELS[:, 0], LABELS).shape == (1, 5, 4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_taken_as_they_are(dtype: type) -> None:
    values = RNG.standard_normal((11, 2, 3, 3)).astype(dtype)
    made = from_arrays(values, LABELS, classes=["a", "b", "c"])
    assert made.images.dtype == np.float32
    assert (made.mean, made.std) == ((0.0, 0.0), (1.0, 1.0))
    np.testing.assert_array_equal(made.images, values.astype(np.float32))


def test_float_rows_are_the_targets_of_a_regression() -> None:
    made = from_arrays(PIXELS, np.linspace(0, 1, 22).reshape(11, 2))
    assert made.labels.dtype == np.float32
    assert made.labels.shape == (11, 2)
    assert made.classes == ()


def test_lists_and_transposed_arrays_are_taken() -> None:
    nhwc = PIXELS.transpose(0, 2, 3, 1)
    made = from_arrays(nhwc.transpose(0, 3, 1, 2), LABELS.tolist())
    assert made.images.flags.c_contiguous
    np.testing.assert_array_equal(made.images, PIXELS)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (PIXELS, LABELS[:9], DataError, "11 labels, as there are images"),
        (PIXELS, LABELS.astype(np.float32), DataError, "labels are not integers"),
        (PIXELS, np.eye(3, dtype=int)[LABELS], ShapeError, "argmax"),
        (PIXELS, LABELS[:, None], ShapeError, r"labels\[:, 0\]"),
        (PIXELS, np.full((11, 2), np.nan), DataError, "regression"),
        (PIXELS, LABELS - 1, LabelError, "label -1"),
        (PIXELS, LABELS + 2**40, LabelError, "number the classes"),
        (PIXELS.astype(np.int64), LABELS, DataError, "int64"),
        (PIXELS[0, 0], LABELS, ShapeError, r"\(5, 4\)"),
        (np.zeros((0, 1, 2, 2), np.uint8), np.zeros(0, np.int64), DataError, "no images"),
        (np.full((11, 1, 2, 2), 1e300), LABELS, DataError, "not finite"),
        (np.full((11, 1, 2, 2), 7, np.uint8), LABELS, DataError, "give std"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images, labels, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_arrays(images, labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    values = np.zeros((11, 1, 2, 2), np.float32)
    values[[4, 7], 0, 1, 1] = bad
    with pytest.raises(DataError, match="in image 4, and in 2 images"):
        from_arrays(values, LABELS)


def test_labels_beyond_the_given_classes() -> None:
    with pytest.raises(LabelError, match=r"0\.\.1"):
        from_arrays(PIXELS, LABELS, classes=["a", "b"])


def test_importing_is_light() -> None:
    code = (
        "import parcnn.data, sys; print(*({'rich', 'PIL', 'urllib.request', 'ssl', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == ""
