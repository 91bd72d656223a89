"""What waits for what: an independent oracle over the bytes that calls touch, and programs run in random valid orders."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parcnn import nn
from parcnn.cpu import CpuExecutor
from parcnn.models import CifarNet, LeNet5
from parcnn.ops.program import Call, Program, Slot
from parcnn.plan.build import Plan
from parcnn.plan.options import Options
from tests.plan.networks import Problem, networks
from tests.plan.step import Step, make_plan

CALM = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
OPTIONS = st.builds(
    Options,
    fuse=st.booleans(),
    reuse=st.sampled_from([True, True, False]),
    inplace=st.sampled_from([True, True, False]),
    parallel=st.sampled_from([True, True, False]),
    update_bytes=st.sampled_from([0, 100, 1 << 20]),
    side_streams=st.integers(1, 4),
    slack_bytes=st.sampled_from([0, 300, 1 << 20]),
)


def _plan(cpu: CpuExecutor, problem: Problem, options: Options, mode: str = "train") -> Plan:
    keywords = {"loss": problem.loss, "options": options, "mode": mode}
    return make_plan(cpu, problem.model, problem.images, problem.targets, **keywords)


def _meet(a: Slot, b: Slot) -> bool:
    return a.region == b.region and a.offset < b.end and b.offset < a.end


def _writes(call: Call) -> list[Slot]:
    """What a call writes, from the op's contract and not from the call's own account of it."""
    scratch = [call.workspace] if call.workspace else []
    return [*call.outputs, *(call.inputs[i] for i in call.op.overwritten), *scratch]


def _conflict(a: Call, b: Call) -> bool:
    touched_a, touched_b = [*a.inputs, *_writes(a)], [*b.inputs, *_writes(b)]
    return any(_meet(x, y) for x in _writes(a) for y in touched_b) or any(
        _meet(x, y) for x in touched_a for y in _writes(b)
    )


def _ancestors(calls: tuple[Call, ...]) -> list[set[int]]:
    """All calls that must be complete before each call starts."""
    result: list[set[int]] = []
    for i, call in enumerate(calls):
        assert all(0 <= j < i for j in call.after), "a call waits for earlier calls only"
        result.append(set(call.after).union(*(result[j] for j in call.after)))
    return result


def check_order(program: Program) -> None:
    """Two calls that touch the same bytes, one of them writing, are ordered by `after` alone; nothing else is asked for."""
    calls, ancestors = program.calls, _ancestors(program.calls)
    for i, call in enumerate(calls):
        for j in range(i):
            if _conflict(calls[j], call):
                assert j in ancestors[i], (
                    f"{call.layer}.{call.op.name} may overtake {calls[j].layer}.{calls[j].op.name}"
                )
        for j in call.after:
            assert _conflict(calls[j], call), "a call waits only for one whose bytes it touches"
            assert not any(j in ancestors[k] for k in call.after), "what another wait implies is not waited for"


def check_places(program: Program) -> None:
    """Slots lie inside their regions; within a call operands share memory only as the op allows."""
    for call in program.calls:
        scratch = [call.workspace] if call.workspace else []
        for slot in (*call.inputs, *call.outputs, *scratch):
            assert slot.offset >= 0
            assert slot.end <= program.region_bytes[slot.region]
            assert slot.offset % 256 == 0
        for o, output in enumerate(call.outputs):
            for i, operand in enumerate(call.inputs):
                if _meet(output, operand):
                    assert (o, i) in call.op.inplace(), f"{call.layer}.{call.op}: output {o} lies on input {i}"
                    assert (output.offset, output.end) == (operand.offset, operand.end)
            for other in (*call.outputs[:o], *scratch):
                assert not _meet(output, other)
        for place in scratch:
            assert not any(_meet(place, operand) for operand in call.inputs)


@CALM
@given(problem=networks(), options=OPTIONS, mode=st.sampled_from(["train", "train", "eval", "predict"]))
def test_every_conflict_is_ordered(cpu: CpuExecutor, problem: Problem, options: Options, mode: str) -> None:
    program = _plan(cpu, problem, options, mode).program
    check_places(program)
    check_order(program)
    assert program.streams == 1 + max(call.stream for call in program.calls)
    if not options.parallel or mode != "train":
        assert program.streams == 1
    for call in program.calls:
        assert call.op.side_branch or call.stream == 0, "the chain of error signals has the main stream for itself"


@CALM
@given(problem=networks(), options=OPTIONS, seed=st.integers(0, 1 << 20))
def test_any_order_that_respects_the_waits_gives_the_same_bits(
    cpu: CpuExecutor, problem: Problem, options: Options, seed: int
) -> None:
    plan = _plan(cpu, problem, options)
    step = Step(cpu, plan, problem.images, problem.targets)
    loss, weights = step.run(), step.read_weights()
    assert step.run_calls(random_order(plan.program.calls, seed)) == loss
    for name, array in step.read_weights().items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


def random_order(calls: tuple[Call, ...], seed: int) -> list[int]:
    """A random topological order of the calls."""
    chooser = random.Random(seed)
    waiting = {i: set(call.after) for i, call in enumerate(calls)}
    order: list[int] = []
    while waiting:
        choice = chooser.choice([i for i, after in waiting.items() if not after])
        del waiting[choice]
        order.append(choice)
        for after in waiting.values():
            after.discard(choice)
    return order


@pytest.mark.parametrize("model", [LeNet5, CifarNet])
@pytest.mark.parametrize("options", [Options(), Options(update_bytes=0, slack_bytes=0), Options(fuse=False)])
def test_shipped_models_are_ordered(cpu: CpuExecutor, model: type[nn.Module], options: Options) -> None:
    program = _plan_of(cpu, model(), options).program
    check_places(program)
    check_order(program)


SMALL = {"lenet5": LeNet5, "cifarnet": partial(CifarNet, widths=(8, 12, 16))}  # all tensors below Options.slack_bytes


@pytest.mark.parametrize("name", SMALL)
def test_weight_gradients_and_updates_run_beside_the_chain(cpu: CpuExecutor, name: str) -> None:
    """A call on the chain of error signals never waits for the side calls that were started since the call before it."""
    calls = _plan_of(cpu, SMALL[name](), Options()).program.calls
    ancestors = _ancestors(calls)
    side = {i for i, call in enumerate(calls) if call.op.side_branch}
    assert {calls[i].stream for i in side} == {1, 2}
    chain = [i for i, call in enumerate(calls) if i not in side and call.phase == "backward"]
    beside = 0
    for before, i in pairwise(chain):
        started = {j for j in side if before < j < i}
        beside += len(started)
        waits_for = [calls[j].layer for j in ancestors[i] & started]
        assert not waits_for, f"{calls[i].layer}.{calls[i].op.name} waits for weight gradients of {waits_for}"
    assert beside >= 3


def _plan_of(cpu: CpuExecutor, model: nn.Module, options: Options) -> Plan:
    """A training plan of batch 2 in the image size of the model's data set."""
    shape = (2, 1, 28, 28) if isinstance(model, LeNet5) else (2, 3, 32, 32)
    return make_plan(cpu, model, np.zeros(shape), np.zeros(2, np.int32), options=options, dtype="f32")
