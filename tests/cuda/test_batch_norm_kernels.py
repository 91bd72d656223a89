"""Batch normalisation, in one launch and in two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import batch_norm
from parcnn.cuda.launch import Device
from parcnn.ops.base import Spec
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain
from parcnn.ops.program import Executor
from tests.cuda.bf16 import stored, values_of
from tests.cuda.compare import EPS, check, executors, normal, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(batch_norm)

SHAPES = {
    "one pixel": (2, 1, 1, 1),
    "odd": (3, 5, 7, 13),
    "vectors": (2, 9, 5, 24),
    "many channels": (7, 65),
    "ten channels": (2, 3, 3, 10),
    "a hundred channels": (1, 31, 43, 100),
    "one pixel of many channels": (2, 1, 1, 2048),
    "wide runs of many channels": (3, 3, 129),
    "many rows and channels": (1, 1, 1300, 60),
    "one channel, blocks": (1, 67, 89, 1),
    "few channels, blocks": (5, 31, 29, 3),
    "vectors, blocks": (3, 37, 41, 8),
    "several tiles a block": (2, 61, 59, 32),
    "a line of bf16": (1, 79, 83, 64),
    "more channels than a warp's lanes, blocks": (2, 47, 49, 140),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
acts = pytest.mark.parametrize("act", [None, "relu"])
dtypes = pytest.mark.parametrize("dtype", ["f32", "bf16"])


def parameters(random: np.random.Generator, channels: int) -> list[np.ndarray]:
    """gamma, beta, running mean and variance."""
    gamma, beta, mean = (normal(random, channels) for _ in range(3))
    return [gamma, beta, mean, np.abs(normal(random, channels)) + 0.1]


def data(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Channels with means and spreads of their own."""
    return stored(normal(random, *shape) * np.exp(normal(random, shape[-1])) + 3 * normal(random, shape[-1]), dtype)


@shapes
@acts
@dtypes
def test_train(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, dtype: str
) -> None:
    check(executor, BatchNormTrain(1e-5, 0.1, act), [data(random, shape, dtype), *parameters(random, shape[-1])])


@acts
@dtypes
@pytest.mark.parametrize("shape", [(9, 8, 8, 3), (3, 37, 41, 8), (1, 1, 1300, 60)], ids=str)
def test_train_by_given_moments(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, dtype: str
) -> None:
    """x is read once, by the pass that writes."""
    x = data(random, shape, dtype)
    rows = values_of(x).astype(float).reshape(-1, shape[-1])
    moments = np.array([rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)], np.float32)
    check(executor, BatchNormTrain(1e-5, 0.1, act, moments=True), [x, *parameters(random, shape[-1]), moments])


@shapes
@acts
@dtypes
def test_train_with_an_addend(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, dtype: str
) -> None:
    arrays = [data(random, shape, dtype), *parameters(random, shape[-1]), data(random, shape, dtype)]
    check(executor, BatchNormTrain(1e-5, 0.1, act, add=True), arrays)


@dtypes
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("alias", [(), "addend"], ids=["apart", "y is the addend"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 24), (9, 8, 8, 3), (3, 37, 41, 8), (1, 1, 1300, 60)], ids=str)
def test_train_with_an_addend_in_place_and_by_given_moments(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], alias: str, moments: bool, dtype: str
) -> None:
    x = data(random, shape, dtype)
    rows = values_of(x).astype(float).reshape(-1, shape[-1])
    given = [np.array([rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)], np.float32)] * moments
    arrays = [x, *parameters(random, shape[-1]), *given, data(random, shape, dtype)]
    op = BatchNormTrain(1e-5, 0.1, "relu", moments=moments, add=True)
    check(executor, op, arrays, alias=[(0, 5 + moments)] if alias else [])


@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7, 24), (3, 37, 41, 8)], ids=["one launch", "two launches"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
def test_an_addend_keeps_its_nan_and_infinities(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], train: bool, dtype: str
) -> None:
    addend = data(random, shape, dtype)
    for place, value in (((0, 0, 0, 1), np.nan), ((1, 2, 3, 7), np.inf), ((2, 4, 6, 0), -np.inf)):
        addend[place] = stored(np.array(value), dtype)
    op = BatchNormTrain(act="relu", add=True) if train else BatchNormInfer(act="relu", add=True)
    y, *_ = check(executor, op, [data(random, shape, dtype), *parameters(random, shape[-1]), addend])
    assert np.isnan(values_of(y)).sum() == 1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((16, 8, 4, 6), "f32", id="one launch"),
        pytest.param((83, 8, 8, 3), "f32", id="two launches"),
        pytest.param((16, 8, 4, 6), "bf16", id="one launch, bf16"),
        pytest.param((83, 8, 8, 3), "bf16", id="two launches, bf16"),
        pytest.param((19, 16, 16, 8), "bf16", id="two launches, vectors of bf16"),
    ],
)
def test_variance_does_not_cancel(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """A mean of a thousand deviations, an outlier in the first row: (shifted) sums of squares would lose the variance.

    The mean's own rounding, EPS * 1000 deviations, bounds what a difference from it can be known to. (In bf16 numbers
    about 1000 are 4 apart: deviations then are.)
    """
    x = stored(normal(random, *shape) * (4 if dtype == "bf16" else 1) + 1000, dtype)
    x[0, 0, 0, 1] = stored(np.array(-1e6), dtype)
    _, mean, rstd, *_ = run_op(executor, BatchNormTrain(), [x, *parameters(random, shape[-1])])
    wide = values_of(x).astype(np.float64).reshape(-1, shape[-1])
    np.testing.assert_allclose(mean, wide.mean(0), rtol=4 * EPS)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(wide.var(0) + 1e-5), rtol=0.1 * 1000 * EPS)


