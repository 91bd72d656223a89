"""`load`: a data set by name, from wherever it is to be had."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parcnn.data import digits
from parcnn.data.archive import unpack
from parcnn.data.cifar import PIXELS, read_cifar
from parcnn.data.dataset import SPLITS, Dataset, check_label_range, check_split, pixel_statistics
from parcnn.data.fault import damaged
from parcnn.data.folder import from_folder
from parcnn.data.idx import read_idx
from parcnn.data.published import PUBLISHED, Published
from parcnn.errors import ArgumentError, DataError, DataUnavailableError

_FOLDER_PREFIX = "folder:"
# Mean and standard deviation by the training files (path, size, time of change): a test split read after its training
# split, as in every training run, then costs no second reading of the training split.
_statistics: dict[tuple[tuple[Path, int, int], ...], tuple[tuple[float, ...], tuple[float, ...]]] = {}


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return (*PUBLISHED, digits.NAME)


def load(
    name: str,
    split: str = "train",
    data_dir: str | Path | None = None,
    *,
    size: tuple[int, int] | None = None,
    download: bool = True,
    notice: Callable[[str], None] | None = None,
) -> Dataset:
    """One split of a data set.

    A published set is looked for in `data_dir`, then $PARCNN_DATA, then the user's cache folder
    ($XDG_CACHE_HOME/parcnn/data), and is downloaded into the latter when it is in none of them. A data folder may hold
    the files, under their published names, in a folder of the set (DIR/mnist/..., DIR/cifar-10-batches-bin/...) or
    themselves; IDX files may be compressed (.gz), and CIFAR may be the published .tar.gz, which is unpacked beside
    itself.

    Args:
        name: one of `names()`, or 'folder:PATH', or the path of a folder of images by class (see `from_folder`).
        split: 'train' or 'test'.
        data_dir: the folder to look in first.
        size: (H, W) that the images of a folder are resized to.
        download: whether to download what is nowhere on this machine.
        notice: is told, in a line, what takes time or may surprise: a download, a folder that lacks the set.

    Raises:
        ArgumentError: an unknown name or split, or a `size` for a published set.
        DataUnavailableError: the set is not on this machine and was not downloaded.
        DataError: a data folder that does not exist; a file that is missing beside others of its set, damaged, or of
            another size than published.
    """
    check_split(split)
    tell = notice or (lambda message: None)
    if name not in names():
        folder = Path(name.removeprefix(_FOLDER_PREFIX))
        if name.startswith(_FOLDER_PREFIX) or (name and folder.is_dir()):
            return from_folder(folder, split=split, size=size)
        raise _unknown(name)
    if size is not None:
        raise ArgumentError("only the images of a folder are resized", where=name, got=f"size={size}")
    if name == digits.NAME:
        return digits.load(split)

    published, searched = PUBLISHED[name], []
    for root in _data_folders(data_dir):
        if files := _locate(published, split, root):
            return _read(published, split, root, files)
        searched.append(str(root))
        tell(f"{name} is not in {root}")
    cache = _cache_folder()
    if not all(_locate(published, each, cache, partial=True) for each in SPLITS):
        searched.append(str(cache))
        if not download:
            raise _unavailable(published, searched, "downloading was not asked for")
        megabytes = sum(file.size for file in published.downloads) / 1e6
        tell(f"downloading {name} ({megabytes:.0f} MB) into {cache / name}")

        from parcnn.data.download import download as fetch  # not at the top: urllib, ssl and http take time to import

        try:
            fetch(published.downloads, published.mirrors, cache / name, name)
        except DataUnavailableError as error:
            raise _unavailable(published, searched, f"{error.where} {error.what}:\n    {error.got}") from error
    files = _locate(published, split, cache)
    if files is None:
        raise DataError("what was downloaded is gone", where=str(cache / name), remedy="run again")
    return _read(published, split, cache, files)


def _data_folders(data_dir: str | Path | None) -> Iterator[Path]:
    for path, where in ((data_dir, "data folder"), (os.environ.get("PARCNN_DATA"), "$PARCNN_DATA")):
        if path:
            folder = Path(path).expanduser()
            if not folder.is_dir():
                raise DataError("is not a folder", where=f"{where} {folder}", remedy="give the path of a folder")
            yield folder


def _cache_folder() -> Path:
    """By the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parcnn" / "data"


