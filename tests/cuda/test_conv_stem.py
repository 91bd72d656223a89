"""bf16 convolutions of few channels: on the host, on the null driver and on the device. Tolerances as in test_conv_mma."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_stem, conv_stem_sm90
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_wgrad import SUM_KERNEL
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Executor, Slot
from tests import reference
from tests.cuda.bf16 import to_bits
from tests.cuda.host_emulation import runner
from tests.cuda.test_conv_mma import (  # noqa: F401  (fixtures)
    H200,
    SAME,
    MakeExecutor,
    Problem,
    bits_of,
    check_close,
    check_exact,
    emulated,
    make,
    normal,
    on_cpu,
    random_of,
    ternary,
)
from tests.op_runner import run_op

PROBLEMS = {
    "lenet conv 1": Problem(3, 28, 28, 1, 6, 5, 5, (2, 2, 2, 2)),
    "lenet conv 2": Problem(3, 14, 14, 6, 16, 5, 5),
    "resnet stem": Problem(2, 25, 46, 3, 64, 7, 7, (3, 3, 3, 3), (2, 2)),
    "cifarnet stem": Problem(2, 10, 32, 3, 64, 3, 3, SAME),
    "whitening": Problem(2, 31, 33, 3, 24, 2, 2),
    "more filters than a block": Problem(1, 9, 20, 3, 130, 3, 3, SAME),
    "odd filters": Problem(2, 11, 35, 3, 13, 3, 4, (1, 2, 0, 1)),
    "wider than a tile": Problem(1, 6, 300, 1, 8, 3, 5, (1, 2, 1, 2)),
    "odd rows and strides": Problem(2, 23, 21, 5, 20, 4, 3, (2, 0, 1, 3), (3, 3)),
    "steps that differ": Problem(1, 17, 40, 2, 65, 5, 3, (0, 1, 4, 1), (1, 2)),
    "dilated rows": Problem(1, 15, 18, 3, 17, 3, 3, (2, 1, 2, 1), (2, 1), (2, 1)),
    "one tap": Problem(2, 7, 9, 3, 8, 1, 1),
    "a row of taps": Problem(2, 4, 30, 1, 5, 1, 32),
    "larger than the image": Problem(2, 3, 4, 2, 8, 5, 6, (3, 3, 3, 3)),
}
GEOMETRY = {"fprop": {"bias": True, "act": "relu"}, "wgrad": {"bias": True}}
CASES = [
    pytest.param(name, kind, pool, id=f"{name} {kind} {pool or 'plain'}")
    for name, problem in PROBLEMS.items()
    for pool in (None, "max")
    if problem.has(pool)
    for kind in GEOMETRY
]
cases = pytest.mark.parametrize(("name", "kind", "pool"), CASES)


def call_of(op: Any, operands: list[np.ndarray], variant: Any = None) -> Call:
    names = {np.dtype(np.uint16): "bf16", np.dtype(np.float32): "f32", np.dtype(np.uint8): "u2"}
    inputs = tuple(Spec(a.shape, names[a.dtype]) for a in bits_of(op, operands))
    outputs = op.infer(*inputs)
    scratch = conv_stem.workspace_bytes(op, inputs, outputs, H200, variant)
    slots = (tuple(Slot(spec, "arena") for spec in specs) for specs in (inputs, outputs))
    return Call(op, *slots, workspace=Slot(Spec((scratch,), "u8"), "arena") if scratch else None)


@cases
def test_problems_are_exact(make: MakeExecutor, name: str, kind: str, pool: str | None) -> None:  # noqa: F811
    """The best and the worst candidate give the oracle's bits; in the emulation, which takes its time, the best."""
    op = PROBLEMS[name].op(kind, pool, **GEOMETRY[kind])
    random = random_of(name, kind)
    operands = PROBLEMS[name].operands(op, ternary(random), random)
    true = on_cpu(op, operands)
    found = conv_stem.candidates(call_of(op, operands), H200)
    emulates = isinstance(make([conv_stem]), runner.EmulationExecutor)
    for variant in found[:1] if emulates else (found[0], found[-1]):
        check_exact(make([Forced(conv_stem, variant)]), op, operands, true, variant)


