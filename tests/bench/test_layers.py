"""Layers one by one, and every variant of their kernels: on a device that runs nothing and checks every launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from parcnn import models, nn
from parcnn.bench import layers, repeated, roofline, tune
from parcnn.bench.conv_peers import Peer
from parcnn.bench.layer import CONV, DEPTHWISE, LAYERS, Layer, Plans, kept_bytes, layer_of, least_bytes, random_layers
from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.bench.roofline import Roofline
from parcnn.bench.rows import Row
from parcnn.cpu import CpuExecutor
from parcnn.cuda.device import is_available
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.tuning import Choice, Tuning, problem_key
from parcnn.errors import ArgumentError
from parcnn.ops.base import Spec
from parcnn.ops.pointwise import Act, Add
from parcnn.ops.program import Call, Slot
from parcnn.plan.trace import Tensor

ODD = Layer(4, 9, 7, 8, 16, 3, 1, 1)
FIRST = Layer(4, 12, 12, 3, 8, 5, 2, 2)


def ignore(message: str) -> None:
    """Takes what a benchmark says."""


@pytest.fixture
def null(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaExecutor]:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(repeated, "SETS_BYTES", 1 << 16)
    monkeypatch.setattr(repeated, "REPEAT_SECONDS", 1e-4)
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(layers, "has_torch_on_gpu", lambda: False)
    executor = CudaExecutor.null()
    yield executor
    assert executor.allocated_bytes == 0, "memory is given back"
    executor.close()


# The lists of layers


def test_sizes_of_layers() -> None:
    stem = LAYERS[5]
    assert stem.shape == "256,224,224,3,64,7,2,3"
    assert stem.outputs == (112, 112)
    assert stem.flops == 2 * 256 * 112 * 112 * 64 * 7 * 7 * 3
    assert stem.directions(fused=False) == ("fprop", "wgrad")
    assert Layer(1, 4, 4, 8, 8, 4, 1, 0).directions(fused=True) == CONV, "a pool needs two outputs"
    assert DEPTHWISE[0].flops == 2 * 256 * 112 * 112 * 32 * 9
    assert len(set(LAYERS)) == 16


def test_random_layers_are_the_same_for_a_seed_and_within_bounds() -> None:
    found = random_layers(60, 0)
    assert found == random_layers(60, 0)
    assert found[:20] == random_layers(20, 0)
    assert len(set(found) - set(random_layers(60, 1))) == 60
    for layer in found:
        assert 1 <= layer.n <= 512
        assert 5 <= layer.h == layer.w <= 224
        assert 3 <= min(layer.c, layer.k) <= max(layer.c, layer.k) <= 768
        assert layer.r in range(1, 8)
        assert layer.stride in (1, 2)
        assert min(layer.outputs) >= 1
        assert 4 * layer.n * max(layer.h * layer.w * layer.c, layer.outputs[0] * layer.outputs[1] * layer.k) < 2**31
    assert {layer.r for layer in found} == set(range(1, 8))
    assert {layer.c % 8 == 0 for layer in found} == {True, False}


@pytest.mark.parametrize("layer", [ODD, FIRST, Layer(2, 6, 6, 4, 6, 1, 1, 0)], ids=lambda layer: layer.shape)
def test_a_layers_calls_are_those_of_that_layer(layer: Layer) -> None:
    plans = Plans(CpuExecutor(threads=1), "fp32")
    for direction in layer.directions(fused=False):
        (call,) = plans.calls(layer, direction)
        assert layer_of(call) == (direction, layer)
        assert call.op.flops(call.input_specs, call.output_specs) == layer.flops


def test_the_fused_block_and_what_it_keeps() -> None:
    plans = Plans(CpuExecutor(threads=1), "fp32")
    assert [call.op.name for call in plans.calls(ODD, "fused_pool_fwd")] == ["conv_fprop"]
    calls = plans.calls(ODD, "fused_pool_train")
    assert sorted(call.op.name for call in calls) == ["act_dgrad", "conv_dgrad", "conv_fprop", "conv_wgrad"]
    assert kept_bytes(calls) == 4 * 4 * 3 * 16 // 4, "2-bit indices of the pooled outputs"
    assert "conv_dgrad" not in [call.op.name for call in plans.calls(FIRST, "fused_pool_train")]


# Repeated calls


def test_repeated_calls_take_turns_on_sets_of_memory(null: CudaExecutor) -> None:
    """On the CPU, where the result can be looked at: each set is computed from its own random operands."""
    a, b, c = (Slot(Spec((5, 7)), "arena", offset) for offset in (1000, 5000, 9000))
    calls = [Call(Act("relu"), (a,), (b,)), Call(Add(), (b, a), (c,), after=(0,))]
    own = RepeatedCalls(CpuExecutor(threads=1), calls)
    assert own.sets == repeated.MOST_SETS
    assert own.count == own.turns * own.sets >= 4
    own.run(1)
    size = own._region.nbytes // own.sets
    assert size < 4000, "what lies between the tensors of the plan is left out"
    seen = []
    for i in range(own.sets):
        x, relu, total = (own._region.read(Spec((5, 7)), i * size + at) for at in (0, 256, 512))
        np.testing.assert_array_equal(relu, np.maximum(x, 0))
        np.testing.assert_array_equal(total, np.maximum(x, 0) + x)
        assert x.std() > 0.5
        seen.append(x.tobytes())
    assert len(set(seen)) > 1
    own.free()


@pytest.mark.parametrize("turns", [1, 3, 8])
def test_a_step_runs_each_set_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """Each run adds a to x: how often shows in x."""
    a, x = Slot(Spec((5, 7)), "arena"), Slot(Spec((5, 7)), "arena", 4096)
    monkeypatch.setattr(repeated, "GRAPH_US", 2.0 * repeated.MOST_SETS * turns)
    own = RepeatedCalls(CpuExecutor(threads=1), [Call(Add(), (x, a), (x,))])
    assert (own.turns, own.count) == (turns, turns * own.sets)
    size = own._region.nbytes // own.sets
    before = [own._region.read(x.spec, i * size + 256) for i in range(own.sets)]
    own.run(2)
    for i in range(own.sets):
        added = own._region.read(a.spec, i * size)
        np.testing.assert_allclose(
            own._region.read(x.spec, i * size + 256), before[i] + 2 * turns * added, rtol=1e-4, atol=1e-5
        )
    own.free()


def test_tensors_that_share_memory_still_do() -> None:
    """An op in place, and a view of half of what another wrote."""
    whole, half = Slot(Spec((4, 64)), "arena", 4096), Slot(Spec((2, 64)), "arena", 4096 + 512)
    calls = [Call(Act("relu"), (whole,), (whole,)), Call(Act("tanh"), (half,), (Slot(Spec((2, 64)), "arena", 0),))]
    own = RepeatedCalls(CpuExecutor(threads=1), calls)
    own.run(1)
    result, x = own._region.read(Spec((2, 64)), 0), own._region.read(Spec((4, 64)), 512)
    assert x.min() == 0
    np.testing.assert_allclose(result, np.tanh(x[2:]), rtol=1e-6)
    own.free()


def test_more_scratch_memory_than_was_asked_for_is_refused(null: CudaExecutor) -> None:
    (wgrad,) = Plans(null, "fp32").calls(Layer(64, 14, 14, 8, 16, 3, 1, 1), "wgrad")
    choices = null.choices(wgrad.op, wgrad.input_specs, wgrad.output_specs)

    def scratch(choice: Choice) -> int:
        null.tuning = Tuning(user={problem_key(wgrad.op, wgrad.input_specs): choice})
        return null.workspace_bytes(wgrad.op, wgrad.input_specs, wgrad.output_specs)

    low, high = min(choices, key=scratch), max(choices, key=scratch)
    most = scratch(high)
    assert scratch(low) < most
    roomy, tight = RepeatedCalls(null, [wgrad], most), RepeatedCalls(null, [wgrad])
    scratch(high)
    roomy.load()(1)
    with pytest.raises(ArgumentError, match="scratch"):
        tight.load()
    for each in (roomy, tight):
        each.free()


def test_times_are_of_each_run() -> None:
    done = {"short": 0, "long": 0}

    def runner(name: str, work: int):
        def run(steps: int) -> None:
            for _ in range(steps):
                done[name] += 1
                sum(range(work))

        return run

    short, long = time_in_turn([runner("short", 1000), runner("long", 100_000)], lambda: None, repeats=3)
    assert short.p20_us <= short.p50_us <= short.p80_us
    assert long.p50_us > 10 * short.p50_us
    assert min(done.values()) >= 3 + 3
    assert short.of(2).p50_us == short.p50_us / 2


# The benchmark


@pytest.mark.parametrize(("commit", "again"), [("abc", 3), ("abc+changes", 5)])
def test_what_a_run_of_the_same_commit_measured_is_left_out(
    null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, commit: str, again: int
) -> None:
    monkeypatch.setenv("GIT_COMMIT", commit)
    subjects = layers.of_layers(null, [ODD], "fp32", ignore)
    earlier = [row for part in layers.run(null, subjects[:2], ignore, precision="fp32") for row in part]
    assert len(earlier) == 2
    later = [row for part in layers.run(null, subjects, ignore, precision="fp32", earlier=earlier) for row in part]
    assert [row.problem for row in later] == [subject.problem for subject in subjects[-again:]]


def test_a_run_that_asks_for_more_measures_again(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's modes and pauses that earlier rows lack; a problem that no peer has needs no peer's row."""
    monkeypatch.setenv("GIT_COMMIT", "abc")
    monkeypatch.setattr(layers, "has_torch_on_gpu", lambda: True)

    class Stub:
        def __init__(self, *arguments: object) -> None:
            pass

        def convolution(self, direction: str, choice: str) -> Peer:
            return Peer(lambda steps: None)

        def block(self, direction: str, mode: str) -> Peer:
            return Peer(lambda steps: None)

    monkeypatch.setattr(layers, "TorchLayer", Stub)
    monkeypatch.setattr(layers, "version", lambda: "a peer")
    monkeypatch.setattr(layers, "PAUSE_SECONDS", 1e-4)
    subjects = layers.of_layers(null, [ODD], "fp32", ignore, ("fprop", "fused_pool_fwd"))
    alone = replace(subjects[0], layer=None, problem={"direction": "fprop", "shape": "its own"})
    rows: list[Row] = []

    def measured(compiled: tuple[str, ...], pauses: bool) -> list[str]:
        """Directions that are measured beside what was before."""
        of = (*subjects, alone)
        parts = layers.run(null, of, ignore, precision="fp32", compiled=compiled, pauses=pauses, earlier=list(rows))
        found = [row for part in parts for row in part]
        rows.extend(found)
        return [f"{row.problem['direction']} {row.peer}" for row in found]

    fused = ["fused_pool_fwd torch_eager", "fused_pool_fwd torch_compile"]
    both = ("default", "max-autotune")
    assert measured(("default",), pauses=False) == ["fprop cudnn", *fused, "fprop None"]
    assert measured(("default",), pauses=False) == []
    assert measured(both, pauses=False) == fused
    assert measured(("default",), pauses=False) == []
    assert measured(("default",), pauses=True) == ["fprop cudnn", *fused, "fprop None"]
    assert measured(both, pauses=True) == fused
    assert measured(both, pauses=True) == []
    rows.remove(next(row for row in reversed(rows) if row.peer == "torch_eager"))
    del rows[:-1]
    assert measured(both, pauses=True) == ["fprop cudnn", *fused, "fprop None"], "one of two peers is not both"


