"""Muon's directions and its updates, of groups of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parcnn.cuda.kernels import muon
from parcnn.ops.base import Spec
from parcnn.ops.muon import MuonDirection, MuonUpdate, direction_shape, is_tall, matrix_of
from parcnn.ops.program import Executor
from parcnn.ops.update import MAX_GROUP
from tests.cuda.bf16 import from_bits, stored, to_bits
from tests.cuda.compare import check, executors, normal, on_cpu, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(muon)

GROUPS = {
    "one number": [(1, 1)],
    "wide and tall": [(8, 3, 3, 8), (64, 3, 3, 3), (10, 84), (84, 10)],
    "blocks": [(16, 3, 3, 29), (1031, 2), (2, 1031)],
    "full": [(i + 1, 5) for i in range(MAX_GROUP)],
}
groups = pytest.mark.parametrize("shapes", GROUPS.values(), ids=GROUPS)
STATE = np.array([2, 40, 0, 0, 0, 0, 0, 0], np.int32)


@groups
@pytest.mark.parametrize("attributes", [{}, {"nesterov": False, "momentum": 0.6}], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_directions(
    executor: Executor,
    random: np.random.Generator,
    shapes: list[tuple[int, ...]],
    attributes: dict[str, Any],
    dtype: str,
) -> None:
    op = MuonDirection(count=len(shapes), **attributes)
    arrays = [normal(random, *shape) for _ in range(2) for shape in shapes]
    if dtype == "f32":
        check(executor, op, arrays)
        return
    results = run_op(executor, replace(op, dtype="bf16"), arrays)
    exact = on_cpu(replace(op, dtype="f64"), [a.astype(np.float64) for a in arrays])
    for got, true in zip(results[: op.count], exact[: op.count], strict=True):
        assert (np.abs(from_bits(got) - true) <= 2.0**-8 * np.abs(true) + 2.0**-20).all()


def test_directions_of_nothing_are_zero(executor: Executor) -> None:
    zeros = np.zeros((9, 3, 3, 5), np.float32)
    x, buffer = run_op(executor, MuonDirection(), [zeros, zeros])
    assert not x.any()
    assert not buffer.any()


@groups
@pytest.mark.parametrize(
    "attributes",
    [{}, {"weight_decay": 0.3}, {"adjustment": "match_rms_adamw"}, {"renormalize": True, "weight_decay": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_updates(
    executor: Executor,
    random: np.random.Generator,
    shapes: list[tuple[int, ...]],
    attributes: dict[str, Any],
    dtype: str,
) -> None:
    hyper = random.uniform(0.01, 0.9, (5, 4)).astype(np.float32)
    weights = [normal(random, *shape) for shape in shapes]
    directions = []
    for shape in shapes:
        x = np.full(direction_shape(Spec(shape)), np.nan)  # the padding is nobody's
        rows, columns = matrix_of(Spec(shape))
        (x.T if is_tall(Spec(shape)) else x)[:rows, :columns] = normal(random, rows, columns)
        directions.append(stored(x, dtype))
    check(executor, MuonUpdate(count=len(shapes), **attributes), [hyper, STATE, *weights, *directions])


@pytest.mark.parametrize("renormalize", [False, True])
def test_copies_are_the_new_weights_rounded(executor: Executor, random: np.random.Generator, renormalize: bool) -> None:
    """Of the weights that have one; the weights have the bits that they have without copies."""
    shapes = GROUPS["blocks"]
    hyper = random.uniform(0.01, 0.9, (5, 4)).astype(np.float32)
    directions = [stored(normal(random, *direction_shape(Spec(shape))), "bf16") for shape in shapes]
    arrays = [hyper, STATE, *(normal(random, *shape) for shape in shapes), *directions]
    op = MuonUpdate(count=len(shapes), renormalize=renormalize)
    plain = run_op(executor, op, arrays)
    *copies, first, second, third = run_op(executor, replace(op, copies=(0, 2)), arrays)
    for weight, expected in zip((first, second, third), plain, strict=True):
        np.testing.assert_array_equal(weight, expected)
    for copy, weight in zip(copies, (first, third), strict=True):
        np.testing.assert_array_equal(copy, to_bits(weight))


def test_weights_of_zero_stay_finite(executor: Executor, random: np.random.Generator) -> None:
    hyper, w = random.uniform(0.1, 0.9, (5, 4)).astype(np.float32), np.zeros((8, 16), np.float32)
    (got,) = check(executor, MuonUpdate(renormalize=True), [hyper, STATE, w, normal(random, 8, 16)])
    assert np.isfinite(got).all()


def test_refuses() -> None:
    row, state, w, x = Spec((1, 4)), Spec((8,), "i32"), Spec((3, 5)), Spec((8, 8), "bf16")
    many = MAX_GROUP + 1
    assert str(MAX_GROUP) in (muon.supports(MuonDirection(many), (w,) * 2 * many) or "")
    assert "f64" in (muon.supports(MuonDirection(dtype="f64"), (w, w)) or "")
    assert "f64" in (muon.supports(MuonUpdate(), (row, state, Spec((3, 5), "f64"), x)) or "")
    assert muon.supports(MuonUpdate(), (row, state, w, x)) is None
