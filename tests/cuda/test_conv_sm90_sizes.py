"""The classes of pixels of Hopper's convolutions with a stride. Without a GPU."""

from __future__ import annotations

from math import ceil, gcd

from parcnn.cuda.kernels.conv_sm90_sizes import _met, _residues


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
            for kind in _residues(extent, pad, stride, dilation, taps)
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
            for part in _met(taps, pad, stride)
            for p in range(20)
            for i in range(part.taps[0])
        ]
        assert len(found) == len(set(found))
        assert set(found) == true
