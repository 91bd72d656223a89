"""The tiles that conv_sm90.cu may cut a convolution into: which fit, and what they take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from parcnn.cuda.kernels.conv_sm90_sizes import Class, Sizes
from parcnn.cuda.launch import Device
from parcnn.ops.pool import PoolWindow

MAX_BOX = 256  # of TMA, a dimension
BARRIER_BYTES, POOLED_BYTES = 512, 512  # with a pool: the list of a tile's pooled pixels, 8 bytes each
MAX_X_STAGES, MAX_W_STAGES = 8, 12
# Pixels of a tile that kernels are compiled for, by FILTER and COLUMNS (`constants`) and by (output channels of a tile,
# reduction channels of a step); a tile of fewer pixels is run by the next larger kernel. Of all that could be compiled these
# are a few that leave the estimates of many problems as they were (test_conv_sm90_choice.py).
Compiled = dict[tuple[int, int], dict[tuple[int, int], tuple[int, ...]]]
PIXELS: Compiled = {
    (0, 0): {(64, 64): (64, 88, 120, 184, 208, 232, 256), (128, 64): (176, 200, 256), (64, 32): (64, 128, 208, 248)},
    (0, 1): {(64, 64): (64, 120, 256), (128, 64): (160, 200, 224, 256), (64, 32): (112, 240)},
    (1, 1): {(64, 64): (64, 120, 152, 240, 256), (128, 64): (96, 192, 200, 224, 256), (64, 32): (80, 232)},
    (3, 1): {(64, 64): (64, 128, 200, 232, 256), (128, 64): (128, 160, 200, 224, 256), (64, 32): (168, 248)},
    (3, 3): {(64, 64): (64, 120, 128, 184, 224, 256), (64, 32): (128, 248, 256), (32, 64): (256,)},
}
# The same of tiles that are pooled by 2x2 windows, where those of several images lie not within threads; and by others.
POOLED_PIXELS: Compiled = {
    (0, 0): {(64, 64): (64, 128, 160, 208, 256), (128, 64): (200,), (64, 32): (64, 112, 208, 240)},
    (0, 1): {(64, 64): (64, 112, 144, 256), (128, 64): (128, 160, 192, 224, 256), (64, 32): (112, 144)},
    (1, 1): {(64, 64): (64, 112, 144, 224, 256), (128, 64): (160, 200), (64, 32): (96, 240)},
    (3, 1): {(64, 64): (200, 256), (128, 64): (200, 256), (64, 32): (128,)},
    (3, 3): {(64, 64): (64, 112, 128, 176, 224), (64, 32): (64, 128, 240)},
}
_WINDOWS = {(64, 64): (128, 176, 256), (128, 64): (176, 256), (64, 32): (248,)}
WINDOW_PIXELS: Compiled = {(0, 1): _WINDOWS, (3, 1): _WINDOWS}
# Tiles of 128 channels whose 2x2 windows lie within threads, as images are the innermost of their pixels; by FILTER and
# COLUMNS (`constants`). Each is a kernel of its own, for its images and its width say what of a window a thread has.
IMAGE_TILES: dict[tuple[int, int], tuple[tuple[int, int, int], ...]] = {
    (3, 1): ((6, 6, 4),),
    (0, 1): ((4, 4, 16), (2, 2, 64)),
    (1, 1): ((2, 2, 32), (2, 6, 16), (2, 2, 64)),
}
STAGED, WITHIN_ROWS, OTHER_WINDOWS, WITHIN_IMAGES = 1, 2, 3, 4  # POOL of a kernel (`pooling`)
WITHIN_THREADS = (WITHIN_ROWS, WITHIN_IMAGES)
PAIRED = 32  # output channels of a tile whose products do two rows of taps at once
# That copies should be asked for before their product: L2's latency, which grows with what it has to do.
AHEAD_CYCLES = 2500


class Shape(NamedTuple):
    """A tile: what an X stage serves, a 'tap', a 'column' of taps or a 'window' (all taps); its pixels, width x height x
    images; its output channels, 64 or 128, or 32, whose products do two rows of taps; X stages, where not as many as fit;
    whether a stage serves all groups of output channels; blocks that share its reduction; where it is for
    conv_sm90_pointwise.cu, how many groups of output channels a stage serves."""

    serves: str
    tile: tuple[int, int, int]
    channels: int
    x_stages: int = 0
    shared: bool = False
    splits: int = 1
    rounds: int = 0


@dataclass(frozen=True)
class Variant:
    """A way to run a problem: a tile and its use of shared memory.

    resident: all weights of a block's channels stay there. own_staging: where the epilogue does not borrow an X stage, the
    tiles that each consumer has room for, 1 or 2.
    shared: an X stage serves all groups of output channels, one after the other.
    splits: blocks that share a tile's reduction; each writes its sums, and a second kernel adds them.
    rounds: of conv_sm90_pointwise.cu, groups of output channels that an X stage serves, one after the other; 0: conv_sm90.cu.
    """

    serves: str
    tile: tuple[int, int, int]
    channels: int
    resident: bool
    own_staging: int
    x_stages: int
    w_stages: int
    shared: bool = False
    splits: int = 1
    rounds: int = 0

    @property
    def borrows(self) -> bool:
        """Whether the epilogue's tile lies in an X stage. A split's sums go to memory as they are."""
        return self.own_staging == 0 and self.splits == 1

    def __str__(self) -> str:
        flags = " resident" * self.resident + ("", " staging", " staging2")[self.own_staging] + " shared" * self.shared
        tile = f"{self.serves} {'x'.join(map(str, self.tile))} {self.channels}"
        stages = f"{self.x_stages}/{self.w_stages}" + f" in {self.splits}" * (self.splits > 1)
        return f"{tile}{flags} {stages}" + f" pointwise {self.rounds}" * (self.rounds > 0)


@dataclass(frozen=True)
class Footprint:
    """What a tile takes: compiled pixels, reduction channels of a step, bytes of shared memory."""

    pixels: int
    cb: int
    row: int  # pixels from a row of the tile to the next
    pitch: int  # of a stage
    rows: int  # of pixels in a stage, of each image
    x_box_bytes: int
    staging_bytes: int
    w_stage_bytes: int

    @classmethod
    def of(cls, sizes: Sizes, serves: str, tile: tuple[int, int, int], channels: int) -> Footprint | None:
        """None where no compiled kernel or no copy takes such a tile."""
        w, h, n = tile
        cb = step_channels(sizes, channels)
        pooled = pooling(sizes, serves, tile, channels)
        in_registers = pooled in WITHIN_THREADS
        halo = serves != "tap"
        pitch = w + sizes.taps[1] - 1 if serves == "window" else w
        row = pitch if is_flat(serves, w) else w
        least = row * (h + (channels == PAIRED)) * n - (row - w)
        if channels == PAIRED and not can_pair(sizes, serves, w):
            return None
        compiled = (least,) if pooled == WITHIN_IMAGES else compiled_pixels(sizes, serves, channels)
        pixels = next((p for p in compiled if p >= least and not (in_registers and p % 16)), None)
        rows = h + sizes.taps[0] - 1 if halo else h
        apart = (1, 1) if halo else sizes.stride
        boxes = (pitch * apart[1], rows * apart[0], n, row * sizes.spread[1], h * sizes.spread[0])
        fits = pixels is not None and max(boxes) <= MAX_BOX
        if halo:
            fits = fits and sizes.plain and (n == 1 or (serves == "column" and pooled in (0, WITHIN_IMAGES)))
            fits = fits and (serves == "column" or channels <= 64)
            fits = fits and (row == w or (w >= sizes.q and cb == 64 and not sizes.pool))
        if sizes.window:
            fits = fits and (serves == "tap" or (serves == "column" and sizes.is_3x3))
            fits = fits and min(pooled_by(sizes.window, w, 1), pooled_by(sizes.window, h, 0)) > 0
        elif sizes.pool:
            fits = fits and w % 2 == h % 2 == 0 and (in_registers or not sizes.mean)
        if not fits or pixels is None:
            return None
        staged = round_up(128 * _staged_rows(sizes, pixels, in_registers))
        return cls(pixels, cb, row, pitch, rows, 2 * cb * pitch * rows * n, staged, 2 * cb * max(64, channels))

    def x_stage_bytes(self, own_staging: bool) -> int:
        """A stage holds what is loaded, and the epilogue's tile where it is borrowed for it."""
        return round_up(max(self.x_box_bytes, 0 if own_staging else self.staging_bytes))


