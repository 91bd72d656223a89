"""The tensor maps of conv_sm90.cu: what TMA brings of the image and the filters, and where it writes tiles."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from parcnn.cuda import tensormap
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_sm90_sizes import CLASSES, Class, Sizes
from parcnn.cuda.kernels.conv_sm90_tiles import Footprint, Variant
from parcnn.cuda.launch import Argument, TensorMap
from parcnn.ops.program import Slot

NO_MAP = bytes(tensormap.NBYTES)


def is_of_pixels(sizes: Sizes, serves: str) -> bool:
    """OF_PIXELS of the kernel."""
    return not sizes.flipped and tiles.constants(sizes, serves) == (0, 0)


def x_maps(x: Slot, sizes: Sizes, variant: Variant, tile: Footprint) -> list[Argument]:
    """Of x; where a stage may serve several taps of any filter, of each class of its pixels that the same taps meet."""
    of_pixels = is_of_pixels(sizes, variant.serves)
    stride = (1, 1) if of_pixels else sizes.stride
    box = (tile.cb, tile.pitch * stride[1], tile.rows * stride[0], variant.tile[2])
    whole = image_map(x, (sizes.c, sizes.w, sizes.h, sizes.n), box, (1, *stride[::-1], 1), tile.cb)
    if sizes.apart != (1, 1):
        _, h, w, c = x.spec.shape
        whole = replace(whole, strides_bytes=(2 * c * sizes.apart[1], 2 * w * c * sizes.apart[0], 2 * h * w * c))
    if not of_pixels:
        return [_ordered(whole, sizes, variant)]
    column, row, image = whole.strides_bytes
    maps: list[Argument] = []
    for part in sizes.parts:
        (down, along), (h0, w0) = sizes.stride, part.first
        dims = (sizes.c, ceil((sizes.w - w0) / along), ceil((sizes.h - h0) / down), sizes.n)
        strides = (column * along, row * down, image)
        own = replace(whole, dims=dims, strides_bytes=strides, offset=h0 * row + w0 * column)
        maps.append(_ordered(own, sizes, variant))
    return maps + [NO_MAP] * (CLASSES - len(maps))


def y_map(y: Slot, sizes: Sizes, variant: Variant, kind: Class) -> TensorMap:
    """Of a class's outputs."""
    (down, along), (h, w) = sizes.spread, kind.first
    dims = (sizes.k, ceil((sizes.q - w) / along), ceil((sizes.p - h) / down), sizes.n)
    row = 2 * sizes.k * sizes.q
    strides = (2 * sizes.k * along, row * down, row * sizes.p)
    box = (64, tiles.footprint(sizes, variant).row, *variant.tile[1:])
    map = TensorMap(y, dims, strides, box, (), "128B", offset=h * row + 2 * w * sizes.k)
    return _ordered(map, sizes, variant)


def pooled_map(y: Slot, sizes: Sizes, variant: Variant) -> TensorMap:
    """Of maxima or means of 2x2 windows: the pooled tensor."""
    (w, h, n), (_, p, q, k) = variant.tile, y.spec.shape
    return _ordered(image_map(y, (k, q, p, y.spec.shape[0]), (64, w // 2, h // 2, n), (), 64), sizes, variant)


def operand_map(slot: Slot, sizes: Sizes, variant: Variant) -> TensorMap:
    """Of what an epilogue reads: a class's pixels of a tensor like dx."""
    (_, h, n), (down, along) = variant.tile, sizes.spread
    w = tiles.footprint(sizes, variant).row
    dims = (sizes.k, sizes.q, sizes.p, sizes.n)
    return _ordered(image_map(slot, dims, (64, w * along, h * down, n), (1, along, down, 1), 64), sizes, variant)


def _ordered(map: TensorMap, sizes: Sizes, variant: Variant) -> TensorMap:
    """The map of columns, rows and images, with its images before its columns where a stage has them so."""
    if not tiles.images_inner(sizes, variant):
        return map

    def turned(columns: int, rows: int, images: int) -> tuple[int, int, int]:
        return images, columns, rows

    steps = map.element_strides
    return replace(
        map,
        dims=(map.dims[0], *turned(*map.dims[1:])),
        strides_bytes=turned(*map.strides_bytes),
        box=(map.box[0], *turned(*map.box[1:])),
        element_strides=(steps[0], *turned(*steps[1:])) if steps else (),
    )


def image_map(
    slot: Slot, dims: tuple[int, int, int, int], box: tuple[int, ...], element_strides: tuple[int, ...], channels: int
) -> TensorMap:
    """Of a tensor NHWC; a box's rows of channels are swizzled over their own width."""
    c, w, h, _ = dims
    swizzle = "128B" if channels == 64 else "64B"
    return TensorMap(slot, dims, (2 * c, 2 * w * c, 2 * h * w * c), box, element_strides, swizzle)


def w_map(w: Slot, sizes: Sizes, variant: Variant, tile: Footprint) -> TensorMap:
    """Of filters (K,RS,C): rows of reduction channels, or where they are exchanged, rows of 64 output channels."""
    taps = sizes.r * sizes.s
    outer, inner = (sizes.c, sizes.k) if sizes.flipped else (sizes.k, sizes.c)
    box = (64, 1, tile.cb) if sizes.flipped else (tile.cb, 1, variant.channels)
    swizzle = "128B" if box[0] == 64 else "64B"
    return TensorMap(w, (inner, taps, outer), (2 * inner, 2 * inner * taps), box, (), swizzle)
