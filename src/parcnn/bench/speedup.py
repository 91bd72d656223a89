"""How much faster is parallel: sequential, all cores and GPU on two networks; do they learn the same; what does each
optimization bring.

Rows: `speedup` (time of a forward pass and of a training step over batch sizes), `agreement` (LeNet-5 trained by each
implementation from one seed), `ablation` (a training step with each switch of the plan off).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from parcnn import data, recipes
from parcnn.bench import peers
from parcnn.bench.machine import Machine
from parcnn.bench.rows import Row
from parcnn.cpu import CpuExecutor, peak_gflops
from parcnn.cuda.device import is_available
from parcnn.data import Dataset
from parcnn.errors import DataUnavailableError
from parcnn.ops.program import Executor
from parcnn.optim import SGD
from parcnn.plan.describe import flops
from parcnn.plan.options import Options
from parcnn.train import Trainer, resolve_executor
from parcnn.train.timing import StepTiming, time_steps

Say = Callable[[str], None]

SEQUENTIAL, ALL_CORES, GPU = "sequential", "all cores", "gpu"
# fuse, reuse, inplace, parallel, graph; what is timed here is in fp32, where no channels are padded.
SWITCHES = tuple(f.name for f in fields(Options) if f.type == "bool" and f.name != "pad_channels")
LOSS_POINTS = 100  # of a loss curve
AGREEMENT_STEPS = 100  # over which the losses of two implementations are compared


@dataclass(frozen=True)
class Size:
    """How much is done. batches: by network; seconds: about so long each time is measured; epochs: of LeNet-5."""

    batches: dict[str, tuple[int, ...]]
    ablation_batch: dict[str, int]
    seconds: float
    repeats: int
    epochs: dict[str, int]  # by data set


FULL = Size(
    {"lenet5": (16, 64, 512, 4096), "cifarnet": (32, 128)},
    {"lenet5": 64, "cifarnet": 64},
    seconds=1,
    repeats=5,
    epochs={"mnist": 3, "digits": 20},
)
# Two minutes on two cores without a GPU.
DEMO = Size(
    {"lenet5": (16, 64, 256), "cifarnet": (16, 64)},
    {"lenet5": 64},
    seconds=1.2,
    repeats=5,
    epochs={"mnist": 1, "digits": 10},
)


@dataclass(frozen=True)
class Subject:
    """A network on its data."""

    network: str
    train: Dataset
    test: Dataset | None

    def trainer(
        self, executor: Executor, batch: int, options: Options | None = None, precision: str = "fp32"
    ) -> Trainer:
        """A trainer for timing: SGD with momentum, as in the peers; a small rate, so that hundreds of steps stay finite."""
        recipe = recipes.Recipe(
            self.network, self.train.name, batch=batch, optimizer=SGD(1e-3, momentum=0.9), precision=precision
        )
        return recipe.trainer(self.train, executor, options)


def executors() -> dict[str, Executor]:
    """The implementations that this machine can run, by variant."""
    found: dict[str, Executor] = {SEQUENTIAL: CpuExecutor(threads=1), ALL_CORES: CpuExecutor()}
    if is_available():
        found[GPU] = resolve_executor("cuda")
    return found


def subjects(data_dir: Path | None, say: Say) -> tuple[Subject, Subject]:
    """LeNet-5 on MNIST, or on the embedded digits where MNIST cannot be had; cifarnet on CIFAR-10, or on noise."""
    try:
        lenet = Subject("lenet5", *(data.load("mnist", split, data_dir, notice=say) for split in ("train", "test")))
    except DataUnavailableError as error:
        say(f"MNIST cannot be had ({error.what}); the 1,797 digits that come with parcnn take its place")
        lenet = Subject("lenet5", *(data.load("digits", split) for split in ("train", "test")))
    try:
        colour = data.load("cifar10", "train", data_dir, download=False)
    except DataUnavailableError:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (4096, 3, 32, 32), np.uint8)
        colour = data.from_arrays(images, random.integers(0, 10, 4096), name="noise")
    return lenet, Subject("cifarnet", colour, None)


def run(size: Size, data_dir: Path | None, say: Say, with_peers: bool = True) -> Iterator[list[Row]]:
    """Measure everything and give the rows of each part when it is done, so that a run cut short keeps what it has.

    `say` is told, in words, what is going on. with_peers: PyTorch too, where it is installed.
    """
    lenet, cifar = subjects(data_dir, say)
    found = executors()
    machines = {variant: Machine.of(executor) for variant, executor in found.items()}
    say(f"This machine: {machines[SEQUENTIAL].cpu}, {len(os.sched_getaffinity(0))} cores" + _gpu_words(machines))
    peak = peak_gflops()
    say(f"One core's peak, measured with a large matrix product: {peak:.0f} GFLOP/s")

    yield train_each(lenet, size.epochs[lenet.train.name], found, machines, say)
    for subject in (lenet, cifar):
        yield time_each(subject, size, found, machines, peak, say, with_peers)
    best = GPU if GPU in found else ALL_CORES
    for network, batch in size.ablation_batch.items():
        subject = next(s for s in (lenet, cifar) if s.network == network)
        yield ablations(subject, batch, size, found[best], machines[best], best, say)
    for executor in found.values():
        executor.close()


def train_each(
    subject: Subject, epochs: int, found: dict[str, Executor], machines: dict[str, Machine], say: Say
) -> list[Row]:
    """Train the network by each implementation from one seed: rows `agreement`."""
    name = subject.train.name
    recipe = replace(recipes.read(f"{name}-{subject.network}"), epochs=epochs)
    say(
        f"Training {subject.network} on {len(subject.train):,} images of {name} for {epochs} epoch{'s' * (epochs > 1)}, "
        "by each implementation from the same seed: they must learn the same"
    )
    rows: list[Row] = []
    reference: np.ndarray | None = None
    for variant, executor in found.items():
        trainer = recipe.trainer(subject.train, executor)
        history = trainer.fit(subject.train, epochs)
        scores = trainer.evaluate(subject.test or subject.train)
        losses = history.losses
        seconds = sum(epoch.seconds for epoch in history.epochs)
        reference = losses if reference is None else reference
        n = min(AGREEMENT_STEPS, len(losses))
        difference = float(np.max(np.abs(losses[:n] - reference[:n]) / np.abs(reference[:n])))
        rows.append(
            machines[variant].row(
                "agreement",
                f"{subject.network} {name}, {epochs} epoch{'s' * (epochs > 1)}, batch {recipe.batch}",
                variant,
                peak_bytes=trainer.peak_bytes,
                network=subject.network,
                data=name,
                epochs=epochs,
                seed=recipe.seed,
                accuracy=scores.accuracy,
                test_images=scores.count,
                seconds=seconds,
                loss_difference=difference,
                loss_curve=_curve(losses),
                steps=len(losses),
            )
        )
        say(f"  {variant:<11} {seconds:6.1f} s   test accuracy {scores.accuracy:.2%}")
    return rows


def disagreement(rows: Sequence[Row]) -> str | None:
    """What is wrong where implementations that were trained alike do not reach the same accuracy; None where they do.

    From one seed the first steps are the same up to rounding, which then grows: accuracies may differ by what chance
    does to runs of another seed, half a point on MNIST's 10,000 test images and two on the 360 of the digits.
    """
    runs = [row for row in rows if row.bench == "agreement"]
    if not runs:
        return None
    first = runs[0]
    allowed = 0.005 if first.extra["test_images"] >= 10_000 else 0.02
    for row in runs[1:]:
        difference = abs(row.extra["accuracy"] - first.extra["accuracy"])
        if not difference <= allowed:  # NaN too
            return f"{row.variant} reaches {row.extra['accuracy']:.2%}, {first.variant} {first.extra['accuracy']:.2%}"
    return None


def time_each(
    subject: Subject,
    size: Size,
    found: dict[str, Executor],
    machines: dict[str, Machine],
    peak: float,
    say: Say,
    with_peers: bool,
) -> list[Row]:
    """Time a forward pass and a training step over batch sizes: rows `speedup`."""
    name, batches = subject.train.name, size.batches[subject.network]
    batches = tuple(b for b in batches if b <= len(subject.train))
    say(f"Timing {subject.network} on {name}: forward passes and whole training steps, in images per second")
    rows: list[Row] = []
    for batch in batches:
        for mode in ("forward", "train"):
            figures = []
            for variant, executor in found.items():
                trainer = subject.trainer(executor, batch)
                plan_mode = "train" if mode == "train" else "eval"
                plan = trainer.plan(plan_mode, subject.train)
                timing = measure(trainer, subject.train, plan_mode, size)
                gflops = flops(plan) / timing.p50_us / 1e3
                threads = getattr(executor, "threads", None)
                rate = batch / timing.p50_us * 1e6
                peer_times = _peer(subject, batch, mode, variant, threads, size.repeats) if with_peers else {}
                peer = min(peer_times, key=lambda each: peer_times[each]) if peer_times else None
                rows.append(
                    machines[variant].row(
                        "speedup",
                        f"{subject.network} {name}, batch {batch}, {mode}",
                        variant,
                        timing,
                        peer=peer,
                        peer_p50_us=peer_times[peer] if peer else None,
                        peak_bytes=plan.peak_bytes,
                        network=subject.network,
                        data=name,
                        batch=batch,
                        mode=mode,
                        threads=threads,
                        images_per_second=rate,
                        flops=flops(plan),
                        gflops=gflops,
                        share_of_peak=gflops / (peak * threads) if threads else None,
                        peak_gflops_of_a_core=peak,
                        peer_modes_us=peer_times,
                    )
                )
                figures.append(f"{variant} {rate:,.0f}")
            say(f"  batch {batch:>4}, {mode:<7}: " + ", ".join(figures))
    return rows


def ablations(
    subject: Subject, batch: int, size: Size, executor: Executor, machine: Machine, variant: str, say: Say
) -> list[Row]:
    """Time a training step with each of the plan's switches off, and with all: rows `ablation`."""
    say(f"What each optimization brings: {subject.network}, batch {batch}, on {variant}, each switched off in turn")
    choices = {"all on": Options()}
    choices |= {f"{switch} off": Options(**{switch: False}) for switch in SWITCHES}
    choices["all off"] = Options(**dict.fromkeys(SWITCHES, False))
    rows = []
    for label, options in choices.items():
        trainer = subject.trainer(executor, batch, options)
        plan = trainer.plan("train", subject.train)
        timing = measure(trainer, subject.train, "train", size)
        rows.append(
            machine.row(
                "ablation",
                f"{subject.network} {subject.train.name}, batch {batch}, train",
                f"{label}, {variant}",
                timing,
                peak_bytes=plan.peak_bytes,
                network=subject.network,
                data=subject.train.name,
                batch=batch,
                executor=variant,
                switches=label,
                arena_bytes=plan.arena_bytes,
                calls=len(plan.program.calls),
            )
        )
        say(f"  {label:<13} {timing.p50_us / 1e3:8.2f} ms a step, {plan.peak_bytes / 2**20:6.2f} MiB")
    return rows


