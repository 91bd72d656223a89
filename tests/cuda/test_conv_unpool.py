"""The error before a convolution's pool."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from parcnn.cuda.kernels import conv_unpool
from parcnn.ops.base import FROM_OUTPUT, Spec
from parcnn.ops.conv import ConvUnpool
from parcnn.ops.program import Executor
from tests.cuda.bf16 import stored, values_of
from tests.cuda.compare import check, executors, normal, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(conv_unpool)
SHAPES = [(1, 1, 1, 8), (2, 3, 5, 24), (3, 7, 1, 64), (1, 2, 9, 136), (2, 17, 2, 256)]
FOURS = [(1, 1, 1, 4), (2, 5, 3, 12), (1, 9, 2, 68)]
shapes = pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, "bf16") for shape in SHAPES), *((shape, "f32") for shape in (*SHAPES, *FOURS))],
    ids=str,
)


@shapes
@pytest.mark.parametrize(("pool", "act"), list(product(("max", "avg"), (None, *FROM_OUTPUT))))
def test_each_error_goes_to_its_window(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], dtype: str, pool: str, act: str | None
) -> None:
    dy, index = normal(random, *shape), random.integers(0, 4, shape).astype(np.uint8)
    saved = np.maximum(normal(random, *shape), 0) if act == "relu" else np.tanh(normal(random, *shape))
    arrays = [stored(dy, dtype), *([index] if pool == "max" else []), *([stored(saved, dtype)] if act else [])]
    (out,) = check(executor, ConvUnpool(pool, act), arrays)
    if act is None and pool == "max":  # nothing is computed, all is moved
        n, p, q, k = shape
        windows = out.reshape(n, p, 2, q, 2, k).transpose(0, 1, 3, 5, 2, 4).reshape(*shape, 4)
        expected = np.where(index[..., None] == np.arange(4), stored(dy, dtype)[..., None], 0)
        np.testing.assert_array_equal(windows, expected)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_nan_and_infinities(executor: Executor, dtype: str) -> None:
    dy = np.full((1, 1, 2, 8), np.inf, np.float32)
    dy[..., 1], dy[0, 0, 1] = np.nan, -np.inf
    saved, index = np.zeros_like(dy), np.full(dy.shape, 3, np.uint8)
    saved[..., :4] = np.nan
    (out,) = run_op(executor, ConvUnpool("max", "relu"), [stored(dy, dtype), index, stored(saved, dtype)])
    values = values_of(out)
    np.testing.assert_array_equal(values[0, 1, 1::2, :4], dy[0, 0, :, :4])  # where the output is NaN the error passes
    values[0, 1, 1::2, :4] = 0
    np.testing.assert_array_equal(values, 0)


def test_what_it_refuses() -> None:
    u2, dy = Spec((1, 2, 2, 8), "u2"), Spec((1, 2, 2, 8), "bf16")
    assert conv_unpool.supports(ConvUnpool(), (dy, u2)) is None
    single = Spec(dy.shape, "f32")
    assert conv_unpool.supports(ConvUnpool(), (single, u2)) is None
    assert "f64" in (conv_unpool.supports(ConvUnpool(), (Spec(dy.shape, "f64"), u2)) or "")
    assert "bf16 and f32" in (conv_unpool.supports(ConvUnpool(act="relu"), (dy, u2, single)) or "")
    assert "multiple of 8" in (conv_unpool.supports(ConvUnpool(), (Spec((1, 2, 2, 12), "bf16"), u2)) or "")
    assert "multiple of 4" in (conv_unpool.supports(ConvUnpool(), (Spec((1, 2, 2, 6), "f32"), u2)) or "")
    assert "gelu" in (conv_unpool.supports(ConvUnpool(act="gelu"), (dy, u2, dy)) or "")
    assert "2**31" in (conv_unpool.supports(ConvUnpool(), (Spec((2**13, 2**8, 2**5, 8), "bf16"), u2)) or "")
