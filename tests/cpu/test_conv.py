"""Convolution against the seven loops, and its gradients against numeric ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parcnn.cpu import CpuExecutor
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvUnpool, ConvWgrad
from parcnn.ops.pointwise import ActDgrad
from parcnn.ops.pool import PoolFprop, PoolWindow
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
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.stride, "pad": self.pad, "dilation": self.dilation}

    @property
    def pq(self) -> tuple[int, int]:
        return ConvFprop(**self.geometry).output_hw(self.h, self.w, self.r, self.s)

    @property
    def can_pool(self) -> bool:
        return min(self.pq) >= 2


PROBLEMS = {
    "one pixel": Problem(1, 1, 1, 1, 1, 1, 1),
    "batch 1, one channel": Problem(1, 7, 7, 1, 3, 3, 3),
    "lenet first": Problem(5, 12, 12, 1, 6, 5, 5, pad=(2, 2, 2, 2)),
    "lenet second": Problem(3, 14, 14, 6, 16, 5, 5),
    "linear": Problem(7, 1, 1, 24, 10, 1, 1),
    "filter covers the image": Problem(3, 5, 5, 16, 11, 5, 5),
    "pointwise": Problem(3, 5, 7, 24, 65, 1, 1),
    "pointwise with stride": Problem(2, 5, 6, 3, 4, 1, 1, stride=(2, 2)),
    "pointwise with padding": Problem(2, 4, 3, 3, 5, 1, 1, pad=(1, 0, 0, 2)),
    "three channels": Problem(2, 11, 13, 3, 24, 3, 3, pad=(1, 1, 1, 1)),
    "65 channels": Problem(2, 5, 5, 65, 7, 3, 3, pad=(1, 1, 1, 1)),
    "primes": Problem(3, 13, 11, 5, 7, 3, 5, stride=(2, 3), pad=(2, 1, 3, 4)),
    "larger than the image, not than the padded one": Problem(2, 2, 3, 4, 3, 5, 5, pad=(2, 2, 2, 2)),
    "larger, asymmetric": Problem(2, 2, 2, 2, 3, 4, 3, pad=(3, 0, 1, 2)),
    "stride larger than the filter": Problem(2, 9, 10, 3, 4, 2, 2, stride=(3, 4)),
    "dilated": Problem(2, 11, 10, 4, 5, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "dilated with stride": Problem(2, 12, 12, 3, 4, 3, 2, stride=(2, 2), pad=(1, 0, 2, 1), dilation=(3, 2)),
    "resnet stem": Problem(1, 15, 15, 3, 8, 7, 7, stride=(2, 2), pad=(3, 3, 3, 3)),
    "stride 2, even filter": Problem(2, 10, 10, 6, 8, 4, 4, stride=(2, 2), pad=(1, 1, 1, 1)),
    "odd outputs": Problem(2, 8, 10, 2, 5, 4, 4),
    "many filters": Problem(2, 8, 8, 4, 48, 3, 3, pad=(1, 1, 1, 1)),
    "filters cut by channels": Problem(2, 4, 3, 70, 256, 3, 3, pad=(1, 1, 1, 1)),
    "filters cut by channels, no padding": Problem(3, 7, 6, 96, 200, 3, 3),
    "pointwise with stride, cut": Problem(3, 6, 5, 640, 160, 1, 1, stride=(2, 2)),
    "linear, cut": Problem(3, 2, 3, 120, 300, 2, 3),
    "rows of one image are blocks": Problem(1, 40, 300, 24, 24, 3, 3, pad=(1, 1, 1, 1)),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@problems
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_fprop_with_an_addend(
    cpu: CpuExecutor, random: np.random.Generator, problem: Problem, act: str | None, bias: bool
) -> None:
    """It is the last input, and y may lie over it."""
    x = random.standard_normal((problem.n, problem.h, problem.w, problem.c))
    w = random.standard_normal((problem.k, problem.r, problem.s, problem.c))
    operands = [x, w, *[random.standard_normal(problem.k)] * bias]
    op = ConvFprop(**problem.geometry, bias=bias)
    (plain,) = run_op(cpu, op, operands)
    addend = random.standard_normal(plain.shape)
    for alias in ((), ((0, 2 + bias),)):
        (y,) = run_op(cpu, replace(op, act=act, add=True), [*operands, addend], alias=alias)
        np.testing.assert_allclose(y, reference.act(act, plain + addend), rtol=1e-11, atol=1e-12)


def test_groups_have_no_addend(cpu: CpuExecutor) -> None:
    x, w = Spec((2, 5, 5, 4)), Spec((4, 1, 1, 2))
    assert cpu.can_fuse(ConvFprop(groups=2), (x, w))
    assert not cpu.can_fuse(ConvFprop(groups=2, add=True), (x, w, x))


def tensors(random: np.random.Generator, problem: Problem) -> tuple[np.ndarray, ...]:
    x = random.standard_normal((problem.n, problem.h, problem.w, problem.c))
    w = random.standard_normal((problem.k, problem.r, problem.s, problem.c))
    w /= np.sqrt(problem.r * problem.s * problem.c)  # outputs near 1: where activations saturate, pools see ties
    return x, w, random.standard_normal(problem.k)


def agree(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, np.abs(expected).max()))


@problems
@pytest.mark.parametrize("pool", [None, "max", "avg"])
def test_fprop(cpu: CpuExecutor, random: np.random.Generator, problem: Problem, pool: str | None) -> None:
    if pool and not problem.can_pool:
        pytest.skip("nothing to pool")
    x, w, b = tensors(random, problem)
    act = ACTIVATIONS[random.integers(len(ACTIVATIONS))]
    outputs = run_op(cpu, ConvFprop(**problem.geometry, pool=pool, bias=True, act=act), [x, w, b])
    expected = reference.act(act, reference.conv(x, w, b, **problem.geometry))
    if pool:
        expected, index = reference.pool2x2(expected, pool)
    agree(outputs[0], expected)
    if pool == "max":
        np.testing.assert_array_equal(outputs[1], index)
        op = ConvFprop(**problem.geometry, pool=pool, bias=True, act=act, indices=False)
        (values,) = run_op(cpu, op, [x, w, b])
        np.testing.assert_array_equal(values, outputs[0])


@pytest.mark.parametrize("pool", [None, "max", "avg"])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("bias", [False, True])
def test_every_epilogue(
    cpu: CpuExecutor, random: np.random.Generator, pool: str | None, act: str | None, bias: bool
) -> None:
    for problem in (PROBLEMS["lenet second"], PROBLEMS["many filters"]):
        x, w, b = tensors(random, problem)
        arrays = [x, w, b] if bias else [x, w]
        outputs = run_op(cpu, ConvFprop(**problem.geometry, pool=pool, bias=bias, act=act), arrays)
        expected = reference.act(act, reference.conv(*arrays, **problem.geometry))
        if pool:
            expected, _ = reference.pool2x2(expected, pool)
        agree(outputs[0], expected)


@problems
@pytest.mark.parametrize("pool", [None, "max", "avg"])
def test_gradients(cpu: CpuExecutor, random: np.random.Generator, problem: Problem, pool: str | None) -> None:
    if pool and not problem.can_pool:
        pytest.skip("nothing to pool")
    x, w, _ = tensors(random, problem)
    pq = problem.pq
    out = (pq[0] // 2, pq[1] // 2) if pool else pq
    dy = random.standard_normal((problem.n, *out, problem.k))
    index = random.integers(0, 4, dy.shape).astype(np.uint8)
    extra = [index] if pool == "max" else []
    full = reference.unpool2x2(dy, index if pool == "max" else None, pq) if pool else dy
    dx, dw, db = reference.conv_gradients(x, w, full, **problem.geometry)

    image, size = x.shape[1:3], w.shape[1:3]
    (actual,) = run_op(cpu, ConvDgrad(**problem.geometry, pool=pool, image=image), [dy, w, *extra])
    agree(actual, dx)
    actual_dw, actual_db = run_op(
        cpu, ConvWgrad(**problem.geometry, pool=pool, bias=True, filter=size), [x, dy, *extra]
    )
    agree(actual_dw, dw)
    agree(actual_db, db)
    (without_bias,) = run_op(cpu, ConvWgrad(**problem.geometry, pool=pool, filter=size), [x, dy, *extra])
    np.testing.assert_array_equal(without_bias, actual_dw)


@pytest.mark.parametrize("name", ["lenet first", "linear", "primes", "many filters", "filter covers the image"])
@pytest.mark.parametrize("act", [None, "relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("add", [False, True])
def test_dgrad_epilogue(cpu: CpuExecutor, random: np.random.Generator, name: str, act: str | None, add: bool) -> None:
    problem = PROBLEMS[name]
    x, w, _ = tensors(random, problem)
    dy = random.standard_normal((problem.n, *problem.pq, problem.k))
    saved, addend = reference.act(act, x), random.standard_normal(x.shape)
    op = ConvDgrad(**problem.geometry, image=x.shape[1:3], act=act, add=add)
    expected = reference.conv_gradients(x, w, dy, **problem.geometry)[0]
    if add:
        expected = expected + addend
    slope = {None: 1, "relu": saved > 0, "tanh": 1 - saved**2, "sigmoid": saved * (1 - saved)}[act]
    arrays = [dy, w, *([saved] if act else []), *([addend] if add else [])]
    for alias in ((), *((pair,) for pair in op.inplace())):
        (dx,) = run_op(cpu, op, arrays, alias=alias)
        agree(dx, expected * slope)


@pytest.mark.parametrize("pool", [None, "max", "avg"])
def test_numeric_gradients(cpu: CpuExecutor, random: np.random.Generator, pool: str | None) -> None:
    problem = Problem(2, 5, 6, 2, 3, 3, 2, pad=(1, 0, 1, 2))
    x, w, b = tensors(random, problem)
    op = ConvFprop(**problem.geometry, pool=pool, bias=True)

    def forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        return run_op(cpu, op, [x, w, b])[0]

    y, *index = run_op(cpu, op, [x, w, b])
    dy = random.standard_normal(y.shape)
    (dx,) = run_op(cpu, ConvDgrad(**problem.geometry, pool=pool, image=(5, 6)), [dy, w, *index])
    dw, db = run_op(cpu, ConvWgrad(**problem.geometry, pool=pool, bias=True, filter=(3, 2)), [x, dy, *index])
    agree(dx, reference.numeric_gradient(lambda v: forward(v, w, b), x, dy), 1e-7)
    agree(dw, reference.numeric_gradient(lambda v: forward(x, v, b), w, dy), 1e-7)
    agree(db, reference.numeric_gradient(lambda v: forward(x, w, v), b, dy), 1e-7)


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("filters", [5, 48])
def test_ties_go_to_the_first_and_nan_wins(
    cpu: CpuExecutor, random: np.random.Generator, channels: int, filters: int
) -> None:
    x = random.integers(-1, 2, (3, 7, 9, channels)).astype(np.float32)  # small integers: exact sums, many ties
    w = random.integers(-1, 2, (filters, 3, 3, channels)).astype(np.float32)
    x[1, 3, 4, 0] = np.nan
    expected, index = reference.pool2x2(reference.act("relu", reference.conv(x, w)), "max")
    y, idx = run_op(cpu, ConvFprop(act="relu", pool="max"), [x, w])
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(y, expected)
    # Where a NaN pixel is in sight, which of the candidates are NaN is open: filters may be padded with zeros.
    np.testing.assert_array_equal(idx[~np.isnan(y)], index[~np.isnan(y)])


def test_the_first_nan_of_a_window_wins(cpu: CpuExecutor, random: np.random.Generator) -> None:
    x = random.standard_normal((2, 4, 6, 5)).astype(np.float32)
    x[0, 1, 2, 3] = x[0, 1, 3, 3] = x[1, 2, 1, 0] = np.nan
    y, idx = run_op(cpu, ConvFprop(pool="max"), [x, np.eye(5, dtype=np.float32).reshape(5, 1, 1, 5)])
    finite = ~np.isnan(x).any(axis=3)  # a product with the identity spreads NaN over a pixel's channels
    assert not finite[0, 1, 2]
    x = np.where(finite[..., None], x, np.nan)
    expected, index = reference.pool2x2(x, "max")
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(idx, index)


@pytest.mark.parametrize("name", ["lenet first", "lenet second", "three channels"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_what_is_not_finite_behind_a_pool(cpu: CpuExecutor, random: np.random.Generator, name: str, pool: str) -> None:
    """NaN and infinities as in the loops, forward and in dx: a window's outputs do not see each other's pixels."""
    problem = PROBLEMS[name]
    x, w, b = tensors(random, problem)
    x[0, 1, 2, 0], x[0, 5, 4, -1], x[-1, -1, -1, 0], x[-1, 0, 3, 0] = np.inf, -np.inf, np.inf, np.nan
    geometry = problem.geometry
    with np.errstate(invalid="ignore"):
        expected, index = reference.pool2x2(reference.conv(x, w, b, **geometry), pool)
    y, *winners = run_op(cpu, ConvFprop(**geometry, pool=pool, bias=True), [x, w, b])
    for unusual in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(unusual(y), unusual(expected))
        assert unusual(y).any()
    for winner in winners:
        np.testing.assert_array_equal(winner, index)
    dy = random.standard_normal(expected.shape)
    dy[0, 0, 0, 0], dy[-1, -1, -1, -1], dy[-1, 1, 0, 0] = np.inf, np.nan, -np.inf
    idx = [random.integers(0, 4, dy.shape).astype(np.uint8)] if pool == "max" else []
    spread = reference.unpool2x2(dy, idx[0] if idx else None, problem.pq)
    with np.errstate(invalid="ignore"):
        expected = reference.conv_gradients(np.zeros_like(x), w, spread, **geometry)[0]
    (dx,) = run_op(cpu, ConvDgrad(**geometry, pool=pool, image=x.shape[1:3]), [dy, w, *idx])
    for unusual in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(unusual(dx), unusual(expected))
    assert 0 < np.isfinite(dx).sum() < dx.size


@pytest.mark.parametrize("name", ["lenet first", "lenet second", "many filters"])
def test_a_non_finite_error_reaches_only_its_winner(cpu: CpuExecutor, random: np.random.Generator, name: str) -> None:
    problem = PROBLEMS[name]
    x, w, _ = tensors(random, problem)
    dy = np.zeros((problem.n, problem.pq[0] // 2, problem.pq[1] // 2, problem.k))
    index = random.integers(0, 4, dy.shape).astype(np.uint8)
    dy[0, 0, 0, 0] = np.inf
    geometry = problem.geometry
    expected = reference.conv_gradients(x, w, reference.unpool2x2(dy, index, problem.pq), **geometry)[1]
    (dw,) = run_op(cpu, ConvWgrad(**geometry, pool="max", filter=w.shape[1:3]), [x, dy, index])
    np.testing.assert_array_equal(np.isfinite(dw[1:]), np.isfinite(expected[1:]))
    assert not np.isfinite(dw[0]).all()


@pytest.mark.parametrize("name", ["lenet first", "lenet second", "three channels", "many filters", "65 channels"])
def test_float32(cpu: CpuExecutor, random: np.random.Generator, name: str) -> None:
    """Error at most twice that of a float32 product of the same sums, done by the loops' definition."""
    problem = PROBLEMS[name]
    x, w, b = (t.astype(np.float32) for t in tensors(random, problem))
    exact = reference.conv(x, w, b, **problem.geometry)
    (y,) = run_op(cpu, ConvFprop(**problem.geometry, bias=True), [x, w, b])
    scale = reference.conv(np.abs(x), np.abs(w), np.abs(b), **problem.geometry)
    depth = problem.r * problem.s * problem.c
    assert np.isfinite(y).all()
    # A sum of `depth` products, each rounded once: the error grows as the square root of their number.
    assert (np.abs(y - exact) <= 4 * np.sqrt(depth) * 2**-24 * scale).all()


