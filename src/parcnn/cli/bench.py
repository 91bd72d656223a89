"""`parcnn bench`: measurements, and the tables that are made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from parcnn.bench import accuracy as accuracy_bench
from parcnn.bench import fused as fused_bench
from parcnn.bench import gpu_check as gpu_check_bench
from parcnn.bench import layers as layers_bench
from parcnn.bench import memory as memory_bench
from parcnn.bench import peers as peers_bench
from parcnn.bench import speedup as speedup_bench
from parcnn.bench import step as step_bench
from parcnn.bench.layer import CONV, DEPTHWISE, FUSED, LAYERS, random_layers
from parcnn.bench.rows import Row, append, read, read_folder
from parcnn.cli.console import say
from parcnn.cli.options import DataDir, Device, Threads
from parcnn.cli.plan import image_shape
from parcnn.errors import ArgumentError, DataError
from parcnn.report import page, plots, tables
from parcnn.train import resolve_executor

RESULTS = Path("benchmarks/results")  # what tables and graphs of README and docs are made from
RUNS = Path("runs/bench")

app = typer.Typer(no_args_is_help=True, help="Measure; every result is a row (JSON lines).")

Out = Annotated[Path, typer.Option(help="Folder for the rows.")]


@app.command()
def speedup(
    demo: Annotated[bool, typer.Option("--demo", help="A small one: two minutes on two cores.")] = False,
    data_dir: DataDir = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="PyTorch too, where it is installed.")] = True,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for page, graphs and rows. [default: {RUNS}; runs/demo with --demo]")
    ] = None,
) -> None:
    """Sequential, all cores and GPU: speed, accuracy, what each optimization brings; rows, graphs and an HTML page."""
    plots.require_matplotlib()  # not after minutes of measuring
    folder = out or (Path("runs/demo") if demo else RUNS)
    if demo:
        say(
            "parcnn trains convolutional networks. This demonstration trains a small one (LeNet-5, which reads handwritten\n"
            "digits) sequentially, on one core, and in parallel: on all cores, and on the GPU where there is one. All must\n"
            "learn the same. Then it measures how fast each is, on LeNet-5 and on a larger network (cifarnet), switches\n"
            "each optimization off in turn to see what it brings, and writes a page with graphs. This takes one to two\n"
            "minutes.\n"
        )
    rows: list[Row] = []
    for part in speedup_bench.run(speedup_bench.DEMO if demo else speedup_bench.FULL, data_dir, say, peers):
        append(folder / "speedup.jsonl", part)
        rows += part
    path = page.write(folder / "speedup.html", rows, plots.graphs(rows))
    fault = speedup_bench.disagreement(rows)
    say(
        f"\nThe implementations do NOT agree: {fault}"
        if fault
        else "\nAll implementations reach the same accuracy (within what chance does to single runs)."
    )
    say("The page with all graphs (open it in a browser):")
    say(str(path.resolve()))
    if fault:
        raise typer.Exit(1)


@app.command()
def fused(device: Device = "auto", threads: Threads = None, out: Out = RUNS) -> None:
    """Convolution + bias + ReLU + max-pool in one kernel against one kernel each: time, memory, bytes moved."""
    _keep(out, "fused", fused_bench.run(resolve_executor(device, threads), say))


@app.command()
def layers(
    model: Annotated[str | None, typer.Option(help="The convolutions of this model's training step instead.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --model: images in a step.")] = 512,
    random: Annotated[int, typer.Option(min=0, help="So many random problems instead.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random problems.")] = 0,
    depthwise: Annotated[bool, typer.Option("--depthwise", help="Depthwise layers instead.")] = False,
    only: Annotated[str, typer.Option(help="Layers with this in N,H,W,C,K,R,stride,pad.")] = "",
    directions: Annotated[str, typer.Option(help=f"Of {', '.join((*CONV, *FUSED))}; comma-separated.")] = ",".join(
        CONV
    ),
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    portable: Annotated[bool, typer.Option("--portable", help="Only kernels that run on every GPU.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="PyTorch too, where it is installed.")] = True,
    max_autotune: Annotated[bool, typer.Option("--max-autotune", help="torch.compile's slowest mode too.")] = False,
    pauses: Annotated[
        bool, typer.Option("--pauses/--no-pauses", help="Also time single graphs after a rest each.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run of the same commit was stopped.")] = False,
    out: Out = RUNS,
) -> None:
    """Convolution layers against cuDNN and the roofline; the block with bias, ReLU and max-pool against torch.compile."""
    from parcnn.cuda.executor import CudaExecutor
    from parcnn.cuda.kernels import REGISTRY
    from parcnn.cuda.tuning import Tuning

    wanted = tuple(directions.split(","))
    if unknown := set(wanted) - {*CONV, *FUSED}:
        raise ArgumentError("unknown direction", where="--directions", expected=(*CONV, *FUSED), got=", ".join(unknown))
    if precision not in ("bf16", "fp32"):
        raise ArgumentError("unknown precision", where="--precision", expected="bf16, fp32", got=precision)
    executor = CudaExecutor(registry=REGISTRY.portable if portable else None)
    if portable:
        executor.tuning = Tuning.of(executor.device)  # a user's table may name kernels that not every GPU has
    if model:
        found = layers_bench.of_model(executor, model, image_shape(model, None), batch, precision)
        subjects = [each for each in found if each.direction in wanted and only in each.problem["shape"]]
    else:
        chosen = random_layers(random, seed) if random else DEPTHWISE if depthwise else LAYERS
        chosen = tuple(layer for layer in chosen if only in layer.shape)
        subjects = layers_bench.of_layers(executor, chosen, precision, say, wanted)
    kind = "model" if model else "random" if random else "depthwise" if depthwise else ""
    calls = (call for subject in subjects for call in subject.calls)
    tuned = any(executor.tuning.is_users(call.op, call.input_specs) for call in calls)
    special = (kind, "tuned" * tuned, "portable" * portable, precision * (precision != "bf16"))
    bench = " ".join(filter(None, ("conv", *special)))
    compiled = ("default", "max-autotune") if max_autotune else ("default",)
    path = out / "layers.jsonl"
    for rows in layers_bench.run(
        executor,
        subjects,
        say,
        bench=bench,
        precision=precision,
        peers=peers,
        compiled=compiled,
        pauses=pauses,
        earlier=read(path) if resume and path.exists() else (),
    ):
        append(path, rows)
    say(f"rows added to {path}")


@app.command()
def step(
    device: Device = "auto",
    threads: Threads = None,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(step_bench.PRECISIONS)}.")] = "fp32",
    only: Annotated[str, typer.Option(help='Problems with this in their name, such as "cifarnet".')] = "",
    max_autotune: Annotated[bool, typer.Option("--max-autotune", help="torch.compile's slowest mode too.")] = False,
    out: Out = RUNS,
) -> None:
    """A whole training step against PyTorch's modes in the same run."""
    modes = peers_bench.ALL_MODES if max_autotune else peers_bench.MODES
    _keep(out, "step", step_bench.run(resolve_executor(device, threads), say, precision, only, modes))


