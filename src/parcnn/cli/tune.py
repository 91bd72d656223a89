"""`parcnn tune`: measure the variants of a model's kernels, and keep the best in a table that training then follows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from parcnn import models
from parcnn.bench import layers as layers_bench
from parcnn.bench import tune as tune_bench
from parcnn.bench.layer import CONV, FUSED, LAYERS, random_layers
from parcnn.bench.tune import Measured
from parcnn.cli.console import console, say
from parcnn.cli.plan import image_shape
from parcnn.cuda import tuning
from parcnn.errors import ArgumentError
from parcnn.plan.precision import check_precision

WIDTH = 200  # of the table where the output is no terminal
ALL_LAYERS, SHIPPED = "layers", "shipped"


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(models.names())}; {ALL_LAYERS}, those of `parcnn bench layers`; or {SHIPPED}, what the "
            "table that ships is measured for."
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images in a step: another batch is another problem.")] = 64,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    input_shape: Annotated[
        str | None, typer.Option("--input", help="C,H,W of an image. [default: what the model was made for]")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes of the network.")] = 10,
    only: Annotated[str, typer.Option(help="Of `layers`: those with this in N,H,W,C,K,R,stride,pad.")] = "",
    random: Annotated[
        int, typer.Option(min=0, help="Of `layers`: so many random problems instead, without the block with a pool.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random problems.")] = 0,
    table: Annotated[Path | None, typer.Option(help="The table to write. [default: the user's own]")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Of `shipped`: measure nothing; exit code 1 where a table is out of date.")
    ] = False,
) -> None:
    """Measure the variants of each convolution of a training step; the best go into a table that later runs follow.

    Checkpoints name the table by its digest: sums of other variants may round differently.
    """
    from parcnn.cuda.executor import CudaExecutor

    if check:
        if model != SHIPPED:
            raise ArgumentError("only the tables that ship are checked", where="--check", expected=SHIPPED, got=model)
        _check()
        return
    executor = CudaExecutor(tuning=tuning.Tuning())
    check_precision(executor, precision)
    folder = tuning.SHIPPED if model == SHIPPED else tuning.user_folder()
    path = table or folder / tuning.file_name(executor.device)
    old = tuning.read(path, executor.device)
    if path.resolve().parent != tuning.SHIPPED:
        executor.tuning = tuning.Tuning.of(executor.device)
    if model == SHIPPED:
        subjects = tune_bench.of_shipped(executor, say)
    elif model == ALL_LAYERS:
        wanted = [layer for layer in (random_layers(random, seed) or LAYERS) if only in layer.shape]
        subjects = layers_bench.of_layers(executor, wanted, precision, say, CONV if random else (*CONV, *FUSED))
    else:
        sample = image_shape(model, input_shape)
        subjects = layers_bench.of_model(executor, model, sample, batch, precision, classes)
    if not subjects:
        raise ArgumentError(
            "there is nothing to measure", where="--only", expected="a part of a layer's shape", got=only
        )
    measured: list[Measured] = []
    choices = old
    most = tune_bench.MOST_OF_MANY if random or model == SHIPPED else None
    for each in tune_bench.run(executor, tune_bench.problems(subjects), say, most):
        measured.append(each)
        choices = tune_bench.table(measured, old)
        tuning.write(path, executor.device, choices)  # what a stopped run has measured is kept
    (console if console.is_terminal else Console(width=WIDTH)).print(_table(measured))
    better = sum(each.best != each.default for each in measured)
    digest = tuning.Tuning(executor.tuning.shipped, choices).digest
    say(
        f"{better} of {len(measured)} problems run faster by another variant. Wrote {path} (digest {digest or 'none'})."
    )


def _check() -> None:
    """Compare the tables that ship with the kernels that there are, on a device that runs nothing."""
    from parcnn.cuda.executor import CudaExecutor

    wrong = []
    for path in sorted(tuning.SHIPPED.glob("*.json")):
        arch, _, sm_count = path.stem.rpartition("-")
        executor = CudaExecutor.null(arch, int(sm_count))
        choices = tuning.read(path, executor.device)
        executor.tuning = tuning.Tuning()
        calls = tune_bench.problems(tune_bench.of_shipped(executor, say))
        wrong += [f"{path.name}: {fault}" for fault in tune_bench.stale(executor, choices, calls)]
    for fault in wrong:
        say(fault)
    if wrong:
        say(f"remove these lines, or measure again: `parcnn tune {SHIPPED}`")
        raise typer.Exit(1)


def _table(measured: list[Measured]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("problem", "default", "best"):
        table.add_column(column, overflow="fold")
    for column in ("variants", "default µs", "best µs", "gain"):
        table.add_column(column, justify="right")
    for each in measured:
        best = str(each.best) if each.best != each.default else "the default"
        times = (f"{each.default_us:.1f}", f"{each.best_us:.1f}", f"{each.gain:.2f}×")
        table.add_row(each.key, str(each.default), best, str(each.count), *times)
    return table
