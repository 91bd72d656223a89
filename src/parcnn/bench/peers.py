"""What a user would take instead: PyTorch, timed in the same run. Optional: where it is not installed, rows have no peer.

Its batch lies ready on the device (ours is gathered from the data set inside the step). On a GPU three modes are timed:
eager, the whole step in a CUDA graph, and torch.compile with reduce-overhead; where asked, torch.compile with max-autotune,
too, which tries many kernels first. In bf16 each of them by autocast (fp32 weights, as ours are) and with the whole network
in bf16, which is faster and learns worse.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parcnn.bench.machine import installed

# What rows call torch.compile's modes. Both replay CUDA graphs.
COMPILE_MODES = {"compile": "reduce-overhead", "compile max-autotune": "max-autotune"}
MODES = ("eager", "graph", "compile")
ALL_MODES = (*MODES, "compile max-autotune")
WARM_UP = 15  # torch.compile's graphs are recorded by then


@dataclass(frozen=True)
class PeerStep:
    """What PyTorch takes for a training step: median microseconds, and bytes at its peak, weights and batch among them."""

    p50_us: float
    peak_bytes: int


def has_torch() -> bool:
    """Whether PyTorch is installed (nothing is imported)."""
    return installed("torch") is not None


def has_torch_on_gpu() -> bool:
    """Whether PyTorch is installed and sees a GPU."""
    if not has_torch():
        return False
    import torch

    return torch.cuda.is_available()


def torch_network(name: str, classes: int = 10) -> Any:
    """`parcnn.models`' network of that name, in PyTorch."""
    from torch import nn

    if name == "lenet5":
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
        )  # fmt: skip
    layers: list[Any] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 256)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, classes))


def time_on_cpu(network: str, shape: tuple[int, ...], batch: int, train: bool, threads: int, repeats: int) -> float:
    """Median microseconds of a step (SGD with momentum), or of a forward pass, on `threads` CPU threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _median(_step(network, shape, batch, train, "cpu"), lambda: None, 1, repeats)
    finally:
        torch.set_num_threads(before)


def time_on_gpu(
    network: str,
    shape: tuple[int, ...],
    batch: int,
    steps: int,
    repeats: int,
    modes: Sequence[str] = MODES,
    precision: str = "fp32",
) -> dict[str, PeerStep]:
    """A training step (SGD with momentum) in each of `modes`, some of ALL_MODES; fp32 is without TF32.

    Peaks include what a mode's trials of kernels take.
    """
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    results = {}
    for numbers in ("fp32",) if precision == "fp32" else ("autocast", "bf16 weights"):
        for mode in modes:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step = _step(network, shape, batch, True, "cuda", numbers, COMPILE_MODES.get(mode), mode == "graph")
            if mode == "graph":
                step = _captured(step)
            p50_us = _median(step, torch.cuda.synchronize, steps, repeats)
            name = mode if precision == "fp32" else f"{mode}, {numbers}"
            results[name] = PeerStep(p50_us, torch.cuda.max_memory_allocated() - before)
            del step
    return results


def _step(
    network: str,
    shape: tuple[int, ...],
    batch: int,
    train: bool,
    device: str,
    numbers: str = "fp32",
    compiled: str | None = None,
    in_place: bool = False,
) -> Callable[[], object]:
    """One training step, or one forward pass, on a random batch.

    numbers: 'fp32', 'autocast' or 'bf16 weights'; compiled: torch.compile's mode.
    """
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    model = torch_network(network).to(device)
    x = torch.randn(batch, *shape, device=device)
    y = torch.randint(0, 10, (batch,), device=device)
    if shape[0] > 1:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if numbers == "bf16 weights":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    run = torch.compile(model, mode=compiled) if compiled else model
    if not train:
        model.eval()

        def forward() -> None:
            with torch.no_grad():
                run(x)

        return forward
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=device == "cuda")

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=numbers == "autocast", cache_enabled=not in_place):
            logits = run(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not in_place)

    return step


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _median(step: Callable[[], object], wait: Callable[[], object], steps: int, repeats: int) -> float:
    """Microseconds of one step by the same clock as ours: `steps` in a row, then a wait."""
    for _ in range(WARM_UP if steps > 1 else 2):
        step()
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        times.append((time.perf_counter() - began) / steps * 1e6)
    return float(np.median(times))
