"""Filter gradients of 1x1 bf16 layers by pairs of blocks: on the host's emulation and the null driver, and on the device.

Where the operands are small integers every sum is exact in fp32, so the kernels must give the oracle's very numbers.
"""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_wgrad_sm90_halves
from parcnn.cuda.launch import Device
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvFprop, ConvWgrad
from tests.cuda.compare import MakeExecutor, makers
from tests.cuda.conv_problems import on_cpu, random_of
from tests.cuda.test_conv_sm90 import Problem
from tests.cuda.test_conv_wgrad_sm90 import bits_of, check_exact, op_of, operands_of
from tests.op_runner import run_op

make_fixture = makers()
H200 = Device("H200", "sm_90a", 132)
NO_PAD = (0, 0, 0, 0)
PROBLEMS = {
    "one pixel": Problem(1, 1, 1, 8, 8, 1, 1, NO_PAD),
    "one stage, no second half": Problem(1, 7, 7, 64, 64, 1, 1, NO_PAD),
    "two stages": Problem(2, 7, 7, 128, 128, 1, 1, NO_PAD),
    "an odd number, channels and filters that hang over a little": Problem(5, 7, 8, 72, 136, 1, 1, NO_PAD),
    "as many as the ring has": Problem(12, 8, 8, 192, 128, 1, 1, NO_PAD),
    "one more": Problem(13, 8, 8, 128, 256, 1, 1, NO_PAD),
    "wide and deep": Problem(33, 7, 7, 320, 520, 1, 1, NO_PAD),
    "half of the channels hang over": Problem(20, 9, 5, 40, 200, 1, 1, NO_PAD),
}
KINDS = ("bare", "bias")
problems = pytest.mark.parametrize("name", PROBLEMS)
kinds = pytest.mark.parametrize("kind", KINDS)


def alone(executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> CudaExecutor:
    """An executor without other families."""
    monkeypatch.setattr(executor, "registry", Registry([conv_wgrad_sm90_halves], REGISTRY.folder))
    return executor


# Without a GPU


@problems
@kinds
def test_launches_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """They compile, and keep to the parameter table, the tensor maps' rules and the device."""
    operands = operands_of(PROBLEMS[name], kind, random_of(name, kind), integers=True)
    got = run_op(alone(null, monkeypatch), op_of(PROBLEMS[name], kind), bits_of(operands))
    assert all(result.dtype == np.float32 for result in got)


def test_the_registry_of_hopper_takes_it_for_tiles_that_half_fill_the_device(null: CudaExecutor) -> None:
    def found(n: int, side: int, c: int, k: int) -> object:
        tensors = Spec((n, side, side, c), "bf16"), Spec((n, side, side, k), "bf16")
        return null.registry.find(ConvWgrad(filter=(1, 1)), tensors, H200)

    assert found(256, 7, 512, 2048) is found(256, 7, 2048, 512) is conv_wgrad_sm90_halves
    assert found(256, 56, 64, 256) is not conv_wgrad_sm90_halves


def test_what_it_refuses() -> None:
    x, dy = Spec((2, 8, 8, 64), "bf16"), Spec((2, 8, 8, 64), "bf16")
    one = ConvWgrad(filter=(1, 1))
    assert conv_wgrad_sm90_halves.supports(one, (x, dy)) is None
    refused = [
        (one, (Spec((2, 8, 8, 64)), dy), "bf16"),
        (one, (x, Spec((2, 8, 8, 64))), "bf16"),
        (one, (Spec((2, 8, 8, 20), "bf16"), dy), "multiples of 8"),
        (one, (x, Spec((2, 8, 8, 10), "bf16")), "multiples of 8"),
        (one, (Spec((0, 8, 8, 64), "bf16"), Spec((0, 8, 8, 64), "bf16")), "no pixels"),
        (one, (Spec((2**20, 8, 8, 64), "bf16"), Spec((2**20, 8, 8, 64), "bf16")), "2**31"),
        (ConvWgrad(filter=(1, 1), groups=2), (x, dy), "one group"),
        (ConvWgrad(filter=(1, 1), stride=(2, 2)), (x, Spec((2, 4, 4, 64), "bf16")), "stride"),
        (ConvWgrad(filter=(3, 3), pad=(1, 1, 1, 1)), (x, dy), "one pixel"),
        (ConvWgrad(filter=(1, 1), pad=(1, 1, 1, 1)), (x, Spec((2, 10, 10, 64), "bf16")), "padding"),
        (ConvWgrad(filter=(1, 1), pool="avg"), (x, Spec((2, 4, 4, 64), "bf16")), "pool"),
        (ConvFprop(), (x, Spec((64, 1, 1, 64), "bf16")), "not a convolution's filter gradient"),
    ]
    for op, inputs, reason in refused:
        assert reason in (conv_wgrad_sm90_halves.supports(op, inputs) or "supported"), op


# On the host's emulation and the device


@problems
@kinds
def test_integers_are_exact(make: MakeExecutor, name: str, kind: str) -> None:
    op, operands = op_of(PROBLEMS[name], kind), operands_of(PROBLEMS[name], kind, random_of(name, kind), integers=True)
    check_exact(make([conv_wgrad_sm90_halves]), op, operands, on_cpu(op, operands))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(30))
