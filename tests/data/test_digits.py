from __future__ import annotations

from pathlib import Path

import numpy as np

import parcnn.data.digits
from parcnn.data import load
from parcnn.data.idx import read_idx

VENDORED = Path(parcnn.data.digits.__file__).parent


def original() -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(VENDORED / "digits-images-idx3-ubyte.gz", 3)
    return images, read_idx(VENDORED / "digits-labels-idx1-ubyte.gz", 1)


def test_the_vendored_files_are_the_published_digits() -> None:
    images, labels = original()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 16)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert labels[:10].tolist() == list(range(10))


def test_the_licence_stands_beside_them() -> None:
    text = (VENDORED / "README.md").read_text()
    assert "Alpaydin" in text
    assert "CC BY 4.0" in text


def test_the_splits_are_fixed_disjoint_stratified_and_whole() -> None:
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == test.shape == (1, 28, 28)
    assert (train.source, train.classes) == ("embedded", tuple("0123456789"))
    _, labels = original()
    together = np.concatenate([train.labels, test.labels])
    np.testing.assert_array_equal(np.bincount(together), np.bincount(labels))
    shares = np.bincount(test.labels) / np.bincount(labels)
    assert np.all(np.abs(shares - 0.2) < 0.006)
    images = {image.tobytes() for image in np.concatenate([train.images, test.images])}
    assert len(images) == 1797  # no image twice, so none in both splits
    np.testing.assert_array_equal(train.images, load("digits", "train").images)


def test_the_test_split_is_normalised_as_the_training_split() -> None:
    train, test = load("digits", "train"), load("digits", "test")
    assert (train.mean, train.std) == (test.mean, test.std)
    np.testing.assert_allclose(train.mean[0], (train.images / 255).mean(), rtol=1e-12)
    np.testing.assert_allclose(train.std[0], (train.images / 255).std(), rtol=1e-12)


def test_resized_bilinearly_between_pixel_centres() -> None:
    """Against the same interpolation in float64 of every image, in the published order."""
    small, labels = original()
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    low = np.minimum(at.astype(int), 6)
    share = at - low
    rows = small[:, low] * (1 - share)[:, None] + small[:, low + 1] * share[:, None]
    resized = (rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share) * 255 / 16
    held_out = np.zeros(1797, bool)
    held_out[np.argsort(labels, kind="stable")[::5]] = True
    for split, mine in (("train", ~held_out), ("test", held_out)):
        data = load("digits", split)
        np.testing.assert_array_equal(data.labels, labels[mine])
        assert np.abs(data.images[:, 0] - resized[mine]).max() <= 0.5 + 1e-9
