"""The error of a data file whose content is not what it must be."""

from __future__ import annotations

from pathlib import Path

from parcnn.errors import DataError


def damaged(path: Path, what: str, *, expected: object = None, got: object = None) -> DataError:
    """A DataError that names the file and the fault, with the remedy that all damaged files share."""
    return DataError(
        what,
        where=str(path),
        expected=expected,
        got=got,
        remedy="the file is damaged: get it again (one in the cache folder: delete it, it is downloaded afresh)",
    )
