"""A whole training step on the GPU against PyTorch's modes, in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from parcnn import data
from parcnn.bench import peers
from parcnn.bench.machine import Machine
from parcnn.bench.rows import Row
from parcnn.bench.speedup import Subject
from parcnn.ops.program import Executor
from parcnn.plan.describe import flops
from parcnn.train.timing import time_steps

SHAPES = {"lenet5": (1, 28, 28), "cifarnet": (3, 32, 32)}
PROBLEMS = (("lenet5", 64), ("lenet5", 512), ("lenet5", 4096), ("cifarnet", 512))
PRECISIONS = ("fp32", "bf16")
# Steps between two waits, for both sides: a wait costs the host ten microseconds, the smallest step takes fifty.
STEPS = 48
REPEATS = 9


def run(
    executor: Executor,
    say: Callable[[str], None],
    precision: str = "fp32",
    only: str = "",
    peer_modes: Sequence[str] = peers.MODES,
) -> Iterator[Row]:
    """Rows `step`, each as it is measured: SGD with momentum, images that are noise (a step's time does not depend on them).

    only: problems with this in their name, such as "cifarnet" or "lenet5, batch 64". peer_modes: PyTorch's, some of
    `peers.ALL_MODES`; the fastest is the row's peer.
    """
    machine = Machine.of(executor)
    with_torch = executor.name == "cuda" and peers.has_torch_on_gpu()
    if not with_torch:
        say("PyTorch with a GPU is not here: no peer")
    for network, batch in PROBLEMS:
        if only not in f"{network}, batch {batch}":
            continue
        steps = STEPS if executor.name == "cuda" else 1
        subject = noise(network, batch, steps)
        trainer = subject.trainer(executor, batch, precision=precision)
        plan = trainer.plan("train", subject.train)
        timing = time_steps(trainer, subject.train, "train", steps=steps, repeats=REPEATS)
        modes = (
            peers.time_on_gpu(network, SHAPES[network], batch, steps, REPEATS, peer_modes, precision)
            if with_torch
            else {}
        )
        peer = min(modes, key=lambda mode: modes[mode].p50_us) if modes else None
        row = machine.row(
            "step",
            f"{network}, batch {batch}" + f", {precision}" * (precision != "fp32"),
            executor.name,
            timing,
            peer=f"torch {machine.torch}, {peer}" if peer else None,
            peer_p50_us=modes[peer].p50_us if peer else None,
            peak_bytes=plan.peak_bytes,
            network=network,
            batch=batch,
            images_per_second=batch / timing.p50_us * 1e6,
            flops=flops(plan),
            peer_modes_us={mode: taken.p50_us for mode, taken in modes.items()},
            peer_modes_bytes={mode: taken.peak_bytes for mode, taken in modes.items()},
            precision=precision,
        )
        against = "".join(f"   torch {mode} {taken.p50_us:,.1f}" for mode, taken in modes.items())
        say(
            f"  {network}, batch {batch}, {precision}: {timing.p50_us:,.1f} us, {plan.peak_bytes / 2**20:.2f} MiB{against}"
        )
        yield row


def noise(network: str, batch: int, steps: int) -> Subject:
    """Random images of the network's shape with random labels, `steps` batches of them."""
    random = np.random.default_rng(0)
    count = batch * steps
    images = random.integers(0, 256, (count, *SHAPES[network]), np.uint8)
    classes = [str(i) for i in range(10)]
    train = data.from_arrays(images, random.integers(0, 10, count), name="noise", classes=classes)
    return Subject(network, train, None)
