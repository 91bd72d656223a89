"""3x3 images of which a maximum keeps one pixel, on Hopper: exact on the host's emulation and on the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_sm90_one_window
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop
from tests.cuda.compare import MakeExecutor, makers
from tests.cuda.conv_problems import Arrays, random_of
from tests.cuda.test_conv_sm90 import H200, Problem, bits_of, check_exact
from tests.op_runner import run_op

make_fixture = makers()
# Images and channels that hang over; fewer copies than stages, as many steps as a turn of the ring, and more.
PROBLEMS = {
    "the least": Problem(1, 3, 3, 8, 8),
    "a step": Problem(70, 3, 3, 64, 72),
    "two steps, two rows of outputs": Problem(64, 3, 3, 72, 64, pad=(1, 1, 0, 1)),
    "three steps, two columns": Problem(129, 3, 3, 136, 128, pad=(1, 1, 1, 0)),
    "five steps": Problem(200, 3, 3, 264, 200),
}
KINDS = ("maxima", "plain maxima", "tanh pooled")


def operands_of(problem: Problem, kind: str, random: np.random.Generator) -> Arrays:
    return problem.extremes(kind, random, ((0, 0, 0, 5), (problem.n // 2, 1, 2, 0), (problem.n - 1, 2, 1, 3)), (3, 5))


@pytest.mark.parametrize("name", PROBLEMS)
def test_launches_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    op, operands = PROBLEMS[name].op("maxima"), PROBLEMS[name].integers("maxima", random_of())
    monkeypatch.setattr(null, "registry", Registry([conv_sm90_one_window], REGISTRY.folder))
    run_op(null, op, bits_of(op, operands))


def test_the_registry_of_hopper_takes_it(null: CudaExecutor) -> None:
    inputs = (Spec((2000, 3, 3, 256), "bf16"), Spec((256, 3, 3, 256), "bf16"), Spec((256,)))
    op = Problem(2000, 3, 3, 256, 256).op("maxima")
    assert null.registry.find(op, inputs, H200) is conv_sm90_one_window
    assert null.registry.find(replace(op, indices=True), inputs, H200) is not conv_sm90_one_window


def test_what_it_refuses() -> None:
    x, w, b = Spec((70, 3, 3, 64), "bf16"), Spec((72, 3, 3, 64), "bf16"), Spec((72,))
    op = ConvFprop(pad=(1, 1, 1, 1), bias=True, pool="max", indices=False)
    assert conv_sm90_one_window.supports(op, (x, w, b)) is None
    refused = [
        (ConvDgrad(image=(3, 3)), (x, w), "not a forward"),
        (op, (Spec((70, 3, 3, 64)), w, b), "bf16"),
        (op, (Spec((70, 3, 3, 60), "bf16"), Spec((72, 3, 3, 60), "bf16"), b), "multiples of 8"),
        (replace(op, indices=True), (x, w, b), "which element won"),
        (replace(op, pool="avg"), (x, w, b), "which element won"),
        (replace(op, pool=None), (x, w, b), "which element won"),
        (op, (Spec((70, 4, 3, 64), "bf16"), w, b), "(4, 3)"),
        (op, (x, Spec((72, 3, 1, 64), "bf16"), b), "(3, 1)"),
        (replace(op, stride=(2, 1), pad=(1, 1, 2, 1)), (x, w, b), "padded by one"),
        (replace(op, dilation=(2, 2), pad=(1, 1, 3, 3)), (x, w, b), "padded by one"),
        (replace(op, pad=(0, 1, 1, 1)), (x, w, b), "padded by one"),
        (replace(op, pad=(1, 1, 2, 1)), (x, w, b), "one window"),
        (op, (Spec((0, 3, 3, 64), "bf16"), w, b), "nothing"),
    ]
    for other, inputs, reason in refused:
        assert reason in (conv_sm90_one_window.supports(other, inputs) or "supported"), other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_are_exact(make: MakeExecutor, name: str, kind: str) -> None:
    problem = PROBLEMS[name]
    op, operands = replace(problem.op(kind), indices=False), operands_of(problem, kind, random_of(name, kind))
    check_exact(make([conv_sm90_one_window]), op, operands)
