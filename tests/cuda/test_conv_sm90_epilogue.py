"""Epilogues of Hopper's convolutions: activations, their derivatives, and whose place an output may take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import conv_sm90, conv_unpool
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT
from tests.cuda import conv_problems
from tests.cuda.bf16 import from_bits, to_bits
from tests.cuda.compare import MakeExecutor, emulates, listing, makers, places
from tests.cuda.conv_problems import on_cpu, random_of
from tests.cuda.test_conv_sm90 import H200, PROBLEMS, bits_of, call_of
from tests.op_runner import run_op

make_fixture = makers(listing(conv_unpool.variants()))
BY_INPUT = tuple(act for act in ACTIVATIONS if act not in FROM_OUTPUT)


@places(
    "name act",
    [
        (name, act)
        for name in ("few channels", "64 channels", "many channels", "stride 2")
        for act in ACTIVATIONS
        if act != "relu"
    ],
    lambda name, act: name == "64 channels",
)
def test_an_activation_is_taken_of_the_sum(make: MakeExecutor, name: str, act: str) -> None:
    """In fp32, before the one rounding, before the pool. No activation's slope is above 1.2."""
    problem = PROBLEMS[name]
    for kind in (act, f"{act} add", f"{act} kept", f"{act} pooled"):
        if not problem.has(kind):
            continue
        op, operands = problem.op(kind), problem.normals(kind, random_of(name))
        operands[1] = from_bits(to_bits(operands[1] / np.sqrt(problem.r * problem.s * problem.c)))
        (magnitude,) = on_cpu(problem.op("fprop"), [np.abs(a) for a in operands[:2]])
        results = on_cpu(op, operands)
        for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
            found = run_op(make([Forced(conv_sm90, variant)]), op, bits_of(op, operands))
            for bits, true in zip(found[:1] if op.pool else found, results, strict=not op.pool):
                slack = 2.0**-8 * np.abs(true) + 2.0**-18 * magnitude.max()
                assert (np.abs(from_bits(bits) - true) <= slack).all(), variant


@places(
    "name act",
    [
        (name, act)
        for name in ("few channels", "64 channels", "many channels", "stride 2", "stride 2 pointwise", "linear")
        for act in BY_INPUT
    ],
    lambda name, act: name in ("64 channels", "stride 2 pointwise"),
)
def test_a_derivative_follows_from_the_input(make: MakeExecutor, name: str, act: str) -> None:
    """(sum + addend) * act'(saved), each step in fp32; the functions err by 2**-20 of what they are at most."""
    problem = PROBLEMS[name]
    for kind in (f"dgrad {act}", f"dgrad add {act}", f"dgrad pooled {act}"):
        if not problem.has(kind):
            continue
        op, operands = problem.op(kind), problem.normals(kind, random_of(name, act))
        saved = 2 + (op.pool is not None)
        bare = [np.abs(a) for i, a in enumerate(operands) if i != saved]
        (magnitude,), (true,) = on_cpu(replace(op, act=None), bare), on_cpu(op, operands)
        for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
            executor = make([Forced(conv_sm90, variant), conv_unpool])
            value = from_bits(run_op(executor, op, bits_of(op, operands))[0])
            slack = 2.0**-8 * np.abs(true) + 1.2 * 2.0**-18 * magnitude
            assert (np.abs(value - true) <= slack).all(), variant


@places("act", [(act,) for act in BY_INPUT], lambda act: True)
def test_a_derivative_near_its_zero(make: MakeExecutor, act: str) -> None:
    """What it errs by is not hidden by a sum of many terms."""
    problem = conv_problems.Problem(3, 13, 10, 72, 8, 1, 1)
    op, random = problem.op("dgrad", act=act), random_of(act)
    operands = problem.operands(op, conv_problems.normal(random), random)
    conv_problems.check_close(make([conv_sm90]), op, operands, "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["few channels", "many channels", "stride 2"])
def test_an_epilogue_rounds_once(cuda: CudaExecutor, name: str) -> None:
    """(sum + addend) * (1 - saved^2), each step in fp32."""
    problem = PROBLEMS[name]
    op, operands = problem.op("dgrad add tanh"), problem.normals("dgrad add tanh", random_of(name))
    value = from_bits(run_op(cuda, op, bits_of(op, operands))[0])
    (true,) = on_cpu(op, operands)
    dy, w, saved, addend = operands
    (magnitude,) = on_cpu(problem.op("dgrad"), [np.abs(dy), np.abs(w)])
    slack = 2.0**-19 * (magnitude + np.abs(addend)) * (1 + saved**2)
    assert (np.abs(value - true) <= 2.0**-8 * np.abs(true) + slack).all()


@places(
    "name alias",
    [(n, alias) for n in ("64 channels", "many channels", "stride 2", "stride 2 pointwise") for alias in (2, 3)],
    lambda name, alias: name != "stride 2 pointwise",
)
def test_dx_may_take_the_place_of_an_operand(make: MakeExecutor, name: str, alias: int) -> None:
    problem = PROBLEMS[name]
    op, operands = problem.op("dgrad add relu"), problem.integers("dgrad add relu", random_of(name))
    executor = make([Forced(conv_sm90, conv_sm90.candidates(call_of(op, operands), H200)[0])])
    apart = run_op(executor, op, bits_of(op, operands))
    together = run_op(executor, op, bits_of(op, operands), alias=[(0, alias)])
    np.testing.assert_array_equal(together[0], apart[0])


@places(
    "name",
    [(name,) for name in ("64 channels", "many channels", "stride 2", "linear", "64 to 256 pointwise")],
    lambda name: name in ("64 channels", "linear"),
)
def test_y_may_take_the_place_of_the_addend(make: MakeExecutor, name: str) -> None:
    problem = PROBLEMS[name]
    op, operands = problem.op("fused add"), problem.integers("fused add", random_of(name))
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        executor = make([Forced(conv_sm90, variant)])
        apart = run_op(executor, op, bits_of(op, operands))
        together = run_op(executor, op, bits_of(op, operands), alias=[(0, 3)])
        np.testing.assert_array_equal(together[0], apart[0], str(variant))
