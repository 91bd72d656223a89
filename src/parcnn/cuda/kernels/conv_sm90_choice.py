"""Which tiles of conv_sm90.cu are tried, the best first: those that were measured so, then others by their cost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil, inf

from parcnn.cuda.kernels.conv_sm90_cost import cost_us, cycles
from parcnn.cuda.kernels.conv_sm90_sizes import Sizes
from parcnn.cuda.kernels.conv_sm90_tiles import (
    IMAGE_TILES,
    MAX_BOX,
    PAIRED,
    WINDOW_PIXELS,
    Shape,
    Variant,
    can_pair,
    compiled_pixels,
    fit,
    footprint,
    items,
    pooled_by,
    round_up,
)
from parcnn.cuda.launch import Device
from parcnn.ops.pool import PoolWindow

SERVES = ("tap", "column", "window")
MOST_CANDIDATES = 8
MOST_PARTS = 16  # of a row of windows other than 2x2, in which tiles may take it


@lru_cache(maxsize=1024)
def candidates(sizes: Sizes, device: Device) -> tuple[Variant, ...]:
    """Variants for a problem, the best first: those that were measured, then others by `cycles`."""
    shapes = MEASURED.get(_key(sizes), ())
    if sizes.flipped and sizes.moments:
        shapes = (*MEASURED_SUMS.get(_key(sizes), ()), *shapes)
    measured = [fit(sizes, shape, device) for shape in shapes]
    estimated = [v for shape in dict.fromkeys(_shapes(sizes)) if (v := fit(sizes, shape, device))]
    estimated.sort(key=lambda v: cycles(sizes, v, device))
    split = [v for shape in dict.fromkeys(_splits(sizes, device)) if (v := fit(sizes, shape, device))]
    if split:  # few tiles: what `cycles` leaves out counts
        estimated = sorted((*estimated, *split), key=lambda v: cost_us(sizes, v, device))
    # The best of each kernel and way to serve: alike tiles cost alike.
    kinds: dict[tuple[object, ...], Variant] = {}
    for variant in estimated:
        pixels = footprint(sizes, variant).pixels
        kind = (variant.serves, variant.channels, variant.shared, pixels, variant.splits > 1)
        kinds.setdefault(kind, variant)
    return tuple(dict.fromkeys([*(v for v in measured if v), *list(kinds.values())[:MOST_CANDIDATES]]))


def _shapes(sizes: Sizes) -> Iterator[Shape]:
    """Tiles that may pay: whole rows or even parts of them, whole images, one or two pixels of many images."""
    if sizes.window:
        yield from _window_shapes(sizes, sizes.window)
        return
    even = 2 if sizes.pool else 1
    p, q = sizes.class_outputs
    widths = {round_up(ceil(q / parts), even) for parts in range(1, 9)} | {8, even}
    if can_pair(sizes, "window", 8):
        for pixels in compiled_pixels(sizes, "window", PAIRED):
            yield Shape("window", (8, ceil(p / ceil(p / (pixels // 8 - 1))), 1), PAIRED)
    if sizes.pool and sizes.k > 64:
        yield from (Shape("column", tile, 128) for tile in IMAGE_TILES[3, 1])
    for channels in (64, 128):
        if channels == 128 and sizes.k <= 64:
            continue
        for pixels in sorted({p for serves in SERVES for p in compiled_pixels(sizes, serves, channels)}):
            for w in sorted(widths):
                highest = pixels // w // even * even
                if highest == 0:
                    continue
                h = round_up(ceil(p / ceil(p / highest)), even)
                for serves in ("column", "window"):
                    yield Shape(serves, (w, h, 1), channels)
                if w == q and w != 8 and (rows := (pixels + sizes.taps[1] - 1) // (w + sizes.taps[1] - 1)):
                    yield Shape("window", (w, ceil(p / ceil(p / rows)), 1), channels)
                if (w, h) == (q, p) and not sizes.pool:
                    yield Shape("column", (w, h, min(pixels // (w * h), sizes.n)), channels)
                for height in {h, *(v for v in (even, 2 * even) if v < h)}:
                    tile = (w, height, min(pixels // (w * height), sizes.n, MAX_BOX))
                    yield Shape("tap", tile, channels)
                    if sizes.r * sizes.s == 1:
                        yield Shape("tap", tile, channels, shared=True)


def _window_shapes(sizes: Sizes, window: PoolWindow) -> Iterator[Shape]:
    """Tiles of whole windows: rows of them or even parts of rows, and whole images."""
    rows, columns = sizes.pooled
    for channels in (64, 128):
        if channels == 128 and sizes.k <= 64:
            continue
        for pixels in compiled_pixels(sizes, "tap", channels):
            for across in {ceil(columns / parts) for parts in range(1, min(columns, MOST_PARTS) + 1)}:
                w = (across - 1) * window.stride[1] + window.kernel[1]
                down = min(rows, pooled_by(window, min(pixels // w, MAX_BOX // sizes.stride[0]), 0))
                if down < 1:
                    continue
                h = (ceil(rows / ceil(rows / down)) - 1) * window.stride[0] + window.kernel[0]
                yield Shape("column", (w, h, 1), channels)
                yield Shape("tap", (w, h, 1), channels)
                yield Shape("tap", (w, h, min(pixels // (w * h), sizes.n, MAX_BOX)), channels)


def _splits(sizes: Sizes, device: Device) -> Iterator[Shape]:
    """Tiles whose reduction blocks may share: those that leave half of the GPU idle, as often as it has room for."""
    if sizes.pool or sizes.c <= 64:
        return
    for shape in dict.fromkeys(_shapes(sizes)):
        tiles = items(sizes, shape.tile) * ceil(sizes.k / shape.channels)
        steps = ceil(sizes.c / 64)
        for splits in {ceil(steps / blocks) for blocks in range(1, steps)}:
            if tiles * splits <= device.sm_count:
                yield shape._replace(splits=splits)


def has_window_tiles(window: PoolWindow, columns: int, stride: tuple[int, int]) -> bool:
    """Whether a row of the narrowest tile's windows, of an image with `columns` of them, fits in a tile, and what a
    convolution of that stride reads for it in a copy."""
    w = (ceil(columns / MOST_PARTS) - 1) * window.stride[1] + window.kernel[1]
    fits = max(w * stride[1], window.kernel[0] * stride[0]) <= MAX_BOX
    return fits and w * window.kernel[0] <= min(max(pixels) for pixels in WINDOW_PIXELS[0, 1].values())


def computed(window: PoolWindow, p: int, q: int) -> float:
    """Outputs that the best tiles of an image's p x q compute, halos twice, by those that there are."""
    rows, columns = window.output_hw(p, q)
    most = max(WINDOW_PIXELS[0, 1][64, 64])
    areas = []
    for across in range(1, columns + 1):
        width = (across - 1) * window.stride[1] + window.kernel[1]
        down = min(rows, pooled_by(window, most // width, 0))
        if down > 0:
            height = (ceil(rows / ceil(rows / down)) - 1) * window.stride[0] + window.kernel[0]
            areas.append(ceil(rows / down) * ceil(columns / across) * width * height)
    return min(areas, default=inf) / (p * q)


def _key(sizes: Sizes) -> tuple[int | bool, ...]:
    pad = sizes.classes[0].pad
    side = (sizes.n, sizes.h, sizes.w, sizes.c, sizes.k, sizes.r, pad[0], sizes.pool)
    if sizes.window:
        return ()
    square = sizes.r == sizes.s and pad[0] == pad[1] and sizes.stride[0] == sizes.stride[1]
    if not square or sizes.dilation != (1, 1) or sizes.spread != (1, 1):
        return ()
    return side if sizes.stride == (1, 1) else (*side, sizes.stride[0])


# (N, H, W, C, K, R, pad, pool, stride where it is not 1): tiles, fastest first, measured on an H200 with this kernel or its
# prototype. dgrad finds its own row: it is the convolution of dy.
MEASURED: dict[tuple[int | bool, ...], tuple[Shape, ...]] = {
    (2000, 31, 31, 24, 64, 3, 1, False): (Shape("window", (8, 31, 1), 64), Shape("window", (8, 16, 1), 64)),
    (2000, 31, 31, 64, 24, 3, 1, False): (Shape("window", (8, 31, 1), 32), Shape("window", (8, 31, 1), 64)),
    (802816, 1, 1, 64, 256, 1, 0, False): (Shape("tap", (1, 1, 120), 64), Shape("tap", (1, 1, 240), 64)),
    (256, 28, 28, 256, 512, 1, 0, False): (Shape("tap", (14, 14, 1), 128), Shape("tap", (1, 28, 7), 128)),
    (2000, 15, 15, 64, 64, 3, 1, False): (Shape("window", (8, 15, 1), 64), Shape("column", (15, 15, 1), 64)),
    (2000, 15, 15, 64, 256, 3, 1, False): (Shape("column", (1, 15, 17), 64), Shape("window", (8, 15, 1), 64)),
    (2000, 7, 7, 256, 256, 3, 1, False): (Shape("tap", (1, 1, 256), 128), Shape("tap", (7, 1, 36), 128)),
    (2000, 3, 3, 256, 256, 3, 1, False): (Shape("tap", (1, 1, 224), 128), Shape("tap", (1, 1, 200), 128)),
    (256, 56, 56, 64, 64, 3, 1, False): (Shape("window", (8, 28, 1), 64), Shape("window", (8, 14, 1), 64)),
    (256, 28, 28, 128, 128, 3, 1, False): (Shape("column", (2, 14, 8), 128), Shape("column", (7, 28, 1), 128, 3)),
    (256, 14, 14, 256, 256, 3, 1, False): (Shape("tap", (1, 1, 256), 128), Shape("column", (14, 14, 1), 128, 3)),
    (256, 7, 7, 512, 512, 3, 1, False): (Shape("column", (7, 7, 4), 128, 3), Shape("tap", (1, 1, 256), 128)),
    (64, 28, 28, 512, 512, 3, 1, False): (Shape("tap", (4, 2, 32), 128), Shape("tap", (4, 4, 16), 128)),
    (2000, 15, 15, 256, 64, 3, 1, False): (Shape("column", (1, 15, 17), 64), Shape("column", (15, 15, 1), 64)),
    (256, 56, 56, 64, 256, 1, 0, True): (
        Shape("tap", (2, 2, 32), 128, rounds=1),
        Shape("tap", (2, 2, 32), 128, rounds=2),
        Shape("tap", (2, 2, 64), 128),
    ),
    (256, 28, 28, 256, 512, 1, 0, True): (
        Shape("tap", (2, 2, 64), 128, rounds=1),
        Shape("tap", (2, 2, 32), 128, rounds=2),
        Shape("tap", (2, 2, 64), 128),
    ),
    (256, 56, 56, 256, 64, 1, 0, True): (Shape("tap", (8, 28, 1), 64),),
    (2000, 31, 31, 24, 64, 3, 1, True): (Shape("window", (8, 30, 1), 64),),
    (2000, 15, 15, 64, 64, 3, 1, True): (Shape("column", (14, 14, 1), 64), Shape("window", (8, 14, 1), 64)),
    (2000, 15, 15, 64, 256, 3, 1, True): (Shape("column", (14, 14, 1), 64), Shape("tap", (14, 2, 9), 128)),
    (2000, 7, 7, 256, 256, 3, 1, True): (Shape("tap", (2, 2, 56), 128), Shape("tap", (6, 2, 16), 128)),
    (2000, 3, 3, 256, 256, 3, 1, True): (Shape("tap", (2, 2, 64), 64), Shape("tap", (2, 2, 32), 128)),
    (256, 56, 56, 64, 64, 3, 1, True): (Shape("window", (8, 28, 1), 64),),
    (256, 28, 28, 128, 128, 3, 1, True): (Shape("tap", (4, 4, 16), 128), Shape("window", (8, 28, 1), 64, 2)),
    (256, 14, 14, 256, 256, 3, 1, True): (Shape("tap", (2, 2, 64), 128), Shape("column", (14, 14, 1), 128)),
    (256, 7, 7, 512, 512, 3, 1, True): (Shape("column", (6, 6, 4), 128), Shape("tap", (6, 6, 4), 128)),
    (64, 28, 28, 512, 512, 3, 1, True): (Shape("tap", (2, 2, 64), 128), Shape("tap", (4, 4, 16), 128)),
    (256, 7, 7, 512, 2048, 1, 0, True): (Shape("tap", (2, 2, 32), 128, rounds=1), Shape("tap", (2, 6, 16), 128)),
}
# The same where dgrad takes a batch norm's sums, and the fastest tiles are others.
MEASURED_SUMS: dict[tuple[int | bool, ...], tuple[Shape, ...]] = {
    (2000, 15, 15, 64, 64, 3, 1, False): (Shape("column", (1, 15, 17), 64), Shape("window", (15, 15, 1), 64)),
    (256, 14, 14, 256, 256, 3, 1, False): (Shape("column", (14, 14, 1), 128, 3),),
    (512, 8, 8, 64, 64, 3, 1, False): (Shape("column", (8, 8, 2), 64), Shape("window", (8, 8, 1), 64)),
}
