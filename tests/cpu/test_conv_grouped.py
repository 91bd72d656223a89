"""Grouped convolution against the seven loops run group by group, and its gradients against numeric ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parcnn.cpu import CpuExecutor
from parcnn.ops.base import ACTIVATIONS, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from tests import reference
from tests.op_runner import run_op


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
    def window(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.stride, "pad": self.pad, "dilation": self.dilation}

    @property
    def geometry(self) -> dict[str, object]:
        return {**self.window, "groups": self.groups}

    @property
    def pq(self) -> tuple[int, int]:
        return ConvFprop(**self.window).output_hw(self.h, self.w, self.r, self.s)

    def tensors(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        fan_in = self.r * self.s * self.c // self.groups
        return {
            "x": random.standard_normal((self.n, self.h, self.w, self.c)),
            "w": random.standard_normal((self.k, self.r, self.s, self.c // self.groups)) / np.sqrt(fan_in),
            "b": random.standard_normal(self.k),
            "dy": random.standard_normal((self.n, *self.pq, self.k)),
        }


PROBLEMS = {
    "depthwise 3x3": Problem(2, 9, 7, 5, 5, 3, 3, 5, pad=(1, 1, 1, 1)),
    "depthwise, stride 2": Problem(3, 8, 9, 24, 24, 3, 3, 24, stride=(2, 2), pad=(1, 1, 1, 1)),
    "depthwise, two filters a channel": Problem(2, 6, 7, 3, 6, 3, 2, 3, pad=(1, 0, 1, 1)),
    "depthwise, dilated": Problem(2, 11, 10, 4, 4, 3, 3, 4, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "depthwise pointwise": Problem(2, 4, 5, 6, 6, 1, 1, 6),
    "depthwise over the whole image": Problem(3, 4, 3, 5, 10, 4, 3, 5),
    "two groups": Problem(2, 8, 7, 6, 10, 3, 3, 2, pad=(1, 1, 1, 1)),
    "32 groups of 4": Problem(1, 6, 6, 128, 128, 3, 3, 32, pad=(1, 1, 1, 1)),
    "pointwise groups": Problem(2, 5, 4, 12, 9, 1, 1, 3),
    "one filter a group": Problem(2, 7, 6, 8, 4, 2, 3, 4, stride=(2, 1)),
    "groups cover the image": Problem(3, 4, 3, 6, 8, 4, 3, 2),
    "primes": Problem(3, 13, 11, 15, 21, 3, 5, 3, stride=(2, 3), pad=(2, 1, 3, 4)),
    "one pixel": Problem(1, 1, 1, 4, 4, 1, 1, 2),
    "larger than the image": Problem(2, 2, 3, 4, 4, 5, 5, 2, pad=(2, 2, 2, 2)),
    "rows of one image are blocks": Problem(1, 6, 130, 24, 24, 3, 3, 24, pad=(1, 1, 1, 1)),
    "rows of one image are blocks, groups": Problem(1, 6, 130, 24, 24, 3, 3, 4, pad=(1, 1, 1, 1)),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def slices(problem: Problem, g: int) -> tuple[slice, slice]:
    """Channels and filters of group g."""
    c, k = problem.c // problem.groups, problem.k // problem.groups
    return slice(g * c, (g + 1) * c), slice(g * k, (g + 1) * k)


def expected_output(problem: Problem, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    parts = [slices(problem, g) for g in range(problem.groups)]
    return np.concatenate([reference.conv(x[..., cs], w[ks], b[ks], **problem.window) for cs, ks in parts], axis=3)


def expected_gradients(
    problem: Problem, x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [slices(problem, g) for g in range(problem.groups)]
    grads = [reference.conv_gradients(x[..., cs], w[ks], dy[..., ks], **problem.window) for cs, ks in parts]
    dx, dw, db = zip(*grads, strict=True)
    return np.concatenate(dx, axis=3), np.concatenate(dw), np.concatenate(db)


def agree(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, np.abs(expected).max()))


@problems
def test_fprop(cpu: CpuExecutor, random: np.random.Generator, problem: Problem) -> None:
    x, w, b, _ = problem.tensors(random).values()
    expected = expected_output(problem, x, w, b)
    agree(run_op(cpu, ConvFprop(**problem.geometry, bias=True), [x, w, b])[0], expected)
    agree(run_op(cpu, ConvFprop(**problem.geometry), [x, w])[0], expected - b)


@pytest.mark.parametrize("name", ["depthwise, two filters a channel", "primes"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(cpu: CpuExecutor, random: np.random.Generator, name: str, act: str) -> None:
    problem = PROBLEMS[name]
    x, w, b, _ = problem.tensors(random).values()
    (y,) = run_op(cpu, ConvFprop(**problem.geometry, bias=True, act=act), [x, w, b])
    agree(y, reference.act(act, expected_output(problem, x, w, b)))


@problems
def test_gradients(cpu: CpuExecutor, random: np.random.Generator, problem: Problem) -> None:
    x, w, _, dy = problem.tensors(random).values()
    dx, dw, db = expected_gradients(problem, x, w, dy)
    agree(run_op(cpu, ConvDgrad(**problem.geometry, image=x.shape[1:3]), [dy, w])[0], dx)
    wgrad = ConvWgrad(**problem.geometry, bias=True, filter=w.shape[1:3])
    actual_dw, actual_db = run_op(cpu, wgrad, [x, dy])
    agree(actual_dw, dw)
    agree(actual_db, db)
    (without_bias,) = run_op(cpu, replace(wgrad, bias=False), [x, dy])
    np.testing.assert_array_equal(without_bias, actual_dw)


@pytest.mark.parametrize("name", ["depthwise, stride 2", "depthwise, two filters a channel", "two groups", "primes"])
@pytest.mark.parametrize("act", [None, "relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("add", [False, True])
def test_dgrad_epilogue(cpu: CpuExecutor, random: np.random.Generator, name: str, act: str | None, add: bool) -> None:
    problem = PROBLEMS[name]
    x, w, _, dy = problem.tensors(random).values()
    saved, addend = reference.act(act, x), random.standard_normal(x.shape)
    op = ConvDgrad(**problem.geometry, image=x.shape[1:3], act=act, add=add)
    expected = expected_gradients(problem, x, w, dy)[0] + (addend if add else 0)
    slope = {None: 1, "relu": saved > 0, "tanh": 1 - saved**2, "sigmoid": saved * (1 - saved)}[act]
    arrays = [dy, w, *([saved] if act else []), *([addend] if add else [])]
    for alias in ((), *((pair,) for pair in op.inplace())):
        (dx,) = run_op(cpu, op, arrays, alias=alias)
        agree(dx, expected * slope)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(2, 5, 6, 3, 3, 3, 2, 3, stride=(2, 1), pad=(1, 0, 1, 2)),
        Problem(2, 5, 6, 4, 6, 3, 2, 2, pad=(1, 0, 1, 2), dilation=(1, 2)),
    ],
    ids=["depthwise", "groups"],
)
def test_numeric_gradients(cpu: CpuExecutor, random: np.random.Generator, problem: Problem) -> None:
    x, w, b, dy = problem.tensors(random).values()
    op = ConvFprop(**problem.geometry, bias=True)

    def forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        return run_op(cpu, op, [x, w, b])[0]

    (dx,) = run_op(cpu, ConvDgrad(**problem.geometry, image=x.shape[1:3]), [dy, w])
    dw, db = run_op(cpu, ConvWgrad(**problem.geometry, bias=True, filter=w.shape[1:3]), [x, dy])
    agree(dx, reference.numeric_gradient(lambda v: forward(v, w, b), x, dy), 1e-7)
    agree(dw, reference.numeric_gradient(lambda v: forward(x, v, b), w, dy), 1e-7)
    agree(db, reference.numeric_gradient(lambda v: forward(x, w, v), b, dy), 1e-7)


def test_a_non_finite_pixel_stays_in_its_group(cpu: CpuExecutor, random: np.random.Generator) -> None:
    for name in ("depthwise, two filters a channel", "two groups"):
        problem = PROBLEMS[name]
        x, w, b, _ = problem.tensors(random).values()
        x[1, 2, 3, 0] = np.nan
        x[0, 1, 1, problem.c - 1] = np.inf
        (y,) = run_op(cpu, ConvFprop(**problem.geometry, bias=True), [x, w, b])
        expected = expected_output(problem, x, w, b)
        assert np.isnan(expected).any()
        assert np.isfinite(expected).any()
        np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_threads_do_not_change_the_bits(random: np.random.Generator) -> None:
    for name in ("rows of one image are blocks", "rows of one image are blocks, groups"):
        problem = replace(PROBLEMS[name], n=3)
        x, w, _, dy = (t.astype(np.float32) for t in problem.tensors(random).values())
        results = []
        for threads in (1, 3):
            executor = CpuExecutor(threads)
            wgrad = run_op(executor, ConvWgrad(**problem.geometry, bias=True, filter=(3, 3)), [x, dy])
            results.append([*wgrad, *run_op(executor, ConvDgrad(**problem.geometry, image=x.shape[1:3]), [dy, w])])
            executor.close()
        for one, three in zip(*results, strict=True):
            np.testing.assert_array_equal(one, three)


def test_a_pool_stays_apart(cpu: CpuExecutor) -> None:
    specs = Spec((1, 4, 4, 6)), Spec((6, 3, 3, 1))
    assert cpu.can_fuse(ConvFprop(groups=6, act="relu"), specs)
    assert not cpu.can_fuse(ConvFprop(groups=6, pool="max"), specs)


@st.composite
def geometries(draw: st.DrawFn) -> Problem:
    r, s = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pad = draw(st.tuples(*[st.integers(0, 3)] * 4))
    groups = draw(st.integers(2, 5))
    return Problem(
        n=draw(st.integers(1, 3)),
        h=max(1, dilation[0] * (r - 1) + 1 - pad[0] - pad[2]) + draw(st.integers(0, 6)),
        w=max(1, dilation[1] * (s - 1) + 1 - pad[1] - pad[3]) + draw(st.integers(0, 6)),
        c=groups * draw(st.integers(1, 3)),
        k=groups * draw(st.integers(1, 3)),
        r=r,
        s=s,
        groups=groups,
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        pad=pad,
        dilation=dilation,
    )


@settings(max_examples=60, deadline=None)
@given(problem=geometries(), seed=st.integers(0, 2**32 - 1))
def test_any_geometry(cpu: CpuExecutor, problem: Problem, seed: int) -> None:
    x, w, b, dy = problem.tensors(np.random.default_rng(seed)).values()
    agree(run_op(cpu, ConvFprop(**problem.geometry, bias=True), [x, w, b])[0], expected_output(problem, x, w, b))
    dx, dw, db = expected_gradients(problem, x, w, dy)
    agree(run_op(cpu, ConvDgrad(**problem.geometry, image=x.shape[1:3]), [dy, w])[0], dx)
    actual_dw, actual_db = run_op(cpu, ConvWgrad(**problem.geometry, bias=True, filter=w.shape[1:3]), [x, dy])
    agree(actual_dw, dw)
    agree(actual_db, db)