@st.composite
def geometries(draw: st.DrawFn) -> Problem:
    r, s = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pad = draw(st.tuples(*[st.integers(0, 3)] * 4))
    least_h = max(1, dilation[0] * (r - 1) + 1 - pad[0] - pad[2])
    least_w = max(1, dilation[1] * (s - 1) + 1 - pad[1] - pad[3])
    return Problem(
        n=draw(st.integers(1, 3)),
        h=least_h + draw(st.integers(0, 6)),
        w=least_w + draw(st.integers(0, 6)),
        c=draw(st.integers(1, 6)),
        k=draw(st.integers(1, 6)),
        r=r,
        s=s,
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        pad=pad,
        dilation=dilation,
    )


@settings(max_examples=60, deadline=None)
@given(problem=geometries(), pool=st.sampled_from([None, "max", "avg"]), seed=st.integers(0, 2**32 - 1))
def test_any_geometry(cpu: CpuExecutor, problem: Problem, pool: str | None, seed: int) -> None:
    if not problem.can_pool:
        pool = None
    random = np.random.default_rng(seed)
    x, w, b = tensors(random, problem)
    y, *index = run_op(cpu, ConvFprop(**problem.geometry, pool=pool, bias=True), [x, w, b])
    expected = reference.conv(x, w, b, **problem.geometry)
    pooled, expected_index = reference.pool2x2(expected, pool) if pool else (expected, None)
    agree(y, pooled)
    dy = random.standard_normal(y.shape)
    full = reference.unpool2x2(dy, expected_index if pool == "max" else None, problem.pq) if pool else dy
    dx, dw, db = reference.conv_gradients(x, w, full, **problem.geometry)
    (actual,) = run_op(cpu, ConvDgrad(**problem.geometry, pool=pool, image=x.shape[1:3]), [dy, w, *index])
    agree(actual, dx)
    actual_dw, actual_db = run_op(
        cpu, ConvWgrad(**problem.geometry, pool=pool, bias=True, filter=w.shape[1:3]), [x, dy, *index]
    )
    agree(actual_dw, dw)
    agree(actual_db, db)


