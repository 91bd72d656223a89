"""Launcher of conv_sm90.cu: bf16 convolution on Hopper's tensor cores, forward and input gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import ceil, gcd
from typing import NamedTuple, cast

import numpy as np

from parcnn.cuda.kernels import batch_norm
from parcnn.cuda.kernels import conv_sm90_choice as choice
from parcnn.cuda.kernels import conv_sm90_cost as cost
from parcnn.cuda.kernels import conv_sm90_maps as maps
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.common import act_code, fast_div
from parcnn.cuda.kernels.conv_common import MAX_SIDE, Conv
from parcnn.cuda.kernels.conv_sm90_cost import Work
from parcnn.cuda.kernels.conv_sm90_sizes import CLASSES, Class, Sizes, sizes_of
from parcnn.cuda.kernels.conv_sm90_tiles import Footprint, Variant
from parcnn.cuda.kernels.conv_unpool import unpool
from parcnn.cuda.kernels.gate import gate_of
from parcnn.cuda.kernels.pool import divisor_of
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer, Struct
from parcnn.cuda.tensormap import MAX_ELEMENT_STRIDE
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.pool import PoolWindow
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad)
SOURCE, POINTWISE = "conv_sm90.cu", "conv_sm90_pointwise.cu"
THREADS, UNREACHED_THREADS, SUM_THREADS, MERGE_THREADS = 384, 256, 256, 1024
PARTIAL_MOMENTS, PARTIAL_SUMS = 3, 2  # count, mean, sum of squared deviations; dgamma, dbeta
MOST_PIXELS_BESIDE_SUMS = 224  # of a tile: twin of conv_sm90_moments.cuh's
# Twins of conv_sm90.cuh's.
ORDER_ENTRIES, NO_ITEM, ORDERED, TURNED, BY_PATCH = 1280, 0xFFFF, 1, 2, 3
MAX_STRIDES = 16  # of dgrad, of both directions together: four classes a launch
# Of a pool's window: outputs of the convolution that tiles compute, by those that there are; elements by stride.
MOST_COMPUTED, MOST_OVERLAP = 1.0, 3.0
PARAMETERS = ("gamma", "beta", "mean", "rstd")  # of a batch norm below dgrad
FEW_CHANNELS = 32  # for which there are kernels of their own
CHANNEL_UNIT = 8  # strides of tensor maps are multiples of 16 bytes
NEGATIVE_INFINITIES = 0xFF80FF80  # two bf16
_ALIGNMENT = 256  # of what lies in the workspace
FITS_L2_BYTES = 32 << 20  # an image that stays in L2 while all tiles of a class, and then those of the next, read it


class Epilogue(NamedTuple):
    """What the epilogue reads: an addend; of dgrad also what is saved of the activation below (or x of a batch norm there), the
    activation, and of the batch norm gamma, beta, mean, rstd. Forward, where what the activation is taken of is to be kept."""

    addend: Slot | None = None
    saved: Slot | None = None
    act: str | None = None
    norm: tuple[Slot, ...] = ()
    kept: Slot | None = None


NO_EPILOGUE = Epilogue()


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvDgrad):
        return f"{op.name} is neither a forward convolution nor an input gradient"
    x, w = inputs[:2]
    if x.dtype != "bf16" or w.dtype != "bf16":
        return f"the tensor-core convolutions take bf16 operands, not {x.dtype} and {w.dtype}"
    if op.groups != 1:
        return f"the tensor-core convolutions have one group, not {op.groups}"
    if isinstance(op, ConvFprop):
        if op.window and (reason := _refuse_window(op, op.window, inputs)):
            return reason
        if op.bias and inputs[2].dtype != "f32":
            return f"the bias must be f32, not {inputs[2].dtype}"
        if max(op.stride) > MAX_ELEMENT_STRIDE:
            return f"strides above {MAX_ELEMENT_STRIDE} are not copied by TMA, got {op.stride}"
        if op.moments and (op.pool or 0 in op.infer(*inputs)[0].shape):
            return "moments are taken of outputs before any pool, of one pixel at least"
        if (op.add or op.keep) and (reason := _refuse_second_tensor(op, inputs)):
            return reason
        image = (x.shape[1], x.shape[2])
    else:
        if max(op.stride) > MAX_ELEMENT_STRIDE or op.stride[0] * op.stride[1] > MAX_STRIDES:
            return (
                f"an input gradient's strides are at most {MAX_ELEMENT_STRIDE}, {MAX_STRIDES} together, got {op.stride}"
            )
        if op.sums and (reason := _refuse_sums(op, inputs)):
            return reason
        named = cast("dict[str, Spec]", op.operands(inputs))
        wrong = [
            spec.dtype for name, spec in named.items() if spec.dtype != "bf16" and name not in ("idx", *PARAMETERS)
        ]
        if wrong:
            return f"the tensor-core convolutions take bf16 operands, not {wrong[0]}"
        image = op.image
    k, r, s, c = w.shape
    if c % CHANNEL_UNIT or k % CHANNEL_UNIT:
        return f"channels must be multiples of {CHANNEL_UNIT}, got {c} -> {k}"
    span = [d * (f - 1) + 1 for d, f in zip(op.dilation, (r, s), strict=True)]
    if max(*image, *span, *op.pad) >= MAX_SIDE:
        return f"image sides, filter spans and padding must be below {MAX_SIDE}"
    before_pool = 4 if isinstance(op, ConvDgrad) and op.pool else 1  # elements of the error, by those of dy
    if max(before_pool * x.size, *(spec.size for spec in (*inputs, *op.infer(*inputs)))) >= 2**31:
        return "a tensor has 2**31 elements or more"
    return None


def _refuse_window(op: ConvFprop, window: PoolWindow, inputs: tuple[Spec, ...]) -> str | None:
    """Why no kernel pools by another window than 2x2; None where one does (`gains`: whether it pays)."""
    if window.dilation != (1, 1):
        return "of pools only those without dilation are fused"
    if window.kernel[0] * window.kernel[1] > 16 or min(window.kernel) < 1:
        return f"windows have at most 16 elements, not {window.kernel}"
    y = op.infer(*inputs)[0].shape
    if min(y[1:3]) < 1:
        return "no window lies within the outputs"
    if not choice.has_window_tiles(window, y[2], op.stride):
        return "no tile is as wide as a sixteenth of a row of windows"
    return None


def _refuse_sums(op: ConvDgrad, inputs: tuple[Spec, ...]) -> str | None:
    """Why the sums for a batch norm below are not taken; None where they are.

    Beside an addend, of one tap or of every second pixel, what they add to the epilogue no longer hides behind the product.
    """
    w = inputs[1].shape
    if op.add or w[1:3] != (3, 3) or op.stride != (1, 1):
        return "a batch norm's sums are taken of 3x3 filters' gradients, stride 1, to which nothing is added"
    if w[0] <= 32:
        return f"a batch norm's sums are taken of more than 32 filters' gradients, not {w[0]}"
    named = cast("dict[str, Spec]", op.operands(inputs))
    if wrong := [named[name].dtype for name in PARAMETERS if named[name].dtype != "f32"]:
        return f"a batch norm's parameters and statistics must be f32, one is {wrong[0]}"
    if op.act not in (None, "relu"):
        return f"a batch norm's sums go with ReLU or nothing, not {op.act}"
    dx = op.infer(*inputs)[0]
    if not (inputs[0].size and dx.size):
        return "a batch norm's sums are of one pixel at least"
    if Conv.of(op, dx, inputs[1]).r == 1:  # a matrix product, whose columns are pixels and channels
        return "a batch norm's sums are not taken where the filter covers the image"
    return None


def _refuse_second_tensor(op: ConvFprop, inputs: tuple[Spec, ...]) -> str | None:
    """Why nothing is added to the outputs, or the activation's input is not stored; None where it is."""
    k, _, _, c = inputs[1].shape
    what = "an addend" if op.add else "the activation's input"
    if op.pool or op.moments or (op.add and op.keep):
        return f"{what} goes with neither a pool nor moments nor another tensor"
    if min(c, k) <= FEW_CHANNELS:
        return f"{what} is of convolutions of more than {FEW_CHANNELS} channels to more than those, not {c} -> {k}"
    return f"the addend must be bf16, not {inputs[-1].dtype}" if op.add and inputs[-1].dtype != "bf16" else None