@pytest.mark.parametrize("pool", [None, "max"])
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("name", ["lenet conv 2", "cifarnet stem"])
def test_rounds_once(make: MakeExecutor, name: str, act: str | None, pool: str | None) -> None:  # noqa: F811
    problem, random = PROBLEMS[name], random_of(name, act)
    for bias in (False, True):
        op = problem.op("fprop", pool, bias=bias, act=act)
        check_close(make([conv_stem]), op, problem.operands(op, normal(random), random))


def check_not_finite(executor: Executor, name: str) -> None:
    """NaN and infinities reach the outputs that they reach in float64, and no other: not those whose runs end before them.
    Biases too: an infinite one makes NaN of a sum that is the other infinity, and of a window's maximum with it."""
    problem = PROBLEMS[name]
    for pool, act, has_bias in itertools.product((None, "max"), (None, "relu"), (False, True)):
        op = problem.op("fprop", pool, bias=has_bias, act=act)
        x, w, *bias = problem.operands(op, ternary(random_of(name)), random_of(name))
        x[0, 1, 1, 0], x[1, 0, 0, 0], x[1, 4, 4, 0], x[0, 9, 20, -1] = np.nan, np.inf, -np.inf, np.inf
        w[...] = 1
        for b in bias:
            b[:3] = np.inf, -np.inf, np.nan
        geometry = {"stride": problem.stride, "pad": problem.pad, "dilation": problem.dilation}
        with np.errstate(invalid="ignore"):
            true = reference.act(act, reference.conv(x, w, *bias, **geometry))
            value, index = reference.pool2x2(true, pool) if pool else (true, None)
        assert np.isnan(value).any()
        assert np.isinf(value).any()
        got, *winners = run_op(executor, op, bits_of(op, [x, w, *bias]))
        np.testing.assert_array_equal(got, to_bits(value + 0.0))
        for winner in winners:
            np.testing.assert_array_equal(winner[~np.isnan(value)], index[~np.isnan(value)])
        if pool:
            (alone,) = run_op(executor, replace(op, indices=False), bits_of(op, [x, w, *bias]))
            np.testing.assert_array_equal(alone, got)


