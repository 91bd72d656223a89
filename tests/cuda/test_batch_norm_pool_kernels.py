"""Batch normalisation in training with the maximum behind it, forward and backward, held to the float64 executor, which does
one after the other."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import batch_norm, batch_norm_pool
from parcnn.cuda.launch import Device
from parcnn.ops.base import Spec
from parcnn.ops.norm import BatchNormDgrad, BatchNormTrain
from parcnn.ops.pool import PoolFprop, PoolWindow
from parcnn.ops.program import Executor
from tests.cuda.bf16 import stored, values_of
from tests.cuda.compare import check, executors, normal, on_cpu, random_fixture  # noqa: F401
from tests.cuda.test_batch_norm_kernels import data, gradient_inputs, parameters
from tests.op_runner import run_op

# Where the convolution took no moments, the norm's own pass does.
with_moments = ModuleType("batch_norm_pool")
vars(with_moments).update(vars(batch_norm_pool), variants=lambda: (*batch_norm_pool.variants(), *batch_norm.variants()))
executor = executors(with_moments)

WINDOWS = {
    "2x2": PoolWindow(),
    "2x2 padded, ceil": PoolWindow(pad=(1, 1), ceil_mode=True),
    "3x3 stride 2": PoolWindow(kernel=(3, 3), stride=(2, 2)),
    "3x3 stride 2 padded": PoolWindow(kernel=(3, 3), stride=(2, 2), pad=(1, 1)),
    "3x3 stride 2 padded on one side, ceil": PoolWindow(kernel=(3, 3), stride=(2, 2), pad=(0, 1), ceil_mode=True),
    "3x3 stride 3": PoolWindow(kernel=(3, 3), stride=(3, 3)),
    "gaps, odd strides": PoolWindow(kernel=(2, 1), stride=(3, 4)),
    "gaps, even strides": PoolWindow(kernel=(3, 4), stride=(4, 4), pad=(1, 1)),
    "3x2 stride 4x2, ceil": PoolWindow(kernel=(3, 2), stride=(4, 2), ceil_mode=True),
    "strips": PoolWindow(kernel=(1, 16), stride=(1, 16), pad=(0, 8)),
}
windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
dtypes = pytest.mark.parametrize("dtype", ["f32", "bf16"])
FORWARD = {name: window for name, window in WINDOWS.items() if window.kernel in ((2, 2), (3, 3))}
ULPS = 8  # as without a pool


@dtypes
@pytest.mark.parametrize("window", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("channels", [4, 8, 12, 72])
@pytest.mark.parametrize("act", [None, "relu"])
def test_train(
    executor: Executor, random: np.random.Generator, window: PoolWindow, channels: int, act: str | None, dtype: str
) -> None:
    """The winners are those of float64, too: the largest before ReLU, of negative gammas the least x."""
    x = data(random, (3, 9, 7, channels), dtype)
    check(executor, BatchNormTrain(act=act, window=window), [x, *parameters(random, channels)])


@dtypes
@pytest.mark.parametrize("window", ["2x2", "3x3 stride 2 padded"])
@pytest.mark.parametrize("shape", [(3, 61, 59, 32), (2, 47, 48, 140)], ids=str)
def test_train_by_given_moments(
    executor: Executor, random: np.random.Generator, window: str, shape: tuple[int, ...], dtype: str
) -> None:
    x = data(random, shape, dtype)
    rows = values_of(x).astype(float).reshape(-1, shape[-1])
    moments = np.array([rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)], np.float32)
    op = BatchNormTrain(1e-5, 0.1, "relu", moments=True, window=WINDOWS[window])
    check(executor, op, [x, *parameters(random, shape[-1]), moments])


@dtypes
@pytest.mark.parametrize("window", FORWARD.values(), ids=FORWARD)
def test_the_first_of_equals_wins(
    executor: Executor, random: np.random.Generator, window: PoolWindow, dtype: str
) -> None:
    """Few values, and a gamma of zero, which makes all equal."""
    x = stored(np.round(normal(random, 2, 9, 7, 8)), dtype)
    gamma, *rest = parameters(random, 8)
    gamma[3] = 0
    check(executor, BatchNormTrain(act="relu", window=window), [x, gamma, *rest])


@dtypes
def test_nan_stays_in_its_channel_forward(executor: Executor, random: np.random.Generator, dtype: str) -> None:
    x = data(random, (4, 6, 6, 8), dtype)
    x[1, 2, 0, 5] = stored(np.array(np.nan), dtype)
    y, *_ = run_op(executor, BatchNormTrain(act="relu", window=PoolWindow()), [x, *parameters(random, 8)])
    assert np.isnan(values_of(y)[..., 5]).all()
    assert np.isfinite(np.delete(values_of(y), 5, axis=-1)).all()


def inputs_of(random: np.random.Generator, shape: tuple[int, ...], window: PoolWindow, dtype: str) -> list[np.ndarray]:
    """The pooled error, x, gamma, beta, mean, 1/std, and who won of x: where gamma is negative, any other would do as well."""
    _, x, *parameters = gradient_inputs(random, shape, dtype)
    pooled, idx = on_cpu(PoolFprop("max", window.kernel, window.stride, window.pad, ceil_mode=window.ceil_mode),
                         [values_of(x)])  # fmt: skip
    return [stored(normal(random, *pooled.shape), dtype), x, *parameters, idx]


@windows
@dtypes
@pytest.mark.parametrize("channels", [4, 8, 12, 72])
def test_dgrad(executor: Executor, random: np.random.Generator, window: PoolWindow, channels: int, dtype: str) -> None:
    """Of bf16 words of 8 channels, words of 4, and more channels than a block has."""
    check(executor, BatchNormDgrad(window=window), inputs_of(random, (3, 9, 7, channels), window, dtype), ulps=ULPS)


@dtypes
@pytest.mark.parametrize("window", ["2x2", "3x3 stride 2 padded", "3x3 stride 3"])
@pytest.mark.parametrize("shape", [(3, 61, 59, 32), (2, 47, 48, 140), (5, 33, 37, 8)], ids=str)
def test_several_tiles_a_block(
    executor: Executor, random: np.random.Generator, window: str, shape: tuple[int, ...], dtype: str
) -> None:
    """In place, too."""
    inputs = inputs_of(random, shape, WINDOWS[window], dtype)
    check(executor, BatchNormDgrad(window=WINDOWS[window]), inputs, alias=[(0, 1)], ulps=ULPS)


@windows
@dtypes
def test_it_is_what_the_spread_error_gives(random: np.random.Generator, window: PoolWindow, dtype: str) -> None:
    """The oracle itself: pool's backward, then batch norm's."""
    dy, x, *parameters, idx = (values_of(a) for a in inputs_of(random, (2, 9, 7, 8), window, dtype))
    (error,) = on_cpu(window.backward((9, 7)), [dy, idx])
    for one, other in zip(
        on_cpu(BatchNormDgrad(window=window), [dy, x, *parameters, idx]),
        on_cpu(BatchNormDgrad(), [error, x, *parameters]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@dtypes
@pytest.mark.parametrize("window", ["2x2", "3x3 stride 2 padded"])
@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_nan_and_infinities_stay_in_their_channel(
    executor: Executor, random: np.random.Generator, window: str, what: float, dtype: str
) -> None:
    inputs = inputs_of(random, (2, 9, 7, 8), WINDOWS[window], dtype)
    inputs[0][1, 2, 1, 5] = stored(np.array(what), dtype)
    with np.errstate(invalid="ignore"):  # inf - inf
        dx, dgamma, dbeta = check(executor, BatchNormDgrad(window=WINDOWS[window]), inputs, ulps=ULPS)
    assert not np.isfinite(values_of(dx)[..., 5]).any()
    for result in (values_of(dx), dgamma, dbeta):
        assert np.isfinite(np.delete(result, 5, axis=-1)).all()


@dtypes
def test_the_same_bits_every_time(executor: Executor, random: np.random.Generator, dtype: str) -> None:
    window = WINDOWS["3x3 stride 2 padded"]
    inputs = inputs_of(random, (3, 61, 59, 32), window, dtype)
    first, again = (run_op(executor, BatchNormDgrad(window=window), inputs) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@dtypes
@windows
@pytest.mark.parametrize("shape", [(64, 56, 56, 64), (3, 19, 17, 4), (8, 16, 16, 512)], ids=str)
def test_launches_fit_the_device_and_the_compiled_kernels(
    null: CudaExecutor, window: PoolWindow, shape: tuple[int, ...], dtype: str
) -> None:
    n, h, w, channels = shape
    pooled, parameters = np.ones((n, *window.output_hw(h, w), channels)), [np.ones(channels, np.float32)] * 4
    inputs = [stored(pooled, dtype), stored(np.ones(shape), dtype), *parameters, np.zeros(pooled.shape, np.uint8)]
    run_op(null, BatchNormDgrad(window=window), inputs)
    if window in FORWARD.values():
        run_op(null, BatchNormTrain(window=window), inputs[1:6])
        run_op(null, BatchNormTrain(window=window, moments=True), [*inputs[1:6], np.ones((2, channels), np.float32)])


def _refusal(window: PoolWindow, channels: int = 8, act: str | None = None, statistics: str = "f32") -> str | None:
    x = Spec((2, 9, 9, channels), "bf16")
    dy, c = Spec((2, *window.output_hw(9, 9), channels), "bf16"), Spec((channels,), statistics)
    inputs = (dy, x, c, c, c, c, Spec(dy.shape, window.index_dtype(channels)))
    return batch_norm_pool.supports(BatchNormDgrad(act, window), inputs)


def test_refuses() -> None:
    assert _refusal(PoolWindow()) is None
    assert "maximum" in (_refusal(PoolWindow("avg")) or "")
    assert "3x3" in (_refusal(PoolWindow(kernel=(3, 3), stride=(1, 1))) or "")
    assert "3x3" in (_refusal(PoolWindow(kernel=(3, 2), stride=(2, 2))) or "")
    assert "apart" in (_refusal(PoolWindow(kernel=(2, 2), stride=(2, 2), dilation=(1, 2))) or "")
    assert "fours" in (_refusal(PoolWindow(), channels=6) or "")
    assert "16 elements" in (_refusal(PoolWindow(kernel=(5, 4), stride=(5, 5))) or "")
    assert "activation" in (_refusal(PoolWindow(), act="relu") or "")
    assert "f32" in (_refusal(PoolWindow(), statistics="bf16") or "")
    x, c = Spec((2, 8, 8, 8)), Spec((8,))
    pooled = Spec((2, 4, 4, 8))
    inputs = (pooled, x, c, c, c, c, Spec(pooled.shape, "u2"))
    assert "pool" in (batch_norm.supports(BatchNormDgrad(window=PoolWindow()), inputs) or "")
    assert "pool" in (batch_norm_pool.supports(BatchNormDgrad(), (x, x, c, c, c, c)) or "")


def test_refuses_forward() -> None:
    x, c = Spec((2, 9, 9, 8), "bf16"), Spec((8,))
    inputs = (x, c, c, c, c)
    assert batch_norm_pool.supports(BatchNormTrain(act="relu", window=PoolWindow()), inputs) is None
    assert "ReLU" in (batch_norm_pool.supports(BatchNormTrain(act="tanh", window=PoolWindow()), inputs) or "")
    odd = BatchNormTrain(window=PoolWindow(kernel=(2, 1), stride=(2, 2)))
    assert "2x2" in (batch_norm_pool.supports(odd, inputs) or "")
    assert "pool" in (batch_norm_pool.supports(BatchNormTrain(), inputs) or "")
    assert "pool" in (batch_norm.supports(BatchNormTrain(window=PoolWindow()), inputs) or "")
    added = BatchNormTrain(window=PoolWindow(), add=True)
    assert "addend" in (batch_norm_pool.supports(added, (*inputs, inputs[0])) or "")


def test_workspace_is_little() -> None:
    x, pooled, c = Spec((256, 112, 112, 64), "bf16"), Spec((256, 56, 56, 64), "bf16"), Spec((64,))
    op, inputs = BatchNormDgrad(window=PoolWindow()), (pooled, x, c, c, c, c, Spec(pooled.shape, "u2"))
    nbytes = batch_norm_pool.workspace_bytes(op, inputs, op.infer(*inputs), Device("", "sm_90a", 132))
    assert 0 < nbytes < 1 << 20
