"""bf16 convolution of stride 1 over lines of positions: on the host's emulation and the null driver, and on the device.

What is exact and what is tolerated is as in test_conv_mma.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_mma_lines
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.launch import Device
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Slot
from tests.cuda.conv_problems import Arrays, Problem, normal, on_cpu, random_of, ternary
from tests.cuda.host_emulation import runner
from tests.cuda.test_conv_mma import MakeExecutor, bits_of, check_close, check_exact, emulated, full, make  # noqa: F401
from tests.op_runner import run_op

H200 = Device("H200", "sm_90a", 132)
KINDS = ("fprop", "dgrad")
SAME = (1, 1, 1, 1)
PROBLEMS = {
    "24 channels": Problem(2, 9, 8, 24, 64, 3, 3, SAME),
    "64 channels": Problem(2, 13, 11, 64, 64, 3, 3, SAME),
    "three slabs": Problem(3, 7, 7, 96, 40, 3, 3),
    "several tiles of channels": Problem(2, 9, 9, 40, 136, 5, 5, (2, 2, 2, 2)),
    "stripes": Problem(1, 5, 150, 16, 72, 3, 3, SAME),
    "asymmetric": Problem(2, 8, 9, 16, 8, 2, 4, (0, 3, 2, 1)),
    "dilated": Problem(2, 11, 10, 8, 16, 3, 3, (2, 2, 2, 2), dilation=(2, 2)),
    "groups": Problem(2, 6, 7, 32, 64, 3, 3, SAME, groups=4),
    "larger than the image": Problem(2, 2, 3, 8, 8, 4, 5, (3, 2, 1, 2)),
    "more padding than taps reach": Problem(1, 4, 5, 8, 40, 2, 2, (3, 3, 2, 3)),
    "a line": Problem(5, 1, 30, 8, 8, 1, 4, (0, 1, 0, 2)),
}
cases = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in PROBLEMS for kind in KINDS])


def call_of(op: Op, operands: Arrays) -> Call:
    names = {np.dtype(np.uint16): "bf16", np.dtype(np.float32): "f32"}
    inputs = tuple(Spec(a.shape, names[a.dtype]) for a in bits_of(op, operands))
    return Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))


@cases
def test_problems_are_exact(make: MakeExecutor, name: str, kind: str) -> None:  # noqa: F811
    """Every tile, the whole epilogue and none."""
    for op in (full(PROBLEMS[name], kind, None), PROBLEMS[name].op(kind)):
        random = random_of(name, kind)
        operands = PROBLEMS[name].operands(op, ternary(random), random)
        true = on_cpu(op, operands)
        for tile in conv_mma_lines.candidates(call_of(op, operands), H200):
            executor = make([Forced(conv_mma_lines, tile)])
            check_exact(executor, op, operands, true, tile)
            if isinstance(executor, runner.EmulationExecutor):
                break
    op = full(PROBLEMS[name], kind, None)
    operands = PROBLEMS[name].operands(op, ternary(random), random)
    for pair in op.inplace():
        check_exact(make([conv_mma_lines]), op, operands, on_cpu(op, operands), alias=(pair,))


@pytest.mark.parametrize("tile", conv_mma_lines.TILES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_exact(make: MakeExecutor, kind: str, tile: conv_mma_lines.Variant) -> None:  # noqa: F811
    problem, random = replace(PROBLEMS["64 channels"], n=3), random_of(kind)
    op = full(problem, kind, None)
    operands = problem.operands(op, ternary(random), random)
    check_exact(make([Forced(conv_mma_lines, tile)]), op, operands, on_cpu(op, operands))


@cases
def test_launches_are_right(null_of: CudaExecutor, name: str, kind: str) -> None:
    """Launches keep to the kernels' parameter tables, the device's limits and the plan's memory."""
    op, random = full(PROBLEMS[name], kind, None), random_of(name)
    operands = PROBLEMS[name].operands(op, ternary(random), random)
    for tile in conv_mma_lines.candidates(call_of(op, operands), null_of.device):
        forced = Registry([Forced(conv_mma_lines, tile)], REGISTRY.folder)
        run_op(CudaExecutor(null_of.driver, registry=forced), op, bits_of(op, operands))


def test_every_variant_is_listed() -> None:
    reached = set()
    for kind in KINDS:
        op = PROBLEMS["64 channels"].op(kind)
        call = call_of(op, PROBLEMS["64 channels"].operands(op, ternary(random_of()), random_of()))
        for tile in conv_mma_lines.candidates(call, H200):
            reached |= {launch.kernel for launch in conv_mma_lines.launches(call, H200, tile)}
    assert reached == set(conv_mma_lines.variants())


