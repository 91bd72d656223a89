"""`parcnn tune` and `parcnn bench layers`, on a device that runs nothing: what they write, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parcnn.bench import layers, repeated, roofline
from parcnn.bench import tune as tune_bench
from parcnn.bench.layer import Layer
from parcnn.bench.rows import read
from parcnn.bench.tune import Measured
from parcnn.cli import bench as bench_command
from parcnn.cli import tune as tune_command
from parcnn.cli.app import app
from parcnn.cuda import tuning
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import Registry, conv_sm90
from parcnn.cuda.tuning import Choice, Tuning, problem_key, user_folder
from parcnn.ops.program import Call

SMALL = (Layer(4, 9, 7, 8, 16, 3, 1, 1), Layer(4, 12, 12, 3, 8, 5, 2, 2))
GPU = CudaExecutor  # before it is replaced


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with a null GPU, small lists of layers and an empty home."""
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for module, name, value in (
        (repeated, "SETS_BYTES", 1 << 16),
        (repeated, "REPEAT_SECONDS", 1e-4),
        (roofline, "COPY_BYTES", 1 << 16),
        (layers, "has_torch_on_gpu", lambda: False),
        (tune_command, "LAYERS", SMALL),
        (bench_command, "LAYERS", SMALL),
    ):
        monkeypatch.setattr(module, name, value)

    def executor(registry: Registry | None = None, tuning: Tuning | None = None) -> CudaExecutor:
        made = GPU.null(registry=registry)
        made.tuning = tuning if tuning is not None else Tuning.of(made.device, user_folder())
        return made

    monkeypatch.setattr("parcnn.cuda.executor.CudaExecutor", executor)
    return tmp_path


def _with_users_table(home: Path) -> CudaExecutor:
    """A null GPU whose tables include the user's."""
    gpu = GPU.null()
    gpu.tuning = Tuning.of(gpu.device, home / "parcnn" / "tuned")
    return gpu


def succeed(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1
    assert "error:" in result.stderr
    return result.stderr


def test_the_best_variants_go_into_the_users_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "parcnn" / "tuned" / "sm_90a-132.json"
    found = Measured("conv_fprop f32[1]", Choice("conv_fprop", "a"), 30.0, Choice("conv_fprop", "b"), 20.0, 5)
    same = Measured("conv_wgrad f32[1]", Choice("conv_wgrad", "a"), 30.0, Choice("conv_wgrad", "a"), 30.0, 5)
    monkeypatch.setattr(tune_bench, "run", lambda executor, calls, say, most: iter([found, same]))
    output = succeed("tune", "layers", "--precision", "fp32")
    assert "1.50×" in output
    assert "1 of 2 problems" in output
    content = json.loads(path.read_text())
    assert content["choices"] == {"conv_fprop f32[1]": "conv_fprop: b"}
    gpu = GPU.null()
    assert Tuning(gpu.tuning.shipped, tuning.read(path, gpu.device)).digest in output


def test_a_models_problems_are_those_of_its_training_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(executor: CudaExecutor, calls: list[Call], say: object, most: object) -> Iterator[Measured]:
        for call in calls:
            first, *_, last = executor.choices(call.op, call.input_specs, call.output_specs)
            yield Measured(problem_key(call.op, call.input_specs), first, 3.0, last, 2.0, 9)

    monkeypatch.setattr(tune_bench, "run", run)
    output = succeed("tune", "lenet5", "--batch", "5", "--precision", "fp32", "--table", home / "own.json")
    assert "14 of 14 problems" in output, "two convolutions and three linear layers; no gradient of images"
    choices = json.loads((home / "own.json").read_text())["choices"]
    assert "conv_fprop pad=(2, 2, 2, 2) pool='max' bias=True act='relu' f32[5,28,28,1] f32[6,5,5,1] f32[6]" in choices
    assert not (home / "parcnn").exists(), "the user's own table is left alone"


def test_tables_that_ship_are_up_to_date() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    succeed("tune", "shipped", "--check")


def test_a_shipped_table_that_is_out_of_date_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_bench, "LAYERS", SMALL[:1])
    monkeypatch.setattr(tune_bench, "SHIPPED_STEPS", (("lenet5", 2, (1, 28, 28)),))
    monkeypatch.setattr(tuning, "SHIPPED", home)
    monkeypatch.setattr("parcnn.cuda.executor.CudaExecutor", GPU)  # needs no device to check
    device = GPU.null().device
    good = "conv_fprop pad=(1, 1, 1, 1) bf16[4,9,7,8] bf16[16,3,3,8]"
    bias = "conv_fprop pad=(2, 2, 2, 2) pool='max' bias=True act='relu' bf16[2,28,28,1] bf16[6,5,5,1] f32[6]"
    known = {good: Choice("conv_mma_fprop", "64x64x64/2x2/3"), bias: Choice("conv_mma_fprop", "128x64x32/4x1/3 flat")}
    tuning.write(home / "sm_90a-132.json", device, known)
    succeed("tune", "shipped", "--check")
    tuning.write(
        home / "sm_90a-132.json", device, {**known, good: Choice("conv_mma_fprop", "1x1"), "conv_fprop": known[good]}
    )
    result = CliRunner().invoke(app, ["tune", "shipped", "--check"])
    assert result.exit_code == 1
    assert f"{good}: there is no variant 'conv_mma_fprop: 1x1'" in result.output
    assert "sm_90a-132.json: conv_fprop: not a problem" in result.output
    assert len(result.output.splitlines()) == 3, "the two, and the remedy"