def is_flat(serves: str, width: int) -> bool:
    """Whether the tile's rows are those of a window's stage, halo and all: what the halo's pixels make is not stored."""
    return serves == "window" and width != 8


def step_channels(sizes: Sizes, channels: int) -> int:
    """Reduction channels of a step."""
    return 32 if sizes.c <= 32 and channels == 64 else 64


def compiled_pixels(sizes: Sizes, serves: str, channels: int) -> tuple[int, ...]:
    """Pixels of the kernels that there are for a problem, in ascending order."""
    own, cb = constants(sizes, serves), step_channels(sizes, channels)
    table = WINDOW_PIXELS if sizes.window else POOLED_PIXELS if sizes.pool else PIXELS
    compiled = table.get(own, {}).get((channels, cb), ())
    if sizes.moments:
        compiled = tuple(p for p in compiled if has_moments(p, cb, channels, own, sizes.flipped))
    return compiled


def has_moments(pixels: int, cb: int, channels: int, constants: tuple[int, int], flipped: bool) -> bool:
    """Whether such a kernel takes moments: beside 256 pixels' sums and filters of any side there are no registers left. Or
    (flipped) a batch norm's sums: those of several taps do (`conv_sm90._refuse_sums`)."""
    if flipped:
        return cb == 64 and channels >= 64 and constants not in ((0, 0), (1, 1))
    return channels < 128 or pixels < 256 or constants[0] > 0


