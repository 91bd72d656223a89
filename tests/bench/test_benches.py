"""The other benchmarks, small, on the CPU: their accounts add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from parcnn.bench import accuracy, fused, gpu_check, memory, peers, step
from parcnn.cpu import CpuExecutor
from parcnn.errors import OutOfMemoryError

EXECUTOR = CpuExecutor()


def ignore(message: str) -> None:
    """Takes what a benchmark says."""


def test_fused_against_unfused() -> None:
    layer = fused.Layer("odd", 3, 5, 9, 7, 3, 1)  # 9x9: the pool drops a row and a column
    rows = {(r.extra["mode"], r.variant): r for r in fused.run(EXECUTOR, ignore, (layer,))}
    assert set(rows) == {(m, v) for m in ("forward", "forward + backward") for v in ("fused", "unfused")}
    for mode, calls in (("forward", 3), ("forward + backward", 7)):  # conv, act, pool; pool', act', dgrad, wgrad
        one, many = rows[mode, "fused"].extra, rows[mode, "unfused"].extra
        assert many["calls"] == calls
        assert one["calls"] < calls
        assert one["bytes_moved"] < many["bytes_moved"]
    assert rows["forward", "fused"].extra["calls"] == 1
    # 4x4 windows of 2x2 are computed, not 9x9 outputs.
    assert rows["forward", "fused"].extra["flops"] == 2 * 3 * 8 * 8 * 7 * 3 * 3 * 5


def test_the_largest_batch_is_run_and_the_next_does_not_fit() -> None:
    cap = 40 << 20
    (row,) = memory.run(EXECUTOR, ignore, cap, image=24)
    assert row.extra["allocated_bytes"] == row.peak_bytes
    assert row.peak_bytes is not None
    assert row.peak_bytes <= cap < row.extra["next_batch_bytes"]
    assert row.extra["largest_batch"] > 1
    assert row.peer is None


def test_not_even_one_image_fits() -> None:
    with pytest.raises(OutOfMemoryError):
        memory.largest_batch(EXECUTOR, 1000, 24)


def test_accuracy_over_seeds(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text('[model]\nname = "lenet5"\n[data]\nname = "digits"\n[train]\nepochs = 2\nbatch = 32\n')
    rows = accuracy.run(EXECUTOR, range(2), ignore, str(path))
    assert [row.extra["seed"] for row in rows] == [0, 1]
    assert all(0.5 < row.extra["accuracy"] <= 1 for row in rows)
    assert rows[0].extra["loss"] != rows[1].extra["loss"]


def test_figures_for_the_record(no_data_sets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PROBLEMS", (("lenet5", 3), ("cifarnet", 2)))
    monkeypatch.setattr(gpu_check, "STEPS", 2)
    monkeypatch.setattr(gpu_check, "REPEATS", 1)
    figures = gpu_check.run(EXECUTOR, ignore)
    assert figures["lenet5_batch3_step_us"] > 0
    assert figures["cifarnet_batch2_step_us"] > 0
    assert figures["data"] == "digits"
    assert figures["cpu_gpu_loss_difference"] == 0  # the same executor twice
    assert figures["lenet5_accuracy_after_1_epoch"] > 0.2


def test_step_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PROBLEMS", (("lenet5", 4), ("lenet5", 8)))
    (row,) = step.run(EXECUTOR, ignore, only="batch 4")
    assert row.problem == "lenet5, batch 4"
    assert row.peer is None
    assert row.extra["peer_modes_us"] == {}


@pytest.mark.torch
def test_torch_on_the_cpu() -> None:
    pytest.importorskip("torch")
    for network, shape in step.SHAPES.items():
        assert peers.time_on_cpu(network, shape, 2, True, 1, 1) > 0
        assert peers.time_on_cpu(network, shape, 2, False, 1, 1) > 0
