"""Pools on their own."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Spec
from parcnn.ops.pointwise import Act
from parcnn.ops.pool import AdaptiveAvgDgrad, AdaptiveAvgFprop, PoolDgrad, PoolFprop
from tests import reference
from tests.op_runner import run_op

WINDOWS = {
    "2x2": {},
    "3x3 stride 2 padded": {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1)},
    "overlapping": {"kernel": (3, 2), "stride": (1, 1)},
    "gaps": {"kernel": (2, 1), "stride": (3, 4)},
    "ceil": {"kernel": (3, 3), "stride": (2, 2), "ceil_mode": True},
    "ceil padded": {"kernel": (2, 3), "stride": (3, 2), "pad": (1, 1), "ceil_mode": True},
    "whole image": {"kernel": (9, 7), "stride": (9, 7)},
}
windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
SHAPE = (9, 9, 7, 3)  # more images than one piece of work


def windows_of(op: PoolFprop) -> tuple[dict, tuple[int, int]]:
    out = op.output_hw(*SHAPE[1:3])
    return reference.pool_windows(SHAPE[1:3], out, op.kernel, op.stride, op.pad, op.dilation), out


@windows
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_max(
    cpu: CpuExecutor, random: np.random.Generator, window: dict[str, object], dilation: tuple[int, int]
) -> None:
    if dilation != (1, 1) and window.get("kernel") == (9, 7):
        pytest.skip("larger than the image")
    op = PoolFprop("max", **window, dilation=dilation)
    x = random.integers(-2, 3, SHAPE).astype(np.float64)  # ties
    x[0, 2, 2, 0] = np.nan
    x[1] = -np.inf
    taps, out = windows_of(op)
    expected, expected_index = reference.max_pool(x, taps, out)
    y, index = run_op(cpu, op, [x])
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(index, expected_index)

    dy = random.standard_normal(y.shape)
    (dx,) = run_op(cpu, PoolDgrad("max", **window, dilation=dilation, image=SHAPE[1:3]), [dy, index])
    expected_dx = np.zeros(SHAPE)
    for (p, q), places in taps.items():
        for position, row, column in places:
            expected_dx[:, row, column] += np.where(index[:, p, q] == position, dy[:, p, q], 0)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-13, atol=1e-14)


@windows
@pytest.mark.parametrize("channels", [4, 8])
def test_fours_of_channels_have_packed_indices(
    cpu: CpuExecutor, random: np.random.Generator, window: dict[str, object], channels: int
) -> None:
    op = PoolFprop("max", **window)
    x = random.standard_normal((2, 9, 7, channels))
    taps = op.kernel[0] * op.kernel[1]
    y, index = op.infer(Spec(x.shape, "f64"))
    assert index.dtype == ("u2" if taps <= 4 else "u4" if taps <= 16 else "u8")
    assert index.nbytes * {"u2": 4, "u4": 2, "u8": 1}[index.dtype] == y.size
    apart = [run_op(cpu, op, [np.ascontiguousarray(x[..., c : c + 1])]) for c in range(channels)]  # a byte each
    together = run_op(cpu, op, [x])
    for i in (0, 1):
        np.testing.assert_array_equal(together[i], np.concatenate([result[i] for result in apart], axis=3))
    dy = random.standard_normal(y.shape)
    (dx,) = run_op(cpu, op.backward((9, 7)), [dy, together[1]])
    for c in range(channels):
        (expected,) = run_op(cpu, op.backward((9, 7)), [np.ascontiguousarray(dy[..., c : c + 1]), apart[c][1]])
        np.testing.assert_array_equal(dx[..., c : c + 1], expected)


@windows
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_of_an_activation(cpu: CpuExecutor, random: np.random.Generator, window: dict[str, object], act: str) -> None:
    op = PoolFprop("max", **window, act=act, keep=True)
    x = random.standard_normal(SHAPE) - 1
    y, index, kept = run_op(cpu, op, [x])
    (activated,) = run_op(cpu, Act(act), [x])
    taps, out = windows_of(op)
    expected, expected_index = reference.max_pool(x if act in FROM_OUTPUT else activated, taps, out)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(y, run_op(cpu, Act(act), [expected])[0] if act in FROM_OUTPUT else expected)
    np.testing.assert_array_equal(y, run_op(cpu, Act(act), [kept])[0])


@windows
@pytest.mark.parametrize("divisor", [{}, {"count_include_pad": False}, {"divisor": 5}])
def test_avg(
    cpu: CpuExecutor, random: np.random.Generator, window: dict[str, object], divisor: dict[str, object]
) -> None:
    op = PoolFprop("avg", **window, **divisor)
    x = random.standard_normal(SHAPE)
    taps, out = windows_of(op)
    expected = np.zeros((SHAPE[0], *out, SHAPE[3]))
    for (p, q), places in taps.items():
        count = len(places)
        if op.divisor:
            count = op.divisor
        elif op.count_include_pad:
            count = 1
            for start, size, kernel, pad in (
                (p * op.stride[0], SHAPE[1], op.kernel[0], op.pad[0]),
                (q * op.stride[1], SHAPE[2], op.kernel[1], op.pad[1]),
            ):
                count *= min(start + kernel, size + 2 * pad) - start
        expected[:, p, q] = sum(x[:, row, column] for _, row, column in places) / count
    (y,) = run_op(cpu, op, [x])
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-14)

    # The pool is linear: its gradient is its transpose.
    dy = random.standard_normal(y.shape)
    (dx,) = run_op(cpu, PoolDgrad("avg", **window, **divisor, image=SHAPE[1:3]), [dy])
    assert dx.shape == SHAPE
    assert (dx * x).sum() == pytest.approx((dy * y).sum(), rel=1e-12)
    probe = np.zeros(SHAPE)
    probe[3, 4, 5, 1] = 1
    (column,) = run_op(cpu, op, [probe])
    assert dx[3, 4, 5, 1] == pytest.approx((column * dy).sum(), rel=1e-12)


def test_wide_windows_have_wide_indices(cpu: CpuExecutor, random: np.random.Generator) -> None:
    x = random.standard_normal((1, 17, 17, 2)).astype(np.float32)
    y, index = run_op(cpu, PoolFprop("max", kernel=(17, 17), stride=(17, 17)), [x])
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index[0, 0, 0], x.reshape(-1, 2).argmax(axis=0))
    np.testing.assert_array_equal(y[0, 0, 0], x.reshape(-1, 2).max(axis=0))


@pytest.mark.parametrize("out", [(1, 1), (2, 3), (9, 7), (10, 8), (4, 4)])
def test_adaptive(cpu: CpuExecutor, random: np.random.Generator, out: tuple[int, int]) -> None:
    x = random.standard_normal(SHAPE)
    (y,) = run_op(cpu, AdaptiveAvgFprop(out), [x])
    expected = np.zeros((SHAPE[0], *out, SHAPE[3]))
    weights = np.zeros((*out, *SHAPE[1:3]))
    for i, j in np.ndindex(*out):
        rows = slice(int(np.floor(i * 9 / out[0])), int(np.ceil((i + 1) * 9 / out[0])))
        columns = slice(int(np.floor(j * 7 / out[1])), int(np.ceil((j + 1) * 7 / out[1])))
        weights[i, j, rows, columns] = 1 / weights[i, j, rows, columns].size
    expected = np.einsum("pqhw,nhwc->npqc", weights, x)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)
    dy = random.standard_normal(y.shape)
    (dx,) = run_op(cpu, AdaptiveAvgDgrad(SHAPE[1:3]), [dy])
    np.testing.assert_allclose(dx, np.einsum("pqhw,npqc->nhwc", weights, dy), rtol=1e-12, atol=1e-14)
