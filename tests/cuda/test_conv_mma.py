"""bf16 convolution by mma.sync: on the host's emulation and the null driver, and on the device.

Where the operands are small integers every sum is exact, so the kernels must give the oracle's very bits, ties and all.
Elsewhere the tolerance follows from what is rounded: fp32 sums err by 2**-19 of their terms' magnitudes, and a bf16 result by
2**-8 of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_mma_dgrad, conv_mma_fprop, conv_mma_wgrad
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_wgrad import SUM_KERNEL
from parcnn.cuda.launch import Device, Launcher
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Executor, Slot
from tests import reference
from tests.cuda import conv_problems
from tests.cuda.bf16 import to_bits
from tests.cuda.conv_problems import Arrays, Problem, normal, on_cpu, random_of, tensors_of, ternary
from tests.cuda.host_emulation import runner
from tests.op_runner import run_op

FAMILIES: dict[type[Op], ModuleType] = {
    ConvFprop: conv_mma_fprop,
    ConvDgrad: conv_mma_dgrad,
    ConvWgrad: conv_mma_wgrad,
}
LAUNCHERS = tuple(FAMILIES.values())
H200 = Device("H200", "sm_90a", 132)
KINDS = ("fprop", "dgrad", "wgrad")
POOLS = (None, "max", "avg")
MakeExecutor = Callable[[Sequence[Launcher]], Executor]


def bits_of(op: Op, operands: Arrays) -> Arrays:
    """Operands as the device takes them."""
    return tensors_of(op, operands, "bf16")


def call_of(op: Op, operands: Arrays) -> Call:
    """The call as a launcher sees it, in no place, with as much scratch as any variant asks for."""
    names = {np.dtype(np.uint16): "bf16", np.dtype(np.float32): "f32", np.dtype(np.uint8): "u2"}
    inputs = tuple(Spec(a.shape, names[a.dtype]) for a in bits_of(op, operands))
    return call_on(op, inputs)


def call_on(op: Op, inputs: tuple[Spec, ...], device: Device = H200) -> Call:
    family = FAMILIES[type(op)]
    bare = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))
    scratch = max(
        family.workspace_bytes(op, inputs, bare.output_specs, device, v) for v in family.candidates(bare, device)
    )
    return replace(bare, workspace=Slot(Spec((scratch,), "u8"), "arena") if scratch else None)


def check_exact(
    executor: Executor, op: Op, operands: Arrays, true: Arrays, where: object = "", alias: tuple = ()
) -> None:
    conv_problems.check_exact(executor, op, operands, "bf16", true, where, alias)


SAME = (1, 1, 1, 1)
PROBLEMS = {
    "one pixel": Problem(1, 1, 1, 1, 1, 1, 1),
    "lenet conv 1": Problem(2, 28, 28, 1, 6, 5, 5, (2, 2, 2, 2)),
    "lenet conv 2": Problem(3, 14, 14, 6, 16, 5, 5),
    "lenet linear 1": Problem(7, 5, 5, 16, 120, 5, 5),  # the filter covers the image
    "lenet linear 2": Problem(130, 1, 1, 120, 84, 1, 1),
    "lenet linear 3": Problem(70, 1, 1, 84, 10, 1, 1),
    "stem": Problem(1, 21, 22, 3, 64, 7, 7, (3, 3, 3, 3), (2, 2)),
    "24 channels": Problem(2, 9, 8, 24, 64, 3, 3, SAME),
    "64 channels": Problem(2, 13, 11, 64, 64, 3, 3, SAME),
    "odd blocks of channels": Problem(2, 7, 9, 72, 136, 3, 3, SAME),
    "many channels": Problem(1, 6, 7, 128, 320, 3, 3, SAME),
    "65 channels": Problem(2, 5, 5, 65, 10, 3, 3, SAME),
    "66 channels": Problem(2, 6, 5, 66, 10, 3, 3, SAME),
    "65 filters": Problem(2, 5, 4, 24, 65, 3, 3, SAME),
    "primes": Problem(3, 13, 11, 5, 7, 3, 5, (2, 1, 3, 4), (2, 3)),
    "asymmetric": Problem(2, 8, 9, 16, 8, 2, 4, (0, 3, 2, 1)),
    "larger than the image": Problem(2, 2, 3, 4, 8, 4, 5, (3, 2, 1, 2)),
    "stride larger than the filter": Problem(2, 9, 10, 8, 16, 2, 2, stride=(3, 4)),
    "stride 2": Problem(2, 12, 11, 32, 40, 3, 3, SAME, (2, 2)),
    "stride 2 pointwise": Problem(2, 10, 9, 64, 128, 1, 1, stride=(2, 2)),
    "dilated": Problem(2, 11, 10, 8, 16, 3, 3, (2, 2, 2, 2), dilation=(2, 2)),
    "dilated with stride": Problem(2, 12, 12, 16, 4, 3, 2, (1, 0, 2, 1), (2, 2), (3, 2)),
    "dilated by the stride": Problem(2, 9, 9, 8, 8, 3, 3, stride=(2, 2), dilation=(2, 2)),
    "pointwise": Problem(2, 5, 7, 24, 20, 1, 1),
    "filter as wide as the image": Problem(3, 6, 4, 2, 5, 3, 4),
    "groups": Problem(2, 6, 7, 32, 64, 3, 3, SAME, groups=4),
    "groups of odd channels": Problem(2, 6, 7, 9, 12, 3, 3, SAME, (2, 1), groups=3),
    "depthwise": Problem(2, 6, 5, 7, 7, 3, 3, SAME, groups=7),
    "groups that cover the image": Problem(3, 4, 5, 16, 32, 4, 5, groups=2),
}
CASES = [
    pytest.param(name, kind, pool, id=f"{name} {kind} {pool or 'plain'}")
    for name, problem in PROBLEMS.items()
    for pool in POOLS
    if problem.has(pool)
    for kind in KINDS
]
cases = pytest.mark.parametrize(("name", "kind", "pool"), CASES)


def full(problem: Problem, kind: str, pool: str | None) -> Any:
    """The op with all of its epilogue."""
    more = {"fprop": {"bias": True, "act": "relu"}, "dgrad": {"act": "relu", "add": True}, "wgrad": {"bias": True}}
    return problem.op(kind, pool, **more[kind])


@pytest.fixture
def emulated() -> MakeExecutor:
    """Makes executors on the host's emulation, with twins of the tensor cores' instructions."""
    if not runner.available():
        pytest.skip("the emulation needs g++")
    return lambda launchers: runner.EmulationExecutor(launchers, sm_count=4)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeExecutor:
    """Makes an executor that runs the given launchers."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    cuda = request.getfixturevalue("cuda")

    def on_device(launchers: Sequence[Launcher]) -> Executor:
        monkeypatch.setattr(cuda, "registry", Registry(launchers, REGISTRY.folder))
        return cuda

    return on_device


