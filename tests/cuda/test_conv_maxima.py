"""Convolutions that pool by a maximum and do not say which elements won: the same values, and nothing else written."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from parcnn.cuda.kernels import (
    conv_fprop,
    conv_mma_fprop,
    conv_padded,
    conv_stem,
    conv_stem_sm90,
    conv_winograd,
)
from parcnn.ops.conv import ConvFprop
from parcnn.ops.program import Executor
from tests.cuda.bf16 import stored
from tests.cuda.compare import MakeExecutor, makers, places
from tests.cuda.conv_problems import Arrays, Problem, normal
from tests.op_runner import run_op

make_fixture = makers()


def check_same_values(executor: Executor, problem: Problem, act: str | None, dtype: str) -> None:
    op = problem.op("fprop", "max", bias=True, act=act)
    random = np.random.default_rng(problem.c)
    x, w, bias = problem.operands(op, normal(random), random)
    x[0, 1, 2, 0], x[-1, 0, 0, -1] = np.nan, np.inf
    operands: Arrays = [stored(x, dtype), stored(w, dtype), stored(bias, "f32")]
    value, index = run_op(executor, op, operands)
    assert index.any()
    values = run_op(executor, replace(op, indices=False), operands)
    assert len(values) == 1
    np.testing.assert_array_equal(values[0], value)


def test_what_is_inferred() -> None:
    asked = [ConvFprop(pool=pool, indices=False).has_indices for pool in (None, "max", "avg")]
    assert asked == [False] * 3
    assert ConvFprop(pool="max").has_indices


@pytest.mark.parametrize("act", [None, "relu", "tanh"])
@pytest.mark.parametrize(
    ("family", "problem"),
    [
        (conv_fprop, Problem(3, 7, 9, 16, 20, pad=(1, 1, 1, 1))),
        (conv_fprop, Problem(3, 12, 12, 1, 6, 5, 5)),
        (conv_winograd, Problem(3, 7, 9, 16, 24, pad=(1, 1, 1, 1))),
    ],
    ids=["tiles", "direct", "winograd"],
)
def test_in_fp32(make: MakeExecutor, family: ModuleType, problem: Problem, act: str | None) -> None:
    check_same_values(make([family]), problem, act, "f32")


BF16 = {
    "direct": (conv_fprop, Problem(3, 12, 12, 1, 6, 5, 5)),
    "mma": (conv_mma_fprop, Problem(3, 7, 9, 24, 20, pad=(1, 1, 1, 1))),
    "stem": (conv_stem, Problem(3, 17, 19, 3, 20, 5, 5, (2, 2, 2, 2))),
    "stem_sm90": (conv_stem_sm90, Problem(3, 17, 19, 3, 64, 7, 7, (3, 3, 3, 3), (2, 2))),
    "padded": (conv_padded, Problem(3, 7, 9, 20, 36, pad=(1, 1, 1, 1))),
}


@places("name act", [(name, act) for name in BF16 for act in (None, "relu")], lambda name, act: name == "stem_sm90")
def test_in_bf16(make: MakeExecutor, name: str, act: str | None) -> None:
    family, problem = BF16[name]
    check_same_values(make([family]), problem, act, "bf16")
