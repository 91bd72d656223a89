"""Writes data files as published, small, for the tests of the readers."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from parcnn.data.published import CIFAR10, CIFAR100, FASHION_MNIST, MNIST, Published

TINY_COUNTS = {"train": 30, "test": 20}
TINY = {p.name: replace(p, counts=TINY_COUNTS) for p in (MNIST, FASHION_MNIST, CIFAR10, CIFAR100)}


def idx_bytes(array: np.ndarray, *, magic: bytes = b"\0\0", code: int = 0x08) -> bytes:
    return magic + bytes([code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(path: Path, array: np.ndarray) -> Path:
    """Compressed when the name ends with .gz."""
    data = idx_bytes(array)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def random_images(published: Published, split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the size that the (tiny) set has."""
    rng = np.random.default_rng([seed, split == "test"])
    count = published.counts[split]
    images = rng.integers(0, 256, (count, *published.shape), dtype=np.uint8)
    labels = rng.integers(0, len(published.classes), count).astype(np.uint8)
    return images, labels


def write_mnist(folder: Path, published: Published, suffix: str = "", seed: int = 0) -> None:
    """Both splits of a tiny set of MNIST's layout."""
    for split, (images_name, labels_name) in published.files.items():
        images, labels = random_images(published, split, seed)
        write_idx(folder / (images_name + suffix), images[:, 0])
        write_idx(folder / (labels_name + suffix), labels)


def cifar_files(published: Published) -> dict[str, bytes]:
    """Name -> content, of both splits of a tiny set of CIFAR's layout."""
    files = {}
    for split, names in published.files.items():
        images, labels = random_images(published, split)
        columns = [images.reshape(len(images), -1)]
        columns.insert(0, labels[:, None])
        if published.label_bytes == 2:
            columns.insert(0, np.full((len(images), 1), 255, np.uint8))  # coarse labels, which nobody reads
        for name, part in zip(names, np.split(np.concatenate(columns, axis=1), len(names)), strict=True):
            files[name] = part.tobytes()
    return files


def write_cifar(folder: Path, published: Published) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in cifar_files(published).items():
        (folder / name).write_bytes(content)


def tar_gz(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def cifar_archive(published: Published) -> bytes:
    files = cifar_files(published)
    folder = published.folders[0]
    return tar_gz([(tarfile.TarInfo(f"{folder}/{name}"), content) for name, content in files.items()])
