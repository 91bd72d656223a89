"""bf16 convolutions of few channels on Hopper: launches on the null driver, results on the device."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_stem_sm90
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvFprop, ConvWgrad
from tests.cuda.test_conv_mma import (
    H200,
    Problem,
    bits_of,
    check_close,
    check_exact,
    normal,
    on_cpu,
    random_of,
    ternary,
)
from tests.cuda.test_conv_stem import PROBLEMS, call_of, call_specs, check_not_finite, problems
from tests.op_runner import run_op

CASES = [
    pytest.param(name, pool, id=f"{name} {pool or 'plain'}")
    for name, problem in PROBLEMS.items()
    for pool in (None, "max")
    if problem.has(pool)
]
cases = pytest.mark.parametrize(("name", "pool"), CASES)


def on_device(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, launcher: object) -> CudaExecutor:
    monkeypatch.setattr(cuda, "registry", Registry([launcher], REGISTRY.folder))
    return cuda


@pytest.mark.gpu
@cases
def test_problems_are_exact(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, pool: str | None) -> None:
    """The best and the worst candidate give the oracle's bits."""
    op = PROBLEMS[name].op("fprop", pool, bias=True, act="relu")
    random = random_of(name, "fprop")
    operands = PROBLEMS[name].operands(op, ternary(random), random)
    true = on_cpu(op, operands)
    found = conv_stem_sm90.candidates(call_of(op, operands), H200)
    for variant in (found[0], found[-1]):
        check_exact(on_device(cuda, monkeypatch, Forced(conv_stem_sm90, variant)), op, operands, true, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [None, "max"])
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("name", ["lenet conv 2", "cifarnet stem", "resnet stem"])
def test_rounds_once(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, act: str | None, pool: str | None
) -> None:
    problem, random = PROBLEMS[name], random_of(name, act)
    for bias in (False, True):
        op = problem.op("fprop", pool, bias=bias, act=act)
        check_close(on_device(cuda, monkeypatch, conv_stem_sm90), op, problem.operands(op, normal(random), random))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lenet conv 1", "cifarnet stem", "resnet stem"])
def test_not_a_number_and_infinity_pass(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_not_finite(on_device(cuda, monkeypatch, conv_stem_sm90), name)


@pytest.mark.gpu
def test_random_problems_are_exact(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(cuda, monkeypatch, conv_stem_sm90)

    @seeded(11)
    @settings(
        max_examples=150, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(problems(), st.booleans(), st.booleans())
    def run(problem: Problem, pooled: bool, bias: bool) -> None:
        pool = "max" if pooled else None
        assume(problem.has(pool))
        op = problem.op("fprop", pool, bias=bias)
        random = random_of(problem)
        operands = problem.operands(op, ternary(random), random)
        assume(conv_stem_sm90.supports(op, call_specs(op, operands)) is None)
        check_exact(cuda, op, operands, on_cpu(op, operands), problem)

    run()


@pytest.mark.gpu
def test_many_tiles_give_the_same_bits_each_time(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(40, 64, 63, 3, 64, 7, 7, (3, 3, 3, 3), (2, 2))
    for pool in (None, "max"):
        op = problem.op("fprop", pool, bias=True, act="relu")
        operands = bits_of(op, problem.operands(op, normal(random_of("many")), random_of("many")))
        first, second = (run_op(on_device(cuda, monkeypatch, conv_stem_sm90), op, operands) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


@cases
def test_launches_are_right(name: str, pool: str | None) -> None:
    """Every candidate keeps to its parameter table, the device's limits and the plan's memory."""
    null = CudaExecutor.null()
    op = PROBLEMS[name].op("fprop", pool, bias=True, act="relu")
    operands = PROBLEMS[name].operands(op, ternary(random_of(name)), random_of(name))
    for variant in conv_stem_sm90.candidates(call_of(op, operands), null.device):
        executor = CudaExecutor(null.driver, registry=Registry([Forced(conv_stem_sm90, variant)], REGISTRY.folder))
        run_op(executor, op, bits_of(op, operands))
    null.close()


def test_every_variant_is_reached_and_listed() -> None:
    reached = set()
    for runs in (1, 2, 3, 4):
        for pool in (None, "max"):
            problem = Problem(1, 12, 12, 1, 64, 3, 8 * runs, (1, 4 * runs, 1, 4 * runs))
            op = problem.op("fprop", pool)
            call = call_of(op, problem.operands(op, ternary(random_of()), random_of()))
            reached |= {launch.kernel for launch in conv_stem_sm90.launches(call, H200)}
    assert reached == set(conv_stem_sm90.variants())


def test_what_it_refuses() -> None:
    op = PROBLEMS["cifarnet stem"].op("fprop", None)
    specs = call_specs(op, PROBLEMS["cifarnet stem"].operands(op, ternary(random_of()), random_of()))
    assert conv_stem_sm90.supports(op, specs) is None
    assert "gelu" in (conv_stem_sm90.supports(ConvFprop(act="gelu"), specs) or "")
    assert "no forward" in (conv_stem_sm90.supports(ConvWgrad(filter=(3, 3)), specs) or "")


@pytest.mark.parametrize(("x", "w"), [((8, 128, 200, 1), (16, 128, 9, 1)), ((8, 128, 200, 3), (16, 60, 10, 3))])
def test_tall_filters_are_left_to_others(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    """A block keeps 64 filters, however few there are."""
    specs = (Spec(x, "bf16"), Spec(w, "bf16"))
    assert "do not fit" in (conv_stem_sm90.supports(ConvFprop(act="relu"), specs) or "")
    assert REGISTRY.on("sm_90a").supports(ConvFprop(act="relu"), specs)