def gains(op: Op, inputs: tuple[Spec, ...]) -> bool:
    """Whether the convolution with its pool is no slower than both apart.

    Where windows other than 2x2 overlap, tiles that have not the whole image compute their halos again, and a pool on its own
    is faster: of 56x56 outputs of 64 channels, maxima 3x3 stride 2 (15 % more outputs), 134 us against 163 on an H200; 2x2
    stride 1, 132 and 180. So it is where tiles of whole windows have one tap a stage and others several: 5x5 filters of
    28x28x64, 3x3 stride 3, 71 us against 94; or few channels: 3x3 filters of 16x16x32, 3x3 stride 2, 17.3 and 19.3.
    """
    if not isinstance(op, ConvFprop) or op.window is None:
        return True
    window, x, (_, r, s, c) = op.window, inputs[0].shape, inputs[1].shape
    if window.kernel[0] * window.kernel[1] > MOST_OVERLAP * window.stride[0] * window.stride[1]:
        return False
    if choice.computed(window, *op.output_hw(x[1], x[2], r, s)) > MOST_COMPUTED:
        return False
    share_stages = (r, s, *op.stride) == (3, 3, 1, 1) and c > 32
    return r * s == 1 or op.dilation != (1, 1) or share_stages


def unpools(call: Call, device: Device, variant: Variant | None = None) -> bool:
    """True: tensor maps know no indices."""
    return True


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """The sums of splits where there are several, and, of dgrad behind a pool, dy unpooled; rows of moments or sums."""
    sizes = sizes_of(Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in outputs)))
    if sizes.moments:
        rows = _rows_of_moments(sizes, variant or choice.candidates(sizes, device)[0], device)
        return (
            _partial_offset(op, inputs[0]) + (PARTIAL_SUMS if sizes.flipped else PARTIAL_MOMENTS) * 4 * rows * sizes.k
        )
    return _partial_offset(op, inputs[0]) + _partial_bytes(sizes, variant, device)


