"""Unpacks the files of a data set from its published .tar.gz, and nothing else."""

from __future__ import annotations

import gzip
import os
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
    """Write the named members of a .tar.gz into `folder`, each atomically, under the last part of its name.

    Only regular files whose full name and size are as given are taken; where a member goes does not depend on what
    the archive says, so an archive cannot write anywhere else, however it was made.

    Args:
        archive: the .tar.gz.
        members: name in the archive -> size in bytes.
        folder: where the files go; made where it is not there.

    Raises:
        DataError: the archive is corrupt, truncated or lacks a member, or the folder cannot be written.
    """
    missing = dict(members)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if name not in missing or not member.isreg():
                    continue
                if member.size != missing[name]:
                    raise damaged(
                        archive, f"{name} has the wrong size", expected=f"{missing[name]} bytes", got=f"{member.size}"
                    )
                _extract(tar, member, folder / posixpath.basename(name))
                del missing[name]
                if not missing:
                    return
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(archive, f"corrupt or truncated archive ({error})") from error
    except OSError as error:
        raise DataError(
            f"cannot be unpacked into {folder} ({error.strerror or error})",
            where=str(archive),
            remedy="unpack it where there is room and permission, and give that folder as the data folder",
        ) from error
    raise damaged(archive, "files are missing in the archive", expected=", ".join(members), got=f"no {min(missing)}")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    part = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as out:
            source = tar.extractfile(member)
            if source is None:  # never for a regular file
                raise tarfile.ExtractError(f"{member.name} has no data")
            shutil.copyfileobj(source, out, 1 << 20)
            if out.tell() != member.size:
                raise tarfile.ReadError(f"{member.name} ends too early")
        part.chmod(0o644)  # mkstemp makes it private
        part.replace(target)
    except BaseException:
        part.unlink()
        raise
