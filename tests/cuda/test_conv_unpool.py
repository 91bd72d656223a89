"""The error before a convolution's pool."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from parcnn.cuda.kernels import conv_unpool
from parcnn.ops.base import FROM_OUTPUT, Spec
from parcnn.ops.conv import ConvUnpool
from parcnn.ops.program import Executor
from tests.cuda.bf16 import from_bits, stored, to_bits
from tests.cuda.compare import check, executors, normal, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(conv_unpool)
SHAPES = [(1, 1, 1, 8), (2, 3, 5, 24), (3, 7, 1, 64), (1, 2, 9, 136), (2, 17, 2, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("pool", "act"), list(product(("max", "avg"), (None, *FROM_OUTPUT))))
def test_each_error_goes_to_its_window(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], pool: str, act: str | None
) -> None:
    dy, index = normal(random, *shape), random.integers(0, 4, shape).astype(np.uint8)
    saved = np.maximum(normal(random, *shape), 0) if act == "relu" else np.tanh(normal(random, *shape))
    arrays = [stored(dy, "bf16"), *([index] if pool == "max" else []), *([stored(saved, "bf16")] if act else [])]
    (out,) = check(executor, ConvUnpool(pool, act), arrays)
    if act is None and pool == "max":  # nothing is computed, all is moved
        n, p, q, k = shape
        windows = out.reshape(n, p, 2, q, 2, k).transpose(0, 1, 3, 5, 2, 4).reshape(*shape, 4)
        expected = np.where(index[..., None] == np.arange(4), to_bits(dy)[..., None], 0)
        np.testing.assert_array_equal(windows, expected)


def test_nan_and_infinities(executor: Executor) -> None:
    dy = np.full((1, 1, 2, 8), np.inf, np.float32)
    dy[..., 1], dy[0, 0, 1] = np.nan, -np.inf
    saved, index = np.zeros_like(dy), np.full(dy.shape, 3, np.uint8)
    saved[..., :4] = np.nan
    (out,) = run_op(executor, ConvUnpool("max", "relu"), [to_bits(dy), index, to_bits(saved)])
    values = from_bits(out)
    np.testing.assert_array_equal(values[0, 1, 1::2, :4], dy[0, 0, :, :4])  # where the output is NaN the error passes
    values[0, 1, 1::2, :4] = 0
    np.testing.assert_array_equal(values, 0)


def test_what_it_refuses() -> None:
    u2, dy = Spec((1, 2, 2, 8), "u2"), Spec((1, 2, 2, 8), "bf16")
    assert conv_unpool.supports(ConvUnpool(), (dy, u2)) is None
    assert "bf16" in (conv_unpool.supports(ConvUnpool(), (Spec(dy.shape, "f32"), u2)) or "")
    assert "multiple of 8" in (conv_unpool.supports(ConvUnpool(), (Spec((1, 2, 2, 12), "bf16"), u2)) or "")
    assert "gelu" in (conv_unpool.supports(ConvUnpool(act="gelu"), (dy, u2, dy)) or "")
    assert "2**31" in (conv_unpool.supports(ConvUnpool(), (Spec((2**13, 2**8, 2**5, 8), "bf16"), u2)) or "")
