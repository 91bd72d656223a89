"""Unpacks the files of a data set from its published .tar.gz, and nothing else."""

from __future__ import annotations

import gzip
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from parcnn.data.fault import damaged
from parcnn.errors import DataError


def unpack(archive: Path, members: Mapping[str, int], folder: Path) -> None:
    """Write the named members of a .tar.gz into `folder`, under the last part of their names.

    They are moved into place when all of them are whole and the check sum of the archive was right. Only regular files
    whose full name and size are as given are taken, and where they go does not depend on what the archive says, so that
    no archive can write anywhere else, however it was made.

    Args:
        archive: the .tar.gz.
        members: name in the archive -> size in bytes.
        folder: where the files go; made where it is not there.

    Raises:
        DataError: the archive is corrupt, truncated or lacks a member, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
            _extract(archive, members, Path(temporary))
            for path in Path(temporary).iterdir():
                path.replace(folder / path.name)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(archive, f"corrupt or truncated archive ({error})") from error
    except OSError as error:
        raise DataError(
            f"cannot be unpacked into {folder} ({error.strerror or error})",
            where=str(archive),
            remedy="unpack it where there is room and permission, and give that folder as the data folder",
        ) from error


def _extract(archive: Path, members: Mapping[str, int], folder: Path) -> None:
    missing = dict(members)
    with gzip.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                source = tar.extractfile(member) if name in missing and member.isreg() else None
                if source is None:
                    continue
                size = missing.pop(name)
                if member.size != size:
                    raise damaged(archive, f"{name} has the wrong size", expected=f"{size} bytes", got=member.size)
                with (folder / posixpath.basename(name)).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        while stream.read(1 << 20):  # gzip checks its sum at the end
            pass
    if missing:
        raise damaged(
            archive, "files are missing in the archive", expected=", ".join(members), got=f"no {min(missing)}"
        )
