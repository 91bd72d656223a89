"""Tensor maps: each rule that the driver would answer with no more than 'invalid value' has an error of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parcnn.cuda.arguments import pack
from parcnn.cuda.cubin import Parameter
from parcnn.cuda.launch import LaunchError, Pointer, TensorMap
from parcnn.cuda.tensormap import check
from parcnn.ops.base import Spec
from parcnn.ops.program import Slot

ADDRESS = 0x7F00_0000_0400
# x (N,H,W,C) = (4, 9, 7, 72) bf16, boxes of 64 channels and every second of 6 x 8 pixels of 2 images.
IMAGE = TensorMap(
    Slot(Spec((4, 9, 7, 72), "bf16"), "arena", 1024, "x"),
    (72, 7, 9, 4),
    (144, 1008, 9072),
    (64, 6, 8, 2),
    (1, 2, 2, 1),
    "128B",
)


def test_the_map_that_the_others_break_is_right() -> None:
    check(IMAGE, ADDRESS, "test")
    assert IMAGE.nbytes == IMAGE.slot.spec.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (), "strides_bytes": (), "box": (), "element_strides": ()}, "dimensions"),
        (
            {"dims": (72, 7, 9, 2, 2, 1), "strides_bytes": (144,) * 5, "box": (1,) * 6, "element_strides": ()},
            "dimensions",
        ),
        ({"box": (64, 6, 8)}, "as long as"),
        ({"element_strides": (1, 1)}, "as long as"),
        ({"dtype": "f32"}, "element type"),
        ({"swizzle": "32B"}, "swizzle"),
        ({"l2_bytes": 32}, "L2"),
        ({"offset": 8}, "misaligned"),
        ({"dims": (72, 0, 9, 4)}, "extent"),
        ({"strides_bytes": (144, 1000, 9072)}, "stride"),
        ({"strides_bytes": (0, 1008, 9072)}, "stride"),
        ({"box": (64, 257, 8, 2)}, "box is out of range"),
        ({"box": (64, 6, 0, 2)}, "box is out of range"),
        ({"element_strides": (1, 9, 1, 1)}, "element stride"),
        ({"box": (60, 6, 8, 2)}, "innermost"),
        ({"box": (72, 6, 8, 2)}, "wider than its swizzle"),
        ({"swizzle": "64B"}, "wider than its swizzle"),
        ({"dims": (72, 7, 9, 5)}, "out of its tensor"),
        ({"offset": 16}, "out of its tensor"),
        ({"offset": -16}, "out of its tensor"),
    ],
)
def test_every_rule_is_held(change: dict, message: str) -> None:
    broken = replace(IMAGE, **change)
    with pytest.raises(LaunchError, match=message):
        check(broken, ADDRESS + broken.offset, "test")


def test_the_base_is_aligned() -> None:
    with pytest.raises(LaunchError, match="misaligned"):
        check(IMAGE, ADDRESS + 8, "test")


def test_a_map_lies_where_the_kernel_reads_it() -> None:
    """Its parameter's offset is the kernel's (64-byte alignment leaves a gap); its tensor is known to the checks."""

    def encode(map: TensorMap, address: int) -> bytes:
        return address.to_bytes(128, "little")

    moved = replace(IMAGE, dims=(72, 7, 9, 3), offset=9072)
    parameters = (Parameter(48, 128), Parameter(176, 4))
    packed = pack((moved, np.int32(7)), parameters, lambda slot: ADDRESS, encode, "test")
    assert packed.data[:48] == bytes(48)
    assert int.from_bytes(packed.data[48:176], "little") == ADDRESS + 9072
    assert packed.data[176:] == b"\7\0\0\0"
    assert packed.pointers == ((48, Pointer(IMAGE.slot, 9072, 3 * 9072)),)


def test_a_wrong_map_names_its_kernel_and_argument() -> None:
    with pytest.raises(LaunchError, match="layer 3: kernel, argument 0"):
        pack(
            (replace(IMAGE, swizzle="64B"),),
            (Parameter(0, 128),),
            lambda slot: ADDRESS,
            lambda map, at: b"",
            "layer 3: kernel",
        )
