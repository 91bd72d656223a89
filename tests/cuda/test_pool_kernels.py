"""Pools on their own."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.kernels import pool
from parcnn.cuda.launch import Device
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Spec
from parcnn.ops.pool import AdaptiveAvgDgrad, AdaptiveAvgFprop, PoolDgrad, PoolFprop
from parcnn.ops.program import Call, Executor, Slot
from tests.cuda.bf16 import stored
from tests.cuda.compare import check, executors, normal, random_fixture  # noqa: F401

executor = executors(pool)
element = pytest.mark.parametrize("element", ["f32", "bf16"])

WINDOWS = {
    "2x2": {},
    "3x3 stride 2 padded": {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1)},
    "overlapping": {"kernel": (3, 2), "stride": (1, 1)},
    "gaps": {"kernel": (2, 1), "stride": (3, 4)},
    "gaps, padded": {"kernel": (2, 2), "stride": (3, 2), "pad": (1, 1)},
    "ceil": {"kernel": (3, 3), "stride": (2, 2), "ceil_mode": True},
    "ceil padded": {"kernel": (2, 3), "stride": (3, 2), "pad": (1, 1), "ceil_mode": True},
    "dilated": {"kernel": (3, 2), "stride": (1, 2), "pad": (1, 1), "dilation": (2, 3)},
    "two overlap": {"kernel": (4, 3), "stride": (3, 2), "pad": (2, 1)},
    "two overlap, ceil": {"kernel": (4, 5), "stride": (2, 4), "pad": (1, 2), "ceil_mode": True},
    "large": {"kernel": (5, 4), "stride": (2, 1), "pad": (2, 1)},
    "whole image": {"kernel": (9, 7), "stride": (9, 7)},
}
windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
# One, not a vector, vectors, in bf16 vectors of 8 bytes, more than a warp's lanes and a part of one.
CHANNELS = [1, 3, 8, 84, 130]


@element
@windows
@pytest.mark.parametrize("channels", CHANNELS)
def test_max(
    executor: Executor, random: np.random.Generator, window: dict[str, object], channels: int, element: str
) -> None:
    x = random.integers(-2, 3, (2, 9, 7, channels)).astype(np.float32)  # ties
    x[0, 2, 2, 0] = x[0, 2, 3, 0] = np.nan
    x[1, ..., -1] = -np.inf
    op = PoolFprop("max", **window)
    y, index = check(executor, op, [stored(x, element)], ulps=0)
    check(executor, op.backward((9, 7)), [stored(normal(random, *y.shape), element), index])


@element
@windows
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_max_of_an_activation(
    executor: Executor, random: np.random.Generator, window: dict[str, object], act: str, element: str
) -> None:
    """GELU and SiLU are not monotone: the largest output is not the largest input's."""
    for channels in (3, 12, 16):
        x = stored(normal(random, 2, 9, 7, channels) - 1, element)
        for keep in (False, True) if act not in FROM_OUTPUT else (False,):
            op = PoolFprop("max", **window, act=act, keep=keep)
            y, index, *kept = check(executor, op, [x])
            check(executor, op.backward((9, 7)), [stored(normal(random, *y.shape), element), index])
            assert len(kept) == keep


@element
def test_nan_before_an_activation(executor: Executor, random: np.random.Generator, element: str) -> None:
    x = normal(random, 2, 6, 5, 4)
    x[0, 2, 2, 0] = x[0, 2, 3, 1] = np.nan
    x[1, 0, 0, 2] = np.inf
    for act in ACTIVATIONS:
        check(executor, PoolFprop("max", kernel=(3, 3), act=act, keep=act not in FROM_OUTPUT), [stored(x, element)])


@element
@windows
@pytest.mark.parametrize(
    "divisor", [{}, {"count_include_pad": False}, {"divisor": 5}], ids=["padded", "inside", "given"]
)
def test_avg(
    executor: Executor, random: np.random.Generator, window: dict[str, object], divisor: dict[str, object], element: str
) -> None:
    op = PoolFprop("avg", **window, **divisor)
    for channels in (3, 8, 12):
        (y,) = check(executor, op, [stored(normal(random, 2, 9, 7, channels), element)])
        check(executor, op.backward((9, 7)), [stored(normal(random, *y.shape), element)])


@element
@pytest.mark.parametrize("channels", [3, 8])
def test_nan_and_infinities_in_averages(
    executor: Executor, random: np.random.Generator, channels: int, element: str
) -> None:
    x = normal(random, 1, 6, 5, channels)
    x[0, 0, 0, 0], x[0, 0, 1, -1], x[0, 3, 2, 0], x[0, 3, 3, 0] = np.nan, np.inf, np.inf, -np.inf
    op = PoolFprop("avg", kernel=(3, 2), stride=(1, 1))
    with np.errstate(invalid="ignore"):  # inf - inf
        (y,) = check(executor, op, [stored(x, element)])
        check(executor, AdaptiveAvgFprop((2, 2)), [stored(x, element)])
        check(executor, op.backward((6, 5)), [y])


@element
def test_max_of_a_window_with_32_bit_indices(executor: Executor, random: np.random.Generator, element: str) -> None:
    op = PoolFprop("max", kernel=(17, 18), stride=(2, 3), pad=(3, 4))
    for channels in (2, 4, 8):
        x = random.integers(-9, 9, (1, 20, 23, channels)).astype(np.float32)
        x += np.arange(20, dtype=np.float32)[:, None, None]  # late rows win
        y, index = check(executor, op, [stored(x, element)], ulps=0)
        assert index.dtype == np.int32
        assert index.max() > 255
        check(executor, op.backward((20, 23)), [stored(normal(random, *y.shape), element), index])


