"""bf16 convolutions of few channels on Hopper: on the host's emulation and the null driver, and on the device."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_stem_sm90, conv_stem_sm90_wgrad, conv_wgrad
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_wgrad import SUM_KERNEL
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvFprop, ConvWgrad
from tests.cuda.compare import MakeExecutor, emulates, listing, makers, places
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
from tests.cuda.test_conv_stem import GEOMETRY, PROBLEMS, call_of, call_specs, check_not_finite, problems
from tests.op_runner import run_op

make_fixture = makers(listing([SUM_KERNEL]))
FAMILIES: dict[str, Any] = {"fprop": conv_stem_sm90, "wgrad": conv_stem_sm90_wgrad}


def taken(problem: Problem, kind: str) -> Problem:
    """The problem, of a gradient with filters by eights."""
    return replace(problem, k=8 * ceil(problem.k / 8)) if kind == "wgrad" else problem


def op_of(name: str, kind: str, pool: str | None) -> tuple[Problem, Any]:
    """Of what its family takes; with a bias where that has a place."""
    problem = taken(PROBLEMS[name], kind)
    return problem, problem.op(
        kind, pool, **{**GEOMETRY[kind], "bias": kind == "fprop" or problem.s * problem.c % 8 != 0}
    )


CASES = [
    (name, kind, pool)
    for name, problem in PROBLEMS.items()
    for pool in (None, "max")
    if problem.has(pool)
    for kind in FAMILIES
    if kind == "fprop" or problem.dilation == (1, 1)
]
cases = pytest.mark.parametrize(("name", "kind", "pool"), CASES, ids=[f"{n} {k} {p or 'plain'}" for n, k, p in CASES])


def on_device(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, launcher: object) -> CudaExecutor:
    monkeypatch.setattr(cuda, "registry", Registry([launcher, conv_wgrad], REGISTRY.folder))
    return cuda


# On the host's emulation and the device


@places(
    "name kind pool",
    CASES,
    lambda name, kind, pool: name in ("lenet conv 1", "cifarnet stem", "resnet stem", "odd rows and strides"),
)
def test_problems_are_exact(make: MakeExecutor, name: str, kind: str, pool: str | None) -> None:
    """The best and the worst candidate give the oracle's bits; in the emulation, which takes its time, the best."""
    problem, op = op_of(name, kind, pool)
    random = random_of(name, kind)
    operands = problem.operands(op, ternary(random), random)
    true = on_cpu(op, operands)
    found = FAMILIES[kind].candidates(call_of(op, operands), H200)
    for variant in found[:1] if emulates(make) else (found[0], found[-1]):
        check_exact(make([Forced(FAMILIES[kind], variant)]), op, operands, true, variant)


@places(
    "name act pool",
    [
        (name, act, pool)
        for name in ("lenet conv 2", "cifarnet stem", "resnet stem")
        for act in (None, "relu")
        for pool in (None, "max")
    ],
    lambda name, act, pool: name == "cifarnet stem",
)
def test_rounds_once(make: MakeExecutor, name: str, act: str | None, pool: str | None) -> None:
    problem, random = PROBLEMS[name], random_of(name, act)
    for bias in (False, True):
        op = problem.op("fprop", pool, bias=bias, act=act)
        check_close(make([conv_stem_sm90]), op, problem.operands(op, normal(random), random))


@places("name", [("lenet conv 1",), ("cifarnet stem",), ("resnet stem",)], lambda name: True)
def test_not_a_number_and_infinity_pass(make: MakeExecutor, name: str) -> None:
    check_not_finite(make([conv_stem_sm90]), name)