def can_pair(sizes: Sizes, serves: str, width: int) -> bool:
    """Whether tiles may have 32 channels."""
    few = sizes.k <= PAIRED and sizes.is_3x3
    return few and serves == "window" and width == 8 and not sizes.pool and not sizes.moments


def products(sizes: Sizes, channels: int) -> int:
    """Of each step of reduction channels: one for each tap, or for two rows' in turns."""
    return 2 * sizes.s if channels == PAIRED else sizes.r * sizes.s


def images_inner(sizes: Sizes, variant: Variant) -> bool:
    """Whether a tile's images are the innermost of its pixels: a column's taps are then whole rows of pixels apart, and a
    pool's windows may lie within threads."""
    pooled = pooling(sizes, variant.serves, variant.tile, variant.channels)
    return pooled == WITHIN_IMAGES or (variant.serves == "column" and variant.tile[2] > 1)


def constants(sizes: Sizes, serves: str) -> tuple[int, int]:
    """FILTER and COLUMNS of the kernel: what is constant in it of filters of side 1, of side 3 where taps share a stage, and
    where a stage serves one tap."""
    if sizes.r == sizes.s == len(sizes.classes) == 1 and not sizes.window:
        return 1, 1
    if sizes.is_3x3 and serves != "tap":
        return 3, {"column": 1, "window": 3}[serves]
    return 0, int(serves == "tap")