@dtypes
def test_nan_stays_in_its_channel(executor: Executor, random: np.random.Generator, dtype: str) -> None:
    x = data(random, (4, 3, 3, 8), dtype)
    x[1, 2, 0, 5] = stored(np.array(np.nan), dtype)
    y, *_ = check(executor, BatchNormTrain(act="relu"), [x, *parameters(random, 8)])
    assert np.isnan(values_of(y)[..., 5]).all()
    assert np.isfinite(np.delete(values_of(y), 5, axis=-1)).all()


@shapes
@acts
@dtypes
def test_infer(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, dtype: str
) -> None:
    inputs = [data(random, shape, dtype), *parameters(random, shape[-1])]
    check(executor, BatchNormInfer(1e-3, act), inputs)
    check(executor, BatchNormInfer(1e-3, act), inputs, alias=[(0, 0)])
    inputs.append(data(random, shape, dtype))
    for alias in ([], [(0, 0)], [(0, 5)]):
        check(executor, BatchNormInfer(1e-3, act, add=True), inputs, alias=alias)


def gradient_inputs(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> list[np.ndarray]:
    """dy, x, gamma, beta, mean and 1/std of x; dy is zero where rounding may change the sign before the activation."""
    x, (gamma, beta, *_) = data(random, shape, dtype), parameters(random, shape[-1])
    wide = values_of(x).astype(np.float64)
    rows = wide.reshape(-1, shape[-1])
    mean, rstd = (v.astype(np.float32) for v in (rows.mean(0), 1 / np.sqrt(rows.var(0) + 1e-5)))
    z = (wide - mean) * rstd * gamma + beta
    dy = np.where(np.abs(z) < 1e-4, 0, normal(random, *shape))
    return [stored(dy, dtype), x, gamma, beta, mean, rstd]


@shapes
@acts
@dtypes
def test_dgrad(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, dtype: str
) -> None:
    check(executor, BatchNormDgrad(act), gradient_inputs(random, shape, dtype), ulps=8)


@acts
@dtypes
@pytest.mark.parametrize("alias", [(), ((0, 0),), ((0, 1),)], ids=["apart", "dx is dy", "dx is x"])
@pytest.mark.parametrize("shape", [(9, 8, 8, 3), (3, 37, 41, 8), (1, 1, 1300, 60)], ids=str)
def test_dgrad_by_given_sums(
    executor: Executor,
    random: np.random.Generator,
    shape: tuple[int, ...],
    alias: tuple[tuple[int, int], ...],
    act: str | None,
    dtype: str,
) -> None:
    """dy and x are read once, by the pass that writes."""
    sums = [np.abs(normal(random, shape[-1])).astype(np.float32) * 100 for _ in range(2)]
    check(
        executor, BatchNormDgrad(act, sums=True), [*gradient_inputs(random, shape, dtype), *sums], ulps=8, alias=alias
    )


@shapes
@acts
@dtypes
def test_infer_dgrad(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, dtype: str
) -> None:
    *inputs, rstd = gradient_inputs(random, shape, dtype)
    check(executor, BatchNormInferDgrad(0.0, act), [*inputs, rstd**-2], ulps=8)


@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7, 24), (3, 37, 41, 8)], ids=["one launch", "two launches"])
@pytest.mark.parametrize("alias", [(0, 0), (0, 1)], ids=["dx is dy", "dx is x"])
def test_dgrad_in_place(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], alias: tuple[int, int], dtype: str
) -> None:
    *inputs, rstd = gradient_inputs(random, shape, dtype)
    check(executor, BatchNormDgrad("relu"), [*inputs, rstd], alias=[alias], ulps=8)
    check(executor, BatchNormInferDgrad(0.0, "relu"), [*inputs, rstd**-2], alias=[alias], ulps=8)


