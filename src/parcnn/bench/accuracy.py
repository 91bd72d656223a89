"""The accuracy that a shipped recipe reaches, over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from parcnn import data, recipes
from parcnn.bench.machine import Machine
from parcnn.bench.rows import Row
from parcnn.ops.program import Executor

RECIPE = "mnist-lenet5"


def run(
    executor: Executor,
    seeds: Sequence[int],
    say: Callable[[str], None],
    recipe_name: str = RECIPE,
    data_dir: Path | None = None,
    precision: str = "fp32",
    epochs: int | None = None,
) -> list[Row]:
    """Rows `accuracy`: one for each seed, with the accuracy on the test images after the last epoch."""
    recipe = replace(recipes.read(recipe_name), precision=precision)
    recipe = replace(recipe, epochs=epochs or recipe.epochs)
    train, test = (data.load(recipe.data, split, data_dir, notice=say) for split in ("train", "test"))
    machine = Machine.of(executor)
    rows = []
    for seed in seeds:
        trainer = replace(recipe, seed=seed).trainer(train, executor)
        history = trainer.fit(train, recipe.epochs)
        scores = trainer.evaluate(test)
        seconds = sum(epoch.seconds for epoch in history.epochs)
        rows.append(
            machine.row(
                "accuracy",
                f"{recipe_name}, " + f"{precision}, " * (precision != "fp32") + f"seed {seed}",
                executor.name,
                peak_bytes=trainer.peak_bytes,
                recipe=recipe_name,
                seed=seed,
                precision=precision,
                epochs=recipe.epochs,
                accuracy=scores.accuracy,
                loss=scores.loss,
                test_images=scores.count,
                seconds=seconds,
                threads=getattr(executor, "threads", None),
            )
        )
        say(f"  seed {seed}: {scores.accuracy:.2%} after {recipe.epochs} epochs in {seconds:.1f} s")
    accuracies = [row.extra["accuracy"] for row in rows]
    say(f"mean {sum(accuracies) / len(accuracies):.3%}, lowest {min(accuracies):.2%}, highest {max(accuracies):.2%}")
    return rows
