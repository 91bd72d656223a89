"""Winograd's kernels against the CPU executor, on the host's emulation and on the device."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from parcnn.cuda.kernels import conv_unpool, conv_wgrad, conv_winograd, conv_winograd_wgrad
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_wgrad import SUM_KERNEL
from parcnn.cuda.launch import Kernel, Launcher
from parcnn.ops.base import ACTIVATIONS, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from tests.cuda import conv_problems
from tests.cuda.compare import WHERE, CheckedEmulation, MakeExecutor, check, makers, normal, on_cpu, random_fixture  # noqa: F401
from tests.cuda.test_conv import Problem, call_of
from tests.op_runner import run_op

PROBLEMS = {
    "one tile": Problem(1, 2, 2, 8, 8, 3, 3, pad=(1, 1, 1, 1)),
    "odd sides": Problem(3, 9, 7, 16, 72, 3, 3, pad=(1, 1, 1, 1)),
    "no padding": Problem(2, 6, 7, 24, 8, 3, 3),
    "asymmetric": Problem(2, 7, 6, 8, 16, 3, 3, pad=(3, 2, 1, 0)),
    "small images": Problem(19, 3, 3, 32, 136, 3, 3, pad=(1, 1, 1, 1)),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


make_fixture = makers()


FORWARD, FILTERS = 25 / 9, 16 / 4


def ulps(terms: int, variance: float = FORWARD) -> float:
    """What the algorithm may err, in ulps of the largest output.

    Each of the 16 products is a running sum that walks at random, a third of a ulp for each of its terms; transforms and
    epilogue round a few times. `variance`: of what enters an output, for random operands, over the output's own. FORWARD:
    the nine products of an output have 4 * (1 + 3/4 + 3/4)**2 = 25, from transforms whose rows have 2 and (1, 3/4, 3/4) as
    sums of squares a side, where nine taps have 9. FILTERS: the errors' transforms have (1, 2, 2, 1), the last one takes
    halves of the middle: 2 * (1 + (2 + 2) / 4) = 4 a side where a tile has 2.
    """
    return np.sqrt(variance) * (4 + np.sqrt(terms) / 3)


def forward(problem: Problem, random: np.random.Generator, **epilogue: Any) -> tuple[ConvFprop, list[np.ndarray]]:
    tensors = problem.tensors(random, None)
    op = ConvFprop(**problem.geometry, bias=True, **epilogue)
    return op, [tensors["x"], tensors["w"], tensors["b"]]


def filter_gradient(
    problem: Problem, random: np.random.Generator, bias: bool, pool: str | None = None
) -> tuple[ConvWgrad, list[np.ndarray]]:
    tensors = problem.tensors(random, pool)
    op = ConvWgrad(**problem.geometry, filter=(3, 3), bias=bias, pool=pool)
    return op, [tensors["x"], tensors["dy"], *([tensors["idx"]] if pool == "max" else [])]


def backward(
    problem: Problem, random: np.random.Generator, pool: str | None = None, **epilogue: Any
) -> tuple[ConvDgrad, list[np.ndarray]]:
    tensors = problem.tensors(random, pool)
    op = ConvDgrad(**problem.geometry, image=(problem.h, problem.w), pool=pool, **epilogue)
    extra = [normal(random, *tensors["x"].shape) for name in ("saved", "addend") if epilogue]
    return op, [tensors["dy"], tensors["w"], *([tensors["idx"]] if pool == "max" else []), *extra]


@problems
@pytest.mark.parametrize("pool", [None, "max", "avg"])
def test_fprop(make: MakeExecutor, random: np.random.Generator, problem: Problem, pool: str | None) -> None:
    if 0 in problem.output_hw(pool):
        pytest.skip("no pooled output")
    op, arrays = forward(problem, random, act="relu", pool=pool)
    check(make([conv_winograd]), op, arrays, ulps=ulps(problem.c))


@problems
@pytest.mark.parametrize("epilogue", [{}, {"act": "relu", "add": True}, {"act": "tanh", "add": True}])
def test_dgrad(make: MakeExecutor, random: np.random.Generator, problem: Problem, epilogue: dict[str, Any]) -> None:
    op, arrays = backward(problem, random, **epilogue)
    for alias in ((), *((pair,) for pair in op.inplace())):
        check(make([conv_winograd]), op, arrays, alias=alias, ulps=ulps(problem.k))


class WithHelpers(Forced):
    """With the kernel that adds the splits, and those that take the error back through a pool."""

    def variants(self) -> Iterable[Kernel]:
        return [*self.family.variants(), SUM_KERNEL, *conv_unpool.variants()]


def wgrad_in(tiles: int, splits: int) -> WithHelpers:
    """The filter gradient in so many splits, or as many as are not empty."""
    steps = ceil(tiles / conv_winograd_wgrad.DEPTH)
    splits = ceil(steps / ceil(steps / min(splits, steps)))
    return WithHelpers(conv_winograd_wgrad, conv_winograd_wgrad.Variant(splits))


@problems
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_wgrad(make: MakeExecutor, random: np.random.Generator, problem: Problem, bias: bool, splits: int) -> None:
    op, arrays = filter_gradient(problem, random, bias)
    p, q = problem.output_hw(None)
    tiles = problem.n * ceil(p / 2) * ceil(q / 2)
    check(make([wgrad_in(tiles, splits)]), op, arrays, ulps=ulps(tiles, FILTERS))


@problems
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("epilogue", [{}, {"act": "relu", "add": True}])
def test_dgrad_behind_a_pool(
    make: MakeExecutor, random: np.random.Generator, problem: Problem, pool: str, epilogue: dict[str, Any]
) -> None:
    """Odd sides too, whose last row and column the pool drops."""
    op, arrays = backward(problem, random, pool, **epilogue)
    executor = make([WithHelpers(conv_winograd, conv_winograd.VARIANT)])
    for alias in ((), *((pair,) for pair in op.inplace())):
        check(executor, op, arrays, alias=alias, ulps=ulps(problem.k))


@problems
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize(("bias", "splits"), [(False, 1), (True, 1), (True, 3)])
def test_wgrad_behind_a_pool(
    make: MakeExecutor, random: np.random.Generator, problem: Problem, pool: str, bias: bool, splits: int
) -> None:
    op, arrays = filter_gradient(problem, random, bias, pool)
    p, q = problem.output_hw(pool)
    tiles = problem.n * p * q
    check(make([wgrad_in(tiles, splits)]), op, arrays, ulps=ulps(tiles, FILTERS))


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_activations(make: MakeExecutor, random: np.random.Generator, act: str | None) -> None:
    op, arrays = forward(PROBLEMS["odd sides"], random, act=act)
    check(make([conv_winograd]), op, arrays, ulps=ulps(16))


@problems
def test_integers_are_exact(make: MakeExecutor, random: np.random.Generator, problem: Problem) -> None:
    """Quarters of small integers are exact in every transform."""
    for op, arrays in (forward(problem, random), backward(problem, random)):
        whole = [random.integers(-4, 5, a.shape).astype(np.float32) for a in arrays]
        (exact,) = on_cpu(op, [a.astype(np.float64) for a in whole])
        (got,) = run_op(make([conv_winograd]), op, whole)
        np.testing.assert_array_equal(got, exact)


def test_what_is_not_finite_stays_where_it_was(make: MakeExecutor, random: np.random.Generator) -> None:
    """NaN where NaN is due; an infinity gives infinities or NaN where a plain sum gives them, and nowhere else."""
    for op, arrays in (forward(PROBLEMS["odd sides"], random), backward(PROBLEMS["odd sides"], random)):
        first = arrays[0]
        first[0, 3, 2, 5], first[1, 0, 0, 0], first[2, 8, 6, 7] = np.nan, np.inf, -np.inf
        (exact,) = on_cpu(op, [a.astype(np.float64) for a in arrays])
        (got,) = run_op(make([conv_winograd]), op, arrays)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(exact))
        assert np.isnan(got[np.isnan(exact)]).all()
        assert np.isinf(exact).any()


@pytest.mark.parametrize(
    ("op", "shape", "reason"),
    [
        (ConvFprop(stride=(2, 2)), (8, 3, 3, 8), "stride"),
        (ConvFprop(), (8, 5, 5, 8), "3x3"),
        (ConvFprop(), (8, 3, 3, 12), "multiples of 8"),
        (ConvFprop(), (6, 3, 3, 8), "multiples of 4"),
    ],
)
def test_refusals_say_why(op: Op, shape: tuple[int, ...], reason: str) -> None:
    call = call_of(op, [np.zeros((2, 9, 9, shape[3]), np.float32), np.zeros(shape, np.float32)])
    assert reason in (conv_winograd.supports(op, call.input_specs) or "")


@pytest.mark.parametrize(
    ("image", "pad", "taken"),
    [
        ((1, 9), (1, 1, 1, 1), False),
        ((1, 9), (2, 1, 2, 1), True),
        ((2, 9), (1, 1, 0, 0), False),
        ((9, 2), (0, 1, 0, 0), False),
        ((1, 1), (2, 2, 2, 2), True),
        ((1, 1), (1, 1, 1, 1), False),
        ((2, 2), (1, 1, 1, 1), True),
        ((3, 3), (0, 0, 0, 0), True),
    ],
)
def test_taps_that_meet_no_pixel(image: tuple[int, int], pad: tuple[int, int, int, int], taken: bool) -> None:
    """Their gradients are zeros, not what is left of a difference: with Adam a step would be as long as any other."""
    x = np.ones((1, *image, 1))
    op = ConvWgrad(pad=pad, filter=(3, 3))
    dy = np.ones((1, *ConvFprop(pad=pad).output_hw(*image, 3, 3), 1))
    (met,) = on_cpu(op, [x, dy])
    assert met.all() == taken
    specs = (Spec((4, *image, 8)), Spec((4, *dy.shape[1:3], 8)))
    assert (conv_winograd_wgrad.supports(op, specs) is None) == taken


@st.composite
def random_problems(draw: st.DrawFn) -> conv_problems.Problem:
    """Of any size from one pixel on; about half of the tiles of such images lie on a border."""
    pad = draw(st.tuples(*[st.integers(0, 3)] * 4))
    sides = [draw(st.integers(max(1, 3 - pad[i] - pad[i + 2]), 12)) for i in (0, 1)]
    return conv_problems.Problem(draw(st.integers(1, 8)), *sides, *(8 * draw(st.integers(1, 3)) for _ in "ck"), pad=pad)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    problem=random_problems(),
    kind=st.sampled_from(["fprop", "dgrad", "wgrad"]),
    pool=st.sampled_from([None, "max", "avg"]),
    splits=st.integers(1, 4),
    number=st.integers(0, 2**32 - 1),
)
def test_random_problems(
    make: MakeExecutor, problem: conv_problems.Problem, kind: str, pool: str | None, splits: int, number: int
) -> None:
    """Each output is held to its own terms."""
    assume(problem.has(pool))
    random, op = np.random.default_rng(number), problem.op(kind, pool)
    operands = problem.operands(op, conv_problems.normal(random), random)
    n, p, q, _ = operands[1 if kind == "wgrad" else 0].shape
    tiles = n * p * q if pool else n * ceil(p / 2) * ceil(q / 2)
    family: Launcher = WithHelpers(conv_winograd, conv_winograd.VARIANT)
    if kind == "wgrad":
        family = wgrad_in(tiles, splits)
    if family.supports(op, conv_problems.specs_of(op, operands, "f32")) is None:
        conv_problems.check_close(make([family]), op, operands, "f32")


def test_errors_of_too_many_elements_before_the_pool() -> None:
    dy, idx = Spec((64, 256, 256, 256)), Spec((64, 256, 256, 256), "u2")
    pooled, image = {"pad": (1, 1, 1, 1), "pool": "max"}, (512, 512)
    cases = [
        (conv_winograd, ConvDgrad(**pooled, image=image), (dy, Spec((256, 3, 3, 4)), idx)),
        (conv_winograd_wgrad, ConvWgrad(**pooled, filter=(3, 3)), (Spec((64, *image, 4)), dy, idx)),
    ]
    for family, op, inputs in cases:
        assert "2**31" in (family.supports(op, inputs) or "")


def test_filters_of_too_many_elements() -> None:
    x = Spec((4, 4, 4, 16384))
    for family in (conv_winograd_wgrad, conv_wgrad):
        assert "2**31" in (family.supports(ConvWgrad(pad=(1, 1, 1, 1), filter=(3, 3)), (x, x)) or "")
