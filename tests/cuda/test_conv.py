"""Convolution kernels against the CPU executor, on the host's emulation and on the device; each variant too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest

from parcnn.cuda.kernels import conv_dgrad, conv_dgrad_direct, conv_fprop, conv_wgrad
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.launch import Device
from parcnn.ops.base import ACTIVATIONS, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Executor, Program, Slot
from tests import reference
from tests.cuda.compare import WHERE, CheckedEmulation, MakeExecutor, check, makers, normal, random_fixture  # noqa: F401
from tests.cuda.host_emulation import runner
from tests.op_runner import run_op, unpack

FAMILIES = {ConvFprop: conv_fprop, ConvDgrad: conv_dgrad, ConvWgrad: conv_wgrad}
H100 = Device("H100", "sm_90a", 132)


@dataclass(frozen=True)
class Problem:
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.stride, "pad": self.pad, "dilation": self.dilation}

    def output_hw(self, pool: str | None) -> tuple[int, int]:
        return ConvFprop(**self.geometry, pool=pool).pooled_hw(self.h, self.w, self.r, self.s)

    def tensors(self, random: np.random.Generator, pool: str | None) -> dict[str, np.ndarray]:
        out = (self.n, *self.output_hw(pool), self.k)
        return {
            "x": normal(random, self.n, self.h, self.w, self.c),
            "w": normal(random, self.k, self.r, self.s, self.c) / np.sqrt(np.float32(self.r * self.s * self.c)),
            "b": normal(random, self.k),
            "dy": normal(random, *out),
            "idx": random.integers(0, 4, out).astype(np.uint8),
        }


PROBLEMS = {
    "lenet conv 1": Problem(2, 28, 28, 1, 6, 5, 5, pad=(2, 2, 2, 2)),
    "lenet conv 2": Problem(3, 14, 14, 6, 16, 5, 5),
    "lenet linear 1": Problem(7, 5, 5, 16, 120, 5, 5),  # the filter covers the image
    "lenet linear 2": Problem(7, 1, 1, 120, 84, 1, 1),
    "lenet linear 3": Problem(7, 1, 1, 84, 10, 1, 1),
    "cifarnet first": Problem(1, 10, 9, 3, 64, 3, 3, pad=(1, 1, 1, 1)),
    "cifarnet second": Problem(1, 8, 8, 64, 64, 3, 3, pad=(1, 1, 1, 1)),
    "one pixel": Problem(1, 1, 1, 1, 1, 1, 1),
    "65 channels": Problem(2, 5, 5, 65, 10, 3, 3, pad=(1, 1, 1, 1)),
    "65 filters": Problem(2, 5, 4, 24, 65, 3, 3, pad=(1, 1, 1, 1)),
    "primes": Problem(3, 13, 11, 5, 7, 3, 5, stride=(2, 3), pad=(2, 1, 3, 4)),
    "larger than the image, asymmetric": Problem(2, 2, 3, 4, 8, 4, 5, pad=(3, 2, 1, 2)),
    "stride larger than the filter": Problem(2, 9, 10, 3, 4, 2, 2, stride=(3, 4)),
    "dilated": Problem(2, 11, 10, 8, 12, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "dilated with stride": Problem(2, 12, 12, 4, 4, 3, 2, stride=(2, 2), pad=(1, 0, 2, 1), dilation=(3, 2)),
    "dilated by the stride": Problem(2, 9, 9, 4, 8, 3, 3, stride=(2, 2), dilation=(2, 2)),
    "pointwise": Problem(2, 5, 7, 24, 20, 1, 1),
    "pointwise with stride": Problem(2, 5, 6, 8, 16, 1, 1, stride=(2, 2)),
    "even filter": Problem(2, 9, 10, 2, 9, 4, 4),
    "filter as wide as the image": Problem(3, 6, 4, 2, 5, 3, 4),
}
pools = pytest.mark.parametrize("pool", [None, "max", "avg"])
# Together they have a vector and a scalar form of each operand; several tiles along every side, none of them full.
EVERY_VARIANT = {
    "few channels": Problem(3, 13, 12, 6, 18, 5, 4, pad=(1, 2, 0, 1)),
    "one channel": Problem(3, 15, 14, 1, 6, 5, 5, pad=(2, 2, 2, 2)),
    "vectors": Problem(3, 9, 7, 20, 68, 3, 3, pad=(1, 1, 1, 1)),
    "scalar channels": Problem(3, 9, 7, 5, 72, 3, 3, pad=(1, 1, 1, 1)),
    "linear": Problem(19, 1, 1, 84, 40, 1, 1),
    "scalar linear": Problem(19, 1, 1, 84, 10, 1, 1),
}


def with_pools(problems: dict[str, Problem], *pools: str | None) -> pytest.MarkDecorator:
    """Each problem with each of the pools that leave it an output."""
    cases = [(p, pool, f"{name} {pool or 'plain'}") for name, p in problems.items() for pool in pools]
    fit = [pytest.param(p, pool, id=name) for p, pool, name in cases if 0 not in p.output_hw(pool)]
    return pytest.mark.parametrize(("problem", "pool"), fit)


make_fixture = makers()


@pytest.fixture
def executor(make: MakeExecutor) -> Executor:
    return make([conv_fprop, conv_dgrad, conv_wgrad])


def call_of(op: Op, arrays: Sequence[np.ndarray]) -> Call:
    """The call as a launcher sees it, in no place."""
    specs = [Spec(a.shape, "u2" if a.dtype == np.uint8 else "f32") for a in arrays]
    return Call(op, tuple(Slot(s, "arena") for s in specs), tuple(Slot(s, "arena") for s in op.infer(*specs)))


def calls(problem: Problem, pool: str | None, tensors: dict[str, np.ndarray]) -> dict[str, tuple[Op, list[np.ndarray]]]:
    """Forward, input gradient and filter gradient with bias."""
    x, w, b, dy, idx = tensors.values()
    routes = [idx] if pool == "max" else []
    shape = {**problem.geometry, "pool": pool}
    return {
        "fprop": (ConvFprop(**shape, bias=True, act="relu"), [x, w, b]),
        "dgrad": (ConvDgrad(**shape, image=(problem.h, problem.w)), [dy, w, *routes]),
        "wgrad": (ConvWgrad(**shape, bias=True, filter=(problem.r, problem.s)), [x, dy, *routes]),
    }


def running_sum_ulps(problem: Problem, kind: str) -> float:
    """What one running sum may add to the error: it walks at random, a third of a ulp each of its terms.

    The CPU sums taps or blocks apart, which errs less.
    """
    taps = problem.r * problem.s
    p, q = problem.output_hw(None)
    terms = {"fprop": taps * problem.c, "dgrad": taps * problem.k, "wgrad": problem.n * p * q}[kind]
    return 4 + np.sqrt(terms) / 3


@with_pools(PROBLEMS, None, "max", "avg")
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_problems(
    executor: Executor, random: np.random.Generator, problem: Problem, pool: str | None, kind: str
) -> None:
    op, arrays = calls(problem, pool, problem.tensors(random, pool))[kind]
    check(executor, op, arrays, ulps=running_sum_ulps(problem, kind))


@with_pools(EVERY_VARIANT, None, "max")
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_every_variant(
    make: MakeExecutor, random: np.random.Generator, problem: Problem, pool: str | None, kind: str
) -> None:
    op, arrays = calls(problem, pool, problem.tensors(random, pool))[kind]
    family = FAMILIES[type(op)]
    variants = family.candidates(call_of(op, arrays), H100)
    assert len(variants) > 1
    for variant in variants:
        check(make([Forced(family, variant)]), op, arrays, ulps=running_sum_ulps(problem, kind))


def test_every_variant_is_tested() -> None:
    """The problems above reach every kernel that a launcher may name."""
    reached = set()
    for problem in EVERY_VARIANT.values():
        for pool in (None, "max"):
            if 0 not in problem.output_hw(pool):
                for op, arrays in calls(problem, pool, problem.tensors(np.random.default_rng(0), pool)).values():
                    call, family = call_of(op, arrays), FAMILIES[type(op)]
                    for variant in family.candidates(call, H100):
                        reached |= {launch.kernel for launch in family.launches(call, H100, variant)}
    listed = {kernel for family in FAMILIES.values() for kernel in family.variants()}
    assert {kernel for kernel in listed if ("ELEMENT", "bf16") not in kernel.defines} - reached == set()


LENET_CONV_1, LENET_CONV_2 = PROBLEMS["lenet conv 1"], PROBLEMS["lenet conv 2"]
CIFARNET_FIRST = Problem(0, 32, 32, 3, 64, 3, 3, pad=(1, 1, 1, 1))
CIFARNET_MIDDLE = Problem(0, 8, 8, 128, 128, 3, 3, pad=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("problem", "pool", "kind", "expected"),
    [
        (LENET_CONV_1, "max", "fprop", ["direct 6"] * 3),
        (LENET_CONV_1, "max", "wgrad", ["direct 6x1 in 64", "direct 6x1 in 256", "direct 6x1 in 256"]),
        (LENET_CONV_2, "max", "fprop", ["64x16x32/4x4/4/3", "direct 8", "direct 8"]),
        (LENET_CONV_2, "max", "dgrad", ["direct 4", "direct 7", "direct 7"]),
        (LENET_CONV_2, "max", "wgrad", ["direct 4x5 in 64", "direct 4x5 in 256", "direct 4x5 in 256"]),
        (LENET_CONV_1, None, "fprop", ["128x16x16/4x4/2/3"] * 3),
        (LENET_CONV_1, None, "wgrad", [f"8x32x64/4x4/16/3 in {splits}" for splits in (262, 262, 396)]),
        (LENET_CONV_2, None, "fprop", ["64x16x32/4x4/4/3", "64x16x32/4x4/4/3", "128x16x16/4x4/2/3"]),
        (LENET_CONV_2, None, "dgrad", ["64x8x32/4x4/4/3"] * 3),
        (LENET_CONV_2, None, "wgrad", [f"64x32x32/4x4/2/3 in {splits}" for splits in (25, 52, 105)]),
        (CIFARNET_FIRST, "max", "fprop", [None, "64x64x16/8x4/1/4", None]),
        (CIFARNET_FIRST, "max", "wgrad", [None, "direct 8x1 in 256", None]),
        (CIFARNET_MIDDLE, None, "fprop", [None, "128x64x16/16x8/1/3", None]),
        (CIFARNET_MIDDLE, None, "dgrad", [None, "128x64x16/8x8/1/3", None]),
        (CIFARNET_MIDDLE, None, "wgrad", [None, "128x128x16/16x8/1/3 in 29", None]),
    ],
)
def test_choices(problem: Problem, pool: str | None, kind: str, expected: list[str | None]) -> None:
    """What a GPU of 132 multiprocessors takes at batches of 64, 512 and 4096; to change on measurements alone."""
    for batch, choice in zip((64, 512, 4096), expected, strict=True):
        if choice:
            op, specs = call_specs(replace(problem, n=batch), pool, kind)
            slots = [tuple(Slot(s, "arena") for s in part) for part in (specs, op.infer(*specs))]
            assert str(FAMILIES[type(op)].candidates(Call(op, *slots), H100)[0]) == choice, f"batch {batch}"


def call_specs(problem: Problem, pool: str | None, kind: str) -> tuple[Op, list[Spec]]:
    """An op with bias and its operands, no tensor of which is made."""
    shape = {**problem.geometry, "pool": pool}
    x, w = Spec((problem.n, problem.h, problem.w, problem.c)), Spec((problem.k, problem.r, problem.s, problem.c))
    fprop = ConvFprop(**shape, bias=True, act="relu")
    b = Spec((problem.k,))
    dy, *idx = fprop.infer(x, w, b)
    return {
        "fprop": (fprop, [x, w, b]),
        "dgrad": (ConvDgrad(**shape, image=(problem.h, problem.w)), [dy, w, *idx]),
        "wgrad": (ConvWgrad(**shape, bias=True, filter=(problem.r, problem.s)), [x, dy, *idx]),
    }[kind]


@pools
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("name", ["lenet conv 2", "cifarnet first"])
def test_fprop_epilogues(
    executor: Executor, random: np.random.Generator, pool: str | None, act: str | None, name: str
) -> None:
    problem = PROBLEMS[name]
    tensors = problem.tensors(random, pool)
    x, w, b = (tensors[k] for k in "xwb")
    for bias in ([], [b]):
        check(executor, ConvFprop(**problem.geometry, pool=pool, act=act, bias=bool(bias)), [x, w, *bias])


@pytest.mark.parametrize(("name", "pool"), [("few channels", "max"), ("vectors", "avg"), ("linear", None)])
@pytest.mark.parametrize("act", ["gelu", "sigmoid"])
def test_every_fprop_variant_has_activations(
    make: MakeExecutor, random: np.random.Generator, name: str, pool: str | None, act: str
) -> None:
    problem = EVERY_VARIANT[name]
    tensors = problem.tensors(random, pool)
    op, arrays = ConvFprop(**problem.geometry, pool=pool, act=act, bias=True), [tensors[k] for k in "xwb"]
    for variant in conv_fprop.candidates(call_of(op, arrays), H100):
        check(make([Forced(conv_fprop, variant)]), op, arrays, ulps=running_sum_ulps(problem, "fprop"))


@pytest.mark.parametrize("name", ["lenet conv 2", "cifarnet second", "primes", "lenet linear 1"])
@pytest.mark.parametrize("act", [None, "relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("add", [False, True])
def test_dgrad_epilogues(
    executor: Executor, random: np.random.Generator, name: str, act: str | None, add: bool
) -> None:
    problem = PROBLEMS[name]
    tensors = problem.tensors(random, None)
    saved = [np.maximum(np.tanh(tensors["x"]), 0 if act == "relu" else -1)] if act else []
    addend = [normal(random, *tensors["x"].shape)] if add else []
    op = ConvDgrad(**problem.geometry, image=(problem.h, problem.w), act=act, add=add)
    for alias in ((), *((pair,) for pair in op.inplace())):
        check(executor, op, [tensors["dy"], tensors["w"], *saved, *addend], alias=alias)


@pools
def test_wgrad_without_bias_gives_the_same_bits(
    executor: Executor, random: np.random.Generator, pool: str | None
) -> None:
    problem = PROBLEMS["lenet conv 2"]
    op, arrays = calls(problem, pool, problem.tensors(random, pool))["wgrad"]
    without = ConvWgrad(**{**op.__dict__, "bias": False})
    with_bias, _ = run_op(executor, op, arrays)
    (dw,) = check(executor, without, arrays)
    if conv_wgrad.candidates(call_of(op, arrays), executor.device) == conv_wgrad.candidates(
        call_of(without, arrays), executor.device
    ):
        np.testing.assert_array_equal(dw, with_bias)


def test_wgrad_sums_in_a_fixed_order(make: MakeExecutor, random: np.random.Generator) -> None:
    problem = Problem(5, 12, 12, 4, 8, 3, 3)
    op, arrays = calls(problem, None, problem.tensors(random, None))["wgrad"]
    best = conv_wgrad.candidates(call_of(op, arrays), H100)[0]
    results = []
    for splits in (1, 2, 3, 7):
        executor = make([Forced(conv_wgrad, conv_wgrad.Variant(best.form, splits))])
        results.append(check(executor, op, arrays))
        for first, again in zip(results[-1], run_op(executor, op, arrays), strict=True):
            np.testing.assert_array_equal(first, again)
    assert any((a[0] != b[0]).any() for a, b in pairwise(results)), "the number of splits has no effect"


@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
def test_direct_gradients_of_many_images(random: np.random.Generator, kind: str) -> None:
    """More images than a block takes at once, and than there are blocks, of which the last has fewer."""
    if not runner.available():
        pytest.skip("the emulation needs g++")
    problem = Problem(11, 8, 9, 3, 7, 3, 4, pad=(1, 0, 2, 1))
    op, arrays = calls(problem, "max", problem.tensors(random, "max"))[kind]
    family, one_sm = FAMILIES[type(op)], Device("one multiprocessor", "sm_90a", 1)
    variants = [v for v in family.candidates(call_of(op, arrays), one_sm) if "direct" in str(v)]
    assert len(variants) > 1
    for variant in variants:
        executor = CheckedEmulation([Forced(family, variant)], sm_count=one_sm.sm_count)
        check(executor, op, arrays, ulps=running_sum_ulps(problem, kind))


@pytest.mark.parametrize("act", [None, "relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("add", [False, True])
def test_direct_dgrad_epilogues(make: MakeExecutor, random: np.random.Generator, act: str | None, add: bool) -> None:
    problem = PROBLEMS["lenet conv 2"]
    tensors = problem.tensors(random, "max")
    saved = [np.maximum(np.tanh(tensors["x"]), 0 if act == "relu" else -1)] if act else []
    addend = [normal(random, *tensors["x"].shape)] if add else []
    op = ConvDgrad(image=(problem.h, problem.w), pool="max", act=act, add=add)
    for variant in conv_dgrad_direct.DIRECTS:
        executor = make([Forced(conv_dgrad, variant)])
        for alias in ((), *((pair,) for pair in op.inplace())):
            operands = [tensors["dy"], tensors["w"], tensors["idx"], *saved, *addend]
            check(executor, op, operands, alias=alias, ulps=running_sum_ulps(problem, "dgrad"))


@pytest.mark.parametrize("kernel", ["tile", "direct"])
@pytest.mark.parametrize("filters", [6, 16])
def test_ties_go_to_the_first_and_nan_wins(
    make: MakeExecutor, random: np.random.Generator, kernel: str, filters: int
) -> None:
    problem = Problem(2, 9, 11, 3, filters, 3, 3, pad=(1, 1, 1, 1))
    x = random.integers(-1, 2, (2, 9, 11, 3)).astype(np.float32)  # small integers: exact sums, many ties
    x[1, 4, 5, 1] = np.nan
    w = random.integers(-1, 2, (filters, 3, 3, 3)).astype(np.float32)
    op = ConvFprop(**problem.geometry, pool="max", act="relu")
    variants = conv_fprop.candidates(call_of(op, [x, w]), H100)
    of_kind = [v for v in variants if isinstance(v, conv_fprop.Direct) == (kernel == "direct")]
    y, idx = run_op(make([Forced(conv_fprop, of_kind[0])]), op, [x, w])
    expected, index = reference.pool2x2(reference.act("relu", reference.conv(x, w, **problem.geometry)), "max")
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(idx[~np.isnan(expected)], index[~np.isnan(expected)])


def test_unused_bits_of_an_index_byte_are_zero(make: MakeExecutor, random: np.random.Generator) -> None:
    problem = Problem(2, 8, 8, 3, 6, 3, 3)
    x, w, *_ = problem.tensors(random, "max").values()
    op = ConvFprop(pool="max")
    for variant in conv_fprop.candidates(call_of(op, [x, w]), H100):
        executor = make([Forced(conv_fprop, variant)])
        packed = packed_indices(executor, op, x, w)
        assert not (packed[..., 1] >> 4).any()
        np.testing.assert_array_equal(unpack(packed, (2, 3, 3, 6), 4), run_op(executor, op, [x, w])[1])


def packed_indices(executor: Executor, op: ConvFprop, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The indices as they lie in memory."""
    specs = [Spec(x.shape), Spec(w.shape)]
    places, total = [], 0
    for spec in (*specs, *op.infer(*specs)):
        places.append(Slot(spec, "arena", total))
        total += -(-spec.nbytes // 256) * 256
    region = executor.region("arena", total)
    region.write(np.full(total, 0xFF, np.uint8))
    region.write(x, places[0].offset)
    region.write(w, places[1].offset)
    call = Call(op, tuple(places[:2]), tuple(places[2:]), layer="test")
    executor.load(Program("fprop", (call,), {"arena": total}, replay=False), {"arena": region}).run()
    executor.synchronize()
    return region.read(places[3].spec, places[3].offset)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.__name__.rsplit(".")[-1])
