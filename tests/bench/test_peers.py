"""PyTorch's training step: its modes run, and a row's peer is the fastest of those that were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parcnn.bench import peers, step
from parcnn.bench.peers import ALL_MODES, MODES, PeerStep
from parcnn.bench.rows import read
from parcnn.cli import bench as bench_command
from parcnn.cli.app import app
from parcnn.cuda.executor import CudaExecutor


@pytest.fixture
def null(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaExecutor]:
    """A GPU that runs nothing, and a small problem."""
    pytest.importorskip("cuda.bindings.nvrtc")
    executor = CudaExecutor.null()
    monkeypatch.setattr(bench_command, "resolve_executor", lambda device, threads: executor)
    monkeypatch.setattr(step, "PROBLEMS", (("lenet5", 3),))
    monkeypatch.setattr(step, "STEPS", 2)
    monkeypatch.setattr(step, "REPEATS", 1)
    yield executor
    executor.close()


@pytest.mark.usefixtures("null")
@pytest.mark.parametrize(
    ("options", "modes", "fastest"),
    [((), MODES, "compile"), (("--max-autotune",), ALL_MODES, "compile max-autotune")],
)
def test_max_autotune_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[str], modes: Sequence[str], fastest: str
) -> None:
    took = {"eager": 90.0, "graph": 40.0, "compile": 30.0, "compile max-autotune": 20.0}

    def time_on_gpu(
        network: str, shape: Sequence[int], batch: int, steps: int, repeats: int, modes: Sequence[str], precision: str
    ) -> dict[str, PeerStep]:
        assert (network, batch, precision) == ("lenet5", 3, "bf16")
        return {mode: PeerStep(took[mode], 1 << 20) for mode in modes}

    monkeypatch.setattr(peers, "has_torch_on_gpu", lambda: True)
    monkeypatch.setattr(peers, "time_on_gpu", time_on_gpu)
    result = CliRunner().invoke(app, ["bench", "step", "--precision", "bf16", "--out", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    (row,) = read(tmp_path / "step.jsonl")
    assert row.extra["peer_modes_us"] == {mode: took[mode] for mode in modes}
    assert row.peer is not None
    assert row.peer.endswith(f", {fastest}")
    assert row.peer_p50_us == took[fastest]


@pytest.fixture
def torch_on_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.usefixtures("torch_on_gpu")
@pytest.mark.parametrize("network", step.SHAPES)
def test_modes_without_the_compiler(network: str) -> None:
    for precision, numbers in (("fp32", ("",)), ("bf16", (", autocast", ", bf16 weights"))):
        found = peers.time_on_gpu(network, step.SHAPES[network], 4, 2, 1, ("eager", "graph"), precision)
        assert list(found) == [mode + of for of in numbers for mode in ("eager", "graph")]
        for each in found.values():
            assert each.p50_us > 0
            assert each.peak_bytes > 0


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.usefixtures("torch_on_gpu")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", peers.COMPILE_MODES)
def test_modes_of_the_compiler(mode: str) -> None:
    found = peers.time_on_gpu("lenet5", step.SHAPES["lenet5"], 4, 2, 1, (mode,))
    assert list(found) == [mode]
    assert found[mode].p50_us > 0
