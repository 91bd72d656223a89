"""Rows as a run would leave them."""

from __future__ import annotations

from typing import Any

from parcnn.bench.rows import Row

MACHINE: dict[str, Any] = {"cpu": "Some CPU <i9>", "cores": 4, "python": "3.12.1", "numpy": "2.1.0"}


def timed(variant: str, us: float, *, batch: int = 64, mode: str = "train", gpu: str | None = None) -> Row:
    threads = {"sequential": 1, "all cores": 4}.get(variant)
    return Row(
        "speedup", f"lenet5 mnist, batch {batch}, {mode}", variant, us * 0.9, us, us * 1.2,
        peer="torch, graph" if gpu else None, peer_p50_us=us * 1.5 if gpu else None, peak_bytes=3 << 20, gpu=gpu,
        date="2026-01-02T03:04:05+00:00", commit="c0ffee",
        extra={
            **MACHINE, "network": "lenet5", "data": "mnist", "batch": batch, "mode": mode, "threads": threads,
            "images_per_second": batch / us * 1e6, "gflops": 12.5, "share_of_peak": 0.25 if threads else None,
        },
    )  # fmt: skip


def agreement(variant: str, accuracy: float, gpu: str | None = None) -> Row:
    extra = {
        **MACHINE, "network": "lenet5", "data": "mnist", "epochs": 1, "accuracy": accuracy, "test_images": 10_000,
        "seconds": 9.0, "loss_difference": 1e-6, "loss_curve": [2.3, 0.5, 0.1], "steps": 30,
    }  # fmt: skip
    return Row("agreement", "lenet5 mnist, 1 epoch, batch 64", variant, gpu=gpu, extra=extra)


def ablation(switches: str, us: float, peak_bytes: int, gpu: str | None = None) -> Row:
    executor = "gpu" if gpu else "all cores"
    extra = {**MACHINE, "network": "lenet5", "batch": 64, "executor": executor, "switches": switches}
    variant = f"{switches}, {executor}"
    return Row(
        "ablation", "lenet5 mnist, batch 64, train", variant, us, us, us, peak_bytes=peak_bytes, gpu=gpu, extra=extra
    )


def on_cpu() -> list[Row]:
    """A run without a GPU and without torch."""
    switches = ("fuse", "reuse", "inplace", "parallel", "graph")
    return [
        agreement("sequential", 0.985),
        agreement("all cores", 0.985),
        *(
            timed(v, us, mode=m)
            for m in ("forward", "train")
            for v, us in (("sequential", 8000.0), ("all cores", 2500.0))
        ),
        ablation("all on", 2500.0, 2 << 20),
        *(ablation(f"{s} off", 3000.0 + i, (3 + i) << 20) for i, s in enumerate(switches)),
        ablation("all off", 6000.0, 9 << 20),
    ]


def on_gpu() -> list[Row]:
    """A run with a GPU and torch."""
    gpu = "NVIDIA H200"
    return [
        *(row for row in on_cpu() if row.bench != "ablation"),
        agreement("gpu", 0.986, gpu),
        *(timed("gpu", 50.0, mode=m, gpu=gpu) for m in ("forward", "train")),
        ablation("all on", 50.0, 2 << 20, gpu),
        ablation("graph off", 400.0, 2 << 20, gpu),
    ]