# On the host's emulation and the device


@cases
def test_problems_are_exact(make: MakeExecutor, name: str, kind: str, pool: str | None) -> None:
    """The default choice, its whole epilogue; in the emulation the smallest tile, which runs in a second."""
    op = full(PROBLEMS[name], kind, pool)
    random = random_of(name, kind)
    operands = PROBLEMS[name].operands(op, ternary(random), random)
    family, true = FAMILIES[type(op)], on_cpu(op, operands)
    executor = make([family])
    if isinstance(executor, runner.EmulationExecutor):
        found = family.candidates(call_of(op, operands), executor.device)
        executor = make([Forced(family, min(found, key=outputs_of))])
    check_exact(executor, op, operands, true)
    for pair in op.inplace():
        check_exact(executor, op, operands, true, alias=(pair,))


def outputs_of(variant: Any) -> tuple[int, int]:
    tile = getattr(variant, "tile", variant)
    return tile.bm * tile.bn, -getattr(variant, "splits", 1)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("name", ["lenet conv 2", "24 channels"])
def test_activations(make: MakeExecutor, name: str, pool: str | None, act: str | None) -> None:
    problem, random = PROBLEMS[name], random_of(name, act)
    for bias in (False, True):
        op = problem.op("fprop", pool, bias=bias, act=act)
        operands = problem.operands(op, normal(random), random)
        check_close(make([conv_mma_fprop]), op, operands)


