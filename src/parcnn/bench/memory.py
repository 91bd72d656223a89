"""The largest batch of 512x512 images that cifarnet trains with under a cap of memory: ours and PyTorch's.

Ours is known from the plan before anything runs; then that batch is truly run, what the executor allocated is counted,
and the next batch must be refused. The data set does not count, on either side: one image here, visited again and again.
PyTorch's is found by bisection, a batch counting as too large when it raises OutOfMemoryError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from parcnn import models, nn
from parcnn.bench import peers
from parcnn.bench.machine import Machine
from parcnn.bench.programs import BoundPlan
from parcnn.bench.rows import Row
from parcnn.errors import DeviceError, OutOfMemoryError
from parcnn.nn.init import manual_seed
from parcnn.ops.program import PERSISTENT, Executor
from parcnn.optim import SGD
from parcnn.plan.build import Plan
from parcnn.plan.describe import outline

CAP_BYTES = 8 << 30
IMAGE = 512
NETWORK = "cifarnet"


def run(executor: Executor, say: Callable[[str], None], cap_bytes: int = CAP_BYTES, image: int = IMAGE) -> list[Row]:
    """Rows `memory`. Raises DeviceError where a run contradicts the plan's account."""
    machine = Machine.of(executor)
    batch, model, plan = largest_batch(executor, cap_bytes, image)
    say(f"The plan says: batch {batch}, {plan.peak_bytes / 2**30:.3f} GiB")
    counted, loss = verify(executor, plan, model, cap_bytes)
    say(f"Run: loss {loss:.3f}, {counted / 2**30:.3f} GiB allocated")
    theirs, peak = _torch_largest_batch(cap_bytes, image, say) if executor.name == "cuda" else (None, None)
    row = machine.row(
        "memory",
        f"{NETWORK}, {image}x{image} images, {cap_bytes / 2**30:g} GiB",
        executor.name,
        peer=f"torch {machine.torch}, eager, channels_last" if theirs is not None else None,
        peak_bytes=plan.peak_bytes,
        largest_batch=batch,
        allocated_bytes=counted,
        next_batch_bytes=_plan(executor, image, batch + 1)[1].peak_bytes,
        peer_largest_batch=theirs,
        peer_peak_bytes=peak,
    )
    return [row]


def largest_batch(executor: Executor, cap_bytes: int, image: int) -> tuple[int, nn.Module, Plan]:
    """The largest batch whose plan fits, by bisection. Raises OutOfMemoryError where not even one image does."""
    low, high = 0, 1
    while _plan(executor, image, high)[1].peak_bytes <= cap_bytes:
        low, high = high, 2 * high
    if not low:
        raise OutOfMemoryError("not even one image fits", expected=f"at most {cap_bytes} bytes")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _plan(executor, image, middle)[1].peak_bytes <= cap_bytes else (low, middle)
    return low, *_plan(executor, image, low)


def verify(executor: Executor, plan: Plan, model: nn.Module, cap_bytes: int) -> tuple[int, float]:
    """Run two steps; what the executor holds for weights, optimizer and arena, and the loss.

    Raises DeviceError where that is not the plan's peak, or the loss is not finite.
    """
    bound = BoundPlan(plan, model, executor)
    try:
        bound.step()
        loss = bound.step()
        counted = sum(bound.regions[name].nbytes for name in ("arena", *PERSISTENT) if name in bound.regions)
        feeds = sum(region.nbytes for region in bound.regions.values()) - counted
        held = getattr(executor, "allocated_bytes", counted + feeds) - feeds
        if not (counted == held == plan.peak_bytes <= cap_bytes) or not math.isfinite(loss):
            raise DeviceError(
                "a run contradicts the plan",
                where=plan.program.name,
                expected=f"{plan.peak_bytes} bytes and a finite loss",
                got=f"{counted} bytes in regions, {held} held by the executor, loss {loss}",
            )
        return held, loss
    finally:
        bound.free()


def _plan(executor: Executor, image: int, batch: int) -> tuple[nn.Module, Plan]:
    manual_seed(0)
    model = models.create(NETWORK, in_channels=3)
    plan = outline(
        model,
        mode="train",
        batch=batch,
        sample=(3, image, image),
        executor=executor,
        loss=nn.CrossEntropyLoss(),
        optimizer=SGD(1e-3, momentum=0.9),
    )
    return model, plan


def _torch_largest_batch(cap_bytes: int, image: int, say: Callable[[str], None]) -> tuple[int | None, int | None]:
    """PyTorch's largest batch and its peak (what its allocator reserved); None where it is not installed."""
    if not peers.has_torch_on_gpu():
        say("PyTorch with a GPU is not here: no peer")
        return None, None
    import torch

    torch.cuda.set_per_process_memory_fraction(cap_bytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        low, high, peak = 0, 1, 0
        while (taken := _torch_peak(torch, image, high)) is not None:
            low, high, peak = high, 2 * high, taken
        while high - low > 1:
            middle = (low + high) // 2
            taken = _torch_peak(torch, image, middle)
            if taken is None:
                high = middle
            else:
                low, peak = middle, taken
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    say(f"PyTorch: batch {low}, {peak / 2**30:.3f} GiB reserved")
    return low, peak


def _torch_peak(torch: Any, image: int, batch: int) -> int | None:
    """Bytes that two training steps make PyTorch reserve; None where they do not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = x = None
    try:
        model = peers.torch_network(NETWORK).cuda().to(memory_format=torch.channels_last)
        x = torch.randn(batch, 3, image, image, device="cuda").contiguous(memory_format=torch.channels_last)
        y = torch.zeros(batch, dtype=torch.long, device="cuda")
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        for _ in range(2):
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_reserved())
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        del model, x
