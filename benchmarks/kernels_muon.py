"""Muon's update of a network's filters, from gradients to weights, against the same in PyTorch.

Ours are the calls of a training step's plan, on random gradients, replayed as a CUDA graph. PyTorch's is Jordan's code with
momentum and weights in fp32 and the iteration in bf16, in a CUDA graph, too: as it is, and by torch.compile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from parcnn import nn
from parcnn.bench.machine import Machine
from parcnn.bench.programs import BoundPlan
from parcnn.bench.rows import Row, append
from parcnn.cuda.executor import CudaExecutor
from parcnn.ops.matmul import MatMul
from parcnn.ops.muon import MuonDirection, MuonUpdate
from parcnn.ops.program import Call
from parcnn.optim import Muon
from parcnn.plan.describe import outline
from parcnn.plan.options import Options
from parcnn.plan.trace import Tensor
from parcnn.train.timing import StepTiming

STEPS, REPEATS = 40, 9
Filters = list[tuple[int, int]]  # C and K of 3x3 filters in a row
NETWORKS: dict[str, Filters] = {
    "airbench94": [(24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)],
    "cifarnet": [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)],
    "ResNet-18's 3x3": [
        *[(64, 64)] * 4, (64, 128), *[(128, 128)] * 3, (128, 256), *[(256, 256)] * 3, (256, 512), *[(512, 512)] * 3,
    ],
}  # fmt: skip


class Stack(nn.Module):
    """Convolutions one after the other, so that a plan has their filters."""

    def __init__(self, filters: Filters) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(c, k, 3, padding=1, bias=False) for c, k in filters))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(filters[-1][1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layers(x)).flatten(1))


def is_muon(call: Call) -> bool:
    """Whether a call is a part of Muon's update."""
    return isinstance(call.op, MuonDirection | MatMul | MuonUpdate)


def time_update(executor: CudaExecutor, filters: Filters, optimizer: Muon, precision: str) -> tuple[StepTiming, int]:
    """Time of our update, and its number of calls."""
    model = Stack(filters)
    plan = outline(
        model, mode="train", batch=2, sample=(filters[0][0], 4, 4), executor=executor, loss=nn.CrossEntropyLoss(),
        optimizer=optimizer, precision=precision,
    )  # fmt: skip
    bound = BoundPlan(plan, model, executor)
    timing = bound.time_calls(is_muon, Options(), STEPS, REPEATS)
    bound.free()
    return timing, sum(map(is_muon, plan.program.calls))


def torch_update(filters: Filters, optimizer: Muon, compiled: bool) -> Callable[[], None]:
    """A replay of the same update in PyTorch."""
    import torch

    a, b, c = optimizer.ns_coefficients
    lr, momentum = torch.tensor(optimizer.lr, device="cuda"), optimizer.momentum

    def zeropower(g: Any) -> Any:
        x = g.bfloat16()
        x = x / (x.norm() + 1e-7)
        if g.size(0) > g.size(1):
            x = x.T
        for _ in range(optimizer.ns_steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if g.size(0) > g.size(1) else x

    torch._dynamo.config.recompile_limit = 64  # of a function; shapes beyond it would run eagerly
    whiten = torch.compile(zeropower, dynamic=False) if compiled else zeropower
    weights, gradients, buffers = ([torch.randn(k, c, 3, 3, device="cuda") for c, k in filters] for _ in range(3))

    @torch.no_grad()
    def update() -> None:
        for w, g, buffer in zip(weights, gradients, buffers, strict=True):
            buffer.mul_(momentum).add_(g)
            u = g.add(buffer, alpha=momentum)
            w.sub_(whiten(u.reshape(len(u), -1)).view(u.shape) * lr)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph.replay


def time_replays(replay: Callable[[], None]) -> float:
    """Microseconds, median."""
    import torch

    times = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / STEPS * 1e6)
    return median(times[1:])


def measure(
    executor: CudaExecutor, networks: Sequence[str], peers: Sequence[str], say: Callable[[str], None]
) -> list[Row]:
    """Rows of each network and precision; PyTorch's iteration is in bf16."""
    machine, rows = Machine.of(executor), []
    for name in networks:
        filters, optimizer = NETWORKS[name], Muon(exclude=("head.weight",))
        ours_us = {}
        for precision in ("bf16", "fp32"):
            timing, calls = time_update(executor, filters, optimizer, precision)
            ours_us[precision] = timing
            say(f"{name:18}{'parcnn ' + precision:22}{timing.p50_us:9.1f} us {calls:4} calls")
        theirs = {}
        for peer in peers:
            theirs[peer] = time_replays(torch_update(filters, optimizer, peer == "torch_compile"))
            say(f"{name:18}{peer:22}{theirs[peer]:9.1f} us {theirs[peer] / ours_us['bf16'].p50_us:8.2f}x")
        best = min(theirs, key=theirs.__getitem__, default=None)
        peer_us = theirs[best] if best else None
        rows += [
            machine.row("muon", name, "bf16", ours_us["bf16"], peer=best, peer_p50_us=peer_us, peers_us=theirs),
            machine.row("muon", name, "fp32", ours_us["fp32"]),
        ]
    return rows


def main() -> None:
    """Measure, print and keep."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--out", type=Path, default=Path("runs/muon"), help="folder of rows")
    arguments.add_argument("--only", default="", help="of the networks, those whose name has this in it")
    arguments.add_argument("--peers", default="torch_eager,torch_compile", help="comma-separated; '' for none")
    options = arguments.parse_args()
    networks = [name for name in NETWORKS if options.only in name]
    peers = [peer for peer in options.peers.split(",") if peer]
    append(options.out / "muon.jsonl", measure(CudaExecutor(), networks, peers, print))


if __name__ == "__main__":
    main()
