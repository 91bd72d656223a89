"""Launcher of conv_mma_lines.cu: bf16 convolutions of stride 1, forward and of the input's gradient, on sm_80 and later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import cast

import numpy as np

from parcnn.cuda.device import SHARED_BYTES
from parcnn.cuda.kernels.common import act_code, fast_div
from parcnn.cuda.kernels.conv_mma import CHUNK, Grouped, Pieces, Tile, cycles, microseconds, refuse
from parcnn.cuda.kernels.gate import gate_of
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.program import Call, Slot

OPS: tuple[type[Op], ...] = (ConvFprop, ConvDgrad)
SOURCE = "conv_mma_lines.cu"

# The last one for runs of many channels on GPUs with little shared memory.
TILES = (Tile(256, 64, 64, 4, 1, 3), Tile(256, 32, 64, 4, 1, 3), Tile(256, 64, 32, 4, 1, 3))
Variant = Tile
_FEWEST_TAPS = 4
_SLOT = 0.1  # a position more in a run, against one more that is computed
# Against the estimate of tap by tap (H200, nine problems): all; stages of 32 channels; fewer than eight warps on an SM.
_SLOWER, _SHORT_STAGES, _FEW_WARPS = 1.08, 1.14, 1.3


@dataclass(frozen=True)
class Lines:
    """A convolution as positions: its images, and how their lines are laid out."""

    images: int
    inner: tuple[int, ...]  # rows, columns, channels of what is read
    outer: tuple[int, ...]  # of what is written
    sizes: Grouped
    back: tuple[int, int]  # how far before an output its first tap lies
    reach: tuple[int, int]  # from the first tap to the last
    stripes: int
    is_gradient: bool

    @property
    def stripe(self) -> int:
        """Columns of outputs that a stripe has."""
        return ceil(self.outer[1] / self.stripes)

    @property
    def height(self) -> int:
        """Lines of a stripe, with the zeros behind it."""
        return max(self.inner[0] + self.back[0], self.outer[0] + max(0, self.reach[0] - self.back[0]))

    @property
    def width(self) -> int:
        """Positions of a line: of one stripe the zeros behind a line are those before the next."""
        if self.stripes > 1:
            return self.stripe + self.reach[1]
        return max(self.inner[1] + self.back[1], self.outer[1] + max(0, self.reach[1] - self.back[1]))

    @property
    def positions(self) -> int:
        return self.images * self.stripes * self.height * self.width

    def slots(self, tile: Tile) -> int:
        """Positions that all taps of a tile meet."""
        return tile.bm + self.reach[0] * self.width + self.reach[1]

    @property
    def channels(self) -> tuple[int, int]:
        """Of a group: read and written."""
        both = self.sizes.channels, self.sizes.filters
        return both[::-1] if self.is_gradient else both

    @property
    def taps(self) -> int:
        return self.sizes.conv.r * self.sizes.conv.s

    def slabs(self, tile: Tile) -> int:
        return ceil(self.channels[0] / tile.bk)

    def loads(self, tile: Tile) -> int:
        """Of a run, by each thread while a tap passes: all are there STAGES - 1 taps before their first use."""
        return ceil(ceil(self.slots(tile) * tile.bk / CHUNK / tile.threads) / (self.taps - tile.stages + 2))

    def shared_bytes(self, tile: Tile) -> int:
        runs = min(2, self.slabs(tile)) * self.slots(tile) * (2 * tile.bk + 16)
        return max(runs + 2 * tile.stages * tile.bk * tile.bn + 4 * self.slots(tile), 2 * tile.bm * tile.bn)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None where the kernels run the op on these operands, else the reason why not."""
    if not isinstance(op, ConvFprop | ConvDgrad):
        return f"{op.name} is neither a forward convolution nor an input gradient"
    if isinstance(op, ConvDgrad) and op.act not in (None, *FROM_OUTPUT):
        return f"the derivative of {op.act} does not follow from its output"
    if op.stride != (1, 1) or op.pool:
        return "lines of an image serve a stride of 1 without a pool"
    if isinstance(op, ConvFprop) and op.bias and inputs[2].dtype != "f32":
        return f"the bias must be f32, not {inputs[2].dtype}"
    k, r, s, c = inputs[1].shape
    if r * s < _FEWEST_TAPS:
        return f"{r} x {s} taps share too few pixels"
    if c % CHUNK or k // op.groups % CHUNK:
        return f"channels of a group must be multiples of {CHUNK}, not {c} and {k // op.groups}"
    outputs = op.infer(*inputs)
    image = op.image if isinstance(op, ConvDgrad) else inputs[0].shape[1:3]
    tensors = [inputs[0], inputs[1], outputs[0]]
    if reason := refuse(op, tensors, cast("tuple[int, int]", tuple(image)), (r, s)):
        return reason
    lines = _lines(op, inputs[0], inputs[1], outputs[0])
    if lines.positions >= 2**31 - max(map(lines.slots, TILES)):
        return f"the images have {lines.positions} positions; the kernels address fewer than 2**31"
    least = min(lines.shared_bytes(tile) for tile in TILES)
    if least > min(SHARED_BYTES.values()):
        return f"a run of lines takes {least} bytes of shared memory, more than every GPU has"
    return None


