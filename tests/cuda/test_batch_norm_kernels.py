"""Batch normalisation, in one launch and in two."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.kernels import batch_norm
from parcnn.cuda.launch import Device
from parcnn.ops.base import Spec
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain
from parcnn.ops.program import Executor
from tests.cuda.compare import EPS, check, executors, normal, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(batch_norm)

SHAPES = {
    "one pixel": (2, 1, 1, 1),
    "odd": (3, 5, 7, 13),
    "vectors": (2, 9, 5, 24),
    "many channels": (7, 65),
    "wide runs of many channels": (3, 3, 129),
    "many rows and channels": (1, 1, 1300, 60),
    "one channel, blocks": (1, 67, 89, 1),
    "few channels, blocks": (5, 31, 29, 3),
    "vectors, blocks": (3, 37, 41, 8),
    "several tiles a block": (2, 61, 59, 32),
    "more channels than a warp's lanes, blocks": (2, 47, 49, 140),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
acts = pytest.mark.parametrize("act", [None, "relu"])


def parameters(random: np.random.Generator, channels: int) -> list[np.ndarray]:
    """gamma, beta, running mean and variance."""
    gamma, beta, mean = (normal(random, channels) for _ in range(3))
    return [gamma, beta, mean, np.abs(normal(random, channels)) + 0.1]


def data(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Channels with means and spreads of their own."""
    return (normal(random, *shape) * np.exp(normal(random, shape[-1])) + 3 * normal(random, shape[-1])).astype(
        np.float32
    )


@shapes
@acts
def test_train(executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None) -> None:
    check(executor, BatchNormTrain(1e-5, 0.1, act), [data(random, shape), *parameters(random, shape[-1])])


@pytest.mark.parametrize("shape", [(16, 8, 4, 6), (83, 8, 8, 3)], ids=["one launch", "two launches"])
def test_variance_does_not_cancel(executor: Executor, random: np.random.Generator, shape: tuple[int, ...]) -> None:
    """A mean of a thousand deviations, an outlier in the first row: (shifted) sums of squares would lose the variance.

    The mean's own rounding, EPS * 1000 deviations, bounds what a difference from it can be known to.
    """
    x = (normal(random, *shape) + 1000).astype(np.float32)
    x[0, 0, 0, 1] = -1e6
    _, mean, rstd, *_ = run_op(executor, BatchNormTrain(), [x, *parameters(random, shape[-1])])
    wide = x.astype(np.float64).reshape(-1, shape[-1])
    np.testing.assert_allclose(mean, wide.mean(0), rtol=4 * EPS)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(wide.var(0) + 1e-5), rtol=0.1 * 1000 * EPS)


def test_nan_stays_in_its_channel(executor: Executor, random: np.random.Generator) -> None:
    x = data(random, (4, 3, 3, 8))
    x[1, 2, 0, 5] = np.nan
    y, *_ = check(executor, BatchNormTrain(act="relu"), [x, *parameters(random, 8)])
    assert np.isnan(y[..., 5]).all()
    assert np.isfinite(np.delete(y, 5, axis=-1)).all()


@shapes
@acts
def test_infer(executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None) -> None:
    inputs = [data(random, shape), *parameters(random, shape[-1])]
    check(executor, BatchNormInfer(1e-3, act), inputs)
    check(executor, BatchNormInfer(1e-3, act), inputs, alias=[(0, 0)])


def gradient_inputs(random: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    """dy, x, gamma, beta, mean and 1/std of x, all of whose signs before the activation are safe from rounding."""
    x, (gamma, beta, *_) = data(random, shape), parameters(random, shape[-1])
    wide = x.reshape(-1, shape[-1]).astype(np.float64)
    mean, rstd = (v.astype(np.float32) for v in (wide.mean(0), 1 / np.sqrt(wide.var(0) + 1e-5)))
    z = (x.astype(np.float64) - mean) * rstd * gamma + beta
    x[np.abs(z) < 1e-4] += 0.01
    return [normal(random, *shape), x, gamma, beta, mean, rstd]


@shapes
@acts
@pytest.mark.parametrize("alias", [[], [(0, 0)], [(0, 1)]], ids=["apart", "dx is dy", "dx is x"])
def test_dgrad(
    executor: Executor,
    random: np.random.Generator,
    shape: tuple[int, ...],
    act: str | None,
    alias: list[tuple[int, int]],
) -> None:
    check(executor, BatchNormDgrad(act), gradient_inputs(random, shape), alias=alias, ulps=8)


@shapes
@acts
@pytest.mark.parametrize("alias", [[], [(0, 0)], [(0, 1)]], ids=["apart", "dx is dy", "dx is x"])
def test_infer_dgrad(
    executor: Executor,
    random: np.random.Generator,
    shape: tuple[int, ...],
    act: str | None,
    alias: list[tuple[int, int]],
) -> None:
    dy, x, gamma, beta, mean, rstd = gradient_inputs(random, shape)
    check(executor, BatchNormInferDgrad(0.0, act), [dy, x, gamma, beta, mean, rstd**-2], alias=alias, ulps=8)


def test_the_same_bits_every_time(executor: Executor, random: np.random.Generator) -> None:
    x = data(random, (3, 37, 41, 8))
    first, again = (run_op(executor, BatchNormTrain(), [x, *parameters(random, 8)])[:3] for _ in range(2))
    for a, b in zip(first[1:], again[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_workspace_only_where_blocks_share_rows() -> None:
    device = Device("", "sm_90a", 132)

    def needed(op: BatchNormTrain | BatchNormInfer, shape: tuple[int, ...]) -> int:
        x, c = Spec(shape), Spec(shape[-1:])
        inputs = (x, c, c, c, c)
        return batch_norm.workspace_bytes(op, inputs, op.infer(*inputs), device)

    assert needed(BatchNormTrain(), (64, 4, 4, 64)) == 0  # few rows
    assert needed(BatchNormTrain(), (64, 7, 7, 2048)) == 0  # many channels
    assert needed(BatchNormInfer(), (512, 16, 16, 64)) == 0
    assert 0 < needed(BatchNormTrain(), (512, 16, 16, 64)) < 512 * 16 * 16 * 64 // 100 * 4


def test_refuses_float64() -> None:
    assert "f64" in (batch_norm.supports(BatchNormInfer(), (Spec((3, 4), "f64"),)) or "")
