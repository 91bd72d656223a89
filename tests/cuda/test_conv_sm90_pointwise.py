"""1x1 convolutions on Hopper by the kernel for maxima behind them: as exact as the others', in every form; what it takes."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import NamedTuple

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import conv_sm90
from parcnn.cuda.kernels import conv_sm90_sizes as of_calls
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_sm90_tiles import Shape
from parcnn.ops.base import Spec
from parcnn.ops.program import Call, Slot
from tests.cuda.compare import MakeExecutor, emulates, makers, places
from tests.cuda.conv_problems import Arrays, on_cpu, random_of
from tests.cuda.test_conv_sm90 import H200, Problem, bits_of, call_of, check_exact, forced, sizes_of
from tests.op_runner import run_op

make_fixture = makers()
TILES = {"x".join(map(str, tile)): tile for tile in tiles.IMAGE_TILES[1, 1]}
every_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


class Form(NamedTuple):
    """Channels, how many times 128 of them a stage serves, the stride."""

    c: int
    k: int
    rounds: int
    stride: int = 1


FORMS = {
    "a step": Form(64, 264, 1),
    "all groups on a stage": Form(64, 264, 3, 2),
    "a part of a step": Form(40, 136, 2),
    "steps with a stride": Form(136, 264, 1, 2),
    "two groups on stages of steps": Form(136, 264, 2),
    "more steps than stages of the fewest": Form(264, 128, 1),
}
KINDS = ("maxima", "plain maxima", "tanh pooled")
CASES = [(tile, form, kind) for tile in TILES for form in FORMS for kind in KINDS]


def problem_of(tile: tuple[int, int, int], form: Form, patches: tuple[int, int, int]) -> Problem:
    """Images, rows and columns beyond the last tile, and outputs that the floor drops."""
    (w, h, n), (across, down, deep) = tile, patches
    sides = (form.stride * (down * h + 1), form.stride * (across * w + 3))
    return Problem(deep * n + 3, *sides, form.c, form.k, 1, 1, (0, 0, 0, 0), (form.stride, form.stride))


def operands_of(problem: Problem, kind: str, random: np.random.Generator) -> Arrays:
    return problem.extremes(
        kind, random, ((0, 0, 0, 5), (problem.n // 2, -1, 0, 0), (-1, 0, -1, 3)), (3, 17, problem.k - 1)
    )


@every_tile
def test_launches_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int, int]) -> None:
    reached = set()
    for form in FORMS.values():
        problem = problem_of(tile, form, (1, 1, 1))
        op, operands = problem.op("maxima"), problem.integers("maxima", random_of(tile))
        variant = tiles.fit(sizes_of(op, operands), Shape("tap", tile, 128, rounds=form.rounds), H200)
        assert variant is not None
        run_op(forced(null, variant, monkeypatch), op, bits_of(op, operands))
        (launch,) = conv_sm90.launches(call_of(op, operands, variant), H200, variant)
        assert launch.shared_bytes <= H200.shared_bytes_per_block
        reached.add(launch.kernel)
    of_tile = {("PIXELS", tile[0] * tile[1] * tile[2]), ("IMAGES", tile[2])}
    named = (kernel for kernel in conv_sm90.variants() if kernel.entry == "conv_sm90_pointwise")
    assert reached == {kernel for kernel in named if of_tile <= {*kernel.defines}}


@every_tile
def test_what_it_takes(tile: tuple[int, int, int]) -> None:
    """No indices, means, other filters or padding that is not whole pixels; channels that there are; stages of a tile."""
    plain = Problem(70, 14, 14, 128, 264, 1, 1, (0, 0, 0, 0))
    for problem, kind, x_stages, rounds, fits in (
        (plain, "maxima", 0, 3, True),
        (plain, "maxima", 0, 4, False),
        (plain, "maxima", 2, 1, True),
        (plain, "maxima", 1, 1, False),
        (replace(plain, c=192), "maxima", 2, 1, True),
        (replace(plain, c=192), "maxima", 2, 2, False),
        (replace(plain, c=32768), "maxima", 0, 1, False),
        (plain, "pooled", 0, 1, False),
        (plain, "mean", 0, 1, False),
        (plain, "fused", 0, 1, False),
        (replace(plain, pad=(1, 1, 1, 1)), "maxima", 0, 1, False),
        (replace(plain, pad=(1, 1, 1, 1), stride=(2, 2)), "maxima", 0, 1, False),
        (replace(plain, r=3, s=3), "maxima", 0, 1, False),
    ):
        op, of_filters = problem.op(kind), (problem.k, problem.r, problem.s, problem.c)
        x = Spec((problem.n, problem.h, problem.w, problem.c), "bf16")
        inputs = (x, Spec(of_filters, "bf16"), Spec((problem.k,)))
        slots = (tuple(Slot(spec, "arena") for spec in specs) for specs in (inputs, op.infer(*inputs)))
        sizes = of_calls.sizes_of(Call(op, *slots))
        found = tiles.fit(sizes, Shape("tap", tile, 128, x_stages, rounds=rounds), H200)
        assert (found is not None) == fits, (problem, kind, x_stages, rounds)


@places(
    "tile form kind", CASES, lambda tile, form, kind: kind == "maxima" and (tile == "2x2x32" or FORMS[form].rounds > 1)
)
def test_every_form_is_exact(
    make: MakeExecutor, monkeypatch: pytest.MonkeyPatch, tile: str, form: str, kind: str
) -> None:
    """A block has several tiles, or (of many multiprocessors) one, of as many stages as fit and of the fewest."""
    problem = problem_of(TILES[tile], FORMS[form], (3, 2, 1))
    op, operands = replace(problem.op(kind), indices=False), operands_of(problem, kind, random_of(kind, tile, form))
    sizes, true = sizes_of(op, operands), on_cpu(op, operands)
    for multiprocessors in (7,) if emulates(make) else (7, 132):
        device = replace(H200, sm_count=multiprocessors)
        for x_stages in (0, max(2, ceil(problem.c / 64))):
            variant = tiles.fit(sizes, Shape("tap", TILES[tile], 128, x_stages, rounds=FORMS[form].rounds), device)
            assert variant is not None
            executor = make([Forced(conv_sm90, variant)])
            monkeypatch.setattr(executor, "device", device)
            check_exact(executor, op, operands, variant, true)