def test_random_problems(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random = np.random.default_rng(seed)
    n, h, w, c, k = (int(v) for v in (*random.integers(1, 24, 3), *(8 * random.integers(1, 40, 2))))
    problem = Problem(n, h, w, c, k, 1, 1, NO_PAD)
    for kind in KINDS:
        op, operands = op_of(problem, kind), operands_of(problem, kind, random, integers=True)
        check_exact(alone(cuda, monkeypatch), op, operands, on_cpu(op, operands), problem)


@pytest.mark.gpu
@problems
@kinds
def test_real_numbers(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """A result errs by 2**-19 of the sum of its terms' magnitudes, which fp32 sums keep to; the same bits each time."""
    op, operands = op_of(PROBLEMS[name], kind), operands_of(PROBLEMS[name], kind, random_of(name, kind), integers=False)
    true, magnitude = (on_cpu(op, [f(operands[0]), f(operands[1])]) for f in (np.asarray, np.abs))
    executor = alone(cuda, monkeypatch)
    got = run_op(executor, op, bits_of(operands))
    for result, wanted, scale in zip(got, true, magnitude, strict=True):
        assert (np.abs(result - wanted) <= 2.0**-19 * scale).all()
    for _ in range(7):
        for again, once in zip(run_op(executor, op, bits_of(operands)), got, strict=True):
            np.testing.assert_array_equal(again, once)


@kinds
def test_not_a_number_and_infinity_show(make: MakeExecutor, kind: str) -> None:
    """Where float64 has one, and nowhere else."""
    problem = Problem(9, 13, 11, 72, 136, 1, 1, NO_PAD)
    op, operands = op_of(problem, kind), operands_of(problem, kind, random_of(kind), integers=True)
    operands[0][0, 3, 4, 5], operands[0][2, 6, 6, 9] = np.nan, np.inf
    operands[1][1, 2, 3, 7] = -np.inf
    true = on_cpu(op, operands)
    for result, wanted in zip(run_op(make([conv_wgrad_sm90_halves]), op, bits_of(operands)), true, strict=True):
        assert not np.isfinite(wanted).all()
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(wanted))
        np.testing.assert_array_equal(result[np.isfinite(wanted)], wanted[np.isfinite(wanted)])


@pytest.mark.gpu
@kinds
def test_more_pairs_than_run_at_once(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Forty times, in the same memory: blocks of a pair find each other, and let each other go."""
    problem = Problem(64, 7, 7, 520, 2048, 1, 1, NO_PAD)
    op, operands = op_of(problem, kind), operands_of(problem, kind, random_of(kind), integers=True)
    got = run_op(alone(cuda, monkeypatch), op, bits_of(operands), steps=40)
    for result, wanted in zip(got, on_cpu(op, operands), strict=True):
        np.testing.assert_array_equal(result, wanted)