@pytest.mark.parametrize("act", FROM_OUTPUT)
@pytest.mark.parametrize("name", ["lenet conv 2", "24 channels", "stride 2"])
def test_derivatives(make: MakeExecutor, name: str, act: str) -> None:
    problem, random = PROBLEMS[name], random_of(name, act)
    for add in (False, True):
        op = problem.op("dgrad", act=act, add=add)
        check_close(make([conv_mma_dgrad]), op, problem.operands(op, normal(random), random))


@pytest.mark.parametrize("name", ["stride 2 pointwise", "stride larger than the filter"])
def test_pixels_that_no_output_meets_are_zeros(make: MakeExecutor, name: str) -> None:
    """Without an addend they are written at once."""
    problem, random = PROBLEMS[name], random_of(name)
    op = problem.op("dgrad")
    operands = problem.operands(op, ternary(random), random)
    check_exact(make([conv_mma_dgrad]), op, operands, on_cpu(op, operands))


def check_close(executor: Executor, op: Any, operands: Arrays) -> None:
    conv_problems.check_close(executor, op, operands, "bf16")


@pytest.mark.parametrize("name", ["lenet conv 1", "24 channels"])
def test_not_a_number_and_infinity_pass(make: MakeExecutor, name: str) -> None:
    """Outputs that they reach in float64 are the same ones; every filter element is 1, so that no infinity meets a zero."""
    problem = PROBLEMS[name]
    for pool in POOLS:
        op = problem.op("fprop", pool, act="relu")
        x, w = problem.operands(op, ternary(random_of(name)), random_of(name))
        x[0, 1, 1, 0], x[1, 0, 0, 0], x[1, 4, 4, 0] = np.nan, np.inf, -np.inf
        w[...] = 1
        geometry = {"stride": problem.stride, "pad": problem.pad, "dilation": problem.dilation}
        with np.errstate(invalid="ignore"):
            true = reference.act("relu", reference.conv(x, w, **geometry))
            value, index = reference.pool2x2(true, pool) if pool else (true, None)
        got, *winners = run_op(make([conv_mma_fprop]), op, bits_of(op, [x, w]))
        assert np.isnan(value).any() and np.isinf(value).any()  # noqa: PT018
        np.testing.assert_array_equal(got, to_bits(value + 0.0))
        for winner in winners:
            np.testing.assert_array_equal(winner[~np.isnan(value)], index[~np.isnan(value)])


