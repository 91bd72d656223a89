"""The binary layout of CIFAR-10 and CIFAR-100 (Alex Krizhevsky, "The CIFAR-10 dataset", binary version)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parcnn.data.dataset import check_label_range
from parcnn.data.fault import damaged
from parcnn.errors import DataError

PIXELS = 3 * 32 * 32


def read_cifar(path: Path, label_bytes: int, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and labels of one file of records: the label bytes, then the red, the green and the blue plane of 32x32.

    Args:
        path: the file.
        label_bytes: 1 in CIFAR-10; 2 in CIFAR-100, where the coarse label comes first and the fine one, taken, second.
        classes: labels must lie in 0..classes-1.

    Returns:
        Images (N, 3, 32, 32) uint8, a view of the records, and labels (N,) uint8.

    Raises:
        DataError: the file cannot be read, or is not a whole number of records.
        LabelError: a label out of range.
    """
    try:
        values = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror or error})",
            where=str(path),
            remedy="check what it is and its permissions",
        ) from error
    record = label_bytes + PIXELS
    if len(values) == 0 or len(values) % record:
        raise damaged(
            path,
            "truncated or corrupt: not a whole number of records",
            expected=f"a multiple of {record} bytes ({label_bytes} of label, {PIXELS} of pixels)",
            got=f"{len(values)} bytes",
        )
    records = values.reshape(-1, record)
    labels = records[:, label_bytes - 1]
    check_label_range(labels, classes, str(path))
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels
