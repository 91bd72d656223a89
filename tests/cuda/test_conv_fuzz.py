"""Convolutions on the device against the float64 oracle: random ones, each by the default choice, by another variant of its
family and by one of another family (of problems as small as these the default is mostly mma.sync's); and a few by every
family, which compute-sanitizer watches too (`make sanitize`).

Where the operands are small integers every sum is exact, so the kernels must give the oracle's very bits, ties and all.
Elsewhere the tolerance follows from what is rounded (`conv_problems.check_close`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.tuning import Tuning, problem_key
from parcnn.errors import UnsupportedError
from parcnn.ops.base import ACTIVATIONS
from parcnn.ops.pool import PoolWindow
from tests.cuda import conv_problems
from tests.cuda.conv_problems import Problem

SHARDS, EXAMPLES, LEAST = 20, 145, 102  # some are drawn twice: more than 2,000 different problems
HOPPER_SHARDS, HOPPER_EXAMPLES = 3, 50  # of each epilogue
MOST_FLOPS = 6e7  # of a problem: the oracle takes some milliseconds
MOST_TERMS = 1800  # bf16 has all sums of this many ternary products that are at all likely
EPILOGUES = ("window", "moments", "add", "sums")
POOLS, PRECISIONS = (None, None, "max", "avg"), ("bf16", "bf16", "f32")
CHANNELS = st.one_of(st.integers(1, 40), st.integers(1, 20).map(lambda eighths: 8 * eighths))
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": (Phase.generate,),
    "suppress_health_check": [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Filters that mostly fit the image; every stride, dilation and padding that networks have, and some that none has."""
    groups = draw(st.sampled_from((1, 1, 1, 1, 2, 3, 8)))
    if draw(st.integers(0, 7)) == 0:  # depthwise
        groups = draw(st.integers(2, 72))
        c, k = groups, groups * draw(st.sampled_from((1, 1, 1, 2)))
    else:
        c, k = (groups * max(1, draw(CHANNELS) // groups) for _ in range(2))
    r, s = (draw(st.integers(1, 5)),) * 2 if draw(st.booleans()) else (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    stride = (
        (draw(st.integers(1, 3)),) * 2 if draw(st.booleans()) else (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    )
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (1, 1), (2, 2), (1, 3))))
    pad = (r // 2, s // 2, r // 2, s // 2) if draw(st.booleans()) else tuple(draw(st.integers(0, 3)) for _ in range(4))
    n, h, w = draw(st.integers(1, 6)), draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return Problem(n, h, w, c, k, r, s, pad, stride, dilation, groups)


@st.composite
def operations(draw: st.DrawFn) -> tuple[Problem, Any, str]:
    """A problem, an op on it with some epilogue, and the type of its tensors."""
    problem, dtype = draw(problems()), draw(st.sampled_from(PRECISIONS))
    kind = draw(st.sampled_from(("fprop", "dgrad", "wgrad")))
    pool = draw(st.sampled_from(POOLS))
    assume(problem.has(pool) and problem.flops(pool) < MOST_FLOPS)
    more: dict[str, Any] = {}
    if kind == "fprop":
        more = {"bias": draw(st.booleans()), "act": draw(st.sampled_from((None, "relu", *ACTIVATIONS)))}
        if pool == "max":
            more["indices"] = draw(st.booleans())
        more["keep"] = pool is None and problem.groups == 1 and draw(st.booleans())
    elif kind == "dgrad":
        more = {"act": draw(st.sampled_from((None, *ACTIVATIONS))), "add": draw(st.booleans())}
    else:
        more = {"bias": draw(st.booleans())}
    return problem, problem.op(kind, pool, **more), dtype


@st.composite
def windows(draw: st.DrawFn) -> PoolWindow:
    kernel, stride = ((draw(st.integers(1, 4)), draw(st.integers(1, 4))) for _ in range(2))
    pad = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    if draw(st.booleans()):
        return PoolWindow("max", kernel, stride, pad, ceil_mode=draw(st.booleans()))
    return PoolWindow("avg", kernel, stride, pad, ceil_mode=draw(st.booleans()), count_include_pad=draw(st.booleans()))


@st.composite
def hopper_operations(draw: st.DrawFn, kind: str) -> tuple[Problem, Any, str]:
    """An epilogue that only Hopper's kernels have, on problems that they take."""
    c, k = (8 * draw(st.integers(1 if kind in ("window", "moments") else 5, 24)) for _ in range(2))
    r, s = (draw(st.sampled_from((1, 2, 3, 3, 5))) for _ in range(2))
    stride, dilation = (draw(st.sampled_from(((1, 1), (1, 1), (1, 1), other))) for other in ((2, 2), (1, 2)))
    pad = (r // 2, s // 2, r // 2, s // 2) if draw(st.booleans()) else tuple(draw(st.integers(0, 2)) for _ in range(4))
    problem = Problem(1, draw(st.integers(1, 40)), draw(st.integers(1, 40)), c, k, r, s, pad, stride, dilation)
    if kind == "sums":
        problem = replace(problem, r=3, s=3, stride=(1, 1))
        op = problem.op("dgrad", draw(st.sampled_from(POOLS)), sums=True, act=draw(st.sampled_from((None, "relu"))))
        assume(any(problem.pad) or (problem.h, problem.w) != (3, 3))  # a filter that covers the image: a matrix product
    else:
        window = draw(windows()) if kind == "window" else None
        act = draw(st.sampled_from((None, "relu") if window else (None, "relu", *ACTIVATIONS)))
        more = {"window": window, "moments": kind == "moments", "add": kind == "add"}
        op = problem.op("fprop", window and window.kind, bias=draw(st.booleans()), act=act, **more)
    assume(min(op.pooled_hw(problem.h, problem.w, problem.r, problem.s)) > 0 and problem.flops(None) < MOST_FLOPS)
    problem = replace(problem, n=draw(st.integers(1, min(40, int(MOST_FLOPS / problem.flops(None))))))
    # Means and a batch norm's sums are of rounded values; the oracle's are none others where terms are few.
    terms = problem.r * problem.s * (k if kind == "sums" else c)
    assume(terms <= MOST_TERMS or not (kind == "sums" or op.pool == "avg"))
    return problem, op, "bf16"


def check_random(
    cuda: CudaExecutor,
    monkeypatch: pytest.MonkeyPatch,
    shard: int,
    operations: st.SearchStrategy,
    examples: int,
    *,
    bare: bool = True,
) -> set[str]:
    """Random operations' results are right; gives the problems that there were. `bare`: less some epilogue where need be."""
    seen: set[str] = set()

    @seeded(shard)
    @settings(**SETTINGS, max_examples=examples)
    @given(operations, st.integers(0, 2**32 - 1), st.booleans(), st.integers(0, 2**16))
    def check(drawn: tuple[Problem, Any, str], seed: int, whole: bool, other: int) -> None:
        problem, whole_op, dtype = drawn
        op, specs = runnable(cuda, problem, whole_op, dtype)
        assert bare or op == whole_op
        random = np.random.default_rng(seed)
        exact = conv_problems.is_exact(op) and (whole or conv_problems.is_held_to_bits(op))
        values = conv_problems.ternary(random) if exact else conv_problems.normal(random)
        operands = problem.operands(op, values, random)
        compare = conv_problems.check_exact if exact else conv_problems.check_close
        compare(cuda, op, operands, dtype)
        default, *rest = cuda.choices(op, specs, op.infer(*specs)) or [None]
        for same_family in (True, False):
            if some := [each for each in rest if (each.family == default.family) == same_family]:
                with monkeypatch.context() as patch:
                    choice = some[other % len(some)]
                    patch.setattr(cuda, "tuning", Tuning(user={problem_key(op, specs): choice}))
                    compare(cuda, op, operands, dtype)
        seen.add(problem_key(op, specs))

    check()
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_problems(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    seen = check_random(cuda, monkeypatch, shard, operations(), EXAMPLES)
    assert len(seen) >= LEAST, f"{len(seen)} different problems"


@pytest.mark.gpu
@pytest.mark.parametrize("shard", range(HOPPER_SHARDS))
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_random_epilogues_of_hopper(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, epilogue: str, shard: int
) -> None:
    """Pools by other windows than 2x2, shortcuts, a batch norm's moments, and its sums in backward."""
    if cuda.device.arch != "sm_90a":
        pytest.skip("no other architecture's kernels have them")
    seen = check_random(cuda, monkeypatch, shard, hopper_operations(epilogue), HOPPER_EXAMPLES, bare=False)
    assert len([key for key in seen if f" {epilogue}=" in key]) >= HOPPER_EXAMPLES // 2, f"{len(seen)} problems"


SAME = (1, 1, 1, 1)
REPRESENTATIVE = {
    "first layer": Problem(2, 18, 17, 3, 16, 5, 5, (2, 2, 2, 2)),
    "24 channels": Problem(2, 19, 17, 24, 64, 3, 3, SAME),
    "64 channels": Problem(3, 15, 14, 64, 72, 3, 3, SAME),
    "128 channels": Problem(2, 9, 9, 128, 136, 3, 3, SAME),
    "pointwise": Problem(2, 9, 7, 64, 128, 1, 1),
    "odd channels": Problem(2, 7, 9, 13, 21, 3, 3, SAME),
    "stride 2": Problem(2, 12, 11, 32, 40, 3, 3, SAME, (2, 2)),
    "dilated": Problem(2, 11, 10, 16, 16, 3, 3, (2, 2, 2, 2), dilation=(2, 2)),
    "groups": Problem(2, 8, 7, 32, 64, 3, 3, SAME, groups=4),
    "depthwise": Problem(2, 12, 14, 16, 16, 3, 3, SAME, groups=16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_family(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, dtype: str) -> None:
    """With all of the epilogue that there is: the default choice, and the first of each other family."""
    problem, random = REPRESENTATIVE[name], np.random.default_rng(0)
    more = {"fprop": {"bias": True, "act": "relu"}, "dgrad": {"act": "relu", "add": True}, "wgrad": {"bias": True}}
    op, specs = runnable(cuda, problem, problem.op(kind, "max" if problem.has("max") else None, **more[kind]), dtype)
    operands = problem.operands(op, conv_problems.ternary(random), random)
    choices = cuda.choices(op, specs, op.infer(*specs))
    for choice in ({each.family: each for each in reversed(choices)} or {"": None}).values():
        with monkeypatch.context() as patch:
            if choice:
                patch.setattr(cuda, "tuning", Tuning(user={problem_key(op, specs): choice}))
            conv_problems.check_exact(cuda, op, operands, dtype)


def runnable(executor: CudaExecutor, problem: Problem, op: Any, dtype: str) -> tuple[Any, tuple[Any, ...]]:
    """The op, less those parts of its epilogue that no kernel has: a bare convolution runs. What does not says why."""
    random = np.random.default_rng(0)
    for without in (
        {},
        {"keep": False},
        {"act": None, "keep": False},
        {"pool": None},
        {"act": None, "pool": None},
        {"act": None, "pool": None, "add": False},
    ):
        less = replace(op, **{name: value for name, value in without.items() if hasattr(op, name)})
        if less == op and without:
            continue
        specs = conv_problems.specs_of(less, problem.operands(less, conv_problems.normal(random), random), dtype)
        try:
            executor.workspace_bytes(less, specs, less.infer(*specs))
        except UnsupportedError:
            assert not executor.can_fuse(less, specs)
        else:
            return less, specs
    raise AssertionError(f"no kernel runs {op} on {problem} in {dtype}, not even bare")