def candidates(call: Call, device: Device) -> list[Variant]:
    """Variants that can run the call, best first (`conv_sm90_choice.candidates`)."""
    sizes = sizes_of(call)
    return list(choice.candidates(sizes, device)) if sizes.classes and sizes.p * sizes.q else []


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best variant."""
    sizes = sizes_of(call)
    passes = 3.0 * (isinstance(call.op, ConvDgrad) and call.op.pool is not None) + 3.0 * (not sizes.classes)
    return passes + (cost.cost_us(sizes, choice.candidates(sizes, device)[0], device) if sizes.classes else 0)


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """The convolution; of dgrad with a stride, one for each four classes of pixels, and a pass over those that no tap
    reaches. Before it, a pass that unpools dy where there is a pool. `variant` forces one of `candidates`."""
    op, sizes = call.op, sizes_of(call)
    if 0 in call.outputs[0].spec.shape:
        return []
    if isinstance(op, ConvFprop):
        x, w, *rest = call.inputs
        addend = rest.pop() if op.add else None
        chosen = variant or choice.candidates(sizes, device)[0]
        bias = rest[0] if rest else None
        epilogue = Epilogue(addend, kept=call.outputs[1] if op.keep else None)
        return _convolution(sizes, chosen, device, call, x, w, bias, op.act, epilogue)
    if not isinstance(op, ConvDgrad):
        raise TypeError(f"{op.name} is neither a forward convolution nor an input gradient")
    named = cast("dict[str, Slot]", op.operands(call.inputs))
    dy, w, result = named["dy"], named["w"], []
    norm = tuple(named[name] for name in PARAMETERS) if op.sums else ()
    epilogue = Epilogue(named.get("addend"), named.get("x" if op.sums else "saved"), op.act, norm)
    if not sizes.classes:
        return [_unreached(sizes, call.outputs[0], epilogue)]
    chosen = variant or choice.candidates(sizes, device)[0]
    if op.pool:
        if call.workspace is None:
            raise ValueError("an input gradient behind a pool needs its workspace")
        result.append(unpool(dy, named.get("idx"), call.workspace))
        dy = call.workspace
    for first in range(0, len(sizes.classes), CLASSES):
        some = replace(sizes, classes=sizes.classes[first : first + CLASSES])
        result += _convolution(some, chosen, device, call, dy, w, epilogue=epilogue)
    if len(sizes.classes) < min(sizes.spread[0], sizes.p) * min(sizes.spread[1], sizes.q):
        result.append(_unreached(sizes, call.outputs[0], epilogue))
    return result


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name, but for those of `conv_unpool` and `batch_norm`."""
    for constants, channels, cb, count in _compiled(tiles.PIXELS):
        for flipped in (False, True):
            yield _kernel(count, cb, channels, 0, flipped, constants)
            if channels != tiles.PAIRED and tiles.has_moments(count, cb, channels, constants, flipped):
                yield _kernel(count, cb, channels, 0, flipped, constants, moments=True)
        if channels != tiles.PAIRED and cb == 64:
            yield _kernel_of_two(count, cb, channels, constants)
    for constants, channels, cb, count in _compiled(tiles.POOLED_PIXELS):
        if constants != (3, 3):  # windows are eight pixels wide
            yield _kernel(count, cb, channels, tiles.STAGED, False, constants)
        if channels == 64 and count % 16 == 0:
            yield _kernel(count, cb, channels, tiles.WITHIN_ROWS, False, constants)
    for constants, channels, cb, count in _compiled(tiles.WINDOW_PIXELS):
        yield _kernel(count, cb, channels, tiles.OTHER_WINDOWS, False, constants)
    for constants, compiled in tiles.IMAGE_TILES.items():
        yield from (_kernel_of_images(tile, constants) for tile in compiled)
    for tile in tiles.IMAGE_TILES[1, 1]:
        yield from (_pointwise_kernel(tile, steps) for steps in (0, 1))
    yield UNREACHED
    yield SUM
    yield MERGE_MOMENTS


