"""Moving elements."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.kernels import shape as family
from parcnn.ops.base import Spec
from parcnn.ops.program import Executor
from parcnn.ops.shape import Cat, ChannelSlice, ToChannelsFirst, ToChannelsLast
from tests.cuda.compare import executors, normal, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(family)


@pytest.mark.parametrize("channels", [(1,), (3, 5), (4, 8), (4, 6, 2), (1, 1, 1, 1)])
def test_cat_and_slices(executor: Executor, random: np.random.Generator, channels: tuple[int, ...]) -> None:
    parts = [normal(random, 3, 5, 7, c) for c in channels]
    (y,) = run_op(executor, Cat(), parts)
    np.testing.assert_array_equal(y, np.concatenate(parts, axis=-1))
    start = 0
    for part in parts:
        (piece,) = run_op(executor, ChannelSlice(start, start + part.shape[-1]), [y])
        np.testing.assert_array_equal(piece, part)
        start += part.shape[-1]


def test_cat_of_rows(executor: Executor, random: np.random.Generator) -> None:
    parts = [normal(random, 301, 8), normal(random, 301, 12)]
    (y,) = run_op(executor, Cat(), parts)
    np.testing.assert_array_equal(y, np.concatenate(parts, axis=-1))


@pytest.mark.parametrize(
    "image",
    [
        *((1, 1, 1), (5, 5, 16), (7, 9, 33), (64, 33, 3), (1, 1, 2050), (47, 45, 1), (1, 2, 3000)),
        *((2, 2, 4), (4, 4, 120), (6, 6, 20), (9, 4, 64), (32, 2, 64)),  # multiples of 4 both ways
    ],
)
def test_both_orders_of_a_flattened_image(
    executor: Executor, random: np.random.Generator, image: tuple[int, int, int]
) -> None:
    x = normal(random, 2, *image)
    (flat,) = run_op(executor, ToChannelsFirst(), [x])
    np.testing.assert_array_equal(flat, x.transpose(0, 3, 1, 2).reshape(2, -1))
    (back,) = run_op(executor, ToChannelsLast(image), [flat])
    np.testing.assert_array_equal(back, x)


def test_refuses() -> None:
    assert "f64" in (family.supports(Cat(), (Spec((1, 4)), Spec((1, 4), "f64"))) or "")
    assert "2**31" in (family.supports(Cat(), (Spec((2**20, 2**10)), Spec((2**20, 2**10)))) or "")
    assert "tiles" in (family.supports(ToChannelsFirst(), (Spec((1, 2**13, 2**9, 33)),)) or "")