def test_many_splits_add_up(make: MakeExecutor) -> None:
    problem, random = Problem(4, 12, 12, 8, 16), random_of("splits")
    op = problem.op("wgrad", bias=True)
    operands = problem.operands(op, ternary(random), random)
    true = on_cpu(op, operands)
    tile = conv_mma_wgrad.candidates(call_of(op, operands), H200)[0].tile
    steps = -(-4 * 10 * 10 // tile.bk)
    for splits in {1, 2, 3, steps}:
        check_exact(make([Forced(conv_mma_wgrad, conv_mma_wgrad.Variant(tile, splits))]), op, operands, true, splits)


# Without a GPU


# Together they have every key of every family, in several tiles along every side.
EVERY_VARIANT = (
    "lenet conv 2",
    "stem",
    "odd blocks of channels",
    "65 channels",
    "66 channels",
    "65 filters",
    "primes",
    "groups",
)


@cases
def test_launches_are_right(null_of: CudaExecutor, name: str, kind: str, pool: str | None) -> None:
    """The default choice keeps to its parameter table, the device's limits and the plan's memory."""
    op = full(PROBLEMS[name], kind, pool)
    operands = PROBLEMS[name].operands(op, ternary(random_of(name)), random_of(name))
    executor = CudaExecutor(null_of.driver, registry=Registry(LAUNCHERS, REGISTRY.folder))
    run_op(executor, op, bits_of(op, operands))


def every_call() -> Iterator[Call]:
    for name in EVERY_VARIANT:
        for pool in POOLS:
            for kind in KINDS:
                if PROBLEMS[name].has(pool):
                    op = full(PROBLEMS[name], kind, pool)
                    yield call_of(op, PROBLEMS[name].operands(op, ternary(random_of(name)), random_of(name)))


def test_every_variant_is_a_candidate_and_listed() -> None:
    reached = set()
    for call in every_call():
        family = FAMILIES[type(call.op)]
        for variant in family.candidates(call, H200):
            reached |= {launch.kernel for launch in family.launches(call, H200, variant)}
    listed = {kernel for family in LAUNCHERS for kernel in family.variants()} | {SUM_KERNEL}
    assert reached == listed


def test_candidates_have_names_of_their_own() -> None:
    for call in every_call():
        names = [str(v) for v in FAMILIES[type(call.op)].candidates(call, H200)]
        assert len(set(names)) == len(names)


def test_no_split_is_empty() -> None:
    for call in every_call():
        if isinstance(call.op, ConvWgrad):
            _, sizes = conv_mma_wgrad._sizes(call.op, call.inputs[0].spec, call.outputs[0].spec)
            for tile, splits in conv_mma_wgrad.candidates(call, H200):
                chunk = conv_mma_wgrad._chunk(sizes, tile, splits)
                assert (splits - 1) * chunk < sizes.conv.rows <= splits * chunk


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_other_devices_run_every_bf16_convolution(arch: str) -> None:
    registry, ran = REGISTRY.on(arch), set()
    for call in every_call():
        ran.add(registry.find(call.op, call.input_specs, replace(H200, arch=arch)))
    assert ran >= set(LAUNCHERS)


def test_nothing_is_computed_for_no_images() -> None:
    problem = Problem(0, 6, 6, 8, 8)
    for kind in ("fprop", "dgrad"):
        op = problem.op(kind)
        call = call_of(op, problem.operands(op, ternary(random_of()), random_of()))
        assert FAMILIES[type(op)].launches(call, H200) == []


def test_filter_gradient_of_no_images_is_zero(make: MakeExecutor) -> None:
    problem = Problem(0, 6, 6, 8, 8)
    op = problem.op("wgrad", bias=True)
    dw, db = run_op(make([conv_mma_wgrad]), op, bits_of(op, problem.operands(op, ternary(random_of()), random_of())))
    assert not dw.any()
    assert not db.any()


def test_what_it_refuses() -> None:
    x, w, dy = Spec((2, 8, 8, 64), "bf16"), Spec((64, 3, 3, 64), "bf16"), Spec((2, 6, 6, 64), "bf16")
    huge = Spec((2**20, 8, 8, 64), "bf16")
    refused: list[tuple[Op, tuple[Spec, ...], str]] = [
        (ConvFprop(), (Spec((2, 8, 8, 64)), w), "bf16"),
        (ConvFprop(bias=True), (x, w, Spec((64,), "bf16")), "bias"),
        (ConvFprop(pad=(2**14, 0, 0, 0)), (x, w), "16384"),
        (ConvFprop(), (huge, w), "2**31"),
        (ConvFprop(pool="max", groups=32), (x, Spec((64, 3, 3, 2), "bf16")), "bytes of 2-bit indices"),
        (ConvFprop(pool="avg", groups=64), (x, Spec((64, 3, 3, 1), "bf16")), "depthwise"),
        (ConvFprop(act="gelu", groups=64), (x, Spec((64, 3, 3, 1), "bf16")), "depthwise"),
        (ConvDgrad(image=(8, 8), act="gelu"), (dy, w, x), "gelu"),
        (ConvDgrad(image=(8, 8)), (Spec(dy.shape), w), "bf16"),
        (ConvWgrad(filter=(3, 3)), (x, Spec(dy.shape)), "bf16"),
        (ConvWgrad(filter=(3, 3)), (huge, dy), "2**31"),
        (ConvWgrad(), (Spec((1, 1, 1, 2**16), "bf16"), Spec((1, 1, 1, 2**15), "bf16")), "2**31"),
    ]
    for op, inputs, reason in refused:
        assert reason in (FAMILIES[type(op)].supports(op, inputs) or "supported"), op
    for family in LAUNCHERS:
        for other in FAMILIES:
            if other not in family.OPS:
                assert "is not" in family.supports(other(), (x, w))


# On the device


@pytest.mark.gpu
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY_VARIANT)
def test_every_candidate_is_exact(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, pool: str | None
) -> None:
    problem = replace(PROBLEMS[name], n=5)
    if not problem.has(pool):
        pytest.skip("there is no such call")
    op, random = full(problem, kind, pool), random_of(name, kind)
    operands = problem.operands(op, ternary(random), random)
    true, family = on_cpu(op, operands), FAMILIES[type(op)]
    for variant in family.candidates(call_of(op, operands), cuda.device):
        monkeypatch.setattr(cuda, "registry", Registry([Forced(family, variant)], REGISTRY.folder))
        check_exact(cuda, op, operands, true, variant)


