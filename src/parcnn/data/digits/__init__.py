"""`digits`: 1,797 handwritten digits of UCI, which come with the package (README.md here says where they are from)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parcnn.data.dataset import Dataset, every_nth_of_each_class, pixel_statistics
from parcnn.data.idx import read_idx

NAME = "digits"
_SIZE, _OUT, _MAX = 8, 28, 16  # as published: 8x8 images of values 0..16


def load(split: str) -> Dataset:
    """1,437 training or 360 test images, 1x28x28.

    The images are resized from 8x8. Every fifth of them, sorted by class, is a test image: the published set names no
    split, and the writers are not told apart.
    """
    folder = Path(__file__).parent
    images = _resize(read_idx(folder / "digits-images-idx3-ubyte.gz", axes=3))[:, None]
    labels = read_idx(folder / "digits-labels-idx1-ubyte.gz", axes=1).astype(np.int32)
    test = every_nth_of_each_class(labels, 5)
    mean, std = pixel_statistics(images[~test])
    mine = test if split == "test" else ~test
    return Dataset(NAME, split, images[mine], labels[mine], tuple("0123456789"), mean, std, "embedded")


def _resize(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 8, 8) of 0..16 to (N, 28, 28) of 0..255: bilinear between the centres of pixels, in exact integers.

    Output i lies at (i + 1/2) * 8/28 - 1/2 = (4 i - 5) / 14 of the input, so that all weights are multiples of 1/14.
    """
    position = 4 * np.arange(_OUT) - 5
    weights = np.zeros((_OUT, _SIZE), np.int32)
    for neighbour in (position // 14, position // 14 + 1):
        weight = 14 - np.abs(position - 14 * neighbour)
        np.add.at(weights, (np.arange(_OUT), neighbour.clip(0, _SIZE - 1)), weight)
    scaled = weights @ images.astype(np.int32) @ weights.T  # values times 14 * 14
    one = 14 * 14 * _MAX
    return ((scaled * 255 + one // 2) // one).astype(np.uint8)