def test_rows_of_layers(null: CudaExecutor) -> None:
    subjects = layers.of_layers(null, [ODD, FIRST], "fp32", ignore)
    rows = [row for part in layers.run(null, subjects, ignore, precision="fp32") for row in part]
    assert [row.problem for row in rows[:2]] == [
        {"direction": "fprop", "shape": "4,9,7,8,16,3,1,1"},
        {"direction": "dgrad", "shape": "4,9,7,8,16,3,1,1"},
    ]
    assert len(rows) == 5 + 4
    for row in rows:
        assert row.bench == "conv"
        assert "conv_" in row.variant
        assert row.peer is None
        assert row.extra["choice"]
        assert row.extra["bound_us"] is None, "no peak is known of a GPU that is not there"
    train = next(row for row in rows if row.problem["direction"] == "fused_pool_train")
    assert train.extra["kept_bytes"] == 4 * 4 * 3 * 16 // 4
    assert train.extra["flops"] > 2 * rows[0].extra["flops"]
    fprop = rows[0]
    assert fprop.extra["flops"] == ODD.flops
    assert fprop.extra["bytes_moved"] == 4 * (4 * 9 * 7 * 8 + 16 * 9 * 8 + 4 * 9 * 7 * 16)


def test_a_stride_beyond_the_filter_skips_pixels() -> None:
    plans = Plans(CpuExecutor(threads=1), "fp32")
    layer = Layer(2, 7, 9, 4, 6, 1, 2, 0)
    outputs = 4 * 2 * 4 * 5 * 6
    assert least_bytes(*plans.calls(layer, "fprop")) == 4 * 2 * 4 * 5 * 4 + 4 * 6 * 4 + outputs
    assert least_bytes(*plans.calls(layer, "wgrad")) == 4 * 2 * 4 * 5 * 4 + 4 * 6 * 4 + outputs
    assert least_bytes(*plans.calls(layer, "dgrad")) == 4 * 2 * 7 * 9 * 4 + 4 * 6 * 4 + outputs
    (padded,) = plans.calls(ODD, "fprop")
    assert least_bytes(padded) == padded.op.bytes(padded.input_specs, padded.output_specs)