@st.composite
def random_problems(draw: st.DrawFn) -> tuple[Problem, str, str | None]:
    """Any geometry: two thirds in channels of eight, some in groups."""
    unit, groups = draw(st.sampled_from([(8, 1), (8, 1), (1, 1), (1, 1), (8, 3), (3, 4)]))
    c, k = (unit * groups * draw(st.integers(1, 80 if unit == 1 else 18)) for _ in range(2))
    side, taps = st.integers(1, 24), st.integers(1, 5)
    steps = st.sampled_from([1, 1, 1, 2, 3])
    problem = Problem(
        draw(st.integers(1, 5)), draw(side), draw(side), c, k, draw(taps), draw(taps),
        draw(st.tuples(*[st.integers(0, 3)] * 4)), draw(st.tuples(steps, steps)), draw(st.tuples(steps, steps)), groups,
    )  # fmt: skip
    pools = [pool for pool in POOLS if problem.has(pool)]
    return problem, draw(st.sampled_from(KINDS)), draw(st.sampled_from(pools)) if pools else "none"


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
def test_random_problems(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The default choice, its whole epilogue."""
    monkeypatch.setattr(cuda, "registry", Registry(LAUNCHERS, REGISTRY.folder))

    @settings(
        max_examples=75, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(random_problems(), st.integers(0, 2**32 - 1))
    def check(drawn: tuple[Problem, str, str | None], number: int) -> None:
        problem, kind, pool = drawn
        if pool == "none":
            return
        op, random = full(problem, kind, pool), np.random.default_rng(number)
        operands = problem.operands(op, ternary(random), random)
        check_exact(cuda, op, operands, on_cpu(op, operands), problem)

    seeded(seed)(check)()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stem", "64 channels", "many channels", "65 channels", "stride 2", "pointwise"])
def test_real_numbers(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    problem, random = PROBLEMS[name], random_of(name, kind)
    op = problem.op(kind, **({"bias": True} if kind == "fprop" else {}))
    operands, family = problem.operands(op, normal(random), random), FAMILIES[type(op)]
    for variant in family.candidates(call_of(op, operands), cuda.device):
        monkeypatch.setattr(cuda, "registry", Registry([Forced(family, variant)], REGISTRY.folder))
        check_close(cuda, op, operands)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "problem",
    [Problem(300, 7, 7, 64, 128, 3, 3, SAME), Problem(60, 28, 28, 3, 64, 3, 3, SAME), Problem(40, 15, 15, 64, 64)],
    ids=str,
)
def test_many_tiles_give_the_same_bits_each_time(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, problem: Problem, kind: str
) -> None:
    """Blocks and splits of many stages, where rings go round often: eight runs of each candidate."""
    op, random = full(problem, kind, None), random_of(problem, kind)
    operands, family = problem.operands(op, normal(random), random), FAMILIES[type(op)]
    for variant in family.candidates(call_of(op, operands), cuda.device):
        monkeypatch.setattr(cuda, "registry", Registry([Forced(family, variant)], REGISTRY.folder))
        first = run_op(cuda, op, bits_of(op, operands))
        for _ in range(7):
            for again, once in zip(run_op(cuda, op, bits_of(op, operands)), first, strict=True):
                np.testing.assert_array_equal(again, once, err_msg=str(variant))
