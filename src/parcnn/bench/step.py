"""A whole training step on the GPU against PyTorch's modes, in the same run."""

from __future__ import annotations

from collections.abc import Callable

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


def run(executor: Executor, say: Callable[[str], None]) -> list[Row]:
    """Rows `step`: fp32, SGD with momentum, images that are noise (a step's time does not depend on them)."""
    machine = Machine.of(executor)
    with_torch = executor.name == "cuda" and peers.has_torch_on_gpu()
    if not with_torch:
        say("PyTorch with a GPU is not here: no peer")
    rows = []
    for network, batch in PROBLEMS:
        trainer = (subject := noise(network, 4 * batch)).trainer(executor, batch)
        plan = trainer.plan("train", subject.train)
        steps = 100 if executor.name == "cuda" else 1
        timing = time_steps(trainer, subject.train, "train", steps=min(steps, 4), repeats=3)  # kernels are loaded
        timing = time_steps(trainer, subject.train, "train", steps=steps, repeats=9)
        modes = peers.time_on_gpu(network, SHAPES[network], batch, 30, 9) if with_torch else {}
        peer = min(modes, key=lambda mode: modes[mode]) if modes else None
        rows.append(
            machine.row(
                "step",
                f"{network}, batch {batch}",
                executor.name,
                timing,
                peer=f"torch {machine.torch}, {peer}" if peer else None,
                peer_p50_us=modes[peer] if peer else None,
                peak_bytes=plan.peak_bytes,
                network=network,
                batch=batch,
                images_per_second=batch / timing.p50_us * 1e6,
                flops=flops(plan),
                peer_modes_us=modes,
            )
        )
        against = "".join(f"   torch {mode} {us:,.1f}" for mode, us in modes.items())
        say(f"  {network}, batch {batch}: {timing.p50_us:,.1f} us{against}")
    return rows


def noise(network: str, count: int) -> Subject:
    """Random images of the network's shape and random labels."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *SHAPES[network]), np.uint8)
    classes = [str(i) for i in range(10)]
    train = data.from_arrays(images, random.integers(0, 10, count), name="noise", classes=classes)
    return Subject(network, train, None)