def measure(trainer: Trainer, train: Dataset, mode: str, size: Size) -> StepTiming:
    """Time steps for about `size.seconds`, fewer times where one step takes about as long as all should."""
    first_us = time_steps(trainer, train, mode, steps=1, repeats=1).p50_us
    steps = int(size.seconds * 1e6 / first_us / (size.repeats + 2))  # two runs warm up
    repeats = size.repeats if steps else min(size.repeats, 3)
    return time_steps(trainer, train, mode, steps=max(1, min(200, steps)), repeats=repeats)


def _peer(subject: Subject, batch: int, mode: str, variant: str, threads: int | None, repeats: int) -> dict[str, float]:
    """PyTorch's times in the same run, by what they are of; empty where it is not installed."""
    shape = subject.train.shape
    if shape != ((1, 28, 28) if subject.network == "lenet5" else (3, 32, 32)):
        return {}
    if threads is not None and peers.has_torch():
        name = f"torch, {threads} CPU thread{'s' * (threads > 1)}"
        return {name: peers.time_on_cpu(subject.network, shape, batch, mode == "train", threads, repeats)}
    if variant == GPU and mode == "train" and peers.has_torch_on_gpu():
        times = peers.time_on_gpu(subject.network, shape, batch, steps=30, repeats=repeats, modes=("eager", "graph"))
        return {f"torch, {mode}": taken.p50_us for mode, taken in times.items()}
    return {}


def _curve(losses: np.ndarray) -> list[float]:
    """At most LOSS_POINTS means over stretches of equal length."""
    return [float(part.mean()) for part in np.array_split(losses, min(LOSS_POINTS, len(losses)))]


def _gpu_words(machines: dict[str, Machine]) -> str:
    return f", {machines[GPU].gpu}" if GPU in machines else "; no GPU, so the parallel implementation is all its cores"
