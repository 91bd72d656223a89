"""bf16 convolution of padded channels: on the host's emulation and the null driver, and on the device.

Where the operands are small integers every sum is exact, so the device must give the oracle's very bits, ties and all.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_padded
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.launch import Device
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Slot
from tests.cuda import conv_problems
from tests.cuda.compare import MakeExecutor, listing, makers, places
from tests.cuda.host_emulation import runner
from tests.cuda.test_conv_mma import KINDS, POOLS, SAME, Problem, bits_of, check_exact, full, on_cpu, random_of, ternary
from tests.op_runner import run_op

make_fixture = makers(listing(REGISTRY.on("sm_90a").variants()))
H200 = Device("H200", "sm_90a", 132)
PROBLEMS = {
    "odd channels": Problem(3, 9, 8, 13, 64, 3, 3, SAME),
    "odd filters": Problem(3, 9, 8, 24, 35, 3, 3, SAME),
    "both odd": Problem(3, 13, 11, 98, 34, 3, 3, SAME),
    "one channel to one": Problem(2, 7, 6, 1, 1),
    "few filters": Problem(5, 6, 7, 148, 6, 1, 1),
    "stride 2": Problem(3, 14, 13, 42, 144, 5, 5, (2, 2, 2, 2), (2, 2)),
    "stride beyond the filter": Problem(2, 9, 9, 20, 395, 1, 1, stride=(2, 2)),
    "dilated": Problem(2, 12, 11, 17, 40, 3, 3, (2, 2, 2, 2), dilation=(2, 2)),
    "linear": Problem(70, 1, 1, 84, 10, 1, 1),
    "filter covers the image": Problem(7, 5, 5, 12, 120, 5, 5),
}
NOT_MET = conv_problems.Problem(3, 1, 1, 33, 48, 1, 1, (1, 1, 1, 1), (2, 2))
CASES = [(n, k, p) for n, problem in PROBLEMS.items() for p in POOLS if problem.has(p) for k in KINDS]
EMULATED = (("both odd", "dgrad", None), ("stride 2", "wgrad", "max"), ("linear", "dgrad", None))
cases = pytest.mark.parametrize(("name", "kind", "pool"), CASES, ids=[f"{n} {k} {p or 'plain'}" for n, k, p in CASES])


def call_of(op: Op, inputs: tuple[Spec, ...]) -> Call:
    """The call, its tensors one after the other, its scratch memory behind them."""
    outputs, end, slots = op.infer(*inputs), 0, []
    for spec in (*inputs, *outputs, Spec((conv_padded.workspace_bytes(op, inputs, outputs, H200),), "u8")):
        slots.append(Slot(spec, "arena", end))
        end += -(-spec.nbytes // 256) * 256
    return Call(op, tuple(slots[: len(inputs)]), tuple(slots[len(inputs) : -1]), slots[-1])


def rows_of(memory: np.ndarray, slot: Slot) -> np.ndarray:
    """A tensor's bytes, a row for all but its last dimension; filters' own rows apart."""
    row = Spec(slot.spec.shape[-1:], slot.spec.dtype).nbytes
    return memory[slot.offset : slot.end].reshape(*slot.spec.shape[:-1], row)


@cases
def test_passes_pad_with_zeros_and_crop(name: str, kind: str, pool: str | None) -> None:
    """By the kernel's own source on the host: every byte of every copy."""
    if not runner.available():
        pytest.skip("the emulation needs g++")
    op = full(PROBLEMS[name], kind, pool)
    call = call_of(op, specs_of(name, op))
    assert call.workspace is not None
    memory = np.random.default_rng(3).integers(0, 256, call.workspace.end, np.uint8)
    parts = conv_padded._Parts.of(call)
    assert parts.before
    for copies in (parts.before, parts.after):
        for launch in conv_padded._copies(copies):
            runner.run_launch(launch, {"arena": memory}, [to for _, to in copies])
        for source, target in copies:
            got, given_bytes = rows_of(memory, target), rows_of(memory, source)
            common = tuple(slice(min(a, b)) for a, b in zip(got.shape, given_bytes.shape, strict=True))
            expected = np.zeros_like(got)
            expected[common] = given_bytes[common]
            np.testing.assert_array_equal(got, expected, err_msg=f"{source} to {target}")


def specs_of(name: str, op: Op) -> tuple[Spec, ...]:
    dtypes = {np.dtype(np.uint16): "bf16", np.dtype(np.float32): "f32", np.dtype(np.uint8): "u2"}
    operands = PROBLEMS[name].operands(op, ternary(random_of(name)), random_of(name))
    return tuple(Spec(a.shape, dtypes[a.dtype]) for a in bits_of(op, operands))


@cases
def test_launches_are_right(null: CudaExecutor, name: str, kind: str, pool: str | None) -> None:
    """They keep to their parameter tables, the device's limits and the plan's memory, in every variant."""
    op = full(PROBLEMS[name], kind, pool)
    random = random_of(name)
    operands = PROBLEMS[name].operands(op, ternary(random), random)
    found = conv_padded.candidates(call_of(op, specs_of(name, op)), H200)
    for variant in (found[0], found[1], found[-1]):
        executor = CudaExecutor(null.driver, registry=Registry([Forced(conv_padded, variant)], REGISTRY.folder))
        run_op(executor, op, bits_of(op, operands))