@element
def test_many_outputs_with_large_windows(executor: Executor, random: np.random.Generator, element: str) -> None:
    """As many as fill the device: each has one thread."""
    for kind in ("max", "avg"):
        x = stored(normal(random, 1, 69, 68, 1), element)
        check(executor, PoolFprop(kind, kernel=(4, 4), stride=(1, 1)), [x])


@element
@pytest.mark.parametrize("out", [(1, 1), (2, 3), (4, 7), (9, 11)])
@pytest.mark.parametrize("channels", [3, 8, 10, 12])
def test_adaptive(
    executor: Executor, random: np.random.Generator, out: tuple[int, int], channels: int, element: str
) -> None:
    (y,) = check(executor, AdaptiveAvgFprop(out), [stored(normal(random, 2, 9, 7, channels), element)])
    check(executor, AdaptiveAvgDgrad((9, 7)), [stored(normal(random, *y.shape), element)])


@element
def test_smallest(executor: Executor, random: np.random.Generator, element: str) -> None:
    x = stored(normal(random, 1, 1, 1, 1), element)
    check(executor, PoolFprop("max", kernel=(3, 3), stride=(1, 1), pad=(1, 1)), [x])
    check(executor, AdaptiveAvgFprop((1, 1)), [x])


def test_few_outputs_share_their_windows() -> None:
    """A global pool uses many threads an output; a small window does not."""
    device = Device("", "sm_90a", 132)

    def entry(op: PoolFprop, shape: tuple[int, ...]) -> str:
        x = Slot(Spec(shape), "arena")
        call = Call(op, (x,), tuple(Slot(s, "arena") for s in op.infer(x.spec)))
        return pool.launches(call, device)[0].kernel.entry

    assert entry(PoolFprop("avg", kernel=(8, 8), stride=(8, 8)), (64, 8, 8, 512)) == "pool_fprop_shared"
    assert entry(PoolFprop("avg"), (64, 8, 8, 512)) == "pool_fprop"
    assert entry(PoolFprop("avg", kernel=(4, 4), stride=(1, 1)), (64, 99, 99, 64)) == "pool_fprop"


def test_a_maximum_has_no_more_parts_than_its_taps_ask_for() -> None:
    device = Device("", "sm_90a", 132)

    def threads(kind: str, dtype: str, channels: int) -> int:
        op, x = PoolFprop(kind, kernel=(4, 4), stride=(4, 4)), Slot(Spec((512, 4, 4, channels), dtype), "arena")
        call = Call(op, (x,), tuple(Slot(s, "arena") for s in op.infer(x.spec)))
        (launch,) = pool.launches(call, device)
        assert launch.kernel.entry == "pool_fprop_shared"
        return launch.block[0]

    assert threads("max", "bf16", 256) == 2 * 32  # two parts of 16 taps, vectors of 8
    assert threads("max", "f32", 256) == 2 * 64
    assert threads("max", "bf16", 3) == 32
    assert threads("avg", "f32", 256) == 256


def test_windows_apart_read_their_error_once() -> None:
    device = Device("", "sm_90a", 132)

    def entry(op: PoolDgrad | AdaptiveAvgDgrad, *inputs: Spec) -> str:
        slots = tuple(Slot(s, "arena") for s in inputs)
        call = Call(op, slots, tuple(Slot(s, "arena") for s in op.infer(*inputs)))
        return pool.launches(call, device)[0].kernel.entry

    y = Spec((4, 3, 3, 8))
    assert entry(PoolDgrad(image=(7, 6)), y, Spec(y.shape, "u2")) == "pool_dgrad_apart"
    assert entry(AdaptiveAvgDgrad((6, 9)), y) == "pool_dgrad_apart"
    assert entry(AdaptiveAvgDgrad((7, 6)), y) == "pool_dgrad"
    assert entry(PoolDgrad("avg", kernel=(3, 2), image=(7, 6)), y) == "pool_dgrad"
    assert entry(PoolDgrad("avg", kernel=(2, 2), dilation=(2, 1), image=(7, 6)), y) == "pool_dgrad"


def test_refuses() -> None:
    assert "f64" in (pool.supports(PoolFprop(), (Spec((1, 2, 2, 1), "f64"),)) or "")
    assert "u8" in (pool.supports(PoolDgrad("avg", image=(4, 4)), (Spec((1, 2, 2, 1), "u8"),)) or "")
    assert "2**31" in (pool.supports(PoolFprop(), (Spec((2**15, 2**8, 2**8, 1)),)) or "")
    assert "65536" in (pool.supports(PoolFprop("max", (257, 256)), (Spec((1, 300, 300, 8), "bf16"),)) or "")
    assert "2**31" in (pool.supports(AdaptiveAvgFprop((2**16, 1)), (Spec((1, 2**16, 1, 1)),)) or "")


def test_images_of_one_pixel_are_counted_pixel_by_pixel() -> None:
    """2 x 2 pixels to a thread would be four threads to a pixel: more than 2^31 of an image that has fewer elements."""
    dx = Spec((700_000_000, 1, 1, 3), "bf16")
    op = PoolFprop("max", kernel=(4, 4), stride=(2, 2), pad=(2, 2))
    dy, idx = op.infer(dx)
    back = op.backward((1, 1))
    assert pool.supports(back, (dy, idx)) is None
    call = Call(back, (Slot(dy, "arena"), Slot(idx, "arena", dy.nbytes)), (Slot(dx, "arena", 2 * dy.nbytes),))
    (launch,) = pool.launches(call, Device("a GPU", "sm_80", 100))
    assert launch.grid[0] * launch.block[0] < 2**31