@app.command()
def memory(
    device: Device = "auto",
    cap_mib: Annotated[int, typer.Option(min=1, help="Memory that may be used.")] = memory_bench.CAP_BYTES >> 20,
    image: Annotated[int, typer.Option(min=8, help="Height and width of an image.")] = memory_bench.IMAGE,
    out: Out = RUNS,
) -> None:
    """The largest batch of 512x512 images that cifarnet trains with under a cap of memory, ours and PyTorch's."""
    _keep(out, "memory", memory_bench.run(resolve_executor(device), say, cap_mib << 20, image))


@app.command()
def accuracy(
    seeds: Annotated[int, typer.Option(min=1, help="How many runs, with seeds 0, 1, ...")] = 5,
    recipe: Annotated[str, typer.Option(help="A recipe's name or path.")] = accuracy_bench.RECIPE,
    device: Device = "auto",
    threads: Threads = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 on the GPU.")] = "fp32",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data. [default: the recipe's]")] = None,
    data_dir: DataDir = None,
    out: Out = RUNS,
) -> None:
    """The accuracy that a recipe reaches over seeds."""
    executor = resolve_executor(device, threads)
    _keep(out, "accuracy", accuracy_bench.run(executor, range(seeds), say, recipe, data_dir, precision, epochs))


@app.command("gpu-check")
def gpu_check(
    json_file: Annotated[Path, typer.Option("--json", help="File for the figures.")],
    device: Device = "cuda",
    data_dir: DataDir = None,
) -> None:
    """Figures of the GPU in less than a minute, for the record of the GPU tests."""
    figures = gpu_check_bench.run(resolve_executor(device), say, data_dir)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    say(f"Wrote {json_file}")


@app.command("graphs")
def make_graphs(
    results: Annotated[Path, typer.Option(help="Folder of the rows, and of the graphs.")] = RESULTS,
) -> None:
    """Draw the graphs of convolution layers anew from the rows (`speedup` draws its own)."""
    graph = plots.roofline(read_folder(results))
    if graph is None:
        raise DataError(
            "there are no rows of layers with a peer", where=str(results), remedy="run `parcnn bench layers`"
        )
    for path in graph.write(results):
        say(f"Wrote {path}")


@app.command("tables")
def make_tables(
    files: Annotated[list[Path], typer.Argument(help=f"Markdown files with markers {tables.MARKERS}.")],
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit code 1 where a table is stale.")] = False,
) -> None:
    """Make the tables in Markdown files anew from the rows."""
    stale = tables.refresh(files, read_folder(results), write=not check)
    for path in stale:
        say(f"{path}: {'stale; `parcnn bench tables` renews it' if check else 'renewed'}")
    if stale and check:
        raise typer.Exit(1)


def _keep(folder: Path, name: str, rows: Iterable[Row]) -> None:
    """Each row is kept as it comes: a run that is stopped loses none."""
    count = 0
    for row in rows:
        append(folder / f"{name}.jsonl", [row])
        count += 1
    say(f"{count} rows added to {folder / name}.jsonl")