@pytest.mark.parametrize("name", ["lenet conv 1", "cifarnet stem", "resnet stem"])
def test_not_a_number_and_infinity_pass(make: MakeExecutor, name: str) -> None:  # noqa: F811
    check_not_finite(make([conv_stem]), name)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    c = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 9, 12]))
    s, r = draw(st.integers(1, 32 // c)), draw(st.integers(1, 7))
    dilation = draw(st.integers(1, 2))
    pad = tuple(draw(st.integers(0, 3)) for _ in range(4))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    h = draw(st.integers(max(1, dilation * (r - 1) + 1 - pad[0] - pad[2]), 40))
    w = draw(st.integers(max(1, s - pad[1] - pad[3]), 70))
    return Problem(draw(st.integers(1, 4)), h, w, c, draw(st.integers(1, 80)), r, s, pad, stride, (dilation, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GEOMETRY)
def test_random_problems_are_exact(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(cuda, "registry", Registry([conv_stem], REGISTRY.folder))

    @seeded(7)
    @settings(
        max_examples=150, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(problems(), st.booleans(), st.booleans())
    def run(problem: Problem, pooled: bool, bias: bool) -> None:
        pool = "max" if pooled else None
        assume(problem.has(pool))
        op = problem.op(kind, pool, bias=bias)
        random = random_of(problem)
        operands = problem.operands(op, ternary(random), random)
        assume(conv_stem.supports(op, call_specs(op, operands)) is None)
        check_exact(cuda, op, operands, on_cpu(op, operands), problem)

    run()


def call_specs(op: Any, operands: list[np.ndarray]) -> tuple[Spec, ...]:
    return tuple(Spec(a.shape, "u2" if a.dtype == np.uint8 else "bf16") for a in bits_of(op, operands))


@pytest.mark.gpu
def test_many_tiles_give_the_same_bits_each_time(cuda: CudaExecutor) -> None:
    problem = Problem(40, 64, 63, 3, 64, 7, 7, (3, 3, 3, 3), (2, 2))
    for kind in GEOMETRY:
        op = problem.op(kind, **GEOMETRY[kind])
        operands = bits_of(op, problem.operands(op, normal(random_of(kind)), random_of(kind)))
        first, second = (run_op(cuda, op, operands) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


@cases
def test_launches_are_right(null_of: CudaExecutor, name: str, kind: str, pool: str | None) -> None:
    """Every candidate keeps to its parameter table, the device's limits and the plan's memory."""
    op = PROBLEMS[name].op(kind, pool, **GEOMETRY[kind])
    operands = PROBLEMS[name].operands(op, ternary(random_of(name)), random_of(name))
    for variant in conv_stem.candidates(call_of(op, operands), null_of.device):
        executor = CudaExecutor(null_of.driver, registry=Registry([Forced(conv_stem, variant)], REGISTRY.folder))
        run_op(executor, op, bits_of(op, operands))


def test_every_variant_is_reached_and_listed() -> None:
    reached = set()
    for runs, k, kind, pool in every_form():
        problem = Problem(1, 12, 12, 1, k, 3, 8 * runs, (1, 4 * runs, 1, 4 * runs))
        op = problem.op(kind, pool)
        call = call_of(op, problem.operands(op, ternary(random_of()), random_of()))
        reached |= {launch.kernel for launch in conv_stem.launches(call, H200)}
    assert reached == {*conv_stem.variants(), SUM_KERNEL}


def every_form() -> Iterator[tuple[int, int, str, str | None]]:
    yield from (
        (runs, k, kind, pool) for runs in (1, 2, 3, 4) for k in (8, 64) for kind in GEOMETRY for pool in (None, "max")
    )


def test_the_registry_gives_them_what_they_take() -> None:
    x, w = Spec((256, 32, 32, 3), "bf16"), Spec((64, 3, 3, 3), "bf16")
    for arch, family in (("sm_80", conv_stem), ("sm_90a", conv_stem_sm90), ("sm_120", conv_stem)):
        assert REGISTRY.on(arch).find(ConvFprop(pad=SAME), (x, w), replace(H200, arch=arch)) is family


def test_what_it_refuses() -> None:
    x, w = Spec((2, 16, 16, 3), "bf16"), Spec((64, 3, 3, 3), "bf16")
    plain = ConvFprop(pad=SAME)
    assert conv_stem.supports(plain, (x, w)) is None
    refused = [
        (replace(plain, act="gelu"), (x, w), "gelu"),
        (replace(plain, pool="avg"), (x, w), "avg"),
        (replace(plain, dilation=(1, 2)), (x, w), "dilated"),
        (replace(plain, groups=3), (x, Spec((64, 3, 3, 1), "bf16")), "group"),
        (plain, (Spec(x.shape), Spec(w.shape)), "bf16"),
        (plain, (Spec((2, 16, 16, 8), "bf16"), Spec((64, 3, 3, 8), "bf16")), "eights"),
        (plain, (Spec((2, 16, 16, 3), "bf16"), Spec((64, 3, 11, 3), "bf16")), "at most 32"),
        (ConvFprop(), (Spec((2, 3, 3, 3), "bf16"), w), "fewer than 4"),
        (ConvWgrad(filter=(8, 3), bias=True), (x, Spec((2, 9, 14, 8), "bf16")), "rows"),
        (ConvDgrad(image=(16, 16)), (x, w), "neither"),
    ]
    for op, inputs, reason in refused:
        assert reason in (conv_stem.supports(op, inputs) or ""), op