def test_nothing_is_computed_for_no_images() -> None:
    problem = Problem(0, 6, 6, 8, 8)
    for kind in KINDS:
        op = problem.op(kind)
        assert conv_mma_lines.launches(call_of(op, problem.operands(op, ternary(random_of()), random_of())), H200) == []


def test_what_it_refuses() -> None:
    x, w, dy = Spec((2, 8, 8, 64), "bf16"), Spec((64, 3, 3, 64), "bf16"), Spec((2, 6, 6, 64), "bf16")
    refused: list[tuple[Op, tuple[Spec, ...], str]] = [
        (ConvWgrad(filter=(3, 3)), (x, dy), "neither"),
        (ConvFprop(stride=(2, 1)), (x, w), "stride"),
        (ConvFprop(pool="max"), (x, w), "pool"),
        (ConvFprop(), (x, Spec((64, 1, 1, 64), "bf16")), "taps"),
        (ConvFprop(), (x, Spec((60, 3, 3, 64), "bf16")), "multiples of 8"),
        (ConvFprop(), (Spec((2, 8, 8, 64)), Spec((64, 3, 3, 64))), "bf16"),
        (ConvFprop(bias=True), (x, w, Spec((64,), "bf16")), "bias"),
        (ConvFprop(pad=(40, 40, 40, 40), dilation=(20, 20)), (Spec((1, 400, 400, 64), "bf16"), w), "shared memory"),
        (ConvDgrad(image=(8, 8), act="gelu"), (dy, w, x), "gelu"),
    ]
    for op, inputs, reason in refused:
        assert reason in (conv_mma_lines.supports(op, inputs) or "supported"), op
    assert conv_mma_lines.supports(ConvFprop(), (x, w)) is None


# On the device


@st.composite
def random_problems(draw: st.DrawFn) -> tuple[Problem, str]:
    """Any geometry of stride 1."""
    groups = draw(st.sampled_from([1, 1, 1, 3]))
    c, k = (8 * groups * draw(st.integers(1, 18)) for _ in range(2))
    h, w = draw(st.integers(1, 24)), draw(st.one_of(st.integers(1, 40), st.integers(100, 200)))
    r, s = draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (2, 2), (1, 4), (7, 1), (4, 3)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    problem = Problem(
        draw(st.integers(1, 6)), h, w, c, k, r, s, draw(st.tuples(*[st.integers(0, 4)] * 4)), (1, 1), dilation, groups
    )
    return problem, draw(st.sampled_from(KINDS))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
def test_random_problems(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The default choice, its whole epilogue."""
    monkeypatch.setattr(cuda, "registry", Registry([conv_mma_lines], REGISTRY.folder))

    @settings(
        max_examples=75, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(random_problems(), st.integers(0, 2**32 - 1))
    def check(drawn: tuple[Problem, str], number: int) -> None:
        problem, kind = drawn
        if not problem.has(None):
            return
        op, random = full(problem, kind, None), np.random.default_rng(number)
        operands = problem.operands(op, ternary(random), random)
        if conv_mma_lines.supports(op, call_of(op, operands).input_specs) is None:
            check_exact(cuda, op, operands, on_cpu(op, operands), problem)

    seeded(seed)(check)()


@pytest.mark.gpu
@cases
def test_real_numbers(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    problem, random = PROBLEMS[name], random_of(name, kind)
    op = problem.op(kind, **({"bias": True} if kind == "fprop" else {}))
    monkeypatch.setattr(cuda, "registry", Registry([conv_mma_lines], REGISTRY.folder))
    check_close(cuda, op, problem.operands(op, normal(random), random))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", [Problem(300, 7, 7, 64, 128, 3, 3, SAME), Problem(40, 15, 15, 96, 64)], ids=str)
def test_many_tiles_give_the_same_bits_each_time(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, problem: Problem, kind: str
) -> None:
    """Blocks of many stages, where rings go round often: eight runs of each candidate."""
    op, random = full(problem, kind, None), random_of(problem, kind)
    operands = problem.operands(op, normal(random), random)
    for tile in conv_mma_lines.candidates(call_of(op, operands), cuda.device):
        monkeypatch.setattr(cuda, "registry", Registry([Forced(conv_mma_lines, tile)], REGISTRY.folder))
        first = run_op(cuda, op, bits_of(op, operands))
        for _ in range(7):
            for again, once in zip(run_op(cuda, op, bits_of(op, operands)), first, strict=True):
                np.testing.assert_array_equal(again, once, err_msg=str(tile))