def pooling(sizes: Sizes, serves: str, tile: tuple[int, int, int], channels: int) -> int:
    """How the kernel pools: not (0); other windows than 2x2; windows that lie within threads, whose pixels are neighbours in
    rows of eight, or the same of several images; or by way of shared memory."""
    w = tile[0]
    if not sizes.pool:
        return 0
    if sizes.window:
        return OTHER_WINDOWS
    if channels == 64:
        return WITHIN_ROWS if w == 8 else STAGED
    within = tile in IMAGE_TILES.get(constants(sizes, serves), ()) and not sizes.mean
    return WITHIN_IMAGES if within else STAGED


def _staged_rows(sizes: Sizes, pixels: int, in_registers: bool) -> int:
    """Rows of 64 channels that are staged of a tile: its pixels, or as much of a 2x2 pool's windows as threads have, eight rows
    at a time: of windows in registers values, and as many of indices; of maxima alone the windows' rows."""
    if not sizes.pool or sizes.window or (sizes.indices and not in_registers):
        return pixels
    eights = ceil(pixels / 32) if in_registers else ceil(pixels / 16)
    return 8 * eights * (2 if sizes.indices else 1)


def pooled_by(window: PoolWindow, extent: int, axis: int) -> int:
    """Windows that lie in so many neighbouring rows (axis 0) or columns of a convolution's outputs, side by side."""
    return (extent - window.kernel[axis]) // window.stride[axis] + 1


def fixed_bytes(sizes: Sizes) -> int:
    """Shared memory beside stages and staging."""
    return BARRIER_BYTES + POOLED_BYTES * (sizes.pool and sizes.window is None)


