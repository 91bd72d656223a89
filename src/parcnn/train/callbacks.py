"""What happens beside training: progress on the terminal, metrics in a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parcnn.errors import DataError

if TYPE_CHECKING:
    from parcnn.train.trainer import EpochResult, History, Trainer


class Callback:
    """Base of callbacks; every method may be left as it is."""

    def on_start(self, trainer: Trainer, epochs: int, steps_per_epoch: int) -> None:
        """Before the first step."""

    def on_progress(
        self, epoch: int, step: int, steps: int, loss: float, accuracy: float | None, images_per_second: float
    ) -> None:
        """A few times a second: means over this epoch so far."""

    def on_epoch(self, result: EpochResult) -> None:
        """After each epoch and its validation."""

    def on_end(self, history: History) -> None:
        """After the last epoch, also when it was interrupted."""


class RichProgress(Callback):
    """A progress bar with loss, accuracy, images/s and memory, and a line for each finished epoch."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self.console = console or Console()

    def on_start(self, trainer: Trainer, epochs: int, steps_per_epoch: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        memory = f"{trainer.peak_bytes / 2**20:.1f} MiB"
        self.epochs = epochs
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TextColumn(memory),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task("fit", total=steps_per_epoch, epoch="1", figures="")
        self.progress.start()

    def on_progress(
        self, epoch: int, step: int, steps: int, loss: float, accuracy: float | None, images_per_second: float
    ) -> None:
        shown = f"loss {loss:.4f}" + ("" if accuracy is None else f"  accuracy {accuracy:.2%}")
        figures = f"{shown}  {images_per_second:,.0f} images/s"
        self.progress.update(
            self.task, completed=step, total=steps, epoch=f"{epoch + 1}/{self.epochs}", figures=figures
        )

    def on_epoch(self, result: EpochResult) -> None:
        parts = [f"epoch {result.epoch + 1:>3}  loss {result.loss:.4f}"]
        if result.accuracy is not None:
            parts.append(f"accuracy {result.accuracy:.2%}")
        if result.val_loss is not None:
            parts.append(f"validation loss {result.val_loss:.4f}")
        if result.val_accuracy is not None:
            parts.append(f"validation accuracy {result.val_accuracy:.2%}")
        parts.append(f"{result.images_per_second:,.0f} images/s  {result.seconds:.2f} s")
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)

    def on_end(self, history: History) -> None:
        self.progress.stop()


class JsonLines(Callback):
    """Appends one JSON object an epoch to a file, written through at once.

    Raises DataError, before the first step where it can, when the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_start(self, trainer: Trainer, epochs: int, steps_per_epoch: int) -> None:
        self._append("")

    def on_epoch(self, result: EpochResult) -> None:
        from dataclasses import asdict

        self._append(json.dumps({**asdict(result), "time": time.time()}) + "\n")

    def _append(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(text)
        except OSError as fault:
            raise DataError(
                f"metrics cannot be written ({fault.strerror or fault})",
                where=str(self.path),
                remedy="make room or give permission there, or write them to another file",
            ) from fault
