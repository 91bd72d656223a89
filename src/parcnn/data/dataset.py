"""`Dataset`: images, labels and what normalises them; and a data set from NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parcnn.errors import ArgumentError, DataError, LabelError, ShapeError

SPLITS = ("train", "test")
_MOST_CLASSES = 1 << 20  # that are named by their numbers: what is larger is no number of a class


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a labelled set of images.

    Attributes:
        name: the name of the data set.
        split: 'train' or 'test'.
        images: (N, C, H, W), uint8 pixels, or float32 values.
        labels: (N,) int32, each in 0..len(classes)-1; or float32 targets (N, F) of a regression (MSELoss).
        classes: the name of each class; none for a regression.
        mean, std: per channel, of the pixels of the *training* split scaled to 0..1; 0 and 1 for float images.
        source: where the images came from: a folder, 'embedded' or 'memory'.

    Raises:
        DataError: no images, a type other than uint8 and float32, values that are not finite, another count of labels.
        LabelError: a label outside 0..len(classes)-1.
        ShapeError: images that are not (N, C, H, W), labels that are not (N,), mean or std not one a channel.
        ArgumentError: a split that is neither 'train' nor 'test'.
    """

    name: str
    split: str
    images: NDArray[np.uint8] | NDArray[np.float32]
    labels: NDArray[Any]  # int32 or float32
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        check_split(self.split)
        _check_images(self.images, self.name)
        if self.labels.dtype.kind == "f":
            _check_targets(self.labels, len(self.images), self.name)
        else:
            _check_labels(self.labels, len(self.images), len(self.classes), self.name)
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.images.shape[1]:
                raise ShapeError(
                    f"{field} needs one value a channel",
                    where=self.name,
                    expected=f"{self.images.shape[1]} values",
                    got=f"{len(values)}: {values}",
                )
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise DataError(
                "images cannot be normalised",
                where=self.name,
                expected="finite means and positive standard deviations",
                got=f"mean {self.mean}, std {self.std}",
                remedy="a std of 0 means that every pixel of a channel is the same: look at the images, or give std",
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, n: int) -> Dataset:
        """The first `n` images, normalised as the whole is.

        Raises:
            ArgumentError: `n` outside 1..len(self).
        """
        if not 1 <= n <= len(self):
            raise ArgumentError(
                "a subset cannot have that size", where=f"{self.name} {self.split}", expected=f"1..{len(self)}", got=n
            )
        return replace(self, images=self.images[:n], labels=self.labels[:n])


