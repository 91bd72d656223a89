"""`parcnn eval` and `parcnn predict`: a checkpoint put to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from parcnn import data, models
from parcnn.cli.console import console, say
from parcnn.cli.images import read_images
from parcnn.cli.options import DataDir, Device, Size, Threads
from parcnn.errors import CheckpointError, DataError
from parcnn.train import Trainer, resolve_executor
from parcnn.train.checkpoint import load_checkpoint

CheckpointFile = Annotated[Path, typer.Argument(help="A checkpoint that `parcnn train` wrote.")]


def evaluate(
    checkpoint: CheckpointFile,
    data_name: Annotated[
        str, typer.Option("--data", help=f"Data set: {', '.join(data.names())}, or a folder of images by class.")
    ],
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 256,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Loss and accuracy of a trained network on a data set."""
    trainer = load_trainer(checkpoint, device, threads, batch)
    if size is None and data_name not in data.names():
        size = _trained_size(trainer)
    images = data.load(data_name, split, data_dir, size=size, notice=say)
    if images.classes != trainer.classes:
        raise DataError(
            "other classes than the network was trained on",
            where=images.name,
            expected=", ".join(trainer.classes),
            got=", ".join(images.classes),
            remedy="evaluate on data with the same classes, in the same order",
        )
    scores = trainer.evaluate(images)
    accuracy = "" if scores.accuracy is None else f", accuracy {scores.accuracy:.2%}"
    say(f"{images.name} {split}: loss {scores.loss:.4f}{accuracy} on {scores.count:,} images")


def predict(
    checkpoint: CheckpointFile,
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Image files (png, jpg, ...), or .npy arrays (H,W), (C,H,W) or (N,C,H,W) of uint8, or of floats from 0 to 1."
        ),
    ],
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Height and width that image files are resized to. [default: as in training]"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes shown for each image.")] = 1,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Class and probability of images."""
    trainer = load_trainer(checkpoint, device, threads, 256)
    channels = len(trainer.normalization[0]) if trainer.normalization else 1
    table = Table(box=None, pad_edge=False)
    for column in ("image", "class", "probability"):
        table.add_column(column, justify="right" if column == "probability" else "left", overflow="fold")
    for path in images:
        pixels = read_images(path, channels, size or _trained_size(trainer))
        for i, probabilities in enumerate(_softmax(trainer.predict(pixels))):
            name = str(path) if len(pixels) == 1 else f"{path}[{i}]"
            for label in np.argsort(-probabilities)[:top]:
                table.add_row(name, trainer.classes[label], f"{probabilities[label]:.2%}")
                name = ""
    console.print(table)


def load_trainer(path: Path, device: str, threads: int | None, batch: int) -> Trainer:
    """A trainer with the checkpoint's model and weights, and its training data's classes and normalisation.

    Raises CheckpointError where the model is none of `parcnn.models`.
    """
    checkpoint = load_checkpoint(path)
    info = checkpoint.info
    known = {type(models.create(name)).__name__: name for name in models.names()}
    if info.get("model") not in known or not all(info.get(key) for key in ("classes", "mean", "std")):
        raise CheckpointError(
            "the command line does not know the checkpoint's model",
            where=str(path),
            expected=f"one of {', '.join(known)}, trained on labelled images",
            got=info.get("model"),
            remedy="in Python: model.load_state_dict(load_checkpoint(path).weights)",
        )
    classes, mean, std = (tuple(info[key]) for key in ("classes", "mean", "std"))
    model = models.create(known[info["model"]], num_classes=len(classes), in_channels=len(mean))
    model.load_state_dict(checkpoint.weights)
    trainer = Trainer(model, batch_size=batch, device=resolve_executor(device, threads))
    trainer.classes, trainer.normalization = classes, (mean, std)
    trainer.input_shape = tuple(info.get("input", ()))
    return trainer


def _trained_size(trainer: Trainer) -> tuple[int, int] | None:
    """(H, W) of the training images; None where an older checkpoint does not say."""
    if len(trainer.input_shape) != 3:
        return None
    _, height, width = trainer.input_shape
    return height, width


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
