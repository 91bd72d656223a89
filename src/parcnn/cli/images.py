"""Images that `parcnn predict` is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from parcnn.errors import DataError, ShapeError, UnsupportedError


def read_images(path: Path, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """(N, C, H, W): one image of an image file (uint8, resized to `size` (H, W) if given), or those of a .npy array.

    Raises DataError where the file cannot be read, ShapeError where an array has another shape, UnsupportedError
    where an image file is given and Pillow is not installed.
    """
    if path.suffix.lower() == ".npy":
        return _read_array(path, channels)
    try:
        from PIL import Image
    except ImportError as fault:
        raise UnsupportedError(
            "reading images needs Pillow, which is not installed",
            where=str(path),
            remedy="pip install 'parcnn[images]', or give a .npy array",
        ) from fault
    try:
        with Image.open(path) as image:
            converted = image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise DataError("not an image that can be read", where=str(path), got=fault) from fault
    if size is not None:
        converted = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(converted)
    return pixels[None, None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]


def _read_array(path: Path, channels: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as fault:
        raise DataError("not a .npy array that can be read", where=str(path), got=fault) from fault
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 3:
        array = array[None] if array.shape[0] == channels else array[:, None]
    if array.ndim != 4 or array.shape[1] != channels or not array.size:
        raise ShapeError(
            "not images of this network", where=str(path), expected=f"(N, {channels}, H, W)", got=array.shape
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(
            "neither pixels nor floats", where=str(path), expected="uint8 (0..255) or a float type", got=array.dtype
        )
    return array if array.dtype == np.uint8 else array.astype(np.float32)