def test_what_needs_no_copy_is_used_in_place() -> None:
    x, w, y = Spec((2, 9, 9, 16), "bf16"), Spec((35, 3, 3, 16), "bf16"), Spec((2, 7, 7, 35), "bf16")
    cases: list[tuple[Op, tuple[Spec, ...], list[Spec], bool]] = [
        (ConvFprop(), (x, w), [w], True),
        (ConvDgrad(image=(9, 9)), (y, w), [y, w], False),
        (ConvWgrad(filter=(3, 3)), (x, y), [y], True),
    ]
    for op, inputs, copied, crops in cases:
        parts = conv_padded._Parts.of(call_of(op, inputs))
        assert [source.spec for source, _ in parts.before] == copied
        assert bool(parts.after) == crops


def test_what_it_refuses() -> None:
    x, w = Spec((2, 8, 8, 12), "bf16"), Spec((64, 3, 3, 12), "bf16")
    even, even_w = Spec((2, 8, 8, 64), "bf16"), Spec((64, 3, 3, 64), "bf16")
    huge = Spec((2**20, 8, 8, 31), "bf16")  # 2**31 elements with its padding
    refused: list[tuple[Op, tuple[Spec, ...], str]] = [
        (ConvFprop(), (even, even_w), "no channels need padding"),
        (ConvFprop(), (Spec((0, 8, 8, 12), "bf16"), w), "nothing to pad"),
        (ConvFprop(groups=2), (x, Spec((64, 3, 3, 6), "bf16")), "group"),
        (ConvFprop(), (Spec(x.shape), w), "bf16"),
        (ConvFprop(), (huge, Spec((8, 1, 1, 31), "bf16")), "2**31"),
    ]
    for op, inputs, reason in refused:
        assert reason in (conv_padded.supports(op, inputs) or "supported"), op


def test_no_tap_may_meet_a_pixel(null: CudaExecutor) -> None:
    """There are then no tiles to choose from: dx is the addend, or zeros, by the epilogue."""
    op, random = NOT_MET.op("dgrad", act="gelu"), random_of("not met")
    specs = conv_problems.specs_of(op, NOT_MET.operands(op, ternary(random), random), "bf16")
    assert null.registry.tunable(op, specs).keys() == {"conv_padded"}
    run_op(null, op, bits_of(op, NOT_MET.operands(op, ternary(random), random)))


# On the host's emulation and the device


@places("act", [("gelu",), ("none",)], lambda act: True)
def test_where_no_tap_meets_a_pixel(make: MakeExecutor, act: str) -> None:
    op, random = NOT_MET.op("dgrad", act=None if act == "none" else act, add=True), random_of(act)
    operands = NOT_MET.operands(op, conv_problems.normal(random), random)
    conv_problems.check_close(make([conv_padded]), op, operands, "bf16")


@places("name kind pool", CASES, lambda *case: case in EMULATED)
def test_results_are_exact(make: MakeExecutor, name: str, kind: str, pool: str | None) -> None:
    op = full(PROBLEMS[name], kind, pool)
    random = random_of(name, kind)
    operands = PROBLEMS[name].operands(op, ternary(random), random)
    executor, true = make([conv_padded]), on_cpu(op, operands)
    check_exact(executor, op, operands, true)
    for pair in op.inplace():
        check_exact(executor, op, operands, true, alias=(pair,))


@st.composite
def random_problems(draw: st.DrawFn) -> tuple[Problem, str, str | None]:
    c, k = (draw(st.integers(1, 200)) for _ in range(2))
    side, taps = st.integers(1, 24), st.integers(1, 5)
    steps = st.sampled_from([1, 1, 1, 2])
    problem = Problem(
        draw(st.integers(1, 5)), draw(side), draw(side), c, k, draw(taps), draw(taps),
        draw(st.tuples(*[st.integers(0, 3)] * 4)), draw(st.tuples(steps, steps)), draw(st.tuples(steps, steps)),
    )  # fmt: skip
    pools = [pool for pool in POOLS if problem.has(pool)]
    return problem, draw(st.sampled_from(KINDS)), draw(st.sampled_from(pools)) if pools else "none"


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_random_problems(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The default choice, its whole epilogue."""
    monkeypatch.setattr(cuda, "registry", Registry([conv_padded], REGISTRY.folder))

    @settings(
        max_examples=40, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(random_problems(), st.integers(0, 2**32 - 1))
    def check(drawn: tuple[Problem, str, str | None], number: int) -> None:
        problem, kind, pool = drawn
        if pool == "none" or (problem.c % 8 == 0 and problem.k % 8 == 0):
            return
        op, random = full(problem, kind, pool), np.random.default_rng(number)
        operands = problem.operands(op, ternary(random), random)
        check_exact(cuda, op, operands, on_cpu(op, operands), problem)

    seeded(seed)(check)()
