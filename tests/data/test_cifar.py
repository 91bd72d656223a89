from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parcnn.data.cifar import PIXELS, read_cifar
from parcnn.errors import DataError, LabelError


@pytest.mark.parametrize(("label_bytes", "classes"), [(1, 10), (2, 100)])
def test_reads_planes_and_the_last_label_byte(tmp_path: Path, label_bytes: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (7, label_bytes + PIXELS), dtype=np.uint8)
    records[:, label_bytes - 1] = rng.integers(0, classes, 7)
    path = tmp_path / "batch.bin"
    records.tofile(path)
    images, labels = read_cifar(path, label_bytes, classes)
    assert images.shape == (7, 3, 32, 32)
    np.testing.assert_array_equal(labels, records[:, label_bytes - 1])
    for n, c, h, w in [(0, 0, 0, 0), (6, 2, 31, 31), (3, 1, 5, 17)]:
        assert images[n, c, h, w] == records[n, label_bytes + 1024 * c + 32 * h + w]


@pytest.mark.parametrize("size", [0, 1, PIXELS, 2 * (PIXELS + 1) - 1, 2 * (PIXELS + 1) + 1, 2 * (PIXELS + 2)])
def test_not_a_whole_number_of_records(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(DataError, match=r"data_batch_1.bin(.|\n)*multiple of 3073 bytes(.|\n)*" f"{size} bytes"):
        read_cifar(path, 1, 10)


def test_label_out_of_range_names_file_index_and_label(tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    records = np.zeros((4, PIXELS + 1), np.uint8)
    records[2, 0] = 10
    records.tofile(path)
    with pytest.raises(LabelError, match=r"test_batch.bin(.|\n)*0\.\.9(.|\n)*label 10 at index 2"):
        read_cifar(path, 1, 10)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.bin: cannot be read"):
        read_cifar(tmp_path / "none.bin", 1, 10)
