"""Depthwise kernels for any geometry against the CPU executor, on the host's emulation and on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parcnn.cuda.kernels import Registry, conv_depthwise_any
from parcnn.cuda.launch import Device
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Executor
from tests.cuda.bf16 import stored, values_of
from tests.cuda.compare import WHERE, CheckedEmulation, check, normal, random_fixture  # noqa: F401
from tests.cuda.host_emulation import runner
from tests.cuda.test_conv_depthwise import call_of, with_sum
from tests.op_runner import run_op

KINDS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Problem:
    n: int
    h: int
    w: int
    c: int
    r: int
    s: int
    multiplier: int = 1
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    element: str = "bf16"

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "pad": self.pad, "dilation": self.dilation, "groups": self.c}

    @property
    def pq(self) -> tuple[int, int]:
        return ConvFprop(**self.geometry).output_hw(self.h, self.w, self.r, self.s)

    def arrays(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        k = self.c * self.multiplier
        scale = np.sqrt(np.float32(self.r * self.s))
        return {
            "x": stored(normal(random, self.n, self.h, self.w, self.c), self.element),
            "w": stored(normal(random, k, self.r, self.s, 1) / scale, self.element),
            "b": normal(random, k),
            "dy": stored(normal(random, self.n, *self.pq, k), self.element),
        }

    def call(self, kind: str, arrays: dict[str, np.ndarray]) -> tuple[Op, list[np.ndarray]]:
        x, w, b, dy = arrays.values()
        if kind == "fprop":
            return ConvFprop(**self.geometry, bias=True, act="relu"), [x, w, b]
        if kind == "dgrad":
            return ConvDgrad(**self.geometry, image=(self.h, self.w)), [dy, w]
        return ConvWgrad(**self.geometry, bias=True, filter=(self.r, self.s)), [x, dy]

    def ulps(self, kind: str) -> float:
        """What one running sum may add to the error: it walks at random, a third of a ulp each of its terms."""
        terms = {
            "fprop": self.r * self.s,
            "dgrad": self.r * self.s * self.multiplier,
            "wgrad": self.n * np.prod(self.pq),
        }
        return 4 + np.sqrt(terms[kind]) / 3


PROBLEMS = {
    "dilated": Problem(2, 9, 8, 8, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "odd channels": Problem(2, 5, 6, 7, 3, 3, pad=(1, 1, 1, 1)),
    "two filters a channel": Problem(2, 6, 5, 4, 3, 3, 2, pad=(1, 1, 1, 1)),
    "three filters a channel, stride": Problem(2, 7, 9, 3, 2, 3, 3, stride=(2, 3), pad=(1, 0, 0, 2)),
    "1x7": Problem(1, 4, 9, 12, 1, 7, pad=(0, 3, 0, 3)),
    "stride larger than the filter": Problem(2, 9, 10, 4, 2, 2, stride=(3, 4)),
    "dilated with stride": Problem(2, 12, 12, 5, 3, 2, stride=(2, 2), pad=(1, 0, 2, 1), dilation=(3, 2)),
    "pointwise": Problem(2, 3, 4, 8, 1, 1),
    "covers the image": Problem(3, 4, 3, 6, 4, 3),
    "filters too large for shared memory": Problem(1, 15, 16, 64, 15, 16, pad=(1, 0, 0, 1)),
    "floats": Problem(2, 7, 6, 8, 4, 4, pad=(1, 2, 2, 1), element="f32"),
    "floats, filters a channel": Problem(2, 7, 6, 5, 5, 5, 2, pad=(2, 2, 2, 2), element="f32"),
    "many pixels": Problem(7, 9, 9, 2, 3, 3, dilation=(2, 1), element="f32"),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@pytest.fixture(params=WHERE)
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Executor:
    if request.param == "gpu":
        cuda: Executor = request.getfixturevalue("cuda")
        monkeypatch.setattr(cuda, "registry", Registry([conv_depthwise_any], runner.KERNELS))
        return cuda
    if not runner.available():
        pytest.skip("the emulation needs g++")
    return CheckedEmulation([with_sum(conv_depthwise_any)], descending=request.param == "descending")


@problems
@pytest.mark.parametrize("kind", KINDS)
def test_problems(executor: Executor, random: np.random.Generator, problem: Problem, kind: str) -> None:
    op, arrays = problem.call(kind, problem.arrays(random))
    check(executor, op, arrays, ulps=problem.ulps(kind))


def test_every_kernel_is_tested() -> None:
    """The problems above reach every kernel that the launcher may name."""
    reached = set()
    for problem in PROBLEMS.values():
        for kind in KINDS:
            call = call_of(*problem.call(kind, problem.arrays(np.random.default_rng(0))))
            launches = conv_depthwise_any.launches(call, Device("H200", "sm_90a", 132))
            reached |= {launch.kernel for launch in launches}
    assert set(conv_depthwise_any.variants()) <= reached


@pytest.mark.parametrize("name", ["dilated", "two filters a channel", "floats"])
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


def test_the_same_bits_again_and_without_what_is_not_asked_for(executor: Executor, random: np.random.Generator) -> None:
    problem = PROBLEMS["many pixels"]
    arrays = problem.arrays(random)
    x, w, _, dy = arrays.values()
    check(executor, ConvFprop(**problem.geometry), [x, w], ulps=problem.ulps("fprop"))
    op, _ = problem.call("wgrad", arrays)
    first, again = run_op(executor, op, [x, dy]), run_op(executor, op, [x, dy])
    (without,) = run_op(executor, ConvWgrad(**problem.geometry, filter=(3, 3)), [x, dy])
    np.testing.assert_array_equal(first[0], without)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_refusals_say_why() -> None:
    x, w = Spec((2, 8, 8, 6), "bf16"), Spec((6, 3, 3, 1), "bf16")

    def reason(op: Op, *inputs: Spec) -> str | None:
        return conv_depthwise_any.supports(op, inputs)

    assert reason(ConvFprop(groups=6, dilation=(2, 2)), x, w) is None
    assert reason(ConvFprop(groups=6), x, Spec((12, 5, 2, 1), "bf16")) is None
    assert "not a depthwise" in str(reason(ConvFprop(groups=3), x, Spec((6, 3, 3, 2), "bf16")))
    assert "no pool" in str(reason(ConvFprop(groups=6, pool="max"), x, w))
    assert "silu" in str(reason(ConvFprop(groups=6, act="silu"), x, w))
    assert "16384" in str(reason(ConvFprop(groups=6, dilation=(2**13, 1)), x, w))
    assert "f64" in str(reason(ConvFprop(groups=6), Spec(x.shape, "f64"), Spec(w.shape, "f64")))
    huge = Spec((2**17, 128, 64, 2), "bf16")
    assert "2**31" in str(reason(ConvWgrad(groups=2, filter=(3, 3)), huge, huge))


@st.composite
def geometries(draw: st.DrawFn) -> Problem:
    r, s = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pad = draw(st.tuples(*[st.integers(0, 3)] * 4))
    return Problem(
        n=draw(st.integers(1, 3)),
        h=max(1, dilation[0] * (r - 1) + 1 - pad[0] - pad[2]) + draw(st.integers(0, 6)),
        w=max(1, dilation[1] * (s - 1) + 1 - pad[1] - pad[3]) + draw(st.integers(0, 6)),
        c=draw(st.integers(2, 9)),
        r=r,
        s=s,
        multiplier=draw(st.integers(1, 3)),
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        pad=pad,
        dilation=dilation,
        element=draw(st.sampled_from(["bf16", "f32"])),
    )


def test_any_geometry(executor: Executor) -> None:
    @settings(max_examples=20 if isinstance(executor, CheckedEmulation) else 200, deadline=None, derandomize=True)
    @given(problem=geometries(), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
    def any_geometry(problem: Problem, kind: str, seed: int) -> None:
        op, arrays = problem.call(kind, problem.arrays(np.random.default_rng(seed)))
        check(executor, op, arrays, ulps=problem.ulps(kind))

    any_geometry()
