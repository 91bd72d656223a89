"""The arena: nobody lies on anybody alive, nothing is wasted that a switch saves, and the account is exact."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parcnn import nn
from parcnn.cpu import CpuExecutor
from parcnn.errors import OutOfMemoryError
from parcnn.models import CifarNet, LeNet5
from parcnn.optim import SGD, Adam
from parcnn.plan import memory
from parcnn.plan.build import Plan, check_memory
from parcnn.plan.options import Options
from parcnn.plan.variable import ALIGNMENT, align
from tests.plan.networks import Problem, networks
from tests.plan.step import Step, make_plan

CALM = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
BLOCKS = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 20), st.integers(0, 8)), max_size=25)


@given(sizes=BLOCKS, reuse=st.booleans())
def test_blocks_alive_together_lie_apart(sizes: list[tuple[int, int, int]], reuse: bool) -> None:
    blocks = [memory.Block(nbytes, first, first + lives) for nbytes, first, lives in sizes]
    arena = memory.place(blocks, reuse)
    for i, a in enumerate(blocks):
        assert a.offset >= 0
        assert a.offset % ALIGNMENT == 0
        assert a.offset + a.nbytes <= arena
        for b in blocks[:i]:
            together = not reuse or any(t in range(b.first, b.last + 1) for t in range(a.first, a.last + 1))
            assert not together or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
    alive = memory.live_bytes(blocks, 30)
    expected = [sum(align(b.nbytes) for b in blocks if b.first <= t <= b.last) for t in range(30)]
    assert alive == expected
    total = sum(align(b.nbytes) for b in blocks)
    assert max(alive) <= arena <= total
    if not reuse:
        assert arena == total


def test_a_block_goes_where_one_has_ended() -> None:
    """Chains need two places: each tensor lies where the one before its operand was."""
    chain = [memory.Block(1000, i, i + 1) for i in range(10)]
    assert memory.place(chain, reuse=True) == 2 * align(1000)


@CALM
@given(problem=networks(), optimizer=st.sampled_from([SGD(lr=1.0), SGD(momentum=0.9), Adam()]))
def test_the_peak_is_what_is_allocated(cpu: CpuExecutor, problem: Problem, optimizer: SGD | Adam) -> None:
    """peak_bytes = the regions of the model and of the step, to the byte; a plan needs no byte outside them."""
    for mode in ("train", "eval", "predict"):
        keywords = {"loss": problem.loss, "optimizer": optimizer, "mode": mode}
        plan = make_plan(cpu, problem.model, problem.images, problem.targets, **keywords)
        needed = plan.program.region_bytes
        regions = {"arena": needed["arena"], "weights": plan.layout.weights_bytes}
        if mode == "train":
            regions["optimizer"] = plan.layout.optimizer_bytes
        assert plan.peak_bytes == sum(regions.values())
        feeds = {"state", "hyper", "images", "targets", "order", "losses", "corrects", "out"}
        for name in needed.keys() - feeds:
            assert needed[name] <= regions[name]
        weights = sum(align(8 * v.data.size) for v in {*problem.model.parameters(), *_statistics(problem.model)})
        assert plan.layout.weights_bytes == weights
        trained = sum(align(8 * v.data.size) for v in problem.model.parameters() if v.requires_grad)
        assert plan.layout.optimizer_bytes == optimizer.slots * trained
        assert len(plan.alive_bytes) == len(plan.program.calls)
        assert max(plan.alive_bytes) <= plan.arena_bytes


def _statistics(model: nn.Module) -> list[nn.Buffer]:
    return [v for name, v in model.named_variables() if name.endswith(("running_mean", "running_var"))]


@CALM
@given(problem=networks())
def test_each_switch_saves_memory_or_costs_none(cpu: CpuExecutor, problem: Problem) -> None:
    def alive(**switches: bool) -> int:
        """The most that is alive at once: what any placement needs."""
        options = Options(parallel=False, **switches)
        plan = make_plan(cpu, problem.model, problem.images, problem.targets, loss=problem.loss, options=options)
        return max(plan.alive_bytes)

    assert alive() <= alive(inplace=False)
    no_reuse = make_plan(
        cpu, problem.model, problem.images, problem.targets, loss=problem.loss, options=Options(reuse=False)
    )
    assert no_reuse.arena_bytes >= max(no_reuse.alive_bytes)


def test_what_the_switches_save_on_lenet(cpu: CpuExecutor) -> None:
    """Each optimisation of memory must show on the model that it was made for."""
    images, targets = np.zeros((64, 1, 28, 28)), np.zeros(64, np.int32)

    def arena(**switches: bool) -> int:
        options = Options(parallel=False, **switches)
        return make_plan(cpu, LeNet5(), images, targets, options=options, dtype="f32").arena_bytes

    best = arena()
    assert arena(reuse=False) > 1.5 * best
    assert arena(fuse=False) > 1.5 * best
    assert arena(fuse=False, inplace=False) > arena(fuse=False)


def test_lenet_at_64_is_small(cpu: CpuExecutor) -> None:
    images, targets = np.zeros((64, 1, 28, 28)), np.zeros(64, np.int32)
    plan = make_plan(cpu, LeNet5(), images, targets, optimizer=SGD(momentum=0.9), dtype="f32")
    scratch = max(c.workspace.spec.nbytes if c.workspace else 0 for c in plan.program.calls)
    assert plan.peak_bytes - scratch <= 4 * 2**20  # the executor's scratch is its own account


def test_inference_needs_less_than_training(cpu: CpuExecutor) -> None:
    images, targets = np.zeros((16, 3, 32, 32)), np.zeros(16, np.int32)
    model = CifarNet(widths=(8, 12, 16))
    train, evaluate = (make_plan(cpu, model, images, targets, mode=mode, dtype="f32") for mode in ("train", "eval"))
    assert evaluate.arena_bytes < train.arena_bytes
    assert evaluate.persistent_bytes == train.layout.weights_bytes


@pytest.mark.parametrize("model", [LeNet5(), CifarNet(widths=(8, 12, 16), in_channels=1)])
@pytest.mark.parametrize("mode", ["train", "predict"])
def test_out_of_memory_names_the_largest_batch(cpu: CpuExecutor, model: nn.Module, mode: str) -> None:
    images, targets = np.zeros((100, 1, 28, 28)), np.zeros(100, np.int32)

    def plan_of(batch: int) -> Plan:
        return make_plan(cpu, model, images, targets, batch=batch, mode=mode, dtype="f32")

    plan = plan_of(100)
    check_memory(plan, plan.peak_bytes, plan_of)  # just fits
    check_memory(plan, None, plan_of)
    for share in (0.999, 0.8, 0.31):
        available = int(plan.peak_bytes * share)
        with pytest.raises(OutOfMemoryError) as caught:
            check_memory(plan, available, plan_of)
        error = caught.value
        match = re.fullmatch(r"use batch (\d+) or less", error.remedy)
        assert match, error.remedy
        largest = int(match[1])
        assert plan_of(largest).peak_bytes <= available < plan_of(largest + 1).peak_bytes
        assert "batch 100" in error.what
        assert f"{plan.peak_bytes / 2**20:.1f} MiB" in error.got
        assert f"{available / 2**20:.1f} MiB" in error.expected
        assert error.where in {name for name, _ in model.named_modules()}, "the error names a layer"


def test_out_of_memory_where_no_batch_fits(cpu: CpuExecutor) -> None:
    images, targets = np.zeros((8, 1, 28, 28)), np.zeros(8, np.int32)
    plan = make_plan(cpu, LeNet5(), images, targets)
    with pytest.raises(OutOfMemoryError, match="not even batch 1 fits"):
        check_memory(plan, 1000, lambda batch: make_plan(cpu, LeNet5(), images, targets, batch=batch))


def test_out_of_memory_where_batch_1_cannot_train(cpu: CpuExecutor) -> None:
    """Batch norm of single values has no plan for batch 1: that is no other error than that it does not fit."""
    images, targets = np.zeros((8, 3)), np.zeros(8, np.int32)
    model = nn.Sequential(nn.Linear(3, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 4))
    plan = make_plan(cpu, model, images, targets)
    with pytest.raises(OutOfMemoryError):
        check_memory(plan, 1000, lambda batch: make_plan(cpu, model, images, targets, batch=batch))


@CALM
@given(problem=networks())
def test_evaluation_and_prediction_change_no_weight(cpu: CpuExecutor, problem: Problem) -> None:
    for mode in ("eval", "predict"):
        plan = make_plan(cpu, problem.model, problem.images, problem.targets, loss=problem.loss, mode=mode)
        written = {slot.region for call in plan.program.calls for slot in call.written}
        assert written <= {"arena", "state", "losses", "corrects", "out"}
    step = Step(cpu, plan, problem.images, problem.targets)
    step.fill()
    before = step.read_weights()
    step.loaded.run()
    for name, array in step.read_weights().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