@problems
@pytest.mark.parametrize(
    "window",
    [
        PoolWindow("max", (3, 2), (2, 1), (1, 1)),
        PoolWindow("avg", (3, 2), (2, 1), (1, 1)),
        PoolWindow("avg", (3, 2), (2, 3), (1, 0), ceil_mode=True, count_include_pad=False),
        PoolWindow("avg", (2, 3), (1, 2), divisor=5),
    ],
    ids=["max", "avg", "avg, ceil", "avg, a fifth"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_pool_by_another_window(
    random: np.random.Generator, problem: Problem, window: PoolWindow, threads: int
) -> None:
    if min(window.output_hw(*problem.pq)) < 1:
        pytest.skip("nothing to pool")
    x, w, b = tensors(random, problem)
    plain = ConvFprop(**problem.geometry, bias=True, act="relu")
    executor = CpuExecutor(threads)
    (before,) = run_op(executor, plain, [x, w, b])
    expected = run_op(executor, PoolFprop(**asdict(window)), [before])
    results = run_op(executor, replace(plain, pool=window.kind, window=window), [x, w, b])
    executor.close()
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("images", [2, 3])
def test_moments_of_a_pool_by_another_window(cpu: CpuExecutor, random: np.random.Generator, images: int) -> None:
    """They are of the outputs, the pooled ones."""
    x, w = random.standard_normal((images, 9, 11, 6)), random.standard_normal((8, 3, 3, 6))
    op = ConvFprop(pool="max", window=PoolWindow("max", (3, 3), (2, 2)))
    y, idx = run_op(cpu, op, [x, w])
    y_too, idx_too, moments = run_op(cpu, replace(op, moments=True), [x, w])
    np.testing.assert_array_equal(y_too, y)
    np.testing.assert_array_equal(idx_too, idx)
    rows = y.reshape(-1, 8)
    np.testing.assert_allclose(moments, [rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)], rtol=1e-12, atol=1e-12)


def test_products_that_no_window_needs_are_not_counted() -> None:
    x, w = Spec((2, 11, 8, 5)), Spec((3, 1, 1, 5))
    apart = ConvFprop(pool="max", window=PoolWindow("max", (3, 2), (4, 3)))
    assert apart.flops((x, w), apart.infer(x, w)) == 2 * 2 * 3 * 5 * (3 * 3 * 3 * 2)
    overlapping = ConvFprop(pool="max", window=PoolWindow("max", (3, 3), (2, 2), (1, 1)))
    assert overlapping.flops((x, w), overlapping.infer(x, w)) == 2 * 2 * 3 * 5 * (11 * 8)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (3, 4, 5, 9), (70, 9, 2, 16)])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("act", [None, *FROM_OUTPUT])
def test_the_error_before_the_pool(
    cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, int, int, int], pool: str, act: str | None
) -> None:
    dy, saved = random.standard_normal(shape), random.standard_normal(shape)
    index = random.integers(0, 4, shape).astype(np.uint8)
    arrays = [dy, *([index] if pool == "max" else []), *([saved] if act else [])]
    (error,) = run_op(cpu, ConvUnpool(pool, act), arrays)
    (below,) = run_op(cpu, ActDgrad(act), [dy, saved]) if act else (dy,)
    expected = reference.unpool2x2(below, index if pool == "max" else None, (2 * shape[1], 2 * shape[2]))
    np.testing.assert_allclose(error, expected, rtol=1e-14)