def _locate(published: Published, split: str, root: Path, *, partial: bool = False) -> list[Path] | None:
    """The files of one split below a data folder; None when none of them is there, or with `partial` not all are."""
    for folder in (root / name for name in published.folders):
        found = [_variant(folder / file) for file in published.files[split]]
        if None not in found:
            return [path for path in found if path]
        if published.layout == "cifar" and _unpack_archive(published, folder):
            return [folder / file for file in published.files[split]]
        if any(found) and not partial:
            missing = next(file for file, path in zip(published.files[split], found, strict=True) if path is None)
            raise DataError(
                f"{missing} is missing beside the other files of {published.name}",
                where=str(folder),
                expected=", ".join(published.files[split]),
                remedy="put it there, or remove the others",
            )
    return None


def _variant(path: Path) -> Path | None:
    """The file, or the file compressed, or under the name that some programs give it when they unpack it."""
    dotted = path.with_name(path.name.replace("-idx", ".idx"))
    return next((p for p in (path, path.with_name(path.name + ".gz"), dotted) if p.is_file()), None)


def _unpack_archive(published: Published, folder: Path) -> bool:
    """Unpack the published archive into `folder`, when `folder` has its name and the archive lies beside it."""
    archive = folder.parent / published.downloads[0].name
    if folder.name != published.folders[0] or not archive.is_file():
        return False
    members = {
        f"{published.folders[0]}/{file}": published.counts[split] // len(files) * (published.label_bytes + PIXELS)
        for split, files in published.files.items()
        for file in files
    }
    unpack(archive, members, folder)
    return True


def _read(published: Published, split: str, root: Path, files: list[Path]) -> Dataset:
    read = _read_idx if published.layout == "idx" else _read_cifar
    images, labels = read(published, split, files)
    if split == "train":
        mean, std = _statistics[_state(files)] = pixel_statistics(images)
    else:
        train = _locate(published, "train", root)
        if train is None:
            raise DataError(
                f"the training files of {published.name} are missing beside its test files",
                where=str(files[0].parent),
                expected=", ".join(published.files["train"]),
                remedy="put them there too: images are normalised by the mean and deviation of the training split",
            )
        if _state(train) not in _statistics:
            _statistics[_state(train)] = pixel_statistics(read(published, "train", train)[0])
        mean, std = _statistics[_state(train)]
    return Dataset(published.name, split, images, labels, published.classes, mean, std, str(files[0].parent))


def _state(files: list[Path]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _read_idx(published: Published, split: str, files: list[Path]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    images, labels = read_idx(files[0], axes=3), read_idx(files[1], axes=1)
    if len(images) != len(labels):
        raise DataError(
            "images and labels differ in count",
            where=str(files[0]),
            expected=f"{len(images)} labels in {files[1]}, as there are images",
            got=len(labels),
            remedy="take both files from the same split of the same set",
        )
    expected = (published.counts[split], *published.shape[1:])
    if images.shape != expected:
        raise damaged(files[0], f"not the size of {published.name} {split}", expected=expected, got=images.shape)
    check_label_range(labels, len(published.classes), str(files[1]))
    for other in PUBLISHED.values():
        first = other.first_labels.get(split)
        if other is not published and first and tuple(labels[: len(first)]) == first:
            raise DataError(
                f"these are the files of {other.name}, which has the same file names",
                where=str(files[1]),
                expected=published.name,
                got=other.name,
                remedy=f"put each set into a folder of its name: {files[1].parent / other.name}",
            )
    return images[:, None], labels.astype(np.int32)


def _read_cifar(published: Published, split: str, files: list[Path]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    images = np.empty((published.counts[split], *published.shape), np.uint8)
    labels = np.empty(published.counts[split], np.int32)
    count = published.counts[split] // len(files)
    for i, path in enumerate(files):
        some_images, some_labels = read_cifar(path, published.label_bytes, len(published.classes))
        if len(some_images) != count:
            raise damaged(path, f"not the size of {published.name}", expected=f"{count} images", got=len(some_images))
        images[i * count : (i + 1) * count] = some_images
        labels[i * count : (i + 1) * count] = some_labels
    return images, labels


def _unknown(name: str) -> ArgumentError:
    close = difflib.get_close_matches(name.lower(), names(), n=1)
    return ArgumentError(
        f"unknown data set '{name}'",
        expected=f"one of {', '.join(names())}, or the path of a folder of images by class",
        got=repr(name),
        remedy=f"did you mean '{close[0]}'?" if close else "",
    )


def _unavailable(published: Published, searched: list[str], why: str) -> DataUnavailableError:
    files = ", ".join(file.name for file in published.downloads)
    return DataUnavailableError(
        f"{published.name} is not on this machine: {why}",
        expected=f"its files in one of {', '.join(searched)}",
        remedy=f"put {files} into a folder and give it as the data folder or as $PARCNN_DATA; '{digits.NAME}' needs no"
        " files",
    )
