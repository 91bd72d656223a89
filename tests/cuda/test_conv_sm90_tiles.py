"""The tiles of Hopper's convolutions: what fits, what they skip and share. Without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import numpy as np
import pytest

from parcnn.cuda.kernels import conv_sm90_sizes
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_sm90_choice import candidates
from parcnn.cuda.kernels.conv_sm90_sizes import Sizes
from parcnn.cuda.kernels.conv_sm90_tiles import Footprint, Shape, Variant
from parcnn.ops.base import Spec
from parcnn.ops.program import Call, Slot
from tests.cuda.conv_problems import random_of
from tests.cuda.test_conv_sm90 import CASES, H200, PROBLEMS, Problem, image_tiles, of_images, sizes_of


def all_sizes() -> Iterator[tuple[Sizes, Variant]]:
    for name, kind in CASES:
        sizes = sizes_of(PROBLEMS[name].op(kind), PROBLEMS[name].integers(kind, random_of()))
        for variant in candidates(sizes, H200):
            yield sizes, variant


def test_skipped_taps_lie_wholly_in_the_padding() -> None:
    for sizes, variant in all_sizes():
        if not tiles.skips(sizes, variant):
            continue
        for axis, image in ((0, sizes.h), (1, sizes.w))[variant.serves == "column" :]:
            extent, outputs = variant.tile[1 - axis], sizes.class_outputs[axis]
            for kind in sizes.classes:
                counts = tiles.live_taps(sizes, kind, axis, extent)
                assert len(counts) == ceil(outputs / extent)
                taps, pad = kind.taps[axis], kind.pad[axis]
                for i, count in enumerate(counts):
                    first = [o * sizes.stride[axis] - pad for o in range(i * extent, (i + 1) * extent)]
                    hit = [any(0 <= f + t * sizes.dilation[axis] < image for f in first) for t in range(taps)]
                    needed = max(np.flatnonzero(hit)) - min(np.flatnonzero(hit)) + 1 if any(hit) else 1
                    assert needed <= count <= taps


def test_blocks_never_exceed_shared_memory_and_always_have_two_stages() -> None:
    for sizes, variant in all_sizes():
        assert variant.x_stages >= 2
        assert variant.w_stages >= (1 if variant.resident else 2)
        assert variant.own_staging or variant.x_stages >= 2, f"{sizes} {variant}"


def test_the_producer_runs_far_ahead_where_a_stage_serves_many_taps() -> None:
    """Of 49 taps a stage, weights have what room there is, and pixels the two stages that are needed."""
    problem = Problem(3, 46, 46, 608, 688, 7, 7, (3, 3, 3, 3))
    x, w = Spec((problem.n, problem.h, problem.w, problem.c), "bf16"), Spec((problem.k, 7, 7, problem.c), "bf16")
    op = problem.op("fprop")
    sizes = conv_sm90_sizes.sizes_of(
        Call(op, tuple(Slot(s, "arena") for s in (x, w)), (Slot(op.infer(x, w)[0], "arena"),))
    )
    variant = tiles.fit(sizes, Shape("window", (8, 23, 1), 64), H200)
    assert variant is not None
    assert (variant.x_stages, variant.w_stages) == (2, tiles.MAX_W_STAGES)


@image_tiles
@pytest.mark.parametrize("kind", ["pooled", "maxima"])
def test_several_images_are_pooled_where_threads_have_whole_windows(
    kind: str, constants: tuple[int, int], tile: tuple[int, int, int]
) -> None:
    """Of 128 channels a tile. A quarter of it is staged, and as much of indices: no stage is borrowed."""
    problem, serves = of_images(constants, 256, 9, 9, 512, 512)
    (w, h, n), pixels = tile, tile[0] * tile[1] * tile[2]
    sizes = sizes_of(problem.op(kind), problem.integers(kind, random_of()))
    assert tiles.pooling(sizes, serves, tile, 128) == tiles.WITHIN_IMAGES
    takes = Footprint.of(sizes, serves, tile, 128)
    assert takes is not None
    assert takes.pixels == pixels
    assert takes.staging_bytes == 1024 * ceil(pixels / 32) * (1 + sizes.indices)
    variant = tiles.fit(sizes, Shape(serves, tile, 128), H200)
    assert variant is not None
    assert not variant.borrows
    assert tiles.images_inner(sizes, variant)
    plain = sizes_of(problem.op("fused"), problem.integers("fused", random_of()))
    mean = sizes_of(problem.op("mean"), problem.integers("mean", random_of()))
    for other, shape, channels in (
        (plain, tile, 128),
        (mean, tile, 128),
        (sizes, tile, 64),
        (sizes, (w, h, n - 1), 128),
        (sizes, (w + 2, h, n), 128),
    ):
        assert tiles.pooling(other, serves, shape, channels) != tiles.WITHIN_IMAGES, (shape, channels)
    assert Footprint.of(sizes, "window", tile, 128) is None
    if serves == "column":
        assert Footprint.of(mean, serves, tile, 128) is None
        for shape, channels in ((tile, 64), ((w, h, n - 1), 128), ((w, h + 1, n), 128), ((w + 2, h, n), 128)):
            assert Footprint.of(sizes, serves, shape, channels) is None, (shape, channels)