def test_what_ships_is_written_where_it_ships(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_bench, "LAYERS", SMALL[:1])
    monkeypatch.setattr(tune_bench, "SHIPPED_STEPS", ())
    monkeypatch.setattr(tuning, "SHIPPED", home / "ships")
    tried: list[int] = []

    def run(executor: CudaExecutor, calls: list[Call], say: object, most: int) -> Iterator[Measured]:
        tried.append(most)
        assert not executor.tuning.user
        choices = executor.choices(calls[0].op, calls[0].input_specs, calls[0].output_specs)
        yield Measured("conv_fprop bf16[1]", choices[0], 3.0, choices[1], 2.0, 9)

    monkeypatch.setattr(tune_bench, "run", run)
    succeed("tune", "shipped")
    assert tried == [tune_bench.MOST_OF_MANY]
    assert list(json.loads((home / "ships" / "sm_90a-132.json").read_text())["choices"]) == ["conv_fprop bf16[1]"]


def test_random_problems_are_tuned_and_then_told_apart(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []

    def two_layers(count: int, seed: int) -> tuple[Layer, ...]:
        drawn.append((count, seed))
        return SMALL

    def run(executor: CudaExecutor, calls: list[Call], say: object, most: int) -> Iterator[Measured]:
        assert (len(calls), most) == (5, tune_bench.MOST_OF_MANY)
        first, *_, last = executor.choices(calls[0].op, calls[0].input_specs, calls[0].output_specs)
        yield Measured(problem_key(calls[0].op, calls[0].input_specs), first, 3.0, last, 2.0, 9)

    monkeypatch.setattr(tune_bench, "run", run)
    for command in (tune_command, bench_command):
        monkeypatch.setattr(command, "random_layers", lambda count, seed: two_layers(count, seed) if count else ())
    measure = ("bench", "layers", "--random", "2", "--seed", "9", "--out", home)
    succeed(*measure)
    succeed("tune", "layers", "--random", "2", "--seed", "9")
    monkeypatch.setattr("parcnn.cuda.executor.CudaExecutor", lambda registry: _with_users_table(home))
    succeed(*measure)
    assert drawn == [(2, 9)] * 3
    before, after = (read(home / "layers.jsonl")[i : i + 5] for i in (0, 5))
    assert {row.bench for row in before} == {"conv random"}
    assert {row.bench for row in after} == {"conv random tuned"}
    assert before[0].variant != after[0].variant
    assert [row.variant for row in before[1:]] == [row.variant for row in after[1:]]


def test_a_damaged_table_stops_it(home: Path) -> None:
    (home / "own.json").write_text("{")
    assert "remove the file" in fail("tune", "lenet5", "--table", home / "own.json")


def test_layers_are_measured_and_kept_part_by_part(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = succeed("bench", "layers", "--precision", "fp32", "--out", home)
    rows = read(home / "layers.jsonl")
    assert [row.bench for row in rows] == ["conv fp32"] * 5
    assert [row.problem["direction"] for row in rows] == ["fprop", "dgrad", "wgrad", "fprop", "wgrad"]
    assert "fprop 4,9,7,8,16,3,1,1" in output
    succeed("bench", "layers", "--only", "3,8,5", "--directions", "wgrad,fused_pool_fwd", "--out", home, "--portable")
    rows = read(home / "layers.jsonl")[5:]
    assert [(row.bench, row.problem["direction"]) for row in rows] == [
        ("conv portable", "wgrad"),
        ("conv portable", "fused_pool_fwd"),
    ]

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    measured = iter([layers.RepeatedCalls] * 3)  # the copy, and two layers

    def repeated_calls(*arguments: object) -> object:
        kind = next(measured, None)
        return kind(*arguments) if kind else stop()

    monkeypatch.setattr(layers, "RepeatedCalls", repeated_calls)
    monkeypatch.setattr(roofline, "RepeatedCalls", repeated_calls)
    CliRunner().invoke(app, ["bench", "layers", "--out", str(home)])
    assert len(read(home / "layers.jsonl")) == 7 + 2


def test_a_stopped_run_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "first")
    layer = ("bench", "layers", "--no-pauses", "--out", home)
    monkeypatch.setenv("GIT_COMMIT", "one")
    succeed(*layer, "--only", "3,8,5")
    first = read(home / "layers.jsonl")
    assert [row.extra["rested_us"] for row in first] == [None, None]
    succeed(*layer, "--resume")
    rows = read(home / "layers.jsonl")
    assert rows[:2] == first
    assert len({json.dumps(row.problem) for row in rows}) == len(rows) == 5, "each is measured once"
    succeed(*layer, "--resume", "--portable")
    assert len(read(home / "layers.jsonl")) == 5 + 5, "other kernels are another measurement"
    monkeypatch.setenv("GIT_COMMIT", "another")
    succeed(*layer, "--resume", "--directions", "dgrad")
    assert len(read(home / "layers.jsonl")) == 10 + 1, "and so are other sources"


def test_a_models_own_convolutions_are_measured(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("bench", "layers", "--model", "lenet5", "--batch", "7", "--precision", "fp32", "--out", home)
    rows = read(home / "layers.jsonl")
    assert {row.bench for row in rows} == {"conv model fp32"}
    assert len(rows) == 14
    assert {row.extra["layer"] for row in rows} == {"conv1", "conv2", "fc1", "fc2", "fc3"}
    assert rows[0].problem == {"direction": "fprop", "shape": "7,28,28,1,6,5,1,2", "fused": "pool=max bias act=relu"}
    some = ("--directions", "wgrad,dgrad", "--only", "1,1,0")  # linear layers
    succeed("bench", "layers", "--model", "lenet5", "--batch", "7", "--precision", "fp32", "--out", home, *some)
    added = [row.problem for row in read(home / "layers.jsonl")[14:]]
    assert {problem["direction"] for problem in added} == {"dgrad", "wgrad"}
    assert all(problem["shape"].endswith("1,1,0") for problem in added)


def test_only_portable_kernels_run_where_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a problem that is large enough for Hopper's."""
    monkeypatch.setattr(bench_command, "LAYERS", (Layer(32, 14, 14, 64, 128, 3, 1, 1),))
    wide = ("--directions", "fprop", "--out", home)
    succeed("bench", "layers", *wide)
    gpu = GPU.null()
    (call,) = (c for s in layers.of_layers(gpu, bench_command.LAYERS, "bf16", print, ("fprop",)) for c in s.calls)
    choice = Choice("conv_sm90", str(conv_sm90.candidates(call, gpu.device)[-1]))
    path = user_folder() / tuning.file_name(gpu.device)
    tuning.write(path, gpu.device, {problem_key(call.op, call.input_specs): choice})
    succeed("bench", "layers", *wide, "--portable")
    variants = [row.variant for row in read(home / "layers.jsonl")]
    assert "sm90" in variants[0]
    assert "sm90" not in variants[1]


def test_wrong_options_are_named(home: Path) -> None:
    assert "--directions" in fail("bench", "layers", "--directions", "fprop,backprop")
    assert "--precision" in fail("bench", "layers", "--precision", "fp16")
    assert "unknown model" in fail("tune", "alexnet")
    assert "no such precision" in fail("tune", "lenet5", "--precision", "fp16")
    for precision in ("fp16", "fp64"):
        assert "no such precision" in fail("tune", "layers", "--precision", precision)
    assert "nothing to measure" in fail("tune", "layers", "--only", "nowhere")
    assert not list(home.rglob("*.json"))
    assert "only the tables that ship are checked" in fail("tune", "lenet5", "--check")