def workspace_bytes(
    op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device, variant: Variant | None = None
) -> int:
    """None is needed."""
    return 0


def candidates(call: Call, device: Device) -> list[Variant]:
    """Tiles that can run the call, best estimate first."""
    costs = _costs(call, device)
    return sorted(costs, key=costs.__getitem__)


def cost_us(call: Call, device: Device) -> float:
    """Estimated microseconds of the best tile."""
    return microseconds(min(_costs(call, device).values()), call)


def _costs(call: Call, device: Device) -> dict[Variant, float]:
    """Estimated cycles of tiles that can run the call."""
    lines, costs = _lines_of(call), {}
    for tile in TILES:
        shared_bytes = lines.shared_bytes(tile)
        if shared_bytes <= device.shared_bytes_per_block:
            blocks = ceil(lines.positions / tile.bm) * ceil(lines.channels[1] / tile.bn) * lines.sizes.groups
            rows = tile.bn + lines.slots(tile) / lines.taps
            steps = lines.taps * lines.slabs(tile)
            few = tile.resident(shared_bytes, device) * tile.threads < 256
            slower = _SLOWER * (_SHORT_STAGES if tile.bk == 32 else 1) * (_FEW_WARPS if few else 1)
            costs[tile] = slower * cycles(tile, blocks, steps, Pieces(), shared_bytes, device, rows)
    return costs


def launches(call: Call, device: Device, variant: Variant | None = None) -> list[Launch]:
    """One launch; `variant` forces one of `candidates`."""
    lines, op = _lines_of(call), cast("ConvFprop | ConvDgrad", call.op)
    if lines.positions == 0:
        return []
    tile = variant or candidates(call, device)[0]
    image, filters, *rest = call.inputs
    named: dict[str, Slot] = dict(zip(("bias",), rest, strict=False))
    if isinstance(op, ConvDgrad):
        named = cast("dict[str, Slot]", op.operands(call.inputs))
    n_tiles = ceil(lines.channels[1] / tile.bn)
    args: tuple[Argument, ...] = (
        image, filters, named.get("bias"), named.get("saved"), named.get("addend"), call.outputs[0],
        _problem(lines, tile, n_tiles, op.act),
    )  # fmt: skip
    grid = (ceil(lines.positions / tile.bm) * n_tiles, lines.sizes.groups, 1)
    return [Launch(_kernel(tile, lines.is_gradient), grid, (tile.threads, 1, 1), args, lines.shared_bytes(tile))]


def variants() -> Iterable[Kernel]:
    """Every kernel that `launches` may name."""
    yield from (_kernel(tile, is_gradient) for is_gradient in (False, True) for tile in TILES)


def _kernel(tile: Tile, is_gradient: bool) -> Kernel:
    return Kernel(SOURCE, "conv_mma_lines", (*tile.defines[:-1], ("DGRAD", int(is_gradient))))


def _lines_of(call: Call) -> Lines:
    return _lines(call.op, call.inputs[0].spec, call.inputs[1].spec, call.outputs[0].spec)


def _lines(op: Op, image: Spec, filters: Spec, output: Spec) -> Lines:
    if not isinstance(op, ConvFprop | ConvDgrad):
        raise TypeError(f"{op.name} is neither a forward convolution nor an input gradient")
    is_gradient = isinstance(op, ConvDgrad)
    sizes = Grouped.of(op, output if is_gradient else image, filters)
    conv = sizes.conv
    reach = (conv.r - 1) * conv.dilation[0], (conv.s - 1) * conv.dilation[1]
    back = (reach[0] - conv.pad[0], reach[1] - conv.pad[1]) if is_gradient else conv.pad
    found = [
        Lines(conv.n, image.shape[1:], output.shape[1:], sizes, back, reach, stripes, is_gradient)
        for stripes in (1, 2, 3, 4, 5, 6, 7, 8)
        if stripes <= max(1, conv.w)
    ]
    return min(found, key=lambda lines: lines.positions * (1 + _SLOT * lines.slots(TILES[0]) / TILES[0].bm))


def _problem(lines: Lines, tile: Tile, n_tiles: int, act: str | None) -> Struct:
    """`Problem` of conv_mma_lines.cu."""
    conv = lines.sizes.conv
    numbers = (
        lines.positions, *lines.inner, *lines.outer, *lines.channels, conv.s, lines.taps, lines.slabs(tile),
        conv.dilation[0] * lines.width, conv.dilation[1], *lines.back, lines.stripe, lines.slots(tile), lines.loads(tile),
        act_code(act),
    )  # fmt: skip
    divisors = (lines.width, lines.height, lines.stripes, n_tiles)
    return Struct((*(np.int32(v) for v in numbers), *(fast_div(d) for d in divisors), *gate_of(act)))