def test_refusals_say_why(family: ModuleType) -> None:
    huge, side = Spec((2**17, 128, 128, 1)), Spec((1, 1, 2**14, 4))
    w = Spec((4, 1, 1, 4))
    ops = {conv_fprop: ConvFprop(), conv_wgrad: ConvWgrad(), conv_dgrad: ConvDgrad(image=(1, 2**14))}
    op = ops[family]
    second = side if family is conv_wgrad else w
    first = huge if family is not conv_dgrad else Spec((2**17, 128, 128, 4))
    assert "2**31" in family.supports(op, (first, second if family is not conv_wgrad else huge))
    assert "16384" in family.supports(op, (side, second))
    assert "f64" in family.supports(op, (Spec((1, 1, 1, 4), "f64"), w))


@pytest.mark.parametrize("filters", [10, 12])
def test_a_grid_has_room_for_a_linear_layer_on_a_large_image(filters: int) -> None:
    x, w, y = Spec((2, 224, 224, 64)), Spec((filters, 224, 224, 64)), Spec((2, 1, 1, filters))
    wide = {
        conv_fprop: (ConvFprop(), (Spec((2, 1, 1, 8)), Spec((224 * 224 * 64, 1, 1, 8)))),
        conv_dgrad: (ConvDgrad(image=(224, 224)), (y, w)),
        conv_wgrad: (ConvWgrad(filter=(224, 224)), (x, y)),
    }
    for family, (op, specs) in wide.items():
        assert family.supports(op, specs) is None
        slots = [tuple(Slot(spec, "arena") for spec in side) for side in (specs, op.infer(*specs))]
        call = Call(op, slots[0], slots[1], workspace=Slot(Spec((2**30,), "u8"), "arena"))
        for variant in family.candidates(call, H100):
            for launch in family.launches(call, H100, variant):
                assert max(launch.grid[1:]) < 2**16, (family.__name__, variant)


def test_more_blocks_than_a_grid_has_are_refused() -> None:
    y, w, x = Spec((1, 1, 1, 4)), Spec((4, 1, 1, 2**23)), Spec((1, 1, 1, 2**23))
    assert "4194240 channels" in conv_dgrad.supports(ConvDgrad(image=(1, 1)), (y, w))
    assert "4194240 elements" in conv_wgrad.supports(ConvWgrad(filter=(1, 1)), (x, y))
    assert "4194240 filters" in conv_fprop.supports(ConvFprop(), (y, Spec((2**23, 1, 1, 4))))
    assert "65535" in conv_dgrad.supports(
        ConvDgrad(image=(600, 600), stride=(300, 300)), (Spec((1, 2, 2, 4)), Spec((4, 1, 1, 4)))
    )


def test_dgrad_refuses_an_activation_whose_derivative_needs_the_input() -> None:
    reason = conv_dgrad.supports(ConvDgrad(image=(1, 1), act="gelu"), (Spec((1, 1, 1, 4)), Spec((4, 1, 1, 4))))
    assert "gelu" in reason
