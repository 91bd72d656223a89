"""`parcnn train`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from parcnn import data, models, recipes
from parcnn.cli.console import console, say
from parcnn.cli.options import DataDir, Device, Size, Threads
from parcnn.errors import ArgumentError, CheckpointError
from parcnn.recipes import Recipe
from parcnn.train import JsonLines, RichProgress, resolve_executor

# What a model is trained on when nothing else is asked for.
DATA = {"lenet5": "mnist", "cifarnet": "cifar10"}
CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
INTERRUPTED = 130  # 128 + SIGINT, the shell's convention


def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help=f"A model ({', '.join(models.names())}), a recipe that comes with parcnn ({', '.join(recipes.shipped())}), "
            "or the path of a recipe (.toml).",
        ),
    ],
    data_name: Annotated[
        str | None, typer.Option("--data", help=f"Data set: {', '.join(data.names())}, or a folder of images by class.")
    ] = None,
    data_dir: DataDir = None,
    size: Size = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in a step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate (the schedule's peak).")] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"One of {', '.join(recipes.recipe.OPTIMIZERS)}.")] = None,
    schedule: Annotated[str | None, typer.Option(help=f"One of {', '.join(recipes.recipe.SCHEDULES)}.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32; bf16 on the GPU; fp64 on the CPU.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order, augmentation and dropout.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoint and metrics. [default: runs/MODEL-DATA]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train a network; leaves a checkpoint and metrics. Ctrl-C stops after the step in flight and keeps the checkpoint."""
    recipe = _recipe(source, data_name, optimizer, schedule, lr)
    chosen: dict[str, Any] = {"size": size, "epochs": epochs, "batch": batch, "seed": seed, "precision": precision}
    recipe = replace(recipe, **{key: value for key, value in chosen.items() if value is not None})
    folder = out or Path("runs") / f"{recipe.model}-{Path(recipe.data).name}"
    checkpoint = folder / CHECKPOINT
    if resume != checkpoint.exists():
        raise ArgumentError(
            "there is no checkpoint to resume from" if resume else "the folder holds a run already",
            where=str(checkpoint),
            remedy="leave out --resume" if resume else "go on with --resume, or give another folder with --out",
        )
    training, test = (
        data.load(recipe.data, split, data_dir, size=recipe.size, notice=say) for split in ("train", "test")
    )
    trainer = recipe.trainer(training, resolve_executor(device, threads))
    _make_folder(folder)
    if resume:
        trainer.load(checkpoint)
        if trainer.epoch >= recipe.epochs:
            say(f"{checkpoint} has had its {recipe.epochs} epochs; more are trained by a larger --epochs")
    say(
        f"{recipe.model} on {training.name} ({len(training):,} images, {len(test):,} to test) by {trainer.executor.name}; "
        f"batch {recipe.batch}, {recipe.optimizer}, {recipe.schedule}, seed {recipe.seed}"
    )
    callbacks = [JsonLines(folder / METRICS), RichProgress(console)]
    try:
        trainer.fit(training, recipe.epochs, validation=test, callbacks=callbacks, checkpoint=checkpoint)
    except KeyboardInterrupt:
        if checkpoint.exists():
            say(f"Stopped; {checkpoint} is whole. Go on with the same command and --resume")
        else:
            say("Stopped; there is no checkpoint yet")
        raise typer.Exit(INTERRUPTED) from None
    scores = trainer.evaluate(test)
    accuracy = "" if scores.accuracy is None else f", accuracy {scores.accuracy:.2%}"
    say(f"Test: loss {scores.loss:.4f}{accuracy} on {scores.count:,} images")
    say(f"In {folder}: {CHECKPOINT}, {METRICS}")


def _make_folder(folder: Path) -> None:
    """Before the first step, not after the first epoch: raises CheckpointError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise CheckpointError(
            f"checkpoints cannot be written there ({fault})", where=str(folder), remedy="give another folder with --out"
        )


def _recipe(
    source: str, data_name: str | None, optimizer: str | None, schedule: str | None, lr: float | None
) -> Recipe:
    """The recipe that is named, or one for the model that is named; then what the options change."""
    if source in models.names():
        recipe = Recipe(source, data_name or DATA[source])
    elif source in recipes.shipped() or source.endswith(".toml"):
        recipe = recipes.read(source)
    else:
        raise ArgumentError(
            f"there is no model or recipe '{source}'",
            expected=f"one of {', '.join((*models.names(), *recipes.shipped()))}, or the path of a .toml file",
            got=source,
        )
    changes: dict[str, Any] = {}
    if data_name is not None:
        changes["data"] = data_name
    if optimizer is not None:
        changes["optimizer"] = recipes.make_optimizer(optimizer, where="--optimizer")
    if lr is not None:
        changes["optimizer"] = replace(changes.get("optimizer", recipe.optimizer), lr=lr)
    if schedule is not None:
        changes["schedule"] = recipes.make_schedule(schedule, where="--schedule")
    return replace(recipe, **changes)
