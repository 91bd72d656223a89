"""Downloads published files: mirrors in turn, resumed, check sum verified, moved into place in one step."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from parcnn.data.published import RemoteFile
from parcnn.errors import DataError, DataUnavailableError

TIMEOUT_S = 15
_CHUNK_BYTES = 1 << 16


def download(files: Sequence[RemoteFile], mirrors: Sequence[str], folder: Path, title: str) -> None:
    """Download `files` into `folder`, with a progress bar on standard error where that is a terminal.

    Each file is tried at `mirror + name`, mirror after mirror. What came is kept in `name.part` and continued by the
    next attempt, of this run or a later one, through a range request. Two processes that want one file wait for each
    other.

    Raises:
        DataUnavailableError: a file could be had from no mirror: says why, mirror by mirror.
        DataError: `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from error
    with _progress_bars(title) as add_bar:
        for file in files:
            if not (folder / file.name).exists():
                fetch(file, [mirror + file.name for mirror in mirrors], folder / file.name, add_bar(file))


def fetch(file: RemoteFile, urls: Sequence[str], target: Path, report: Callable[[int], None]) -> None:
    """Download one file to `target` from the first address that has it; `report` gets the number of bytes there so far.

    Raises:
        DataUnavailableError, DataError: as `download`.
    """
    part = target.with_name(target.name + ".part")
    try:
        with part.open("a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if target.exists():  # another process has finished it meanwhile
                part.unlink(missing_ok=True)
                return
            problems = []
            for url in urls:
                resumed = _size(handle) > 0
                problem = _attempt(file, url, handle, report)
                if problem and resumed and _size(handle) == 0:  # what was there before was bad: from the start
                    problem = _attempt(file, url, handle, report)
                if problem is None:
                    part.replace(target)
                    return
                problems.append(f"{url}: {problem}")
    except OSError as error:  # of the disk: no permission, no room, no locks on a network file system
        raise _not_written(part, error) from error
    raise DataUnavailableError(
        "could not be downloaded",
        where=file.name,
        got="\n    ".join(problems),
        remedy=f"check the network and run again (what came is kept), or put the file into {target.parent} yourself",
    )


def _attempt(file: RemoteFile, url: str, handle: BufferedRandom, report: Callable[[int], None]) -> str | None:
    """Continue the file in `handle` from `url`. Returns what went wrong, or None when it is whole and right."""
    if _size(handle) > file.size:
        handle.truncate(0)
    if _size(handle) < file.size:
        problem = _receive(file, url, handle, report)
        if problem:
            return problem
    size = _size(handle)
    if size < file.size:
        return f"ended after {size} of {file.size} bytes"
    handle.seek(0)
    sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    if size > file.size or sha256 != file.sha256:
        handle.truncate(0)
        return f"not the published file: expected {file.size} bytes with SHA-256 {file.sha256}, got {sha256}"
    os.fsync(handle.fileno())
    return None


def _size(handle: BufferedRandom) -> int:
    return handle.seek(0, os.SEEK_END)


def _receive(file: RemoteFile, url: str, handle: BufferedRandom, report: Callable[[int], None]) -> str | None:
    """Append what `url` sends to `handle`, at most one chunk beyond the size. Returns what went wrong, or None."""
    have = _size(handle)
    request = urllib.request.Request(url, headers={"User-Agent": "parcnn"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            begins = response.headers.get("Content-Range", "")
            if have and not (response.status == 206 and begins.startswith(f"bytes {have}-")):  # the server sends it all
                handle.truncate(0)
                have = 0
            report(have)
            while have <= file.size and (chunk := response.read(_CHUNK_BYTES)):
                _write(handle, chunk)
                have += len(chunk)
                report(have)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the range is not there: the part cannot be of this file
            handle.truncate(0)
        return f"HTTP {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None


def _write(handle: BufferedRandom, chunk: bytes) -> None:
    try:
        handle.write(chunk)
        handle.flush()
    except OSError as error:
        raise _not_written(Path(handle.name), error) from error


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot be written ({error.strerror or error})",
        where=str(path),
        remedy="make room or give permission there, or set XDG_CACHE_HOME to a folder that can be written",
    )


@contextmanager
def _progress_bars(title: str) -> Iterator[Callable[[RemoteFile], Callable[[int], None]]]:
    """Gives a function that adds the bar of a file, which gives a function that is told how many bytes are there."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    name, speed = TextColumn("{task.description}"), TransferSpeedColumn()
    columns = (name, BarColumn(), DownloadColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def add_bar(file: RemoteFile) -> Callable[[int], None]:
            bar = progress.add_task(f"{title} {file.name}", total=file.size)
            return lambda have: progress.update(bar, completed=have)

        yield add_bar