def _compiled(table: tiles.Compiled) -> Iterator[tuple[tuple[int, int], int, int, int]]:
    """(FILTER, COLUMNS), output channels, reduction channels and pixels of each kernel in a table."""
    for constants, blocks in table.items():
        for (channels, cb), pixels in blocks.items():
            yield from ((constants, channels, cb, count) for count in pixels)


UNREACHED = Kernel("conv_dgrad_unreached.cu", "conv_dgrad_unreached")
SUM = Kernel("conv_sm90_sum.cu", "conv_sm90_sum")
MERGE_MOMENTS = Kernel("conv_moments.cu", "conv_moments")


def _kernel(
    pixels: int, cb: int, channels: int, pool: int, flipped: bool, constants: tuple[int, int], moments: bool = False
) -> Kernel:
    names = ("PIXELS", "CB", "CHANNELS", "POOL", "FLIPPED", "FILTER", "COLUMNS", "MOMENTS")
    values = (pixels, cb, channels, pool, int(flipped), *constants, int(moments))
    return Kernel(SOURCE, "conv_sm90", tuple(zip(names, values, strict=True)))


def _kernel_of_two(pixels: int, cb: int, channels: int, constants: tuple[int, int]) -> Kernel:
    """Forward, with a second tensor of y's shape: an addend, or what the activation is taken of."""
    kernel = _kernel(pixels, cb, channels, 0, False, constants)
    return replace(kernel, defines=(*kernel.defines, ("SECOND", 1)))


def _kernel_of_images(tile: tuple[int, int, int], constants: tuple[int, int]) -> Kernel:
    """Of a pool whose windows lie within threads that have pixels of several images."""
    w, h, n = tile
    kernel = _kernel(w * h * n, 64, 128, tiles.WITHIN_IMAGES, False, constants)
    return replace(kernel, defines=(*kernel.defines, ("IMAGES", n), ("WIDTH", w)))


def _pointwise_kernel(tile: tuple[int, int, int], steps: int) -> Kernel:
    """Of 1x1 filters and maxima of 2x2 windows; `steps` of channels are a constant where there is one."""
    w, h, n = tile
    defines = (("PIXELS", w * h * n), ("WIDTH", w), ("IMAGES", n), ("STEPS", steps if steps == 1 else 0))
    return Kernel(POINTWISE, "conv_sm90_pointwise", defines)


def _partial_offset(op: Op, x: Spec) -> int:
    """Where the sums of splits begin in the workspace: behind dy unpooled."""
    return _round_up(4 * x.nbytes) if isinstance(op, ConvDgrad) and op.pool else 0


def _partial_bytes(sizes: Sizes, variant: Variant | None, device: Device) -> int:
    """Of the sums of splits; launches of one call write them in turns."""
    if sizes.pool or not sizes.classes or not sizes.p * sizes.q * sizes.n:
        return 0
    chosen = variant or choice.candidates(sizes, device)[0]
    some = replace(sizes, classes=sizes.classes[:CLASSES])
    return tiles.partial_bytes(some, chosen) if chosen.splits > 1 else 0


