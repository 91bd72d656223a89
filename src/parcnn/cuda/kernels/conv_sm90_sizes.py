"""The convolution that conv_sm90.cu computes of a call: its sizes, and the classes of outputs that the same taps reach."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd
from typing import NamedTuple

from parcnn.cuda.kernels.conv_common import Conv
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.pool import PoolWindow
from parcnn.ops.program import Call

CLASSES = 4  # of a launch: twin of conv_sm90.cuh's


class Class(NamedTuple):
    """Outputs that the same taps reach, in each direction every `spread`-th from `first` on: their taps, rows and columns,
    their padding at the top and the left, and the filter's tap that is their first."""

    taps: tuple[int, int]
    pad: tuple[int, int]
    tap: int = 0
    first: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Sizes:
    """The convolution that the kernel computes. Of dgrad: of dy, with the filters' taps reversed and channels exchanged.

    p, q: outputs that are computed, before the pool (then even). They fall into classes, most taps first.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pool: bool
    classes: tuple[Class, ...]
    spread: tuple[int, int] = (1, 1)
    tap_steps: tuple[int, int] = (0, 0)  # in the filter, from a class's tap to the next, down and along
    flipped: bool = False
    mean: bool = False  # the pool's; of 2x2 windows only threads that have whole ones take it
    indices: bool = False  # whether the pool says which elements won
    window: PoolWindow | None = None  # of a pool other than 2x2: p and q are then all outputs of the convolution
    apart: tuple[int, int] = (1, 1)  # pixels of the tensor x from a pixel of the image to the next, down and along
    moments: bool = False  # whether the epilogue takes them, or of dgrad a batch norm's sums; it sees no sums of splits

    @property
    def pooled(self) -> tuple[int, int]:
        """Rows and columns that are stored."""
        if self.window:
            return self.window.output_hw(self.p, self.q)
        return (self.p // 2, self.q // 2) if self.pool else (self.p, self.q)

    @property
    def plain(self) -> bool:
        """Whether taps are neighbouring pixels, of a class where there are such, so that they can share a stage."""
        apart = self.stride != (1, 1)
        fits = not apart or (self.h >= self.stride[0] and self.w >= self.stride[1])
        return fits and len(self.parts) <= CLASSES and self.dilation == (1, 1) and self.taps[0] * self.taps[1] > 1

    @property
    def parts(self) -> tuple[Class, ...]:
        """Classes of which a load is, where it serves several taps, most taps first: those of outputs, or with a stride, of the
        image's pixels that the same taps meet, a stride apart."""
        if self.stride == (1, 1):
            return self.classes
        axes = zip((self.r, self.s), self.classes[0].pad, self.stride, strict=True)
        rows, columns = (_met(taps, pad, stride) for taps, pad, stride in axes)
        parts = (
            Class((h.taps[0], w.taps[0]), (h.pad[0], w.pad[0]), h.tap * self.s + w.tap, (h.first[0], w.first[0]))
            for h in rows
            for w in columns
        )
        return tuple(sorted(parts, key=lambda part: -part.taps[0] * part.taps[1]))

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the class with the most."""
        return self.parts[0].taps

    @property
    def is_3x3(self) -> bool:
        """Whether each output has a 3x3 filter's taps, for which there are kernels where a stage serves several."""
        return self.r == self.s == 3 == self.taps[0] == self.taps[1]

    @property
    def class_outputs(self) -> tuple[int, int]:
        """Rows and columns of the largest class."""
        return ceil(self.p / self.spread[0]), ceil(self.q / self.spread[1])


def _met(taps: int, pad: int, stride: int) -> list[Class]:
    """Along one axis: pixels first, first + stride, ... of an image, and the taps that meet them."""
    found = []
    for first in range(stride):
        meet = [tap for tap in range(taps) if (tap - pad - first) % stride == 0]
        if meet:
            found.append(Class((len(meet),) * 2, ((pad + first - meet[0]) // stride,) * 2, meet[0], (first, first)))
    return found


def sizes_of(call: Call) -> Sizes:
    """What the kernel computes of a call."""
    op, filters = call.op, call.inputs[1].spec
    if isinstance(op, ConvFprop):
        conv = Conv.of(op, call.inputs[0].spec, filters)
        p, q = (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)
        if op.window:
            p, q = op.output_hw(conv.h, conv.w, conv.r, conv.s)
        # Where an axis has one tap, the image is that of the pixels which it meets.
        met = [taps == 1 and pad % s == 0 for taps, pad, s in zip((conv.r, conv.s), conv.pad, conv.stride, strict=True)]
        apart = (conv.stride[0] if met[0] else 1, conv.stride[1] if met[1] else 1)
        stride = (conv.stride[0] // apart[0], conv.stride[1] // apart[1])
        pad = (conv.pad[0] // apart[0], conv.pad[1] // apart[1])
        return Sizes(
            conv.n, ceil(conv.h / apart[0]), ceil(conv.w / apart[1]), conv.c, conv.k, conv.r, conv.s, p, q, stride,
            conv.dilation, conv.pool is not None, (Class((conv.r, conv.s), pad),), apart=apart, tap_steps=(conv.s, 1),
            mean=conv.pool == "avg", indices=op.has_indices, window=op.window, moments=op.moments,
        )  # fmt: skip
    if isinstance(op, ConvDgrad):
        conv = Conv.of(op, call.outputs[0].spec, filters)
        p, q = (2 * conv.p, 2 * conv.q) if conv.pool else (conv.p, conv.q)
        common = (gcd(conv.stride[0], conv.dilation[0]), gcd(conv.stride[1], conv.dilation[1]))
        steps = (conv.stride[0] // common[0], conv.stride[1] // common[1])
        dilation = (conv.dilation[0] // common[0], conv.dilation[1] // common[1])
        return Sizes(
            conv.n, p, q, conv.k, conv.c, conv.r, conv.s, conv.h, conv.w, (1, 1), dilation, False, _classes(conv),
            conv.stride, (-steps[0] * conv.s, -steps[1]), flipped=True, moments=op.sums,
        )  # fmt: skip
    raise TypeError(f"{op.name} is neither a forward convolution nor an input gradient")


def _classes(conv: Conv) -> tuple[Class, ...]:
    """dgrad's classes that some tap reaches, most taps first."""
    rows = _residues(conv.h, conv.pad[0], conv.stride[0], conv.dilation[0], conv.r)
    columns = _residues(conv.w, conv.pad[1], conv.stride[1], conv.dilation[1], conv.s)
    classes = [
        Class((h.taps, w.taps), (h.pad, w.pad), h.tap * conv.s + w.tap, (h.first, w.first))
        for h in rows
        for w in columns
    ]
    return tuple(sorted(classes, key=lambda c: -c.taps[0] * c.taps[1]))


class _Residue(NamedTuple):
    """Class, along one axis."""

    first: int
    taps: int
    pad: int
    tap: int


def _residues(extent: int, pad: int, stride: int, dilation: int, taps: int) -> list[_Residue]:
    """Pixels first, first + stride, ... of an axis that some tap reaches.

    dx's pixel h = first + stride * u meets the output p where h + pad = stride * p + dilation * r: with the taps r in
    reverse, every (stride / gcd)-th of them, p advances by dilation / gcd from tap to tap, and by one with u.
    """
    apart = dilation // gcd(stride, dilation)
    found = []
    for first in range(min(stride, extent)):
        reach = [r for r in range(taps) if (first + pad - r * dilation) % stride == 0]
        if reach:
            output = (first + pad - reach[0] * dilation) // stride
            found.append(_Residue(first, len(reach), (len(reach) - 1) * apart - output, reach[-1]))
    return found
