"""The IDX format of the MNIST files (Yann LeCun, "THE MNIST DATABASE", file formats), plain or gzip-compressed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from parcnn.data.fault import damaged
from parcnn.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_DEFLATE_RATIO = 1032  # no byte of deflate's output takes less than 1/1032 byte of its input
_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an IDX file.

    The layout is: two zero bytes, the code of the type (8 = unsigned byte), the number of axes, each axis as a
    big-endian 32-bit number, then the values. Whether the file is compressed is read off its first two bytes.

    Args:
        path: the file.
        axes: how many axes it must have: 3 for images, 1 for labels.

    Returns:
        A read-only uint8 array.

    Raises:
        DataError: the file cannot be read, is corrupt, truncated or too long, or is not such an array.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                return _parse(raw, path, axes, most=path.stat().st_size)
            with gzip.open(raw) as unzipped:
                return _parse(unzipped, path, axes, most=path.stat().st_size * _DEFLATE_RATIO)
    except EOFError as error:
        raise damaged(path, "truncated: the compressed data ends too early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"corrupt gzip data ({error})") from error
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror or error})",
            where=str(path),
            remedy="check what it is and its permissions",
        ) from error


def _parse(file: BinaryIO | gzip.GzipFile, path: Path, axes: int, most: int) -> NDArray[np.uint8]:
    """`most`: how many bytes the file can hold at the most, so that a corrupt header claims no memory."""
    head = file.read(4)
    if len(head) < 4:
        raise damaged(path, "truncated in the header", expected="at least 4 bytes", got=f"{len(head)} bytes")
    if head[:2] != b"\0\0":
        raise damaged(path, "not an IDX file: wrong magic number", expected="00 00 at the start", got=head.hex(" "))
    if head[2] != 0x08:
        name = _TYPES.get(head[2], "not a type of IDX")
        raise damaged(path, "wrong type code", expected="0x08 (uint8)", got=f"0x{head[2]:02x} ({name})")
    if head[3] != axes:
        raise DataError(
            "wrong number of axes",
            where=str(path),
            expected=axes,
            got=head[3],
            remedy="images have 3 axes and labels 1: are the two files mixed up?",
        )
    sizes = file.read(4 * axes)
    if len(sizes) < 4 * axes:
        raise damaged(
            path, "truncated in the header", expected=f"{4 + 4 * axes} bytes of header", got=f"{4 + len(sizes)} bytes"
        )
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    expected = math.prod(shape)
    if expected == 0:
        raise damaged(path, "the header says that it is empty", got=f"shape {shape}")
    if expected > most:
        raise damaged(path, "truncated", expected=f"{expected} values, for shape {shape}", got=f"at most {most} bytes")
    values = file.read(expected + 1)  # one more, to see what is too long, and for gzip's check sum at the end
    if len(values) < expected:
        raise damaged(path, "truncated", expected=f"{expected} values, for shape {shape}", got=f"{len(values)} values")
    if len(values) > expected:
        raise damaged(path, "longer than its header says", expected=f"{expected} values, for shape {shape}", got="more")
    return np.frombuffer(values, np.uint8).reshape(shape)
