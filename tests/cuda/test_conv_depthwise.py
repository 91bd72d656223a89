"""Depthwise convolution kernels against the CPU executor, on the host's emulation and on the device; each variant too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parcnn.cuda.kernels import Registry, conv_depthwise, conv_depthwise_wgrad
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_wgrad import SUM_KERNEL
from parcnn.cuda.launch import Device
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Executor, Slot
from tests.cuda.bf16 import stored, values_of
from tests.cuda.compare import (  # noqa: F401
    WHERE,
    CheckedEmulation,
    MakeExecutor,
    check,
    listing,
    makers,
    normal,
    random_fixture,
    specs_of,
)
from tests.cuda.host_emulation import runner
from tests.op_runner import run_op

FAMILIES = {ConvFprop: conv_depthwise, ConvDgrad: conv_depthwise, ConvWgrad: conv_depthwise_wgrad}
KINDS = ("fprop", "dgrad", "wgrad")
H200 = Device("H200", "sm_90a", 132)


@dataclass(frozen=True)
class Problem:
    n: int
    h: int
    w: int
    c: int
    r: int
    stride: int = 1
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    element: str = "bf16"

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": (self.stride,) * 2, "pad": self.pad, "groups": self.c}

    def arrays(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        p, q = ConvFprop(**self.geometry).output_hw(self.h, self.w, self.r, self.r)
        return {
            "x": stored(normal(random, self.n, self.h, self.w, self.c), self.element),
            "w": stored(normal(random, self.c, self.r, self.r, 1) / self.r, self.element),
            "b": normal(random, self.c),
            "dy": stored(normal(random, self.n, p, q, self.c), self.element),
        }

    def call(self, kind: str, arrays: dict[str, np.ndarray]) -> tuple[Op, list[np.ndarray]]:
        x, w, b, dy = arrays.values()
        if kind == "fprop":
            return ConvFprop(**self.geometry, bias=True, act="relu"), [x, w, b]
        if kind == "dgrad":
            return ConvDgrad(**self.geometry, image=(self.h, self.w)), [dy, w]
        return ConvWgrad(**self.geometry, bias=True, filter=(self.r, self.r)), [x, dy]

    def ulps(self, kind: str) -> float:
        """What one running sum may add to the error: it walks at random, a third of a ulp each of its terms."""
        p, q = ConvFprop(**self.geometry).output_hw(self.h, self.w, self.r, self.r)
        return 4 + np.sqrt(self.n * p * q if kind == "wgrad" else self.r * self.r) / 3


ONES = (1, 1, 1, 1)
PROBLEMS = {
    "3x3": Problem(2, 9, 11, 6, 3, pad=ONES),
    "3x3, stride 2": Problem(2, 9, 12, 8, 3, 2, pad=ONES),
    "3x3, stride 2, other parity": Problem(2, 8, 7, 10, 3, 2, pad=(0, 1, 1, 0)),
    "3x3 without padding": Problem(1, 7, 6, 4, 3),
    "3x3, more padding than the filter": Problem(1, 4, 3, 2, 3, pad=(4, 3, 5, 4)),
    "3x3, stride 2, more padding than the filter": Problem(1, 5, 4, 2, 3, 2, pad=(4, 3, 5, 4)),
    "3x3, one pixel": Problem(3, 1, 1, 12, 3, pad=ONES),
    "3x3 of floats": Problem(2, 7, 10, 6, 3, pad=ONES, element="f32"),
    "3x3 of floats, stride 2": Problem(2, 7, 10, 6, 3, 2, pad=ONES, element="f32"),
    "5x5": Problem(2, 8, 9, 6, 5, pad=(2, 2, 2, 2)),
    "5x5, stride 2": Problem(2, 9, 8, 4, 5, 2, pad=(2, 2, 1, 2)),
    "7x7": Problem(1, 9, 10, 4, 7, pad=(3, 3, 3, 3)),
    "7x7, stride 2": Problem(1, 11, 10, 4, 7, 2, pad=(3, 3, 3, 3)),
    "channels in slices": Problem(1, 3, 4, 260, 3, pad=ONES),
    "a slice that is not full": Problem(1, 3, 4, 134, 5, pad=(2, 2, 2, 2)),
    "many images": Problem(9, 4, 4, 16, 3, pad=ONES),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


with_sum = listing([SUM_KERNEL])
make_fixture = makers(with_sum)


@pytest.fixture
def executor(make: MakeExecutor) -> Executor:
    return make([conv_depthwise, conv_depthwise_wgrad])


def call_of(op: Op, arrays: Sequence[np.ndarray]) -> Call:
    """The call as a launcher sees it, in no place."""
    specs = specs_of(arrays)
    return Call(op, tuple(Slot(s, "arena") for s in specs), tuple(Slot(s, "arena") for s in op.infer(*specs)))


@problems
@pytest.mark.parametrize("kind", KINDS)
def test_every_variant(make: MakeExecutor, random: np.random.Generator, problem: Problem, kind: str) -> None:
    op, arrays = problem.call(kind, problem.arrays(random))
    family = FAMILIES[type(op)]
    variants = family.candidates(call_of(op, arrays), H200)
    assert len(set(map(str, variants))) == len(variants)
    for variant in {variants[0], variants[-1], *variants[1:2]}:
        check(make([Forced(family, variant)]), op, arrays, ulps=problem.ulps(kind))


def test_every_kernel_is_tested() -> None:
    """The problems above reach every kernel that a launcher may name."""
    reached = set()
    for problem in PROBLEMS.values():
        arrays = problem.arrays(np.random.default_rng(0))
        for kind in KINDS:
            call = call_of(*problem.call(kind, arrays))
            reached |= {launch.kernel for launch in FAMILIES[type(call.op)].launches(call, H200)}
    assert {kernel for family in (conv_depthwise, conv_depthwise_wgrad) for kernel in family.variants()} <= reached


@pytest.mark.parametrize("name", ["3x3", "3x3, stride 2", "3x3 of floats", "5x5, stride 2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", [None, "relu"])
def test_fprop_epilogues(
    executor: Executor, random: np.random.Generator, name: str, bias: bool, act: str | None
) -> None:
    problem = PROBLEMS[name]
    x, w, b, _ = problem.arrays(random).values()
    op = ConvFprop(**problem.geometry, bias=bias, act=act)
    check(executor, op, [x, w, *([b] if bias else [])], ulps=problem.ulps("fprop"))


@pytest.mark.parametrize("name", ["3x3", "3x3, stride 2, other parity", "3x3 of floats"])
@pytest.mark.parametrize("act", [None, "relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("add", [False, True])
def test_dgrad_epilogues(
    executor: Executor, random: np.random.Generator, name: str, act: str | None, add: bool
) -> None:
    problem = PROBLEMS[name]
    arrays = problem.arrays(random)
    x = values_of(arrays["x"])
    saved = [stored(np.maximum(np.tanh(x), 0 if act == "relu" else -1), problem.element)] if act else []
    addend = [stored(normal(random, *x.shape), problem.element)] if add else []
    op = ConvDgrad(**problem.geometry, image=(problem.h, problem.w), act=act, add=add)
    for alias in ((), *((pair,) for pair in op.inplace())):
        check(executor, op, [arrays["dy"], arrays["w"], *saved, *addend], alias=alias, ulps=problem.ulps("dgrad"))


def test_wgrad_without_bias_gives_the_same_bits(executor: Executor, random: np.random.Generator) -> None:
    for name in ("3x3", "many images"):
        op, arrays = PROBLEMS[name].call("wgrad", PROBLEMS[name].arrays(random))
        first, again = run_op(executor, op, arrays), run_op(executor, op, arrays)
        (without,) = run_op(executor, replace(op, bias=False), arrays)
        np.testing.assert_array_equal(first[0], without)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_non_finite_pixel_stays_in_its_channel(executor: Executor, random: np.random.Generator) -> None:
    problem = PROBLEMS["3x3, stride 2"]
    arrays = problem.arrays(random)
    x = values_of(arrays["x"])
    x[0, 4, 5, 3], x[1, 2, 2, 0] = np.nan, np.inf
    (y,) = check(executor, ConvFprop(**problem.geometry), [stored(x, "bf16"), arrays["w"]], ulps=problem.ulps("fprop"))
    assert np.isnan(values_of(y)).any()


def test_refusals_say_why() -> None:
    x, w = Spec((2, 8, 8, 6), "bf16"), Spec((6, 3, 3, 1), "bf16")

    def reason(op: Op, *inputs: Spec) -> str | None:
        return FAMILIES[type(op)].supports(op, inputs)

    assert reason(ConvFprop(groups=6), x, w) is None
    assert "not a depthwise" in str(reason(ConvFprop(), x, Spec((6, 3, 3, 6), "bf16")))
    assert "not a depthwise" in str(reason(ConvFprop(groups=3), x, Spec((6, 3, 3, 2), "bf16")))
    assert "not a depthwise" in str(reason(ConvFprop(groups=6), x, Spec((12, 3, 3, 1), "bf16")))
    assert "no pool" in str(reason(ConvFprop(groups=6, pool="max"), x, w))
    assert "dilation" in str(reason(ConvFprop(groups=6, dilation=(2, 2)), x, w))
    assert "stride" in str(reason(ConvFprop(groups=6, stride=(1, 2)), x, w))
    assert "4x4" in str(reason(ConvFprop(groups=6), x, Spec((6, 4, 4, 1), "bf16")))
    assert "multiple of 2" in str(reason(ConvFprop(groups=5), Spec((2, 8, 8, 5), "bf16"), Spec((5, 3, 3, 1), "bf16")))
    assert "gelu" in str(reason(ConvFprop(groups=6, act="gelu"), x, w))
    assert "gelu" in str(reason(ConvDgrad(groups=6, image=(10, 10), act="gelu"), x, w))
    assert "f32" in str(reason(ConvFprop(groups=6), x, Spec((6, 3, 3, 1), "f32")))
    assert "f32" in str(reason(ConvFprop(groups=6, bias=True), x, w, Spec((6,), "bf16")))
    huge = Spec((2**17, 128, 64, 2), "bf16")
    assert "2**31" in str(reason(ConvWgrad(groups=2, filter=(3, 3)), huge, huge))


@st.composite
def geometries(draw: st.DrawFn) -> Problem:
    element = draw(st.sampled_from(["bf16", "bf16", "f32"]))
    r = draw(st.sampled_from([3, 5, 7])) if element == "bf16" else 3
    pad = draw(st.tuples(*[st.integers(0, r)] * 4))
    return Problem(
        n=draw(st.integers(1, 3)),
        h=max(1, r - pad[0] - pad[2]) + draw(st.integers(0, 9)),
        w=max(1, r - pad[1] - pad[3]) + draw(st.integers(0, 9)),
        c=2 * draw(st.integers(1, 20)),
        r=r,
        stride=draw(st.sampled_from([1, 2])),
        pad=pad,
        element=element,
    )


@pytest.mark.parametrize("where", [p for p in WHERE if p != "descending"])
def test_any_geometry(where: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    families = [conv_depthwise, conv_depthwise_wgrad]
    on_device = where == "gpu"
    if on_device:
        executor: Executor = request.getfixturevalue("cuda")
        monkeypatch.setattr(executor, "registry", Registry(families, runner.KERNELS))
    elif runner.available():
        executor = CheckedEmulation(list(map(with_sum, families)))
    else:
        pytest.skip("the emulation needs g++")

    @settings(max_examples=150 if on_device else 20, deadline=None, derandomize=True)
    @given(problem=geometries(), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
    def any_geometry(problem: Problem, kind: str, seed: int) -> None:
        op, arrays = problem.call(kind, problem.arrays(np.random.default_rng(seed)))
        check(executor, op, arrays, ulps=problem.ulps(kind))

    any_geometry()
