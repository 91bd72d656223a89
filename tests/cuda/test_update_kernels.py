"""Optimizer updates of groups of parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parcnn.cuda.kernels import update
from parcnn.ops.base import Spec
from parcnn.ops.program import Executor
from parcnn.ops.update import MAX_GROUP, AdamUpdate, SgdUpdate, Update
from tests.cuda.bf16 import to_bits
from tests.cuda.compare import check, executors, normal, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(update)

GROUPS = {
    "one number": [(1,)],
    "LeNet's first layers": [(6, 5, 5, 1), (6,), (16, 5, 5, 6), (16,)],
    "blocks": [(1024,), (3, 1025), (2047,), (7,)],
    "full": [(i + 1,) for i in range(MAX_GROUP)],
}
groups = pytest.mark.parametrize("shapes", GROUPS.values(), ids=GROUPS)
STATE = np.array([0, 40, 0, 0, 0, 0, 0, 0], np.int32)
FIRST = np.array([3, 0, 0, 0, 0, 0, 0, 0], np.int32)


def hyper(random: np.random.Generator) -> np.ndarray:
    """Rows of learning rate and bias corrections."""
    return random.uniform(0.01, 0.9, (5, 4)).astype(np.float32)


@groups
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"weight_decay": 0.01},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.8, "dampening": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("state", [STATE, FIRST], ids=["later", "first"])
def test_sgd(
    executor: Executor,
    random: np.random.Generator,
    shapes: list[tuple[int, ...]],
    attributes: dict[str, Any],
    state: np.ndarray,
) -> None:
    op = SgdUpdate(count=len(shapes), **attributes)
    tensors = [normal(random, *shape) for _ in range(2 + op.slots) for shape in shapes]
    if state is FIRST:
        for buffer in tensors[2 * len(shapes) :]:
            buffer.fill(np.nan)  # what it held does not matter
    check(executor, op, [hyper(random), state, *tensors])


@groups
@pytest.mark.parametrize(
    "attributes", [{}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "decoupled": True, "eps": 1e-3}], ids=str
)
def test_adam(
    executor: Executor, random: np.random.Generator, shapes: list[tuple[int, ...]], attributes: dict[str, Any]
) -> None:
    op = AdamUpdate(count=len(shapes), beta1=0.8, beta2=0.95, **attributes)
    tensors = [normal(random, *shape) for _ in range(3) for shape in shapes]
    variances = [np.square(normal(random, *shape)) for shape in shapes]
    check(executor, op, [hyper(random), STATE, *tensors, *variances])


def test_adam_from_zero(executor: Executor, random: np.random.Generator) -> None:
    """The first step from buffers of zeros, some gradients zero too: no 0/0."""
    w, g = normal(random, 300), normal(random, 300)
    g[::3] = 0
    results = check(executor, AdamUpdate(), [hyper(random), FIRST, w, g, np.zeros_like(w), np.zeros_like(w)])
    assert all(np.isfinite(r).all() for r in results)


@pytest.mark.parametrize("shapes", [GROUPS["LeNet's first layers"], GROUPS["blocks"]], ids=["LeNet", "blocks"])
@pytest.mark.parametrize("op", [SgdUpdate(), SgdUpdate(momentum=0.9), AdamUpdate()], ids=repr)
def test_copies_are_the_new_weights_rounded(
    executor: Executor, random: np.random.Generator, shapes: list[tuple[int, ...]], op: Update
) -> None:
    """Of the parameters that have one; the weights have the bits that they have without copies."""
    tensors = [np.abs(normal(random, *shape)) for _ in range(2 + op.slots) for shape in shapes]
    arrays = [hyper(random), STATE, *tensors]
    op = replace(op, count=len(shapes))
    plain = run_op(executor, op, arrays)
    *copies, last = run_op(executor, replace(op, copies=(0, 2)), arrays)[: 2 + len(shapes)]
    np.testing.assert_array_equal(last, plain[len(shapes) - 1])
    for copy, weight in zip(copies, (plain[0], plain[2]), strict=False):
        np.testing.assert_array_equal(copy, to_bits(weight))


def test_refuses() -> None:
    row, state, w = Spec((1, 4)), Spec((8,), "i32"), Spec((3,))
    many = MAX_GROUP + 1
    assert str(MAX_GROUP) in (update.supports(SgdUpdate(count=many), (row, state, *[w] * 2 * many)) or "")
    assert "f64" in (update.supports(SgdUpdate(), (row, state, Spec((3,), "f64"), w)) or "")
