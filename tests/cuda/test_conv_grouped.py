"""fp32 convolutions in groups against the CPU executor, on the host's emulation and on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parcnn.cuda.kernels import Registry, conv_grouped
from parcnn.cuda.launch import Device
from parcnn.ops.base import ACTIVATIONS, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Executor
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
    k: int
    r: int
    s: int
    groups: int
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "pad": self.pad, "dilation": self.dilation, "groups": self.groups}

    @property
    def pq(self) -> tuple[int, int]:
        return ConvFprop(**self.geometry).output_hw(self.h, self.w, self.r, self.s)

    def arrays(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        seen = self.c // self.groups
        return {
            "x": normal(random, self.n, self.h, self.w, self.c),
            "w": normal(random, self.k, self.r, self.s, seen) / np.sqrt(np.float32(self.r * self.s * seen)),
            "b": normal(random, self.k),
            "dy": normal(random, self.n, *self.pq, self.k),
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
        taps, (p, q) = self.r * self.s, self.pq
        terms = {"fprop": taps * self.c // self.groups, "dgrad": taps * self.k // self.groups, "wgrad": self.n * p * q}
        return 4 + np.sqrt(terms[kind]) / 3


PROBLEMS = {
    "two groups": Problem(2, 8, 7, 6, 10, 3, 3, 2, pad=(1, 1, 1, 1)),
    "32 groups of 4": Problem(1, 5, 4, 128, 128, 3, 3, 32, pad=(1, 1, 1, 1)),
    "groups of more than a tile": Problem(1, 4, 5, 70, 74, 3, 3, 2, pad=(1, 1, 1, 1)),
    "pointwise": Problem(2, 5, 4, 12, 9, 1, 1, 3),
    "pointwise with stride": Problem(2, 5, 6, 8, 16, 1, 1, 4, stride=(2, 2)),
    "one filter a group": Problem(2, 7, 6, 8, 4, 2, 3, 4, stride=(2, 1)),
    "covers the image": Problem(3, 4, 3, 6, 8, 4, 3, 2),
    "primes": Problem(3, 13, 11, 15, 21, 3, 5, 3, stride=(2, 3), pad=(2, 1, 3, 4)),
    "one pixel": Problem(1, 1, 1, 4, 4, 1, 1, 2),
    "larger than the image": Problem(2, 2, 3, 4, 4, 5, 5, 2, pad=(2, 2, 2, 2)),
    "dilated": Problem(2, 11, 10, 8, 12, 3, 3, 2, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "stride larger than the filter": Problem(2, 9, 10, 4, 4, 2, 2, 2, stride=(3, 4)),
    "many pixels": Problem(9, 9, 9, 4, 4, 3, 3, 2, dilation=(2, 1)),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@pytest.fixture(params=WHERE)
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Executor:
    if request.param == "gpu":
        cuda: Executor = request.getfixturevalue("cuda")
        monkeypatch.setattr(cuda, "registry", Registry([conv_grouped], runner.KERNELS))
        return cuda
    if not runner.available():
        pytest.skip("the emulation needs g++")
    return CheckedEmulation([with_sum(conv_grouped)], descending=request.param == "descending")


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
            launches = conv_grouped.launches(call, Device("H200", "sm_90a", 132))
            reached |= {launch.kernel for launch in launches}
    assert set(conv_grouped.variants()) <= reached


@pytest.mark.parametrize("name", ["dilated", "32 groups of 4", "primes"])
@pytest.mark.parametrize("act", [None, "relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("add", [False, True])
def test_dgrad_epilogues(
    executor: Executor, random: np.random.Generator, name: str, act: str | None, add: bool
) -> None:
    problem = PROBLEMS[name]
    arrays = problem.arrays(random)
    x = arrays["x"]
    saved = [np.maximum(np.tanh(x), 0 if act == "relu" else -1)] if act else []
    addend = [normal(random, *x.shape)] if add else []
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


@pytest.mark.parametrize("name", ["two groups", "groups of more than a tile"])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_activations(executor: Executor, random: np.random.Generator, name: str, act: str | None) -> None:
    problem = PROBLEMS[name]
    x, w, b, _ = problem.arrays(random).values()
    check(executor, ConvFprop(**problem.geometry, bias=True, act=act), [x, w, b], ulps=problem.ulps("fprop"))


def test_refusals_say_why() -> None:
    x, w = Spec((2, 8, 8, 6)), Spec((4, 3, 3, 3))

    def reason(op: Op, *inputs: Spec) -> str | None:
        return conv_grouped.supports(op, inputs)

    assert reason(ConvFprop(groups=2), x, w) is None
    assert "2 to 65535 groups" in str(reason(ConvFprop(), x, Spec((4, 3, 3, 6))))
    assert "of several channels" in str(reason(ConvFprop(groups=6), x, Spec((6, 3, 3, 1))))
    assert "no pool" in str(reason(ConvFprop(groups=2, pool="max"), x, w))
    assert "gelu" in str(reason(ConvDgrad(groups=2, image=(10, 10), act="gelu"), Spec((2, 8, 8, 4)), w))
    assert "16384" in str(reason(ConvFprop(groups=2, dilation=(2**13, 1)), x, w))
    assert "bf16" in str(reason(ConvFprop(groups=2), Spec(x.shape, "bf16"), Spec(w.shape, "bf16")))
    huge = Spec((2**17, 128, 64, 4))
    assert "2**31" in str(reason(ConvWgrad(groups=2, filter=(3, 3)), huge, huge))


@st.composite
def geometries(draw: st.DrawFn) -> Problem:
    r, s = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pad = draw(st.tuples(*[st.integers(0, 3)] * 4))
    groups = draw(st.integers(2, 5))
    return Problem(
        n=draw(st.integers(1, 3)),
        h=max(1, dilation[0] * (r - 1) + 1 - pad[0] - pad[2]) + draw(st.integers(0, 6)),
        w=max(1, dilation[1] * (s - 1) + 1 - pad[1] - pad[3]) + draw(st.integers(0, 6)),
        c=groups * draw(st.integers(2, 6)),
        k=groups * draw(st.integers(1, 10)),
        r=r,
        s=s,
        groups=groups,
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        pad=pad,
        dilation=dilation,
    )


def test_any_geometry(executor: Executor) -> None:
    @settings(max_examples=20 if isinstance(executor, CheckedEmulation) else 200, deadline=None, derandomize=True)
    @given(problem=geometries(), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
    def any_geometry(problem: Problem, kind: str, seed: int) -> None:
        op, arrays = problem.call(kind, problem.arrays(np.random.default_rng(seed)))
        check(executor, op, arrays, ulps=problem.ulps(kind))

    any_geometry()
