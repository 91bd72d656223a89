from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from parcnn.data.archive import unpack
from parcnn.errors import DataError
from tests.data.files import tar_gz

CONTENT = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
MEMBERS = {"set/a.bin": len(CONTENT), "set/b.bin": 3}


def info(name: str, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def archive(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "set.tar.gz"
    path.write_bytes(content)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


GOOD = tar_gz([(info("set/a.bin"), CONTENT), (info("set/readme.html"), b"<html>"), (info("set/b.bin"), b"bbb")])


@pytest.mark.parametrize("prefix", ["", "./"])
def test_only_the_named_members_are_written(tmp_path: Path, prefix: str) -> None:
    members = [(info(f"{prefix}set/{n}"), c) for n, c in [("a.bin", CONTENT), ("x", b"x"), ("b.bin", b"bbb")]]
    unpack(archive(tmp_path, tar_gz(members)), MEMBERS, tmp_path / "out" / "set")
    assert names(tmp_path / "out" / "set") == ["a.bin", "b.bin"]
    assert (tmp_path / "out" / "set" / "a.bin").read_bytes() == CONTENT
    assert (tmp_path / "out" / "set" / "b.bin").stat().st_mode & 0o777 == 0o644


def test_an_archive_cannot_write_elsewhere_or_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"old")
    evil = tar_gz(
        [
            (info("../victim"), b"new"),
            (info(str(victim)), b"new"),
            (info("set/../../victim"), b"new"),
            (info("set/b.bin", type=tarfile.SYMTYPE, linkname=str(victim)), b""),
            (info("set/b.bin", type=tarfile.LNKTYPE, linkname=str(victim)), b""),
            (info("set/b.bin", type=tarfile.FIFOTYPE), b""),
            (info("set/a.bin"), CONTENT),
            (info("set/b.bin"), b"bbb"),
        ]
    )
    unpack(archive(tmp_path, evil), MEMBERS, tmp_path / "out")
    assert victim.read_bytes() == b"old"
    assert (tmp_path / "out" / "b.bin").read_bytes() == b"bbb"
    assert not (tmp_path / "out" / "b.bin").is_symlink()
    assert names(tmp_path) == ["out", "set.tar.gz", "victim"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "corrupt or truncated"),
        (b"<html>404</html>", "corrupt or truncated"),
        (GOOD[:5000], "corrupt or truncated"),
        (GOOD[:-4], "corrupt or truncated"),
        (GOOD[:20000] + bytes([GOOD[20000] ^ 255]) + GOOD[20001:], "corrupt or truncated"),
        (tar_gz([(info("set/a.bin"), CONTENT)]), r"no set/b\.bin"),
        (tar_gz([(info("set/a.bin"), CONTENT), (info("set/b.bin"), b"bbbb")]), r"set/b\.bin has the wrong size"),
    ],
    ids=["empty", "html", "cut", "cut at the end", "corrupt", "lacks a file", "wrong size"],
)
def test_a_bad_archive_is_named_and_leaves_nothing_behind(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        unpack(archive(tmp_path, content), MEMBERS, tmp_path / "out")
    assert "set.tar.gz" in str(caught.value)
    assert names(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(DataError, match="cannot be unpacked into"):
        unpack(archive(tmp_path, GOOD), MEMBERS, tmp_path / "out")