def fit(sizes: Sizes, shape: Shape, device: Device) -> Variant | None:
    """The variant with as many stages as shared memory holds; None where it does not fit.

    Weights are resident where there is room for enough X stages beside them, and the epilogue has staging of its own
    where tiles have too few loads to borrow from, or few bytes for it to hurt, or where two consumers share tiles, who must
    wait for each other when they borrow. Blocks of a single tile use weights once, and stream them.
    """
    if shape.rounds:
        return _fit_pointwise(sizes, shape, device)
    serves, tile, channels, x_stages, shared, splits, _ = shape
    takes = Footprint.of(sizes, serves, tile, channels)
    if takes is None:
        return None
    steps, taps = ceil(sizes.c / takes.cb), products(sizes, channels)
    blocks = ceil(steps / splits)
    if splits > 1 and (sizes.pool or sizes.moments or shared or channels == PAIRED or splits != ceil(steps / blocks)):
        return None
    groups = ceil(sizes.k / channels) if shared else 1
    if shared and (blocks * taps > 1 or groups == 1):
        return None
    if serves == "tap":
        least = min(min(live_taps(sizes, c, 0, tile[1])) * min(live_taps(sizes, c, 1, tile[0])) for c in sizes.classes)
        least = 1 if sizes.window else least
    elif serves == "column":
        skipped = skips_columns(sizes) and not sizes.window
        least = min(live_taps(sizes, sizes.classes[0], 1, tile[0])) if skipped else _fewest_loads(sizes, serves)
    else:
        least = _fewest_loads(sizes, serves)
    scarce = blocks * least < (1 if channels <= 64 else 2)
    once = serves != "tap" and splits == 1 and items(sizes, tile) * ceil(sizes.k / channels) <= device.sm_count
    pooled = pooling(sizes, serves, tile, channels)
    staged = pooled == STAGED and sizes.indices  # all of a tile
    if splits > 1:
        choices: tuple[int, ...] = (0,)
    elif pooled == WITHIN_IMAGES:  # the kernels have no other
        choices = (1,)
    elif scarce or shared or takes.cb == 32 or (taps == 1 and not sizes.pool):
        choices = (1,) if sizes.pool else (2, 1)
    else:
        choices = (1, 0) if channels == 128 and not sizes.window and not staged else (0,)
    weights = groups * blocks * taps * takes.w_stage_bytes
    enough = 2 if shared else 4 if channels == 128 else {"tap": 3, "column": 3, "window": 2}[serves]
    for own_staging in choices:
        stage = takes.x_stage_bytes(own_staging > 0 or splits > 1)
        left = device.shared_bytes_per_block - fixed_bytes(sizes) - 2 * own_staging * takes.staging_bytes
        resident_stages = min(MAX_X_STAGES, (left - weights) // stage)
        if resident_stages >= max(enough, x_stages) and (not once or channels == PAIRED):
            return Variant(serves, tile, channels, True, own_staging, x_stages or resident_stages, 1, shared, splits)
        if channels == PAIRED:
            continue
        may_borrow = choices == (1, 0) and own_staging == 1
        x = x_stages or min(MAX_X_STAGES, left // (stage + takes.w_stage_bytes))
        w = min(MAX_W_STAGES, (left - x * stage) // takes.w_stage_bytes) if x_stages or may_borrow else x
        product = takes.cb / 16 * takes.pixels / 2 * ceil(channels / 64)
        if serves != "tap" and not (x_stages or may_borrow) and x * product < AHEAD_CYCLES:
            x, w = _rings(left, stage, takes.w_stage_bytes, x, taps_per_load(sizes, serves))
        if not shared and min(x_stages or x, w) >= (4 if own_staging == 2 else 3 if may_borrow and not x_stages else 2):
            return Variant(serves, tile, channels, False, own_staging, x, w, splits=splits)
    return None


def _fit_pointwise(sizes: Sizes, shape: Shape, device: Device) -> Variant | None:
    """`fit` of conv_sm90_pointwise.cu: all weights of a block's channels stay there, and each consumer stages two tiles."""
    serves, tile, channels, x_stages, _, _, rounds = shape
    takes = Footprint.of(sizes, serves, tile, channels)
    apart = sizes.stride != (1, 1) or sizes.classes[0].pad != (0, 0)
    if takes is None or apart or sizes.indices or constants(sizes, serves) != (1, 1):
        return None
    if pooling(sizes, serves, tile, channels) != WITHIN_IMAGES or rounds > ceil(sizes.k / channels):
        return None
    steps, own_staging = ceil(sizes.c / takes.cb), 2
    left = device.shared_bytes_per_block - pointwise_bytes(rounds) - 2 * own_staging * takes.staging_bytes
    fits = (left - rounds * steps * takes.w_stage_bytes) // takes.x_stage_bytes(True)
    stages = min(x_stages or MAX_X_STAGES, fits)
    if stages < (max(2, steps) if rounds > 1 else 2):
        return None
    return Variant(serves, tile, channels, True, own_staging, stages, 1, rounds=rounds)


def pointwise_bytes(rounds: int) -> int:
    """Shared memory of conv_sm90_pointwise.cu beside stages and staging: barriers, biases of `rounds` times 128 channels."""
    return BARRIER_BYTES + 4 * 128 * rounds


def _rings(left: int, x_bytes: int, w_bytes: int, most: int, per_load: float) -> tuple[int, int]:
    """Stages of pixels (at most so many) and of weights that let the producer run the most products ahead, where a stage of
    pixels serves `per_load` of them: it asks for the next one only after the weights of all of these."""

    def w_stages(x: int) -> int:
        return min(MAX_W_STAGES, (left - x * x_bytes) // w_bytes)

    x = max(range(2, most + 1), key=lambda x: (min(w_stages(x), (x - 1) * per_load), x), default=most)
    return x, w_stages(x)


@lru_cache(maxsize=4096)
def live_taps(sizes: Sizes, kind: Class, axis: int, extent: int) -> tuple[int, ...]:
    """Taps along an axis (0: h) that reach the image from each tile of `extent` of a class's outputs; `live_taps` of
    conv_sm90.cuh."""
    image, outputs = (sizes.h, sizes.w)[axis], sizes.class_outputs[axis]
    stride, dilation = sizes.stride[axis], sizes.dilation[axis]
    taps, pad = kind.taps[axis], kind.pad[axis]
    counts = []
    for first in range(-pad, outputs * stride - pad, extent * stride):
        last = first + (extent - 1) * stride
        begin = max(0, ceil(-last / dilation))
        end = min(taps, ceil((image - first) / dilation))
        counts.append(max(1, end - begin))
    return tuple(counts)


def skips(sizes: Sizes, variant: Variant) -> bool:
    """Whether tiles leave out taps that lie wholly in the padding: where a stage serves one, or a column of a 3x3 filter."""
    return not sizes.window and (variant.serves == "tap" or (variant.serves == "column" and skips_columns(sizes)))


def skips_columns(sizes: Sizes) -> bool:
    """SKIPS_COLUMNS of the kernels whose stages serve a column of a filter's taps."""
    return sizes.is_3x3 and (sizes.flipped or not sizes.moments)


def patches(sizes: Sizes, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tiles of a class along the width, the height and the images."""
    p, q = sizes.class_outputs
    w, h = tile[:2]
    if sizes.window:
        (p, q), h, w = sizes.pooled, pooled_by(sizes.window, h, 0), pooled_by(sizes.window, w, 1)
    return ceil(q / w), ceil(p / h), ceil(sizes.n / tile[2])


def steps(sizes: Sizes, variant: Variant) -> int:
    """Of reduction channels that a block takes, for each tap."""
    return ceil(ceil(sizes.c / footprint(sizes, variant).cb) / variant.splits)


def items(sizes: Sizes, tile: tuple[int, int, int]) -> int:
    """Tiles of all classes, of one group of channels."""
    x, y, z = patches(sizes, tile)
    return x * y * z * len(sizes.classes)


def units(sizes: Sizes, variant: Variant) -> int:
    """Tiles of 64 output channels, of all classes."""
    return items(sizes, variant.tile) * ceil(sizes.k / variant.channels) * variant.channels // 64


def partial_bytes(sizes: Sizes, variant: Variant) -> int:
    """Of the splits' sums, with the pixels that the kernel rounds tiles up to."""
    return variant.splits * units(sizes, variant) * footprint(sizes, variant).pixels * 64 * 4


def taps_of_tiles(sizes: Sizes, variant: Variant) -> list[int]:
    """Taps of each tile of one image (group), class by class."""
    w, h, _ = variant.tile
    if variant.serves == "column":
        return [sizes.r * s for s in live_taps(sizes, sizes.classes[0], 1, w)] * patches(sizes, variant.tile)[1]
    return [r * s for c in sizes.classes for r in live_taps(sizes, c, 0, h) for s in live_taps(sizes, c, 1, w)]


def footprint(sizes: Sizes, variant: Variant) -> Footprint:
    """What the variant's tile takes. Raises ValueError where there is no such kernel."""
    found = Footprint.of(sizes, variant.serves, variant.tile, variant.channels)
    if found is None:
        raise ValueError(f"{variant} does not fit {sizes}")
    return found


def taps_per_load(sizes: Sizes, serves: str) -> float:
    """In the mean."""
    if serves == "tap":
        return 1.0
    return sum(part.taps[0] * part.taps[1] for part in sizes.parts) / sum(loads_of_parts(sizes, serves))


def loads_of_parts(sizes: Sizes, serves: str) -> list[int]:
    """For each step of reduction channels, where a load serves several taps."""
    return [part.taps[1] if serves == "column" else 1 for part in sizes.parts]


def _fewest_loads(sizes: Sizes, serves: str) -> int:
    """Of a tile, for each step: it goes through all classes of pixels, or is of one of outputs."""
    return min(loads_of_parts(sizes, serves)) if sizes.stride == (1, 1) else sum(loads_of_parts(sizes, serves))


def round_up(value: int, multiple: int = 1024) -> int:
    """The least multiple that is not below the value; of shared memory, where a swizzled tile may begin."""
    return ceil(value / multiple) * multiple
