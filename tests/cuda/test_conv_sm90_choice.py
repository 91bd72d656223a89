"""Which tiles of Hopper's convolutions are tried first. Without a GPU."""

from __future__ import annotations

from math import ceil
from statistics import geometric_mean

import pytest

from parcnn.bench.layer import LAYERS, Layer, random_layers
from parcnn.cuda.kernels import conv_sm90, conv_sm90_sizes
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_sm90_choice import candidates
from parcnn.cuda.kernels.conv_sm90_cost import Work, cost_us
from parcnn.cuda.kernels.conv_sm90_sizes import Sizes
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvDgrad
from parcnn.ops.program import Call, Slot
from tests.cuda import conv_problems
from tests.cuda.conv_problems import random_of
from tests.cuda.test_conv_sm90 import H200, Problem, sizes_of


def test_dgrad_of_a_layer_is_tuned_as_the_convolution_that_it_is() -> None:
    """dgrad of 2000 x 15 x 15, 64 -> 256 is the convolution 256 -> 64, which has a row of measurements."""
    op = ConvDgrad(pad=(1, 1, 1, 1), image=(15, 15))
    inputs = (Spec((2000, 15, 15, 256), "bf16"), Spec((256, 3, 3, 64), "bf16"))
    call = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))
    best = conv_sm90.candidates(call, H200)[0]
    assert (best.serves, best.tile, best.channels) == ("column", (1, 15, 17), 64)


def test_small_images_are_pooled_in_columns_of_several() -> None:
    problem, tile = Problem(256, 7, 7, 512, 512), (6, 6, 4)
    for kind in ("pooled", "maxima"):
        inputs = (
            Spec((problem.n, problem.h, problem.w, problem.c), "bf16"),
            Spec((problem.k, 3, 3, problem.c), "bf16"),
            Spec((problem.k,)),
        )
        op = problem.op(kind)
        call = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))
        assert ("column", tile, 128) in [(v.serves, v.tile, v.channels) for v in conv_sm90.candidates(call, H200)]


@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_few_tiles_and_a_long_reduction_are_split(kind: str) -> None:
    """Splits share the reduction in whole steps of channels, all of the same length, on at most one block an SM."""
    channels = (680, 16) if kind == "fprop" else (16, 680)
    problem = Problem(2, 23, 23, *channels, 4, 4, (2, 2, 2, 2))
    sizes = sizes_of(problem.op(kind), problem.integers(kind, random_of()))
    found = [v for v in candidates(sizes, H200) if v.splits > 1]
    assert found[0] == candidates(sizes, H200)[0]
    for variant in found:
        assert (variant.splits - 1) * tiles.steps(sizes, variant) < 11 <= variant.splits * tiles.steps(sizes, variant)
        work = Work.of(sizes, variant, H200)
        assert work.slots * work.k_groups * variant.splits <= H200.sm_count


def test_many_tiles_and_pools_are_not_split() -> None:
    for problem, kind in ((Problem(256, 14, 14, 256, 256), "fprop"), (Problem(2, 14, 14, 512, 64), "pooled")):
        sizes = sizes_of(problem.op(kind), problem.integers(kind, random_of()))
        assert all(variant.splits == 1 for variant in candidates(sizes, H200))


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "pooled", "moments"])
def test_a_few_compiled_tiles_cost_what_all_would(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the estimates, of problems as networks have them, against a kernel for every eighth number of pixels."""
    every = tuple(range(64, 257, 8))
    problems = [sizes for layer in (*LAYERS, *random_layers(24, 3)) if (sizes := sizes_of_layer(layer, kind))]
    few = [cost_us(sizes, candidates(sizes, H200)[0], H200) for sizes in problems]
    candidates.cache_clear()
    for table in (tiles.PIXELS, tiles.POOLED_PIXELS):
        for constants, blocks in table.items():
            monkeypatch.setitem(table, constants, dict.fromkeys(blocks, every))
    all_of_them = [cost_us(sizes, candidates(sizes, H200)[0], H200) for sizes in problems]
    candidates.cache_clear()
    ratios = [ours / least for ours, least in zip(few, all_of_them, strict=True)]
    assert len(ratios) > 20
    assert geometric_mean(ratios) < 1.03
    assert max(ratios) < 1.4


def sizes_of_layer(layer: Layer, kind: str) -> Sizes | None:
    """What Hopper's kernels compute of it, its channels padded; None where they do not run it."""
    channels = [8 * ceil(count / 8) for count in (layer.c, layer.k)]
    problem = conv_problems.Problem(
        layer.n, layer.h, layer.w, *channels, layer.r, layer.r, (layer.pad,) * 4, (layer.stride,) * 2
    )
    op = problem.op("dgrad" if kind == "dgrad" else "fprop", "max" if kind == "pooled" else None)
    image, filters = (layer.n, layer.h, layer.w, channels[0]), (channels[1], layer.r, layer.r, channels[0])
    if kind == "moments":
        op = problem.op("fprop", moments=True)
    first = image if kind != "dgrad" else (layer.n, *layer.outputs, channels[1])
    inputs = (Spec(first, "bf16"), Spec(filters, "bf16"))
    if layer.c <= 8 or min(layer.outputs) < 2 or conv_sm90.supports(op, inputs):
        return None
    call = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))
    return conv_sm90_sizes.sizes_of(call)
