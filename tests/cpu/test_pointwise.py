"""Activations, sums and dropout."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.cpu.erf import erfc
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT
from parcnn.ops.pointwise import Act, ActDgrad, Add, Dropout
from tests import reference
from tests.op_runner import run_op

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 65), (1, 7), (3, 100, 113, 1)]  # the last is larger than one piece of work


def test_erfc_to_the_last_digits() -> None:
    x = np.concatenate(
        [np.linspace(-7, 27, 4001), [0.0, -0.0, 0.46875, 4.0, -4.0, 1e-300, 40.0, 1e300, np.inf, -np.inf]]
    )
    expected = np.array([math.erfc(v) for v in x])
    actual = erfc(x)
    normal = expected > 1e-300  # below, the result is subnormal
    np.testing.assert_allclose(actual[normal], expected[normal], rtol=1e-14)
    np.testing.assert_allclose(actual[(x > -1) & (x < 4)], expected[(x > -1) & (x < 4)], rtol=2e-15)
    np.testing.assert_allclose(actual[~normal], expected[~normal], atol=1e-300)
    assert np.isnan(erfc(np.array([np.nan])))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_act(cpu: CpuExecutor, random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> None:
    x = 3 * random.standard_normal(shape)
    x.reshape(-1)[0] = 0
    for alias in ((), ((0, 0),)):
        (y,) = run_op(cpu, Act(kind), [x], alias=alias)
        np.testing.assert_allclose(y, reference.act(kind, x), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_act_of_extremes(cpu: CpuExecutor, kind: str) -> None:
    x = np.array([[np.nan, 300.0, -300.0, 30.0, -30.0]])
    (y,) = run_op(cpu, Act(kind), [x])
    assert np.isnan(y[0, 0])
    np.testing.assert_allclose(
        y[0, 1:3], [1 if kind in ("tanh", "sigmoid") else 300, -1 if kind == "tanh" else 0], atol=1e-12
    )
    assert np.isfinite(y[0, 1:]).all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("alias", [(), ((0, 0),), ((0, 1),)])
def test_act_dgrad(
    cpu: CpuExecutor, random: np.random.Generator, kind: str, alias: tuple[tuple[int, int], ...]
) -> None:
    x, dy = random.standard_normal((3, 5, 7)), random.standard_normal((3, 5, 7))
    saved = reference.act(kind, x) if kind in FROM_OUTPUT else x
    (dx,) = run_op(cpu, ActDgrad(kind), [dy, saved], alias=alias)
    expected = reference.numeric_gradient(lambda v: reference.act(kind, v), x, dy, 1e-5) if x.size < 50 else None
    if expected is None:  # elementwise: all central differences at once
        step = 1e-5
        expected = dy * (reference.act(kind, x + step) - reference.act(kind, x - step)) / (2 * step)
    np.testing.assert_allclose(dx, expected, rtol=1e-7, atol=1e-9)


def test_relu_dgrad_stops_infinite_errors_and_lets_nan_outputs_through(cpu: CpuExecutor) -> None:
    dy = np.array([[np.inf, np.nan, 2.0, 3.0]], np.float32)
    (dx,) = run_op(cpu, ActDgrad("relu"), [dy, np.array([[0.0, 0.0, np.nan, 1.0]], np.float32)])
    np.testing.assert_array_equal(dx, [[0, 0, 2, 3]])


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("alias", [(), ((0, 0),), ((0, 1),)])
def test_add(
    cpu: CpuExecutor, random: np.random.Generator, act: str | None, alias: tuple[tuple[int, int], ...]
) -> None:
    a, b = random.standard_normal((2, 3, 5, 7)), random.standard_normal((2, 3, 5, 7))
    (y,) = run_op(cpu, Add(act), [a, b], alias=alias)
    np.testing.assert_allclose(y, reference.act(act, a + b), rtol=1e-13)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 5, 11), (5, 10007)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout(cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, ...], p: float) -> None:
    x = random.standard_normal(shape) + 10
    state = np.array([3, 12, 0, -5, 77, 0, 0, 0], np.int32)
    (y,) = run_op(cpu, Dropout(p, stream=4), [x, state])
    flat, source = y.reshape(-1), x.reshape(-1)
    for i in {*range(min(x.size, 40)), x.size - 1, x.size // 2, min(x.size - 1, 32768)}:
        words = reference.philox4x32((i // 4, 4, 12, 0), (-5 & 0xFFFFFFFF, 77))
        keep = words[i % 4] >= p * 2**32
        assert flat[i] == pytest.approx(source[i] / (1 - p) if keep else 0)
    (again,) = run_op(cpu, Dropout(p, stream=4), [x, state], alias=((0, 0),))
    np.testing.assert_array_equal(again, y)
    if x.size > 50_000:
        assert (y != 0).mean() == pytest.approx(1 - p, abs=0.01)
