"""A data set from a folder of images: one folder a class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parcnn.data.dataset import Dataset, check_split, every_nth_of_each_class, pixel_statistics
from parcnn.data.image import GREY_MODES, check_size, decode, header, require_pillow
from parcnn.errors import ArgumentError, DataError, ShapeError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Mean and standard deviation of the latest training images, by how they were read and when they were written: the test split
# has them, too, and is mostly loaded next.
_known_statistics: dict[tuple[Any, ...], tuple[tuple[float, ...], tuple[float, ...]]] = {}


def from_folder(
    path: str | Path,
    *,
    split: str = "train",
    size: tuple[int, int] | None = None,
    test_every: int = 5,
    name: str | None = None,
) -> Dataset:
    """A data set from images in one folder a class: PATH/cat/1.png, PATH/dog/2.jpg, ...

    With PATH/train and PATH/test (PATH/train/cat/1.png, ...) these are the splits. Else every `test_every`-th image,
    sorted by class and path, makes the test split, and the others the training split: the same on every run. Classes
    are the folders of the training split, sorted by name. Images are grey (C = 1) when all training images are, else
    RGB (C = 3); transparency is dropped. Files with other suffixes than those of images, and hidden ones, are passed
    over.

    Args:
        path: the folder.
        split: 'train' or 'test'.
        size: (H, W) to resize to (bilinear, antialiased); without it all images must have one size.
        test_every: without PATH/train and PATH/test: one image in how many is a test image.
        name: the data set's name; that of the folder when left out.

    Raises:
        UnsupportedError: Pillow is not installed; an image with more than 8 bits a value.
        ShapeError: images of different sizes, and no `size`.
        DataError: no such folder, no classes, a class without images, an image that cannot be read, a test class that
            the training split lacks, a split PATH/train without PATH/test.
        ArgumentError: an unknown split, or a `size` or `test_every` that cannot be.
    """
    root = Path(path).expanduser()
    check_split(split)
    check_size(size, root)
    if test_every < 2:
        raise ArgumentError("test_every is too small", where=str(root), expected="2 or more", got=test_every)
    require_pillow(root)
    if not root.is_dir():
        raise DataError("there is no such folder", where=str(root), remedy="give a folder of images by class")

    if (root / "train").is_dir() and (root / "test").is_dir():
        classes = _class_names(root / "train")
        train_files, train_labels = _list_images(root / "train", classes)
        test_files, test_labels = _list_images(root / "test", classes)
    elif (root / "train").is_dir() and any(p.is_dir() and p.name[0] != "." for p in (root / "train").iterdir()):
        raise DataError(
            "there is a folder 'train' of classes, and no folder 'test'",
            where=str(root),
            expected="both splits, or a folder for each class",
            got=", ".join(_class_names(root)),
            remedy=f"name the folder of test images 'test', or give {root / 'train'}, which is then split",
        )
    else:
        classes = _class_names(root)
        files, labels = _list_images(root, classes)
        test = every_nth_of_each_class(labels, test_every)
        train_files, train_labels = [f for f, held in zip(files, test, strict=True) if not held], labels[~test]
        test_files, test_labels = [f for f, held in zip(files, test, strict=True) if held], labels[test]
    if not train_files or not test_files:
        raise DataError(
            "too few images for two splits",
            where=str(root),
            expected="at least one training and one test image",
            got=f"{len(train_files)} training, {len(test_files)} test",
            remedy="add images",
        )
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        headers = list(pool.map(header, [*train_files, *test_files]))
        mode = "L" if all(m in GREY_MODES for m, _ in headers[: len(train_files)]) else "RGB"
        height, width = size or _common_size([*train_files, *test_files], [shape for _, shape in headers])

        def decode_all(files: list[Path]) -> NDArray[np.uint8]:
            images = np.empty((len(files), 1 if mode == "L" else 3, height, width), np.uint8)
            for i, pixels in enumerate(pool.map(lambda file: decode(file, mode, (height, width)), files)):
                images[i] = pixels
            return images

        images, labels = (
            (decode_all(train_files), train_labels) if split == "train" else (decode_all(test_files), test_labels)
        )
        read = (mode, height, width, *((file, file.stat().st_mtime_ns, file.stat().st_size) for file in train_files))
        statistics = _known_statistics.get(read)
        if statistics is None:
            statistics = pixel_statistics(images if split == "train" else decode_all(train_files))
            _known_statistics.clear()
            _known_statistics[read] = statistics
    mean, std = statistics
    return Dataset(name or root.resolve().name, split, images, labels, classes, mean, std, str(root))


def _class_names(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise DataError(
            "no classes", where=str(folder), expected="a folder of images for each class", got="no folder",
            remedy="move the images into a folder a class: cat/1.png, dog/2.png",
        )  # fmt: skip
    return classes


def _list_images(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], NDArray[np.int32]]:
    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        raise DataError(
            f"class '{unknown[0]}' is not among the training classes", where=str(folder), expected=", ".join(classes),
            remedy="add training images of it, or remove the folder",
        )  # fmt: skip
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        mine = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        if not mine and (folder / name).is_dir():  # a test split may lack a class
            raise DataError(
                "a class has no images",
                where=str(folder / name),
                expected=" ".join(SUFFIXES),
                remedy="put images there, or remove the folder",
            )
        files += mine
        labels += [label] * len(mine)
    return files, np.array(labels, np.int32)


def _common_size(files: list[Path], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is not None:
        raise ShapeError(
            "the images differ in size",
            where=str(files[odd]),
            expected=f"{sizes[0]}, as {files[0]}",
            got=sizes[odd],
            remedy="give size=(H, W), `--size H W`, to resize them all",
        )
    return sizes[0]
