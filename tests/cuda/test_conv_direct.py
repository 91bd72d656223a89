"""The direct kernels of few channels behind a pool, in bf16: on the host, on the null driver and on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_dgrad, conv_fprop, conv_wgrad
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.launch import Device, Launcher
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Spec
from parcnn.ops.program import Call, Executor, Slot
from tests import reference
from tests.cuda.bf16 import to_bits
from tests.cuda.compare import WHERE, CheckedEmulation
from tests.cuda.conv_problems import Problem, check_close, check_exact, normal, specs_of, tensors_of, ternary
from tests.cuda.host_emulation import runner
from tests.op_runner import run_op

FAMILIES = {"fprop": conv_fprop, "dgrad": conv_dgrad, "wgrad": conv_wgrad}
H100, ONE_SM = Device("H100", "sm_90a", 132), Device("one multiprocessor", "sm_90a", 1)
MORE = {"fprop": {"bias": True, "act": "relu"}, "dgrad": {"act": "relu"}, "wgrad": {"bias": True}}
PROBLEMS = {
    "lenet conv 1": Problem(3, 28, 28, 1, 6, 5, 5, (2, 2, 2, 2)),
    "lenet conv 2": Problem(3, 14, 14, 6, 16, 5, 5),
    "three channels": Problem(2, 12, 12, 3, 10, 3, 3, (1, 1, 1, 1)),
    "odd sides": Problem(3, 13, 11, 5, 7, 3, 4, (1, 0, 2, 1)),
    "even filter": Problem(2, 9, 10, 2, 9, 4, 4),
    "one pixel": Problem(5, 2, 2, 1, 1, 1, 1),
    "one channel, wide": Problem(1, 6, 70, 1, 5, 3, 2, (1, 1, 1, 0)),
}
MakeExecutor = Callable[..., Executor]


@pytest.fixture(params=WHERE)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeExecutor:
    """Makes an executor that runs one launcher."""
    if request.param == "gpu":
        cuda = request.getfixturevalue("cuda")

        def on_device(launcher: Launcher) -> Executor:
            monkeypatch.setattr(cuda, "registry", Registry([launcher], REGISTRY.folder))
            return cuda

        return on_device
    if not runner.available():
        pytest.skip("the emulation needs g++")
    return lambda launcher, sm_count=4: CheckedEmulation(
        [launcher], descending=request.param == "descending", sm_count=sm_count
    )


def random_of(*what: object) -> np.random.Generator:
    return np.random.default_rng(sum(map(ord, repr(what))))


def call_of(op: Any, operands: list[np.ndarray]) -> Call:
    inputs = specs_of(op, operands, "bf16")
    return Call(op, *(tuple(Slot(spec, "arena") for spec in specs) for specs in (inputs, op.infer(*inputs))))


def variants(family: ModuleType, op: Any, operands: list[np.ndarray], device: Device = H100) -> list[Any]:
    call = call_of(op, operands)
    assert family.supports(op, call.input_specs) is None
    return family.candidates(call, device)


CASES = [
    pytest.param(problem, kind, pool, id=f"{name} {kind} {pool}")
    for name, problem in PROBLEMS.items()
    for kind in FAMILIES
    for pool in (("max", "avg") if kind == "fprop" else ("max",))
    if (name, kind) != ("lenet conv 1", "dgrad")  # nobody wants it, and its windows fill more than shared memory
]
cases = pytest.mark.parametrize(("problem", "kind", "pool"), CASES)


@cases
def test_every_variant_is_exact(make: MakeExecutor, problem: Problem, kind: str, pool: str) -> None:
    """Small integers: the oracle's bits, ties and all. A mean's rounding is that of one sum."""
    op, random = problem.op(kind, pool, **MORE[kind]), random_of(problem)
    operands = problem.operands(op, ternary(random), random)
    found = variants(FAMILIES[kind], op, operands)
    assert found
    for variant in found:
        check_exact(make(Forced(FAMILIES[kind], variant)), op, operands, "bf16")


@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
def test_gradients_of_many_images(kind: str) -> None:
    """More images than a block takes at once, and than there are blocks, of which the last has fewer."""
    if not runner.available():
        pytest.skip("the emulation needs g++")
    problem = Problem(11, 8, 9, 3, 7, 3, 4, (1, 0, 2, 1))
    op, random = problem.op(kind, "max", **MORE[kind]), random_of(kind)
    operands = problem.operands(op, ternary(random), random)
    for variant in variants(FAMILIES[kind], op, operands, ONE_SM):
        check_exact(CheckedEmulation([Forced(FAMILIES[kind], variant)], sm_count=1), op, operands, "bf16")


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_fprop_rounds_once(make: MakeExecutor, act: str | None, pool: str) -> None:
    problem, random = PROBLEMS["lenet conv 2"], random_of(act)
    for bias in (False, True):
        op = problem.op("fprop", pool, bias=bias, act=act)
        operands = problem.operands(op, normal(random), random)
        for variant in variants(conv_fprop, op, operands):
            check_close(make(Forced(conv_fprop, variant)), op, operands, "bf16")


@pytest.mark.parametrize("act", [None, *FROM_OUTPUT])
@pytest.mark.parametrize("add", [False, True])
def test_dgrad_rounds_once(make: MakeExecutor, act: str | None, add: bool) -> None:
    problem, random = PROBLEMS["lenet conv 2"], random_of(act, add)
    op = problem.op("dgrad", "max", act=act, add=add)
    operands = problem.operands(op, normal(random), random)
    for variant in variants(conv_dgrad, op, operands):
        check_close(make(Forced(conv_dgrad, variant)), op, operands, "bf16")


def test_wgrad_sums_in_floats(make: MakeExecutor) -> None:
    problem, random = PROBLEMS["lenet conv 1"], random_of("wgrad")
    op = problem.op("wgrad", "max", bias=True)
    operands = problem.operands(op, normal(random), random)
    for variant in variants(conv_wgrad, op, operands):
        check_close(make(Forced(conv_wgrad, variant)), op, operands, "bf16")


def test_rounded_values_are_compared_and_nan_wins(make: MakeExecutor) -> None:
    """1 + 2**-10 and 1 are one bf16: the first wins, in every kernel of the engine."""
    problem = Problem(1, 4, 4, 2, 6, 1, 1)
    x, w = np.zeros((1, 4, 4, 2)), np.ones((6, 1, 1, 2))
    x[..., 0] = 1
    x[0, 0, 1, 1] = x[0, 3, 3, 1] = 2.0**-10
    x[0, 1, 3, 0] = np.nan
    op = problem.op("fprop", "max")
    true, index = reference.pool2x2(np.broadcast_to(x[..., :1], (1, 4, 4, 6)), "max")
    assert np.isnan(true).any()
    for variant in variants(conv_fprop, op, [x, w]):
        y, idx = run_op(make(Forced(conv_fprop, variant)), op, tensors_of(op, [x, w], "bf16"))
        np.testing.assert_array_equal(y, to_bits(true))
        np.testing.assert_array_equal(idx, index)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
@cases
def test_launches_are_right(arch: str, problem: Problem, kind: str, pool: str) -> None:
    """Every candidate keeps to its parameter table, the device's limits and the plan's memory."""
    null = CudaExecutor.null(arch)
    op, random = problem.op(kind, pool, **MORE[kind]), random_of(problem)
    operands = problem.operands(op, ternary(random), random)
    for variant in variants(FAMILIES[kind], op, operands, null.device):
        registry = Registry([Forced(FAMILIES[kind], variant)], REGISTRY.folder)
        run_op(CudaExecutor(null.driver, registry=registry), op, tensors_of(op, operands, "bf16"))


def test_every_kernel_in_bf16_is_tested() -> None:
    reached = set()
    for case in CASES:
        problem, kind, pool = case.values
        op = problem.op(kind, pool, **MORE[kind])
        operands = problem.operands(op, ternary(random_of(problem)), random_of(problem))
        for variant in variants(FAMILIES[kind], op, operands):
            reached |= {launch.kernel for launch in FAMILIES[kind].launches(call_of(op, operands), H100, variant)}
    listed = {kernel for family in FAMILIES.values() for kernel in family.variants()}
    assert {kernel for kernel in listed if ("ELEMENT", "bf16") in kernel.defines} <= reached


def test_what_they_refuse_in_bf16() -> None:
    x, w = Spec((2, 16, 16, 3), "bf16"), Spec((16, 3, 3, 3), "bf16")
    plain = Problem(2, 16, 16, 3, 16).op("fprop", "max")
    assert conv_fprop.supports(plain, (x, w)) is None
    wide = Spec((2, 16, 16, 64), "bf16"), Spec((16, 3, 3, 64), "bf16")
    for op, inputs in (
        (replace(plain, pool=None), (x, w)),
        (replace(plain, stride=(2, 2)), (x, w)),
        (replace(plain, dilation=(2, 2)), (x, w)),
        (plain, wide),
        (plain, (x, Spec((17, 3, 3, 3), "bf16"))),
    ):
        assert "few channels and filters behind a pool" in (conv_fprop.supports(op, inputs) or ""), op
    assert "all f32 or all bf16" in (conv_fprop.supports(plain, (x, Spec(w.shape))) or "")
    dy, idx = Spec((2, 7, 7, 16), "bf16"), Spec((2, 7, 7, 16), "u2")
    assert "max-pool" in (conv_dgrad.supports(Problem(2, 16, 16, 3, 16).op("dgrad", "avg"), (dy, w)) or "")
    assert "max-pool" in (conv_wgrad.supports(Problem(2, 16, 16, 64, 16).op("wgrad", "max"), (wide[0], dy, idx)) or "")
