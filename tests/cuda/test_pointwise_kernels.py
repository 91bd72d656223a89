"""Activations, sums and dropout."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.kernels import pointwise
from parcnn.cuda.launch import Device
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Spec
from parcnn.ops.philox import philox4x32
from parcnn.ops.pointwise import Act, ActDgrad, Add, Cast, Dropout
from parcnn.ops.program import Call, Executor, Slot
from tests.cuda.bf16 import from_bits, stored, to_bits, values_of
from tests.cuda.compare import check, executors, normal, on_cpu, random_fixture  # noqa: F401
from tests.op_runner import run_op

executor = executors(pointwise)
element = pytest.mark.parametrize("element", ["f32", "bf16"])

# No whole vector, a tail, exactly one block of f32 and of bf16, blocks and a tail, channels of networks.
SHAPES = [(1, 1), (3,), (7,), (2, 5, 7, 13), (4096,), (8192,), (9001,), (3, 5, 3, 84), (17, 120)]
STATE = np.array([2, 40, 3, -7, 9, 0, 0, 0], np.int32)


@element
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_act(executor: Executor, random: np.random.Generator, kind: str, element: str) -> None:
    for shape in SHAPES:
        x = 4 * normal(random, *shape)
        x.reshape(-1)[:: max(1, x.size // 3)] = (0.0, 30.0, -30.0, -0.0)[: len(x.reshape(-1)[:: max(1, x.size // 3)])]
        check(executor, Act(kind), [stored(x, element)])
        check(executor, Act(kind), [stored(x, element)], alias=[(0, 0)])


@element
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_goes_through(executor: Executor, random: np.random.Generator, kind: str, element: str) -> None:
    x = normal(random, 5, 7)
    x[2, 3] = np.nan
    x[4, 6] = np.nan  # in the part behind the last whole vector
    (y,) = check(executor, Act(kind), [stored(x, element)])
    np.testing.assert_array_equal(np.isnan(values_of(y)), np.isnan(x))
    check(executor, ActDgrad(kind), [stored(normal(random, 5, 7), element), stored(x, element)])


@pytest.mark.parametrize("kind", ["relu", "tanh", "sigmoid", "silu"])
def test_infinities_in_bf16(executor: Executor, kind: str) -> None:
    with np.errstate(invalid="ignore"):  # silu(-inf) is NaN, as -inf * 0 is
        check(executor, Act(kind), [to_bits(np.array([np.inf, -np.inf, 3e38, -3e38, 1e-40, -1e-40]))])


@element
@pytest.mark.parametrize("alias", [[], [(0, 0)], [(0, 1)]])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_act_dgrad(
    executor: Executor, random: np.random.Generator, kind: str, alias: list[tuple[int, int]], element: str
) -> None:
    for shape in SHAPES:
        saved = 3 * normal(random, *shape)
        if kind in FROM_OUTPUT:
            (saved,) = on_cpu(Act(kind), [saved])
        inputs = [stored(normal(random, *shape), element), stored(saved, element)]
        check(executor, ActDgrad(kind), inputs, alias=alias)


@element
@pytest.mark.parametrize("alias", [[], [(0, 0)], [(0, 1)]])
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_add(
    executor: Executor, random: np.random.Generator, act: str | None, alias: list[tuple[int, int]], element: str
) -> None:
    for shape in SHAPES:
        check(executor, Add(act), [stored(normal(random, *shape), element) for _ in range(2)], alias=alias)


def test_a_bf16_sum_is_rounded_to_nearest_even_once(executor: Executor) -> None:
    a, b = np.full(9, 1.0), np.array([2**-8, 3 * 2**-8, -(2**-9), 2**-8 + 2**-15, 0, np.inf, -np.inf, np.nan, 2**-7])
    sums = np.array([1, 1 + 2**-6, 1, 1 + 2**-7, 1, np.inf, -np.inf, np.nan, 1 + 2**-7])
    (y,) = run_op(executor, Add(), [to_bits(a), to_bits(b)])
    np.testing.assert_array_equal(from_bits(y), sums)


@element
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 2**-32, 1.0])
@pytest.mark.parametrize("alias", [[], [(0, 0)]])
def test_dropout_keeps_the_same_elements_everywhere(
    executor: Executor, random: np.random.Generator, p: float, alias: list[tuple[int, int]], element: str
) -> None:
    op = Dropout(p, stream=3)
    for n in (1, 6, 4099):
        x = stored(np.abs(normal(random, n)) + 1, element)
        words = philox4x32((np.arange(-(-n // 4), dtype=np.uint64), 3, 40, 0), (-7 & 0xFFFFFFFF, 9)).reshape(-1)[:n]
        (y,) = check(executor, op, [x, STATE], alias=alias)
        np.testing.assert_array_equal(y != 0, words.astype(np.float64) >= p * 2**32)


def test_dropout_keeps_a_word_equal_to_the_threshold(executor: Executor, random: np.random.Generator) -> None:
    words = philox4x32((np.arange(4, dtype=np.uint64), 0, 40, 0), (-7 & 0xFFFFFFFF, 9)).reshape(-1)
    p = float(words[5]) / 2**32
    (y,) = check(executor, Dropout(p), [np.ones(16, np.float32), STATE])
    assert y[5] != 0
    np.testing.assert_array_equal(y != 0, words >= words[5])


@element
def test_dropout_drops_nan(executor: Executor, element: str) -> None:
    x = np.full(64, np.nan, np.float32)
    (y,) = run_op(executor, Dropout(0.5), [stored(x, element), STATE])
    (expected,) = on_cpu(Dropout(0.5), [x, STATE])
    np.testing.assert_array_equal(values_of(y), expected)
    assert 0 < np.isnan(expected).sum() < 64


SIZES = [(1,), (3,), (6, 5, 5, 1), (16, 5, 5, 6), (120, 400), (84, 120), (10, 84), (4096,), (4097,), (64, 3, 3, 64)]


@pytest.mark.parametrize("target", ["f32", "bf16"])
@pytest.mark.parametrize("source", ["f32", "bf16"])
@pytest.mark.parametrize("count", [1, 10, 64, 65, 130])  # one launch for 64
def test_cast(executor: Executor, random: np.random.Generator, source: str, target: str, count: int) -> None:
    sizes = SIZES if count == 10 else [(1 + i % 7,) for i in range(count)]
    values = [normal(random, *size) for size in sizes]
    tensors = [stored(v, source) for v in values]
    cast = run_op(executor, Cast(target), tensors)
    for tensor, result in zip(tensors, cast, strict=True):
        np.testing.assert_array_equal(result, stored(values_of(tensor), target))


def test_cast_rounds_to_nearest_even_and_keeps_nan(executor: Executor) -> None:
    values = [
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-23,
        -1 - 2**-8,
        3.4e38,
        -3.4e38,
        np.inf,
        -np.inf,
        np.nan,
        0.0,
        -0.0,
    ]
    values += [2.0**-133, 2.0**-134, 2.0**-134 + 2.0**-149, 2.0**-140]  # subnormals: the least, half of it, more, less
    x = np.array(values, np.float32)
    nan = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # to be kept NaN
    y, kept = run_op(executor, Cast("bf16"), [x, nan])
    np.testing.assert_array_equal(y, to_bits(x))
    np.testing.assert_array_equal(
        from_bits(y),
        [1, 1 + 2**-6, 1 + 2**-7, -1, np.inf, -np.inf, np.inf, -np.inf, np.nan, 0, 0, 2**-133, 0, 2**-133, 0],
    )
    assert np.isnan(from_bits(kept)).all()
    (back,) = run_op(executor, Cast("f32"), [y])
    np.testing.assert_array_equal(back, from_bits(y))
    assert np.signbit(back[10])


def test_every_bf16_survives_the_way_to_f32_and_back(executor: Executor) -> None:
    bits = np.arange(2**16).astype(np.uint16)
    (wide,) = run_op(executor, Cast("f32"), [bits])
    np.testing.assert_array_equal(wide, from_bits(bits))
    (back,) = run_op(executor, Cast("bf16"), [wide])
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(back[number], bits[number])
    np.testing.assert_array_equal(back[~number], 0x7FFF)


def test_cast_of_both_types_at_once(executor: Executor, random: np.random.Generator) -> None:
    values = [normal(random, n) for n in (5, 4100, 1, 9)]
    tensors = [stored(v, kind) for v, kind in zip(values, ("f32", "bf16", "bf16", "f32"), strict=True)]
    for tensor, result in zip(tensors, run_op(executor, Cast("bf16"), tensors), strict=True):
        np.testing.assert_array_equal(result, to_bits(values_of(tensor)))


def test_a_group_is_cast_in_one_launch() -> None:
    def count(tensors: int) -> int:
        specs = tuple(Spec((7,)) for _ in range(tensors))
        slots = (tuple(Slot(s, "arena") for s in some) for some in (specs, Cast("bf16").infer(*specs)))
        return len(pointwise.launches(Call(Cast("bf16"), *slots), Device("", "sm_90a", 132)))

    assert [count(n) for n in (1, 54, 64, 65, 161)] == [1, 1, 1, 2, 3]


def test_refuses() -> None:
    assert "f64" in (pointwise.supports(Add(), (Spec((3,)), Spec((3,), "f64"))) or "")
    assert "bf16 and f32" in (pointwise.supports(Add(), (Spec((3,)), Spec((3,), "bf16"))) or "")
    assert "bf16 and f32" in (pointwise.supports(ActDgrad(), (Spec((3,), "bf16"), Spec((3,)))) or "")
    assert "u8" in (pointwise.supports(Dropout(), (Spec((3,), "u8"), Spec((8,), "i32"))) or "")
    assert "i32" in (pointwise.supports(Cast("bf16"), (Spec((3,)), Spec((3,), "i32"))) or "")
    assert "f64" in (pointwise.supports(Cast("f64"), (Spec((3,)),)) or "")
    assert "2**31" in (pointwise.supports(Cast("bf16"), (Spec((2**31,)),)) or "")
