"""The registry, and the real data where $PARCNN_TEST_DATA names a folder that holds it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from parcnn.data import load
from parcnn.data.idx import read_idx
from parcnn.data.published import PUBLISHED
from parcnn.errors import DataError
from tests.data.files import idx_bytes

REAL = os.environ.get("PARCNN_TEST_DATA")
real_data = pytest.mark.skipif(not REAL, reason="PARCNN_TEST_DATA names no folder of the published data")


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=lambda p: p.name)
def test_the_registry_is_consistent(published) -> None:
    assert len(set(published.classes)) == (100 if published.name == "cifar100" else 10)
    for file in published.downloads:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.size > 0
    assert len({file.sha256 for file in published.downloads}) == len(published.downloads)
    for split, files in published.files.items():
        assert published.counts[split] % len(files) == 0
        if published.layout == "idx":
            assert {f"{name}.gz" for name in files} <= {file.name for file in published.downloads}
    assert all(mirror.endswith("/") for mirror in published.mirrors)
    assert len(published.mirrors) >= 2


@real_data
def test_mnist_is_mnist() -> None:
    """SHA-256 of the unpacked files, as published by many; mean and deviation as everyone uses them."""
    sums = {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
    for name, expected in sums.items():
        path = next(Path(REAL or "").glob(f"**/{name}*"))
        assert hashlib.sha256(idx_bytes(read_idx(path, 3 if "images" in name else 1))).hexdigest() == expected
    train, test = load("mnist", "train", REAL, download=False), load("mnist", "test", REAL, download=False)
    assert (train.images.shape, test.images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert train.mean == test.mean == pytest.approx((0.1306604762738429,), rel=1e-12)
    assert train.std == test.std == pytest.approx((0.30810780,), rel=1e-7)
    for split, first in PUBLISHED["mnist"].first_labels.items():
        data = train if split == "train" else test
        assert tuple(data.labels[: len(first)]) == first


@real_data
def test_mnist_loads_in_half_a_second() -> None:
    """Processor time, so that another program on the machine does not count."""
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        load("mnist", "train", REAL, download=False)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.5


@real_data
def test_cifar10_is_cifar10() -> None:
    train, test = load("cifar10", "train", REAL, download=False), load("cifar10", "test", REAL, download=False)
    assert (train.images.shape, test.images.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.mean == test.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)  # as everyone uses them
    assert train.std == test.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=3e-3)
    sky = train.images[train.labels == 0].mean(axis=(0, 2, 3))  # aeroplanes: more blue than red
    assert sky[2] > sky[0] + 5


@real_data
def test_the_fashion_set_is_not_found_in_mnist_s_folder() -> None:
    with pytest.raises(DataError, match="these are the files of mnist"):
        load("fashion-mnist", "train", Path(REAL or "") / "mnist", download=False)
