"""The tiles of Hopper's convolutions: what fits, what they skip and share, who gets them, which are chosen. Without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, gcd

import numpy as np
import pytest

from parcnn.cuda.kernels import conv_sm90
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_sm90_tiles import Footprint, Shape, Sizes, Variant, Work
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvDgrad
from parcnn.ops.program import Call, Slot
from tests.cuda.conv_problems import random_of
from tests.cuda.test_conv_sm90 import CASES, H200, PROBLEMS, Problem, image_tiles, of_images, sizes_of


def all_sizes() -> Iterator[tuple[Sizes, Variant]]:
    for name, kind in CASES:
        sizes = sizes_of(PROBLEMS[name].op(kind), PROBLEMS[name].integers(kind, random_of()))
        for variant in tiles.candidates(sizes, H200):
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


def test_classes_of_a_strided_gradient_meet_every_pair_of_pixels_once() -> None:
    """dx's pixel h meets the output p by the tap r where h + pad = stride * p + dilation * r."""
    for extent, pad, stride, dilation, taps in (
        (7, 1, 2, 1, 3),
        (9, 0, 3, 2, 4),
        (8, 3, 4, 2, 3),
        (5, 2, 1, 3, 2),
        (1, 1, 3, 1, 1),
    ):
        true = {
            (h, p, r)
            for h in range(extent)
            for r in range(taps)
            for p in range(-40, 40)
            if h + pad == stride * p + dilation * r
        }
        common = gcd(stride, dilation)
        found = [
            (kind.first + stride * u, u - kind.pad + i * dilation // common, kind.tap - i * (stride // common))
            for kind in conv_sm90._residues(extent, pad, stride, dilation, taps)
            for u in range(ceil((extent - kind.first) / stride))
            for i in range(kind.taps)
        ]
        assert len(found) == len(set(found))
        assert set(found) == true


def test_classes_of_pixels_meet_every_tap_once() -> None:
    """Output p reads the pixel stride * p + tap - pad."""
    for taps, pad, stride in ((3, 1, 2), (5, 2, 2), (2, 0, 2), (4, 3, 3), (7, 0, 3), (1, 1, 2)):
        true = {(p, stride * p + tap - pad, tap) for p in range(20) for tap in range(taps)}
        found = [
            (p, (p - part.pad[0] + i) * stride + part.first[0], part.tap + i * stride)
            for part in tiles._met(taps, pad, stride)
            for p in range(20)
            for i in range(part.taps[0])
        ]
        assert len(found) == len(set(found))
        assert set(found) == true


def test_every_item_is_dealt_once_and_evenly() -> None:
    uneven = 0
    for sizes, variant in all_sizes():
        dealt = tiles.deal(sizes, variant, H200)
        if dealt is None:
            continue
        uneven += 1
        work = Work.of(sizes, variant, H200)
        x, y, z = tiles.patches(sizes, variant.tile)
        assert sorted(i for items in dealt for i in items) == list(range(x * y * z * len(sizes.classes) * work.k_inner))
        assert len(dealt) == work.slots
        assert all(dealt), "a block without work"
    assert uneven > 20


@pytest.mark.parametrize("slots", [132, 130, 129, 66, 44, 33, 26])
@pytest.mark.parametrize("k_inner", [1, 2, 5])
@pytest.mark.parametrize("classes", [2, 4])
def test_patch_by_patch_each_block_meets_each_class(slots: int, k_inner: int, classes: int) -> None:
    """`item_of` of conv_sm90.cuh: over 60 rounds no class comes to a block much more often than another."""
    turn = conv_sm90._turn(classes, Work(1.0, 1.0, slots, 1, k_inner, 1))
    for slot in range(slots):
        met = [0] * classes
        for at in range(slot, 60 * slots, slots):
            patch, kind = divmod(at // k_inner, classes)
            met[(kind + patch // turn) % classes] += 1
        assert max(met) <= 1.5 * 60 / classes, slot


def test_blocks_never_exceed_shared_memory_and_always_have_two_stages() -> None:
    for sizes, variant in all_sizes():
        assert variant.x_stages >= 2
        assert variant.w_stages >= (1 if variant.resident else 2)
        assert variant.own_staging or variant.x_stages >= 2, f"{sizes} {variant}"


@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_few_tiles_and_a_long_reduction_are_split(kind: str) -> None:
    """Splits share the reduction in whole steps of channels, all of the same length, on at most one block an SM."""
    channels = (680, 16) if kind == "fprop" else (16, 680)
    problem = Problem(2, 23, 23, *channels, 4, 4, (2, 2, 2, 2))
    sizes = sizes_of(problem.op(kind), problem.integers(kind, random_of()))
    found = [v for v in tiles.candidates(sizes, H200) if v.splits > 1]
    assert found[0] == tiles.candidates(sizes, H200)[0]
    for variant in found:
        assert (variant.splits - 1) * tiles.steps(sizes, variant) < 11 <= variant.splits * tiles.steps(sizes, variant)
        work = Work.of(sizes, variant, H200)
        assert work.slots * work.k_groups * variant.splits <= H200.sm_count


def test_the_producer_runs_far_ahead_where_a_stage_serves_many_taps() -> None:
    """Of 49 taps a stage, weights have what room there is, and pixels the two stages that are needed."""
    problem = Problem(3, 46, 46, 608, 688, 7, 7, (3, 3, 3, 3))
    x, w = Spec((problem.n, problem.h, problem.w, problem.c), "bf16"), Spec((problem.k, 7, 7, problem.c), "bf16")
    op = problem.op("fprop")
    sizes = conv_sm90._sizes(Call(op, tuple(Slot(s, "arena") for s in (x, w)), (Slot(op.infer(x, w)[0], "arena"),)))
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


def test_many_tiles_and_pools_are_not_split() -> None:
    for problem, kind in ((Problem(256, 14, 14, 256, 256), "fprop"), (Problem(2, 14, 14, 512, 64), "pooled")):
        sizes = sizes_of(problem.op(kind), problem.integers(kind, random_of()))
        assert all(variant.splits == 1 for variant in tiles.candidates(sizes, H200))


def test_dgrad_of_a_layer_is_tuned_as_the_convolution_that_it_is() -> None:
    """dgrad of 2000 x 15 x 15, 64 -> 256 is the convolution 256 -> 64, which has a row of measurements."""
    op = ConvDgrad(pad=(1, 1, 1, 1), image=(15, 15))
    inputs = (Spec((2000, 15, 15, 256), "bf16"), Spec((256, 3, 3, 64), "bf16"))
    call = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))
    best = conv_sm90.candidates(call, H200)[0]
    assert (best.serves, best.tile, best.channels) == ("column", (1, 15, 17), 64)