def test_what_no_kernel_runs_is_said(null: CudaExecutor) -> None:
    said: list[str] = []
    far = Layer(1, 5, 5, 4, 4, 1, 64, 2**14)  # padding beyond what the kernels count
    assert layers.of_layers(null, [far], "fp32", said.append) == []
    assert len(said) == 5
    assert all("no kernel runs conv_fprop" in line for line in said)


def test_the_convolutions_of_a_model_each_once(null: CudaExecutor) -> None:
    subjects = layers.of_model(null, "cifarnet", (3, 32, 32), 6, "fp32")
    shapes = [(s.direction, s.problem["shape"]) for s in subjects]
    assert len(set(shapes)) == len(shapes) == 3 * 7 - 1, "six convolutions and a linear layer; no gradient of images"
    assert ("fprop", "6,32,32,3,64,3,1,1") in shapes
    assert ("wgrad", "6,1,1,256,10,1,1,0") in shapes
    assert subjects[0].extra == {"model": "cifarnet", "batch": 6, "layer": "blocks.0.conv1"}
    assert subjects[0].problem["fused"] == "pool=max"


class Branches(nn.Module):
    """Convolutions of one shape that differ by their groups and by what follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 1)
        self.plain, self.grouped = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.relu = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.tanh = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Tanh())
        self.twos = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(2))
        self.threes = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(3))
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.end(self.plain(x))
        for branch in (self.grouped, self.relu, self.tanh, self.twos, self.threes):
            y = y + self.end(branch(x))
        return y


def test_problems_of_a_model_have_names_of_their_own(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "create", lambda name, **_: Branches())
    subjects = layers.of_model(null, "branches", (3, 24, 24), 32, "bf16")
    names = [str(subject.problem) for subject in subjects]
    assert len(set(names)) == len(names)
    shape = "32,24,24,64,64,3,1,1"
    found = [(s.problem["fused"], s.problem.get("groups")) for s in subjects if s.problem["shape"] == shape]
    wanted = ("bias", None), ("bias", 2), ("bias act=relu", None), ("bias act=tanh", None), ("pool=max bias", None)
    assert {*wanted, ("pool=max bias pool_window kernel=(3, 3) stride=(3, 3)", None)} <= set(found)


def test_peaks_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 16)
    executor = CpuExecutor()
    known = Roofline.of("NVIDIA H200", "bf16", executor)
    assert known.flops_per_second == 989e12
    assert known.bytes_per_second > 1e8
    assert known.bound_us(989 * 10**6, 8) == pytest.approx(1.0)
    assert known.bound_us(0, int(known.bytes_per_second)) == pytest.approx(1e6)
    assert Roofline.of("NVIDIA H100 PCIe", "fp32", executor).flops_per_second == 51e12
    assert Roofline.of("Another", "bf16", executor).bound_us(1, 1) is None


# Tuning


def test_every_variant_is_measured_and_the_tables_stay(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = layers.of_layers(null, [ODD], "fp32", ignore, CONV)
    calls = tune.problems(subjects * 2)
    assert len(calls) == 3
    before = null.tuning
    ran: list[str] = []
    load = CudaExecutor.load

    def watched(self: CudaExecutor, program, regions):
        call = program.calls[0]
        ran.append(str(self.choices(call.op, call.input_specs, call.output_specs)[0]))
        return load(self, program, regions)

    monkeypatch.setattr(CudaExecutor, "load", watched)
    measured = list(tune.run(null, calls, ignore))
    assert null.tuning is before
    for call, each in zip(calls, measured, strict=True):
        choices = null.choices(call.op, call.input_specs, call.output_specs)
        assert each.key == problem_key(call.op, call.input_specs)
        assert each.default == choices[0]
        assert each.best in choices
        assert 1 < each.count <= len(choices)
        own = {str(choice) for choice in choices if choice.family == choices[0].family}
        assert own <= set(ran), "all of the family that runs by default"
        assert each.best == each.default or each.gain >= tune.LEAST_GAIN


def test_a_faster_variant_goes_into_the_table(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times out of a table instead of a clock: the third choice is the fastest, another is too close to the default."""
    (wgrad,) = Plans(null, "fp32").calls(ODD, "wgrad")
    (fprop,) = Plans(null, "fp32").calls(ODD, "fprop")
    choices = null.choices(wgrad.op, wgrad.input_specs, wgrad.output_specs)
    own = null.choices(fprop.op, fprop.input_specs, fprop.output_specs)
    speeds = {choices[2]: 50.0, own[1]: 99.0}
    loaded: list[tuple[object, Choice, int]] = []

    class Timed(RepeatedCalls):
        def load(self):
            call = self._calls[0]
            choice = null.choices(call.op, call.input_specs, call.output_specs)[0]
            loaded.append((super().load(), choice, self.count))
            return loaded[-1][0]

    def times(runs, wait, repeats=9, repeat_seconds=None):
        of = [next((choice, count) for run, choice, count in loaded if run == wanted) for wanted in runs]
        return [repeated.StepTiming(*[count * speeds.get(choice, 100.0)] * 3) for choice, count in of]

    monkeypatch.setattr(tune, "RepeatedCalls", Timed)
    monkeypatch.setattr(tune, "time_in_turn", times)
    measured = list(tune.run(null, [wgrad, fprop], ignore))
    assert (measured[0].best, measured[0].best_us, measured[0].gain) == (choices[2], 50.0, 2.0)
    assert measured[1].best == measured[1].default == own[0]
    key, other = problem_key(wgrad.op, wgrad.input_specs), problem_key(fprop.op, fprop.input_specs)
    table = tune.table(measured, {"elsewhere": own[0], other: own[1], key: choices[1]})
    assert table == {"elsewhere": own[0], key: choices[2]}
    null.tuning = Tuning(user=table)
    assert null.choices(wgrad.op, wgrad.input_specs, wgrad.output_specs)[0] == choices[2]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_the_device(precision: str) -> None:
    if not is_available():
        pytest.skip("no NVIDIA GPU")
    executor = CudaExecutor(tuning=Tuning())
    subjects = layers.of_layers(executor, [ODD, FIRST], precision, ignore)
    rows = [row for part in layers.run(executor, subjects, ignore, precision=precision, peers=False) for row in part]
    assert len(rows) == 5 + 4
    for row in rows:
        assert row.p20_us is not None
        assert row.p50_us is not None
        assert 0.5 < row.p20_us <= row.p50_us
        assert row.extra["copy_bytes_per_second"] > 1e11
    measured = list(tune.run(executor, tune.problems(subjects[:1]), ignore))
    assert [each.count > 1 and each.best_us > 0.5 for each in measured] == [True]
    executor.close()