@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7, 24), (3, 37, 41, 8)], ids=["one launch", "two launches"])
def test_backward_cuts_off_what_forward_did(
    executor: Executor, random: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """x takes few values, and beta makes one of them zero but for rounding, in half of the channels each way."""
    x = stored(np.round(normal(random, *shape)), dtype)
    gamma, beta, running_mean, running_var = parameters(random, shape[-1])
    train = BatchNormTrain(act="relu")
    _, mean, rstd, *_ = run_op(executor, train, [x, gamma, beta, running_mean, running_var])
    beta = np.nextafter(-(1 - mean) * (gamma * rstd), np.array([np.inf, -np.inf] * (shape[-1] // 2), np.float32))
    y, *_ = run_op(executor, train, [x, gamma, beta, running_mean, running_var])
    ones = stored(np.ones(shape), dtype)
    _, _, dbeta = run_op(executor, BatchNormDgrad("relu"), [ones, x, gamma, beta, mean, rstd])
    np.testing.assert_array_equal(dbeta, (y != 0).reshape(-1, shape[-1]).sum(0))
    least = np.abs(values_of(y)[values_of(x) == 1])
    assert 0 < least.max() < 1e-5, "nothing lies just above zero: the test tests nothing"
    assert least.min() == 0, "nothing lies just below zero: the test tests nothing"


@dtypes
def test_the_same_bits_every_time(executor: Executor, random: np.random.Generator, dtype: str) -> None:
    x = data(random, (3, 37, 41, 8), dtype)
    first, again = (run_op(executor, BatchNormTrain(), [x, *parameters(random, 8)])[:3] for _ in range(2))
    for a, b in zip(first[1:], again[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_workspace_only_where_blocks_share_rows() -> None:
    device = Device("", "sm_90a", 132)

    def needed(op: BatchNormTrain | BatchNormInfer, shape: tuple[int, ...]) -> int:
        x, c = Spec(shape), Spec(shape[-1:])
        inputs = (x, c, c, c, c)
        return batch_norm.workspace_bytes(op, inputs, op.infer(*inputs), device)

    assert needed(BatchNormTrain(), (32, 4, 4, 64)) == 0  # few rows
    assert 0 < needed(BatchNormTrain(), (64, 7, 7, 2048)) < 64 * 7 * 7 * 2048 // 100 * 4
    assert needed(BatchNormInfer(), (512, 16, 16, 64)) == 0
    assert 0 < needed(BatchNormTrain(), (512, 16, 16, 64)) < 512 * 16 * 16 * 64 // 100 * 4


def test_refuses_float64() -> None:
    assert "f64" in (batch_norm.supports(BatchNormInfer(), (Spec((3, 4), "f64"),)) or "")


@dtypes
@pytest.mark.parametrize("shape", [(512, 16, 16, 64), (64, 7, 7, 2048), (3, 5, 7, 13), (9, 31, 29, 100)])
def test_launches_fit_the_device_and_the_compiled_kernels(
    null: CudaExecutor, random: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    x, channels = stored(np.ones(shape), dtype), [np.ones(shape[-1], np.float32)] * 4
    for forward in (BatchNormTrain(act="relu"), BatchNormInfer()):
        run_op(null, forward, [x, *channels])
        run_op(null, replace(forward, add=True), [x, *channels, x])
    moments = np.ones((2, shape[-1]), np.float32)
    run_op(null, BatchNormTrain(moments=True, add=True), [x, *channels, moments, x], alias=[(0, 6)])
    for backward in (BatchNormDgrad(act="relu"), BatchNormInferDgrad()):
        run_op(null, backward, [x, x, *channels])


@pytest.mark.parametrize("changed", [0, 1, 2, 5])
def test_refuses_tensors_of_mixed_types(changed: int) -> None:
    """dy and x are of one type; parameters and statistics are f32 beside both."""
    x, c = Spec((2, 3, 3, 8), "bf16"), Spec((8,))
    inputs = [x, x, c, c, c, c]
    assert batch_norm.supports(BatchNormDgrad(), tuple(inputs)) is None
    inputs[changed] = Spec(inputs[changed].shape, "f32" if inputs[changed].dtype == "bf16" else "bf16")
    assert "f32" in (batch_norm.supports(BatchNormDgrad(), tuple(inputs)) or "")


@pytest.mark.parametrize("changed", [0, 1, 4, 5, 6])
def test_an_addend_is_of_the_type_of_x(changed: int) -> None:
    x, c = Spec((2, 3, 3, 8), "bf16"), Spec((8,))
    inputs = [x, c, c, c, c, Spec((2, 8)), x]
    op = BatchNormTrain(moments=True, add=True)
    assert batch_norm.supports(op, tuple(inputs)) is None
    inputs[changed] = Spec(inputs[changed].shape, "f32" if inputs[changed].dtype == "bf16" else "bf16")
    assert "f32" in (batch_norm.supports(op, tuple(inputs)) or "")


def test_an_addend_is_taken_where_it_gains(null: CudaExecutor) -> None:
    def takes(op: BatchNormTrain | BatchNormInfer, images: int) -> bool:
        x, channel = Spec((images, 28, 28, 128), "bf16"), Spec((128,))
        return null.can_fuse(op, (x, *[channel] * 4, x))

    assert takes(BatchNormTrain(add=True), 64)
    assert not takes(BatchNormTrain(add=True), 256), "the pass that writes has too few blocks for three large tensors"
    assert takes(BatchNormInfer(add=True), 256)
