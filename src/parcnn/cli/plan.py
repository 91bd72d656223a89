"""`parcnn plan`: what a step does, call by call, and the exact memory it takes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from parcnn import models, nn
from parcnn.cli.console import console, say
from parcnn.cuda.device import is_available
from parcnn.errors import ArgumentError
from parcnn.ops.program import Executor
from parcnn.optim import SGD
from parcnn.plan.build import MODES, Plan
from parcnn.plan.describe import CallRow, describe, outline
from parcnn.plan.options import Options
from parcnn.plan.precision import TENSOR_TYPES, check_precision
from parcnn.train import resolve_executor

INPUTS = {"lenet5": "1,28,28", "cifarnet": "3,32,32"}
WIDTH = 160  # of the table where the output is no terminal


def plan(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(models.names())}.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 64,
    mode: Annotated[str, typer.Option(help=f"One of {', '.join(MODES)}.")] = "train",
    input_shape: Annotated[
        str | None, typer.Option("--input", help="C,H,W of an image. [default: what the model was made for]")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes of the network.")] = 10,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; cuda works without a GPU, for the kernels' names.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads: each has scratch memory. [default: all]")
    ] = None,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(TENSOR_TYPES)}.")] = "fp32",
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fused kernels.")] = True,
    reuse: Annotated[bool, typer.Option("--reuse/--no-reuse", help="Tensors share memory.")] = True,
    inplace: Annotated[bool, typer.Option("--inplace/--no-inplace", help="Written over an operand.")] = True,
    parallel: Annotated[bool, typer.Option("--parallel/--no-parallel", help="Gradients beside the chain.")] = True,
) -> None:
    """Print the plan of a step (SGD with momentum), and the exact peak memory of training and of inference."""
    if mode not in MODES:
        raise ArgumentError("unknown mode", where="--mode", expected=", ".join(MODES), got=mode)
    sample = image_shape(model, input_shape)
    options = Options(fuse=fuse, reuse=reuse, inplace=inplace, parallel=parallel)
    executor = _executor(device, threads)
    check_precision(executor, precision)

    def plan_of(wanted: str) -> Plan:
        return outline(
            models.create(model, num_classes=classes, in_channels=sample[0]),
            mode=wanted,
            batch=batch,
            sample=sample,
            executor=executor,
            loss=nn.CrossEntropyLoss(),
            optimizer=SGD(momentum=0.9),
            options=options,
            precision=precision,
        )

    shown = plan_of(mode)
    rows = describe(shown, executor)
    title = f"{model}, {mode}, batch {batch}, input {'x'.join(map(str, sample))}, {executor.name}"
    (console if console.is_terminal else Console(width=WIDTH)).print(_table(rows, title))
    say(
        f"{len(rows)} calls, {sum(row.flops for row in rows) / 1e9:,.3f} GFLOP, "
        f"{sum(row.bytes for row in rows) / 1e6:,.2f} MB at least to move, {shown.program.streams} streams"
    )
    for words, each in (("training", plan_of("train")), ("inference", plan_of("predict"))):
        say(
            f"Peak memory of {words}: {each.peak_bytes:,} bytes ({each.peak_bytes / 2**20:.2f} MiB) = "
            f"{each.persistent_bytes:,} persistent + {each.arena_bytes:,} transient"
        )


def _table(rows: list[CallRow], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for column in ("#", "layer", "op", "output shape", "kernel"):
        table.add_column(column, overflow="fold")
    for column in ("MFLOP", "kB", "scratch kB", "arena offset", "stream", "after"):
        table.add_column(column, justify="right")
    for i, row in enumerate(rows):
        table.add_row(
            str(i),
            row.layer,
            row.op,
            "×".join(map(str, row.shape)),
            row.kernel,
            f"{row.flops / 1e6:,.2f}" if row.flops else "",
            f"{row.bytes / 1e3:,.1f}",
            f"{row.workspace_bytes / 1e3:,.1f}" if row.workspace_bytes else "",
            f"{row.place:,}" if isinstance(row.place, int) else row.place,
            str(row.stream),
            " ".join(map(str, row.after)),
        )
    return table


def _executor(device: str, threads: int | None) -> Executor:
    if device == "cuda" and not is_available():
        from parcnn.cuda.executor import CudaExecutor

        return CudaExecutor.null()
    return resolve_executor(device, threads)


def image_shape(model: str, text: str | None) -> tuple[int, ...]:
    """(C, H, W) out of '3,32,32'; by default what the model was made for."""
    text = text or INPUTS.get(model, "3,224,224")
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError("not the shape of an image", where="--input", expected="C,H,W such as 3,32,32", got=text)
    return tuple(int(part) for part in parts)
