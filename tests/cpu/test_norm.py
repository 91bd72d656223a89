"""Batch normalisation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain
from tests import reference
from tests.op_runner import run_op

SHAPES = [(2, 3, 1, 1), (3, 5, 7, 24), (7, 65), (2, 64, 50, 24)]  # the last is larger than one piece of work
shapes = pytest.mark.parametrize("shape", SHAPES)
acts = pytest.mark.parametrize("act", [None, "relu"])


def tensors(random: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    x = 3 * random.standard_normal(shape) + 5
    gamma, beta, mean = (random.standard_normal(shape[-1]) for _ in range(3))
    return [x, gamma, beta, mean, random.random(shape[-1]) + 0.5]


@shapes
@acts
def test_train(cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, ...], act: str | None) -> None:
    x, gamma, beta, running_mean, running_var = tensors(random, shape)
    op = BatchNormTrain(eps=1e-3, momentum=0.3, act=act)
    y, mean, rstd, new_mean, new_var = run_op(cpu, op, [x, gamma, beta, running_mean, running_var])
    expected, expected_mean, expected_rstd, unbiased = reference.batch_norm(x, gamma, beta, 1e-3)
    np.testing.assert_allclose(y, reference.act(act, expected), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(rstd, expected_rstd, rtol=1e-12)
    np.testing.assert_allclose(new_mean, 0.7 * running_mean + 0.3 * expected_mean, rtol=1e-12)
    np.testing.assert_allclose(new_var, 0.7 * running_var + 0.3 * unbiased, rtol=1e-12)


@shapes
@acts
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_train_with_an_addend(
    cpu: CpuExecutor,
    random: np.random.Generator,
    shape: tuple[int, ...],
    act: str | None,
    moments: bool,
    in_place: bool,
) -> None:
    """The addend is the last input, behind the moments; y may lie over it. Nothing else changes."""
    x, *rest = tensors(random, shape)
    addend, rows = random.standard_normal(shape), x.reshape(-1, shape[-1])
    given = [np.array([rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)])] * moments
    op = BatchNormTrain(act=act, moments=moments, add=True)
    alias = [(0, 5 + moments)] * in_place
    y, *statistics = run_op(cpu, op, [x, *rest, *given, addend], alias=alias)
    plain, *expected = run_op(cpu, BatchNormTrain(moments=moments), [x, *rest, *given])
    np.testing.assert_array_equal(y, reference.act(act, plain + addend))
    for one, other in zip(statistics, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@acts
@pytest.mark.parametrize("pool", [None, "max", "avg"])
@pytest.mark.parametrize("groups", [1, 3])
def test_train_by_the_moments_of_a_convolution(
    cpu: CpuExecutor, random: np.random.Generator, act: str | None, pool: str | None, groups: int
) -> None:
    """The convolution's other outputs do not change, and the batch norm's are what its own pass gives."""
    if pool and groups > 1:
        pytest.skip("groups have no pool")
    conv = ConvFprop(pad=(1, 1, 1, 1), pool=pool, act=act, groups=groups)
    operands = [random.standard_normal((3, 9, 11, 6)) + 2, random.standard_normal((9, 3, 3, 6 // groups))]
    y, *idx, moments = run_op(cpu, replace(conv, moments=True), operands)
    for got, plain in zip((y, *idx), run_op(cpu, conv, operands), strict=True):
        np.testing.assert_array_equal(got, plain)
    rows = y.reshape(-1, 9)
    np.testing.assert_allclose(moments, [rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)], rtol=1e-12)
    rest = tensors(random, y.shape)[1:]
    given = run_op(cpu, BatchNormTrain(act=act, moments=True), [y, *rest, moments])
    for one, other in zip(given, run_op(cpu, BatchNormTrain(act=act), [y, *rest]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@shapes
@acts
def test_infer(cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, ...], act: str | None) -> None:
    x, gamma, beta, mean, var = arrays = tensors(random, shape)
    expected = reference.act(act, (x - mean) / np.sqrt(var + 1e-5) * gamma + beta)
    for alias in ((), ((0, 0),)):
        (y,) = run_op(cpu, BatchNormInfer(act=act), arrays, alias=alias)
        np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-12)


@shapes
@acts
@pytest.mark.parametrize("alias", [(), ((0, 0),), ((0, 5),)])
def test_infer_with_an_addend(
    cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, alias: tuple
) -> None:
    arrays, addend = tensors(random, shape), random.standard_normal(shape)
    (plain,) = run_op(cpu, BatchNormInfer(), arrays)
    (y,) = run_op(cpu, BatchNormInfer(act=act, add=True), [*arrays, addend], alias=alias)
    np.testing.assert_array_equal(y, reference.act(act, plain + addend))


@acts
@pytest.mark.parametrize("alias", [(), ((0, 0),), ((0, 1),)])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_train_dgrad(
    cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, alias: tuple
) -> None:
    x, gamma, beta, *_ = tensors(random, shape)
    dy = random.standard_normal(shape)
    _, mean, rstd, _ = reference.batch_norm(x, gamma, beta, 1e-5)
    dx, dgamma, dbeta = run_op(cpu, BatchNormDgrad(act), [dy, x, gamma, beta, mean, rstd], alias=alias)

    def forward(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        return reference.act(act, reference.batch_norm(x, gamma, beta, 1e-5)[0])

    for actual, f, v in (
        (dx, lambda v: forward(v, gamma, beta), x),
        (dgamma, lambda v: forward(x, v, beta), gamma),
        (dbeta, lambda v: forward(x, gamma, v), beta),
    ):
        np.testing.assert_allclose(actual, reference.numeric_gradient(f, v, dy), rtol=1e-6, atol=1e-7)


@acts
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("pool", "groups"), [(None, 1), (None, 3), ("max", 1), ("avg", 1)])
@pytest.mark.parametrize("images", [3, 60])
def test_train_dgrad_by_the_sums_of_an_input_gradient(
    cpu: CpuExecutor,
    random: np.random.Generator,
    act: str | None,
    add: bool,
    pool: str | None,
    groups: int,
    images: int,
) -> None:
    """As by the norm's own pass: the error is cut off where that would do it, and dx is the same."""
    conv = ConvDgrad(pad=(1, 1, 1, 1), pool=pool, groups=groups, image=(8, 10), add=add)
    out = (images, *conv.pooled_hw(8, 10, 3, 3), 9)
    dy, w = random.standard_normal(out), random.standard_normal((9, 3, 3, 6 // groups))
    idx = [random.integers(0, 4, out).astype(np.uint8)] * (pool == "max")
    addend = [random.standard_normal((images, 8, 10, 6))] * add
    x, gamma, beta, *_ = tensors(random, (images, 8, 10, 6))
    _, mean, rstd, _ = reference.batch_norm(x, gamma, beta, 1e-5)
    norm = [x, gamma, beta, mean, rstd]
    (error,) = run_op(cpu, conv, [dy, w, *idx, *addend])
    dx, *sums = run_op(cpu, BatchNormDgrad(act), [error, *norm])
    dz, *given = run_op(cpu, replace(conv, act=act, sums=True), [dy, w, *idx, *norm, *addend])
    z = (x - mean) * rstd * gamma + beta
    np.testing.assert_array_equal(dz, np.where(z <= 0, 0, error) if act else error)
    for one, other in zip(given, sums, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-10)
    (by_sums,) = run_op(cpu, BatchNormDgrad(sums=True), [dz, *norm, *given])
    np.testing.assert_allclose(by_sums, dx, rtol=1e-11, atol=1e-11)


@acts
@pytest.mark.parametrize("alias", [(), ((0, 0),), ((0, 1),)])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_infer_dgrad(
    cpu: CpuExecutor, random: np.random.Generator, shape: tuple[int, ...], act: str | None, alias: tuple
) -> None:
    x, gamma, beta, mean, var = tensors(random, shape)
    dy = random.standard_normal(shape)
    op = BatchNormInferDgrad(act=act)
    dx, dgamma, dbeta = run_op(cpu, op, [dy, x, gamma, beta, mean, var], alias=alias)

    def forward(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        return reference.act(act, (x - mean) / np.sqrt(var + 1e-5) * gamma + beta)

    for actual, f, v in (
        (dx, lambda v: forward(v, gamma, beta), x),
        (dgamma, lambda v: forward(x, v, beta), gamma),
        (dbeta, lambda v: forward(x, gamma, v), beta),
    ):
        np.testing.assert_allclose(actual, reference.numeric_gradient(f, v, dy), rtol=1e-6, atol=1e-7)


def test_float32_statistics_of_many_pixels_far_from_zero(cpu: CpuExecutor, random: np.random.Generator) -> None:
    x = (random.standard_normal((16, 64, 64, 3)) + 100).astype(np.float32)
    gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)
    _, mean, rstd, *_ = run_op(cpu, BatchNormTrain(), [x, gamma, beta, beta, gamma])
    _, expected_mean, expected_rstd, _ = reference.batch_norm(x, gamma, beta, 1e-5)
    np.testing.assert_allclose(mean, expected_mean, rtol=2e-7)
    np.testing.assert_allclose(rstd, expected_rstd, rtol=1e-5)
