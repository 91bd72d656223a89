"""Who gets which tile of Hopper's convolutions. Without a GPU."""

from __future__ import annotations

import pytest

from parcnn.cuda.kernels import conv_sm90
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_sm90_cost import Work, deal
from tests.cuda.test_conv_sm90 import H200
from tests.cuda.test_conv_sm90_tiles import all_sizes


def test_every_item_is_dealt_once_and_evenly() -> None:
    uneven = 0
    for sizes, variant in all_sizes():
        dealt = deal(sizes, variant, H200)
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