def from_arrays(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
    split: str = "train",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Dataset:
    """A data set from arrays; no copy is made where the types fit.

    Args:
        images: (N, C, H, W), or (N, H, W) for one channel; uint8 pixels, or floats that are taken as they are.
        labels: (N,) integers, or floats (N, F), the targets of a regression.
        classes: names of classes; '0', '1', ... up to the largest label when left out.
        name, split: as in `Dataset`.
        mean, std: per channel; for a test split give those of the training split. Left out: computed from these
            images when uint8, 0 and 1 when float.

    Raises:
        DataError, LabelError, ShapeError, ArgumentError: as `Dataset` does.
    """
    pixels, targets = np.asarray(images), np.asarray(labels)
    if pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is refused below
            pixels = pixels.astype(np.float32, copy=False)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    _check_images(pixels, name)
    if targets.ndim == 2 and targets.dtype.kind == "f":
        classes = ()
    elif targets.ndim == 2:
        raise ShapeError(
            "labels have two axes",
            where=name,
            expected=f"({len(pixels)},)",
            got=targets.shape,
            remedy="labels[:, 0]" if targets.shape[1] == 1 else "of one-hot labels take labels.argmax(axis=1)",
        )
    elif targets.dtype.kind not in "iu":
        raise DataError(
            "labels are not integers", where=name, expected="an integer type", got=targets.dtype,
            remedy="labels.astype(np.int32), if they are class numbers",
        )  # fmt: skip
    if classes is None:
        if targets.max(initial=0) >= _MOST_CLASSES:
            raise LabelError(
                "labels are too large to be numbers of classes",
                where=name,
                expected=f"0..{_MOST_CLASSES - 1}",
                got=int(targets.max()),
                remedy="number the classes: np.unique(labels, return_inverse=True)[1]",
            )
        classes = [str(i) for i in range(int(targets.max(initial=0)) + 1)]
    if targets.dtype.kind != "f":  # before the cast: int64 labels may not fit
        _check_labels(targets, len(pixels), len(classes), name)
    if pixels.dtype == np.uint8:
        own_mean, own_std = pixel_statistics(pixels)
    else:
        own_mean, own_std = (0.0,) * pixels.shape[1], (1.0,) * pixels.shape[1]
    return Dataset(
        name=name,
        split=split,
        images=np.ascontiguousarray(pixels),
        labels=np.ascontiguousarray(targets, dtype=np.float32 if targets.dtype.kind == "f" else np.int32),
        classes=tuple(classes),
        mean=own_mean if mean is None else tuple(mean),
        std=own_std if std is None else tuple(std),
        source="memory",
    )


def check_split(split: str) -> None:
    """Raises ArgumentError unless `split` is 'train' or 'test'."""
    if split not in SPLITS:
        raise ArgumentError("unknown split", expected="'train' or 'test'", got=repr(split))


def pixel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation per channel of (N, C, H, W) uint8 images scaled to 0..1.

    The sums are exact integers, so the result is the same on every machine.
    """
    channels = images.shape[1]
    total, squares = [0] * channels, [0] * channels
    for begin in range(0, len(images), 4096):  # bounds the memory of the squares
        chunk = images[begin : begin + 4096]
        for c in range(channels):
            total[c] += int(chunk[:, c].sum(dtype=np.uint64))
            squares[c] += int(np.square(chunk[:, c], dtype=np.uint16).sum(dtype=np.uint64))  # 255^2 < 2^16
    count = images.size // channels
    mean = tuple(t / count / 255 for t in total)
    variance = ((count * q - t * t) / count**2 for t, q in zip(total, squares, strict=True))
    return mean, tuple(v**0.5 / 255 for v in variance)


def every_nth_of_each_class(labels: NDArray[np.integer], n: int) -> NDArray[np.bool_]:
    """A mask of every `n`-th image in their order sorted by class: stratified, and drawn without chance."""
    mask = np.zeros(len(labels), dtype=bool)
    mask[np.argsort(labels, kind="stable")[::n]] = True
    return mask


def _check_images(images: NDArray[np.generic], name: str) -> None:
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(
            "images have a type that is not supported",
            where=name,
            expected="uint8 pixels (0..255) or floats",
            got=images.dtype,
            remedy="images.astype(np.uint8) for values 0..255, else images.astype(np.float32)",
        )
    if images.ndim != 4:
        raise ShapeError("images have the wrong number of axes", where=name, expected="(N, C, H, W)", got=images.shape)
    if images.size == 0:
        raise DataError("there are no images", where=name, expected="at least one pixel", got=images.shape)
    if images.dtype == np.float32:
        finite = np.isfinite(images).all(axis=(1, 2, 3))
        if not finite.all():
            raise DataError(
                "an image has values that are not finite",
                where=name,
                expected="finite values",
                got=f"NaN or infinity in image {int(finite.argmin())}, and in {int((~finite).sum())} images in all",
                remedy="leave these images out, or repair what made them",
            )


def _check_labels(labels: NDArray[Any], images: int, classes: int, name: str) -> None:
    if labels.ndim != 1:
        raise ShapeError("labels have the wrong number of axes", where=name, expected="(N,)", got=labels.shape)
    if len(labels) != images:
        raise DataError(
            "images and labels differ in count", where=name, expected=f"{images} labels, as there are images",
            got=f"{len(labels)} labels",
        )  # fmt: skip
    check_label_range(labels, classes, name)


def _check_targets(targets: NDArray[Any], images: int, name: str) -> None:
    if targets.ndim != 2 or len(targets) != images or not np.isfinite(targets).all():
        raise DataError(
            "targets of a regression do not fit",
            where=name,
            expected=f"finite floats ({images}, F)",
            got=f"{targets.dtype} {targets.shape}",
            remedy="class numbers are integers; float targets have one row an image",
        )


def check_label_range(labels: NDArray[Any], classes: int, where: str) -> None:
    """Raises LabelError that names the first label outside 0..classes-1."""
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        first = int(outside.argmax())
        raise LabelError(
            "label out of range",
            where=where,
            expected=f"0..{classes - 1}",
            got=f"label {int(labels[first])} at index {first}, and {int(outside.sum())} such labels in all",
            remedy="give every class a name, or correct the labels",
        )
