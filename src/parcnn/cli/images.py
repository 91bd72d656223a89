"""Images that `parcnn predict` is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from parcnn.data.image import read_image
from parcnn.errors import DataError, ShapeError


def read_images(path: Path, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """(N, C, H, W): one image of an image file (uint8, resized to `size` (H, W) if given), or those of a .npy array.

    Raises DataError where the file cannot be read or has values that are not finite, ShapeError where an array has
    another shape, and what `read_image` raises.
    """
    if path.suffix.lower() == ".npy":
        return _read_array(path, channels)
    return read_image(path, channels, size)[None]


def _read_array(path: Path, channels: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as fault:
        raise DataError(
            "not a .npy array that can be read", where=str(path), got=fault, remedy="write it by numpy.save"
        ) from fault
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 3:
        array = array[None] if array.shape[0] == channels else array[:, None]
    if array.ndim != 4 or array.shape[1] != channels or not array.size:
        raise ShapeError(
            "not images of this network",
            where=str(path),
            expected=f"(N, {channels}, H, W)",
            got=array.shape,
            remedy="give them as they were in training",
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(
            "neither pixels nor floats",
            where=str(path),
            expected="uint8 (0..255) or a float type",
            got=array.dtype,
            remedy="array.astype(numpy.uint8), if its values are 0..255",
        )
    if array.dtype != np.uint8 and not np.isfinite(array).all():
        raise DataError("values that are not finite", where=str(path), remedy="leave out images with NaN or infinity")
    return array if array.dtype == np.uint8 else array.astype(np.float32)