@places("name pool", [("lenet conv 1", None), ("cifarnet stem", "max"), ("resnet stem", "max")], lambda *_: True)
def test_filter_gradients_of_what_is_not_finite(make: MakeExecutor, name: str, pool: str | None) -> None:
    """Wherever float64 has NaN or an infinity, the device has no finite number; what is finite is exact."""
    problem, op = op_of(name, "wgrad", pool)
    x, dy, *winners = problem.operands(op, ternary(random_of(name)), random_of(name))
    x[0, 3, 4, 0], x[1, 6, 6, -1], dy[0, 1, 2, 3] = np.nan, np.inf, -np.inf
    true = on_cpu(op, [x, dy, *winners])
    got = run_op(make([conv_stem_sm90_wgrad]), op, bits_of(op, [x, dy, *winners]))
    for result, wanted in zip(got, true, strict=True):
        assert not np.isfinite(wanted).all()
        assert not np.isfinite(result[~np.isfinite(wanted)]).any()
        same = np.isfinite(result)
        assert (result[same] == wanted[same]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_random_problems_are_exact(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    on_device(cuda, monkeypatch, FAMILIES[kind])

    @seeded(11)
    @settings(
        max_examples=150, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(problems(), st.booleans(), st.booleans())
    def run(drawn: Problem, pooled: bool, bias: bool) -> None:
        pool, problem = "max" if pooled else None, taken(drawn, kind)
        assume(problem.has(pool))
        op = problem.op(kind, pool, bias=bias)
        random = random_of(problem)
        operands = problem.operands(op, ternary(random), random)
        assume(FAMILIES[kind].supports(op, call_specs(op, operands)) is None)
        check_exact(cuda, op, operands, on_cpu(op, operands), problem)

    run()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_many_tiles_give_the_same_bits_each_time(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    problem = Problem(40, 64, 63, 3, 64, 7, 7, (3, 3, 3, 3), (2, 2))
    for pool in (None, "max"):
        op = problem.op(kind, pool, **GEOMETRY[kind])
        operands = bits_of(op, problem.operands(op, normal(random_of("many")), random_of("many")))
        first, second = (run_op(on_device(cuda, monkeypatch, FAMILIES[kind]), op, operands) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [None, "max"])
def test_a_gradient_rounds_as_it_may(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, pool: str | None) -> None:
    problem, random = Problem(3, 61, 224, 3, 64, 7, 7, (3, 3, 3, 3), (2, 2)), random_of(pool)
    op = problem.op("wgrad", pool, bias=True)
    check_close(on_device(cuda, monkeypatch, conv_stem_sm90_wgrad), op, problem.operands(op, normal(random), random))


@cases
def test_launches_are_right(name: str, kind: str, pool: str | None) -> None:
    """Every candidate keeps to its parameter table, the device's limits and the plan's memory."""
    null = CudaExecutor.null()
    problem, op = op_of(name, kind, pool)
    operands = problem.operands(op, ternary(random_of(name)), random_of(name))
    found = FAMILIES[kind].candidates(call_of(op, operands), null.device)
    assert found
    for variant in found:
        registry = Registry([Forced(FAMILIES[kind], variant)], REGISTRY.folder)
        run_op(CudaExecutor(null.driver, registry=registry), op, bits_of(op, operands))
    null.close()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_variant_is_reached_and_listed(kind: str) -> None:
    reached = set()
    for runs in (1, 2, 3, 4):
        for r in (3, 7):
            for w in (112, 128):
                for pool in (None, "max"):
                    problem = Problem(1, 12, w, 1, 64, r, 8 * runs - 1, (3, 4 * runs - 1, 3, 4 * runs - 1))
                    op = problem.op(kind, pool)
                    call = call_of(op, problem.operands(op, ternary(random_of()), random_of()))
                    for variant in FAMILIES[kind].candidates(call, H200):
                        reached |= {launch.kernel for launch in FAMILIES[kind].launches(call, H200, variant)}
    assert reached - {SUM_KERNEL} == set(FAMILIES[kind].variants())


def test_what_it_refuses() -> None:
    op = PROBLEMS["cifarnet stem"].op("fprop", None)
    specs = call_specs(op, PROBLEMS["cifarnet stem"].operands(op, ternary(random_of()), random_of()))
    assert conv_stem_sm90.supports(op, specs) is None
    assert "gelu" in (conv_stem_sm90.supports(ConvFprop(act="gelu"), specs) or "")
    assert "no forward" in (conv_stem_sm90.supports(ConvWgrad(filter=(3, 3)), specs) or "")
    assert "no filter gradient" in (conv_stem_sm90_wgrad.supports(ConvFprop(), specs) or "")
    x, dy = specs[0], Spec((*specs[0].shape[:3], 12), "bf16")
    gradient = ConvWgrad(filter=(3, 3), pad=(1, 1, 1, 1))
    assert "eights" in (conv_stem_sm90_wgrad.supports(gradient, (x, dy)) or "")
    dy = Spec((*dy.shape[:3], 16), "bf16")
    assert conv_stem_sm90_wgrad.supports(gradient, (x, dy)) is None
    dilated = replace(gradient, pad=(2, 1, 2, 1), dilation=(2, 1))
    assert "dilation" in (conv_stem_sm90_wgrad.supports(dilated, (x, dy)) or "")
    whole = ConvWgrad(filter=(1, 8), pad=(0, 4, 0, 3), bias=True)
    thin = (Spec((2, 16, 16, 1), "bf16"), Spec((2, 16, 16, 16), "bf16"))
    assert "place" in (conv_stem_sm90_wgrad.supports(whole, thin) or "")
    assert conv_stem_sm90_wgrad.supports(replace(whole, bias=False), thin) is None
    flat = (Spec((2, 3, 16, 1), "bf16"), Spec((2, 0, 4, 16), "bf16"))  # the pool's floor leaves no row
    assert "nothing" in (conv_stem_sm90_wgrad.supports(ConvWgrad(filter=(3, 9), pool="max"), flat) or "")


@pytest.mark.parametrize(("x", "w"), [((8, 128, 200, 1), (16, 128, 9, 1)), ((8, 128, 200, 3), (16, 60, 10, 3))])
def test_tall_filters_are_left_to_others(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    """A block keeps 64 filters, however few there are."""
    specs = (Spec(x, "bf16"), Spec(w, "bf16"))
    assert "do not fit" in (conv_stem_sm90.supports(ConvFprop(act="relu"), specs) or "")
    assert REGISTRY.on("sm_90a").supports(ConvFprop(act="relu"), specs)
