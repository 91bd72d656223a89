"""Activations, sums and dropout."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.kernels import pointwise
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Spec
from parcnn.ops.philox import philox4x32
from parcnn.ops.pointwise import Act, ActDgrad, Add, Dropout
from parcnn.ops.program import Executor
from tests.cuda.compare import check, executors, normal, on_cpu, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(pointwise)

SHAPES = [
    (1, 1),
    (3,),
    (2, 5, 7, 13),
    (4096,),
    (9001,),
]  # no whole vector, a tail, exactly one block, blocks and a tail
STATE = np.array([2, 40, 3, -7, 9, 0, 0, 0], np.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_act(executor: Executor, random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> None:
    x = 4 * normal(random, *shape)
    x.reshape(-1)[:: max(1, x.size // 3)] = (0.0, 30.0, -30.0, -0.0)[: len(x.reshape(-1)[:: max(1, x.size // 3)])]
    check(executor, Act(kind), [x])
    check(executor, Act(kind), [x], alias=[(0, 0)])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_goes_through(executor: Executor, random: np.random.Generator, kind: str) -> None:
    x = normal(random, 5, 7)
    x[2, 3] = np.nan
    (y,) = check(executor, Act(kind), [x])
    assert np.isnan(y[2, 3])
    check(executor, ActDgrad(kind), [normal(random, 5, 7), x])


@pytest.mark.parametrize("alias", [[], [(0, 0)], [(0, 1)]])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_act_dgrad(executor: Executor, random: np.random.Generator, kind: str, alias: list[tuple[int, int]]) -> None:
    for shape in SHAPES:
        saved = 3 * normal(random, *shape)
        if kind in FROM_OUTPUT:
            (saved,) = on_cpu(Act(kind), [saved])
        check(executor, ActDgrad(kind), [normal(random, *shape), saved], alias=alias)


@pytest.mark.parametrize("alias", [[], [(0, 0)], [(0, 1)]])
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_add(executor: Executor, random: np.random.Generator, act: str | None, alias: list[tuple[int, int]]) -> None:
    for shape in SHAPES:
        check(executor, Add(act), [normal(random, *shape), normal(random, *shape)], alias=alias)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 2**-32, 1.0])
@pytest.mark.parametrize("alias", [[], [(0, 0)]])
def test_dropout_keeps_the_same_elements_everywhere(
    executor: Executor, random: np.random.Generator, p: float, alias: list[tuple[int, int]]
) -> None:
    op = Dropout(p, stream=3)
    for n in (1, 6, 4099):
        x = np.abs(normal(random, n)) + 1
        words = philox4x32((np.arange(-(-n // 4), dtype=np.uint64), 3, 40, 0), (-7 & 0xFFFFFFFF, 9)).reshape(-1)[:n]
        (y,) = check(executor, op, [x, STATE], alias=alias)
        np.testing.assert_array_equal(y != 0, words.astype(np.float64) >= p * 2**32)


def test_dropout_keeps_a_word_equal_to_the_threshold(executor: Executor, random: np.random.Generator) -> None:
    words = philox4x32((np.arange(4, dtype=np.uint64), 0, 40, 0), (-7 & 0xFFFFFFFF, 9)).reshape(-1)
    p = float(words[5]) / 2**32
    (y,) = check(executor, Dropout(p), [np.ones(16, np.float32), STATE])
    assert y[5] != 0
    np.testing.assert_array_equal(y != 0, words >= words[5])


def test_dropout_drops_nan(executor: Executor) -> None:
    x = np.full(64, np.nan, np.float32)
    (y,) = run_op(executor, Dropout(0.5), [x, STATE])
    (expected,) = on_cpu(Dropout(0.5), [x, STATE])
    np.testing.assert_array_equal(y, expected)
    assert 0 < np.isnan(y).sum() < 64


def test_refuses_float64() -> None:
    assert "f64" in (pointwise.supports(Add(), (Spec((3,)), Spec((3,), "f64"))) or "")