def _convolution(
    sizes: Sizes,
    variant: Variant,
    device: Device,
    call: Call,
    x: Slot,
    w: Slot,
    bias: Slot | None = None,
    act: str | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> list[Launch]:
    """The product, and behind splits their sum, which then has the epilogue; or what merges the product's moments or sums."""
    if variant.rounds:
        return [_pointwise(sizes, variant, device, call.outputs[0], x, w, bias, act)]
    if variant.splits == 1 and not sizes.moments:
        return [_product(sizes, variant, device, call.outputs, x, w, bias, None, act, epilogue)]
    if call.workspace is None:
        raise ValueError("a convolution of several splits, or with sums for a batch norm, needs its workspace")
    offset = _partial_offset(call.op, call.inputs[0].spec)
    if sizes.moments:
        rows = _rows_of_moments(sizes, variant, device)
        product = _product(
            sizes, variant, device, call.outputs, x, w, bias, Pointer(call.workspace, offset), act, epilogue
        )
        return [product, _merge(sizes, rows, call, offset)]
    place = Pointer(call.workspace, offset, tiles.partial_bytes(sizes, variant))
    product = _product(sizes, variant, device, call.outputs, x, w, None, place, None, NO_EPILOGUE)
    return [product, _sum(sizes, variant, place, call.outputs[0], bias, act, epilogue)]


def _product(
    sizes: Sizes,
    variant: Variant,
    device: Device,
    outputs: tuple[Slot, ...],
    x: Slot,
    w: Slot,
    bias: Slot | None,
    partial: Pointer | None,
    act: str | None,
    epilogue: Epilogue,
) -> Launch:
    tile = tiles.footprint(sizes, variant)
    work = Work.of(sizes, variant, device)
    pool = tiles.pooling(sizes, variant.serves, variant.tile, variant.channels)
    constants = tiles.constants(sizes, variant.serves)
    has_second = not sizes.flipped and (epilogue.addend or epilogue.kept) is not None
    if pool == tiles.WITHIN_IMAGES:
        kernel = _kernel_of_images(variant.tile, constants)
    elif has_second:
        kernel = _kernel_of_two(tile.pixels, tile.cb, variant.channels, constants)
    else:
        kernel = _kernel(tile.pixels, tile.cb, variant.channels, pool, sizes.flipped, constants, sizes.moments)
    order = _order(sizes, variant, device)
    stage_bytes = tile.x_stage_bytes(not variant.borrows)
    resident = work.k_rounds * tiles.steps(sizes, variant) * tiles.products(sizes, variant.channels)
    weights = resident if variant.resident else variant.w_stages
    staging_offset = variant.x_stages * stage_bytes + weights * tile.w_stage_bytes
    barrier_offset = staging_offset + 2 * variant.own_staging * tile.staging_bytes
    problem = _problem(sizes, variant, tile, work, order, (staging_offset, barrier_offset), act, epilogue)
    sums: tuple[Argument, ...] = () if sizes.pool or has_second else (partial,)
    if sizes.moments:
        sums = (partial, np.int32(_rows_of_moments(sizes, variant, device)), _inside(sizes, variant), *_norm(epilogue))
    filters = w if variant.channels == tiles.PAIRED else maps.w_map(w, sizes, variant, tile)
    args: tuple[Argument, ...] = (
        *maps.x_maps(x, sizes, variant, tile), filters, *_outputs(outputs, sizes, variant, epilogue),
        *sums, bias, problem, order or bytes(2 * ORDER_ENTRIES),
    )  # fmt: skip
    grid = (work.slots * work.k_groups, variant.splits, 1)
    return Launch(kernel, grid, (THREADS, 1, 1), args, barrier_offset + tiles.fixed_bytes(sizes))


def _pointwise(
    sizes: Sizes, variant: Variant, device: Device, y: Slot, x: Slot, w: Slot, bias: Slot | None, act: str | None
) -> Launch:
    tile, work, steps = tiles.footprint(sizes, variant), Work.of(sizes, variant, device), tiles.steps(sizes, variant)
    weights = variant.rounds * steps * tile.w_stage_bytes
    staging_offset = variant.x_stages * tile.x_stage_bytes(True) + weights
    barrier_offset = staging_offset + 2 * variant.own_staging * tile.staging_bytes
    problem = _problem(sizes, variant, tile, work, None, (staging_offset, barrier_offset), act, NO_EPILOGUE)
    (pixels,) = maps.x_maps(x, sizes, variant, tile)
    args = (pixels, maps.w_map(w, sizes, variant, tile), maps.pooled_map(y, sizes, variant), bias, problem)
    shared_bytes = barrier_offset + tiles.pointwise_bytes(variant.rounds)
    grid = (work.slots * work.k_groups, 1, 1)
    return Launch(_pointwise_kernel(variant.tile, steps), grid, (THREADS, 1, 1), args, shared_bytes)


def _sum(
    sizes: Sizes,
    variant: Variant,
    partial: Pointer,
    y: Slot,
    bias: Slot | None,
    act: str | None,
    epilogue: Epilogue,
) -> Launch:
    """The launch that adds the splits' sums."""
    addend, saved, derivative, _, kept = epilogue
    tile = tiles.footprint(sizes, variant)
    _, h, n = variant.tile
    w = tile.row
    columns, rows, images = tiles.patches(sizes, variant.tile)
    units, is_inner = tiles.units(sizes, variant), tiles.images_inner(sizes, variant)
    kinds = (*sizes.classes, *[sizes.classes[0]] * (CLASSES - len(sizes.classes)))
    numbers = (
        sizes.n, sizes.p, sizes.q, sizes.k, variant.splits, units, tile.pixels, n, h, w, int(is_inner), *sizes.spread,
        int(sizes.flipped), act_code(derivative if sizes.flipped else act),
    )  # fmt: skip
    divisors = (
        tile.pixels, units // tiles.items(sizes, variant.tile), columns * rows * images, columns, rows,
        *((n, w) if is_inner else (w, h)),
    )  # fmt: skip
    geometry = Struct(
        (
            *(np.int32(v) for v in numbers),
            *(fast_div(d) for d in divisors),
            *(np.int32(kind.first[axis]) for axis in (0, 1) for kind in kinds),
        )
    )
    grid = (ceil(units * tile.pixels * 8 / SUM_THREADS), 1, 1)
    return Launch(SUM, grid, (SUM_THREADS, 1, 1), (partial, bias, addend, saved, y, kept, geometry))


def _outputs(outputs: tuple[Slot, ...], sizes: Sizes, variant: Variant, epilogue: Epilogue) -> tuple[Argument, ...]:
    """What the kernel writes: y and (of a maximum) idx, and where windows lie within threads a map of y, or a map of y; of
    dgrad, one for each class. Then maps of what the epilogue reads or writes, too: of dgrad addend and saved tensor, else of an
    addend or what is kept, if any."""
    if sizes.pool:
        y, idx = outputs[0], outputs[1] if sizes.indices else None
        if tiles.pooling(sizes, variant.serves, variant.tile, variant.channels) not in tiles.WITHIN_THREADS:
            return y, idx
        return y, idx, maps.NO_MAP if idx else maps.pooled_map(y, sizes, variant)
    written: list[Argument] = [maps.y_map(outputs[0], sizes, variant, kind) for kind in sizes.classes]
    if epilogue.kept is not None:
        written.append(maps.y_map(epilogue.kept, sizes, variant, sizes.classes[0]))
    if not sizes.flipped:
        return (
            tuple(written) if epilogue.addend is None else (*written, maps.operand_map(epilogue.addend, sizes, variant))
        )
    written += [maps.NO_MAP] * (CLASSES - len(written))
    written += [
        maps.operand_map(slot, sizes, variant) if slot else maps.NO_MAP for slot in (epilogue.addend, epilogue.saved)
    ]
    return tuple(written)


def _rows_of_moments(sizes: Sizes, variant: Variant, device: Device) -> int:
    """Rows of partial moments: one for each consumer that has tiles of its own, or where its tiles are not all of the same
    channels, one for each patch of pixels; so of dgrad's sums."""
    work, pixels = Work.of(sizes, variant, device), tiles.footprint(sizes, variant).pixels
    if sizes.flipped or work.k_inner > 1 or work.k_rounds > 1 or pixels > MOST_PIXELS_BESIDE_SUMS:
        return tiles.items(sizes, variant.tile)
    return work.slots * (2 if variant.channels <= 64 else 1)


def _inside(sizes: Sizes, variant: Variant) -> bytes:
    """`Inside` of conv_sm90_moments.cuh: the pixels of a tile that lie inside the image, by where the image ends."""
    extents, tile = (sizes.q, sizes.p, sizes.n), variant.tile
    inside = np.zeros((8, 8 * 32), np.uint8)
    for ends in range(8):
        left = [
            e - (ceil(e / t) - 1) * t if ends >> i & 1 else t
            for i, (e, t) in enumerate(zip(extents, tile, strict=True))
        ]
        steps = (tiles.footprint(sizes, variant).row, *tile[1:])
        w, h, n = (np.arange(step) < some for step, some in zip(steps, left, strict=True))
        slowest, middle, fastest = (h, w, n) if tiles.images_inner(sizes, variant) else (n, h, w)
        pixels = (slowest[:, None, None] & middle[:, None] & fastest).reshape(-1)[: inside.shape[1]]
        inside[ends, : pixels.size] = pixels
    whole = np.append(inside, np.zeros((8, 1), np.uint8), axis=1).argmin(1).astype(np.int32)
    bits = np.packbits(inside, axis=1, bitorder="little")
    return b"".join(part.tobytes() for part in (bits, inside.sum(1, dtype=np.float32), whole))


def _merge(sizes: Sizes, rows: int, call: Call, offset: int) -> Launch:
    """The launch that merges `rows` of partial moments or sums, which begin at `offset` of the workspace."""
    workspace = cast("Slot", call.workspace)
    if sizes.flipped:
        half = 4 * rows * sizes.k
        halves = (Pointer(workspace, offset, half), Pointer(workspace, offset + half, half))
        _, dgamma, dbeta = call.outputs
        return batch_norm.sum_gradients("bf16", 1, *halves, dgamma, dbeta, rows, sizes.k)
    grid = (sizes.k // CHANNEL_UNIT, 1, 1)
    args = (workspace, call.outputs[-1], np.int32(rows), np.int32(sizes.k))
    return Launch(MERGE_MOMENTS, grid, (MERGE_THREADS, 1, 1), args)


def _norm(epilogue: Epilogue) -> tuple[Argument, ...]:
    """`Norm` of conv_sm90_norm.cuh, where there is a batch norm below."""
    return (Struct(epilogue.norm),) if epilogue.norm else ()


def _order(sizes: Sizes, variant: Variant, device: Device) -> bytes | None:
    """`Order` of conv_sm90.cuh, [round][slot]; None where the kernel may count, for items are alike or too many to list."""
    dealt = cost.deal(sizes, variant, device)
    if dealt is None:
        return None
    rounds = max(map(len, dealt))
    if rounds * len(dealt) > ORDER_ENTRIES:
        return None
    table = np.full(ORDER_ENTRIES, NO_ITEM, np.uint16)
    for slot, items in enumerate(dealt):
        table[slot : rounds * len(dealt) : len(dealt)][: len(items)] = items
    return table.tobytes()


def _turn(classes: int, work: Work) -> int:
    """Patches after which another class begins, where else a slot would come to the same class in each round."""
    apart = work.slots // work.k_inner
    return max(1, apart // classes) if gcd(apart, classes) > 1 else 2**31 - 1


def _problem(
    sizes: Sizes,
    variant: Variant,
    tile: Footprint,
    work: Work,
    order: bytes | None,
    offsets: tuple[int, int],
    act: str | None,
    epilogue: Epilogue,
) -> Struct:
    """`Problem` of conv_sm90.cuh."""
    w, h, n = variant.tile
    x_tiles, y_tiles, z_tiles = tiles.patches(sizes, variant.tile)
    items = tiles.items(sizes, variant.tile) * work.k_inner
    if order is not None:
        items = int(np.flatnonzero(np.frombuffer(order, np.uint16) != NO_ITEM)[-1]) + 1
    row_bytes = 2 * tile.cb
    blocks = tiles.steps(sizes, variant)
    is_uneven = tiles.skips(sizes, variant) and min(tiles.taps_of_tiles(sizes, variant)) < sizes.r * sizes.s
    ordered = ORDERED if order is not None else TURNED if is_uneven and variant.splits == 1 else 0
    are_alike = not is_uneven and len({kind.taps for kind in sizes.classes}) == 1
    of_pixels = maps.is_of_pixels(sizes, variant.serves)
    loads_of_parts = tiles.loads_of_parts(sizes, variant.serves)
    loads_of_tile = sum(loads_of_parts) if of_pixels else max(loads_of_parts)
    stride, tap_steps, kinds, none = sizes.stride, sizes.tap_steps, sizes.classes, sizes.classes[0]
    if of_pixels:
        stride, kinds, none = (1, 1), sizes.parts, Class((0, 0), (0, 0))
        tap_steps = (sizes.stride[0] * tap_steps[0], sizes.stride[1] * tap_steps[1])
    load_rows, load_columns, loads, row_step, column_step = {
        "tap": (1, 1, blocks if sizes.r * sizes.s == 1 else 0, 0, 0),
        "column": (sizes.taps[0], 1, blocks * loads_of_tile if are_alike else 0, tile.pitch * n * row_bytes, 0),
        "window": (*sizes.taps, blocks * loads_of_tile if are_alike else 0, tile.pitch * row_bytes, row_bytes),
    }[variant.serves]
    p, q = sizes.pooled
    pooled_w, pooled_h, windows = max(1, w // 2), max(1, h // 2), [0] * 8
    if len(sizes.classes) > 1 and order is None and 2 * sizes.n * sizes.h * sizes.w * sizes.c > FITS_L2_BYTES:
        ordered, pooled_w, pooled_h = BY_PATCH, len(sizes.classes), _turn(len(sizes.classes), work)
    if window := sizes.window:
        pooled_w, pooled_h = tiles.pooled_by(window, w, 1), tiles.pooled_by(window, h, 0)
        windows = [*window.kernel, *window.stride, *window.pad, sizes.p, sizes.q]
        windows += divisor_of(window, (sizes.p, sizes.q), sizes.pooled), int(window.count_include_pad)
    group_bytes = (8 if tile.row == tile.pitch else tile.pitch) * row_bytes
    swizzle = 1 if tile.cb == 64 else 2
    before = (
        sizes.h, sizes.w, sizes.r, sizes.s, sizes.c, sizes.k, sizes.n, p, q,
        *stride, *sizes.dilation, *sizes.spread, *tap_steps,
        blocks, tiles.units(sizes, variant), n, h, w, int(tiles.images_inner(sizes, variant)),
        items, work.slots, work.k_groups, work.k_rounds, ordered,
        load_rows, load_columns, loads, row_step >> 4, column_step >> 4,
    )  # fmt: skip
    after = (
        tile.x_box_bytes, tile.x_stage_bytes(not variant.borrows), variant.x_stages,
        variant.w_stages, int(variant.resident), 0 if variant.borrows else max(1, variant.own_staging), *offsets,
        tile.staging_bytes, act_code(epilogue.act if sizes.flipped else None if act == "relu" else act), int(sizes.mean),
        int(epilogue.addend is not None), tile.row * h * n * 128,
    )  # fmt: skip
    of_class = x_tiles * y_tiles * z_tiles * work.k_inner
    divisors = (
        *sizes.dilation, of_class, work.k_inner, x_tiles, y_tiles, work.k_rounds, variant.x_stages, variant.w_stages,
        pooled_w, pooled_h,
    )  # fmt: skip
    kinds = (*kinds, *[none] * (CLASSES - len(kinds)))
    classes = (v for c in kinds for v in (*c.taps, *c.pad, c.tap, *c.first))
    return Struct(
        (
            *(np.int32(v) for v in before),
            np.uint32(group_bytes >> 4 | swizzle << 30),
            *(np.int32(v) for v in after),
            np.uint32(0 if act == "relu" else NEGATIVE_INFINITIES),
            *(fast_div(d) for d in divisors),
            *(np.int32(v) for v in classes),
            *gate_of(epilogue.act if sizes.flipped else act),
            *(np.int32(v) for v in windows),
        )
    )


def _unreached(sizes: Sizes, dx: Slot, epilogue: Epilogue) -> Launch:
    """The launch that writes the pixels of dx that no tap reaches."""
    reached = [0, 0]  # bits: rows, columns by their remainder
    for kind in sizes.classes:
        for axis in (0, 1):
            reached[axis] |= 1 << kind.first[axis]
    chunks = dx.spec.size // CHANNEL_UNIT
    pixels = Struct(
        (
            *(fast_div(d) for d in (sizes.k // CHANNEL_UNIT, sizes.q, sizes.p, sizes.spread[0], sizes.spread[1])),
            *(np.uint32(bits) for bits in reached),
        )
    )
    return Launch(
        UNREACHED,
        (ceil(chunks / UNREACHED_THREADS), 1, 1),
        (UNREACHED_THREADS, 1, 1),
        (epilogue.addend, epilogue.saved, dx, np.int32(chunks), np.int32(act_code(epilogue.act)), pixels),
    )


def _round_up(nbytes: int) -> int:
    return ceil(nbytes / _ALIGNMENT) * _ALIGNMENT
