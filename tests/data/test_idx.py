from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parcnn.data.idx import read_idx
from parcnn.errors import DataError
from tests.data.files import idx_bytes, write_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize("array", [IMAGES, IMAGES[:1, :1, :1], IMAGES.reshape(-1)], ids=["images", "pixel", "labels"])
def test_reads_what_was_written(tmp_path: Path, name: str, array: np.ndarray) -> None:
    path = write_idx(tmp_path / name, array)
    np.testing.assert_array_equal(read_idx(path, axes=array.ndim), array, strict=True)


def test_compression_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed"
    plain.write_bytes(idx_bytes(IMAGES))
    packed.write_bytes(gzip.compress(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(read_idx(plain, 3), IMAGES)
    np.testing.assert_array_equal(read_idx(packed, 3), IMAGES)


GOOD = idx_bytes(IMAGES)
PACKED = gzip.compress(GOOD)
FAULTS = {
    "empty": (b"", "truncated in the header"),
    "three bytes": (GOOD[:3], "truncated in the header"),
    "header cut": (GOOD[:15], "truncated in the header"),
    "one value short": (GOOD[:-1], "truncated"),
    "no values": (GOOD[:16], "truncated"),
    "one value more": (GOOD + b"x", "longer than its header says"),
    "wrong magic": (idx_bytes(IMAGES, magic=b"\x89P"), "wrong magic number"),
    "html": (b"<!DOCTYPE html><html>404</html>", "wrong magic number"),
    "floats": (idx_bytes(IMAGES, code=0x0D), "0x0d \\(float32\\)"),
    "no such type": (idx_bytes(IMAGES, code=0x77), "0x77 \\(not a type of IDX\\)"),
    "labels for images": (idx_bytes(IMAGES.reshape(-1)), "number of axes"),
    "empty axis": (idx_bytes(IMAGES[:0]), "empty"),
    "gz cut": (PACKED[:-9], "ends too early"),
    "gz cut in half": (PACKED[: len(PACKED) // 2], "ends too early"),
    "gz of a short file": (gzip.compress(GOOD[:-1]), "truncated"),
    "gz of a long file": (gzip.compress(GOOD + b"x"), "longer than its header says"),
    "gz header only": (PACKED[:10], "ends too early"),
    "gz bad check sum": (PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:], "corrupt gzip data"),
    "gz bad method": (PACKED[:2] + b"\x07" + PACKED[3:], "corrupt gzip data"),
    "gz bad block": (PACKED[:10] + b"\xff" + PACKED[11:], "corrupt gzip data"),
    "gz then rubbish": (PACKED + b"rubbish", "corrupt gzip data"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, axes=3)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_a_missing_file_and_a_folder_are_data_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_idx(path, axes=3)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_header_that_promises_terabytes_claims_no_memory(tmp_path: Path, pack) -> None:
    path = tmp_path / "huge"
    path.write_bytes(pack(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(100)))
    with pytest.raises(DataError, match="truncated"):
        read_idx(path, axes=3)


@given(
    content=st.binary(max_size=64)
    | st.binary(max_size=64).map(gzip.compress)
    | st.binary(max_size=24).map(lambda tail: b"\0\0\x08\x01" + tail)
    | st.binary(max_size=24).map(lambda tail: b"\x1f\x8b\x08" + tail),
    axes=st.sampled_from([1, 3]),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_parse_or_raise_data_error(tmp_path: Path, content: bytes, axes: int) -> None:
    path = tmp_path / "fuzz"
    path.write_bytes(content)
    try:
        array = read_idx(path, axes)
    except DataError:
        return
    assert array.ndim == axes
    assert idx_bytes(array) == (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)


@given(position=st.integers(0, len(PACKED) - 1), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_or_a_cut_never_gives_other_images(tmp_path: Path, position: int, value: int, cut: bool) -> None:
    path = tmp_path / "fuzz.gz"
    path.write_bytes(PACKED[:position] if cut else PACKED[:position] + bytes([value]) + PACKED[position + 1 :])
    try:
        array = read_idx(path, axes=3)
    except DataError:
        return
    np.testing.assert_array_equal(array, IMAGES)  # a byte that matters not, such as the time in gzip's header
