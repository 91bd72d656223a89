"""Image files, read by Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from parcnn.data.fault import damaged
from parcnn.errors import ArgumentError, DataError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from PIL import Image

GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV")


def read_image(path: Path, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """The pixels (C, H, W) of an image file: grey for one channel, RGB for three; resized to `size` (H, W) if given.

    Raises:
        DataError: the file is not an image that can be read.
        UnsupportedError: Pillow is not installed; an image with more than 8 bits a value.
        ShapeError: a number of channels that image files do not have.
        ArgumentError: a size that cannot be.
    """
    require_pillow(path)
    if channels not in (1, 3):
        raise ShapeError(
            "image files have 1 channel or 3", where=str(path), expected=f"{channels} channels",
            remedy="give the images as a NumPy array",
        )  # fmt: skip
    check_size(size, path)
    _, own = header(path)
    return decode(path, "L" if channels == 1 else "RGB", size or own)


def require_pillow(path: Path) -> None:
    """Raises UnsupportedError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "reading images needs Pillow, which is not installed",
            where=str(path),
            remedy="pip install pillow",
        ) from error


def check_size(size: tuple[int, int] | None, where: Path) -> None:
    """Raises ArgumentError unless `size` is None or (H, W) from 1 on."""
    if size is not None and min(size) < 1:
        raise ArgumentError("images cannot have that size", where=str(where), expected="(H, W), both >= 1", got=size)


def header(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode and (H, W), without decoding."""
    image = _open(path)
    with image:
        if image.mode not in (*GREY_MODES, *_COLOUR_MODES):
            raise UnsupportedError(
                f"images of Pillow's mode '{image.mode}' are not supported",
                where=str(path),
                expected="8 bits a value, grey or colour",
                remedy="convert it to 8 bits a value",
            )
        return image.mode, (image.height, image.width)


def decode(path: Path, mode: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels (C, H, W) in Pillow's mode 'L' or 'RGB'."""
    from PIL import Image

    with _open(path) as image:
        try:
            converted = image.convert(mode)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise, SyntaxError among them
            raise damaged(path, f"the image cannot be decoded ({error})") from error
    if (converted.height, converted.width) != size:
        converted = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(converted)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _open(path: Path) -> Image.Image:
    from PIL import Image

    if not path.is_file():
        raise DataError(
            "a folder, no image" if path.is_dir() else "no such file", where=str(path), remedy="check the path"
        )
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise damaged(path, f"not an image that can be read ({error})") from error
