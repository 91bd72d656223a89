"""Moving elements."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.kernels import shape as family
from parcnn.ops.base import Spec
from parcnn.ops.program import Executor
from parcnn.ops.shape import Cat, ChannelPad, ChannelSlice, ToChannelsFirst, ToChannelsLast
from tests.cuda.compare import executors, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(family)
element = pytest.mark.parametrize("element", ["f32", "bf16"])


def bits(random: np.random.Generator, element: str, *shape: int) -> np.ndarray:
    """Any bits at all: what is moved stays what it is."""
    if element == "bf16":
        return random.integers(0, 2**16, shape).astype(np.uint16)
    return random.integers(0, 2**32, shape).astype(np.uint32).view(np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@element
@pytest.mark.parametrize("channels", [(1,), (3, 5), (4, 8), (4, 6, 2), (1, 1, 1, 1), (10, 84, 120), (64, 8, 16)])
def test_cat_and_slices(
    executor: Executor, random: np.random.Generator, channels: tuple[int, ...], element: str
) -> None:
    parts = [bits(random, element, 3, 5, 7, c) for c in channels]
    (y,) = run_op(executor, Cat(), parts)
    assert same_bits(y, np.concatenate(parts, axis=-1))
    start = 0
    for part in parts:
        (piece,) = run_op(executor, ChannelSlice(start, start + part.shape[-1]), [y])
        assert same_bits(piece, part)
        start += part.shape[-1]


@element
def test_cat_of_rows(executor: Executor, random: np.random.Generator, element: str) -> None:
    parts = [bits(random, element, 301, 8), bits(random, element, 301, 12)]
    (y,) = run_op(executor, Cat(), parts)
    assert same_bits(y, np.concatenate(parts, axis=-1))


@element
@pytest.mark.parametrize("channels", [(6, 8), (3, 4), (1, 2), (5, 16), (8, 12), (16, 40), (7, 7)])
def test_pads_channels(
    executor: Executor, random: np.random.Generator, channels: tuple[int, int], element: str
) -> None:
    own, whole = channels
    x = bits(random, element, 3, 5, 7, own)
    (y,) = run_op(executor, ChannelPad(whole), [x])
    assert same_bits(np.ascontiguousarray(y[..., :own]), x)
    assert not y[..., own:].view(np.uint8).any()
    (back,) = run_op(executor, ChannelSlice(0, own), [y])
    assert same_bits(back, x)


@element
@pytest.mark.parametrize(
    "image",
    [
        *((1, 1, 1), (5, 5, 16), (7, 9, 33), (64, 33, 3), (1, 1, 2050), (47, 45, 1), (1, 2, 3000)),
        *((2, 2, 4), (4, 4, 120), (6, 6, 20), (9, 4, 64), (32, 2, 64)),  # multiples of 4 both ways
        *((8, 1, 8), (4, 4, 10), (5, 5, 84), (16, 4, 40), (12, 6, 72)),  # of 8 some, one way, none, both
    ],
)
def test_both_orders_of_a_flattened_image(
    executor: Executor, random: np.random.Generator, image: tuple[int, int, int], element: str
) -> None:
    x = bits(random, element, 2, *image)
    (flat,) = run_op(executor, ToChannelsFirst(), [x])
    assert same_bits(flat, x.transpose(0, 3, 1, 2).reshape(2, -1))
    (back,) = run_op(executor, ToChannelsLast(image), [flat])
    assert same_bits(back, x)


def test_refuses() -> None:
    assert "f64" in (family.supports(Cat(), (Spec((1, 4)), Spec((1, 4), "f64"))) or "")
    assert "bf16 and f32" in (family.supports(Cat(), (Spec((1, 4)), Spec((1, 4), "bf16"))) or "")
    assert "u8" in (family.supports(ChannelSlice(0, 2), (Spec((1, 4), "u8"),)) or "")
    assert "2**31" in (family.supports(Cat(), (Spec((2**20, 2**10)), Spec((2**20, 2**10)))) or "")
    assert "tiles" in (family.supports(ToChannelsFirst(), (Spec((1, 2**13, 2**9, 33)),)) or "")
