"""Layers that are measured: convolutions of networks, the lists of them, and the plan's calls that run one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np

from parcnn import nn
from parcnn.nn.init import manual_seed
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvGeometry, ConvWgrad
from parcnn.ops.program import Call, Executor, Slot
from parcnn.optim import SGD
from parcnn.plan.describe import outline

CONV = ("fprop", "dgrad", "wgrad")
FUSED = ("fused_pool_fwd", "fused_pool_train")
OPS = {"fprop": ConvFprop, "dgrad": ConvDgrad, "wgrad": ConvWgrad}
BLOCK = "block"
IMAGE_CHANNELS = 3  # a first layer: nobody asks for the gradient of its images
FILTERS = (0.2, 0.08, 0.36, 0.06, 0.14, 0.06, 0.1)  # shares of 1x1 to 7x7 among random layers
MOST_TENSOR_BYTES, MOST_FLOPS = 2 << 30, 5 * 10**11


@dataclass(frozen=True)
class Layer:
    """N images H x W of C channels, K filters R x R over C/groups of them, stride and padding on every side."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    stride: int
    pad: int
    groups: int = 1

    @property
    def shape(self) -> str:
        """'N,H,W,C,K,R,stride,pad'."""
        return ",".join(map(str, (self.n, self.h, self.w, self.c, self.k, self.r, self.stride, self.pad)))

    @property
    def outputs(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        p, q = ((side + 2 * self.pad - self.r) // self.stride + 1 for side in (self.h, self.w))
        return p, q

    @property
    def flops(self) -> int:
        """2*N*P*Q*K*R*S*C/groups."""
        p, q = self.outputs
        return 2 * self.n * p * q * self.k * self.r * self.r * self.c // self.groups

    def directions(self, fused: bool) -> tuple[str, ...]:
        """What there is to measure: no gradient of images; no pool where there is one output."""
        plain = tuple(d for d in CONV if d != "dgrad" or self.c > IMAGE_CHANNELS)
        return (*plain, *(FUSED if fused and min(self.outputs) > 1 else ()))


# CIFAR-10 speedrun networks, ResNet-50, VGG-16.
LAYERS = (
    Layer(2000, 31, 31, 24, 64, 3, 1, 1),
    Layer(2000, 15, 15, 64, 64, 3, 1, 1),
    Layer(2000, 15, 15, 64, 256, 3, 1, 1),
    Layer(2000, 7, 7, 256, 256, 3, 1, 1),
    Layer(2000, 3, 3, 256, 256, 3, 1, 1),
    Layer(256, 224, 224, 3, 64, 7, 2, 3),
    Layer(256, 56, 56, 64, 64, 3, 1, 1),
    Layer(256, 28, 28, 128, 128, 3, 1, 1),
    Layer(256, 14, 14, 256, 256, 3, 1, 1),
    Layer(256, 7, 7, 512, 512, 3, 1, 1),
    Layer(256, 56, 56, 64, 256, 1, 1, 0),
    Layer(256, 56, 56, 256, 64, 1, 1, 0),
    Layer(256, 7, 7, 512, 2048, 1, 1, 0),
    Layer(256, 56, 56, 256, 512, 1, 2, 0),
    Layer(64, 224, 224, 64, 64, 3, 1, 1),
    Layer(64, 28, 28, 512, 512, 3, 1, 1),
)
# MobileNets' depthwise layers.
DEPTHWISE = tuple(
    Layer(256, side, side, c, c, 3, 1, 1, c) for c, side in ((32, 112), (96, 56), (144, 28), (384, 14), (512, 7))
)


def random_layers(count: int, seed: int) -> tuple[Layer, ...]:
    """Problems as networks might have them that nobody tuned for; the same for the same seed.

    Batch 1 to 512, images 5 to 224, channels 3 to 768 (three quarters of them multiples of 8), filters 1 to 7, stride 1 or
    2, mostly padded so that stride 1 keeps the image's size; evenly distributed on a logarithmic scale where that spans
    more than a decade. Tensors stay below 2 GiB and calls below 500 GFLOP.
    """
    random = np.random.default_rng(seed)

    def between(low: int, high: int) -> int:
        return round(exp(random.uniform(log(low), log(high))))

    def channels() -> int:
        drawn = between(3, 768)
        return max(8, round(drawn / 8) * 8) if random.random() < 0.75 else drawn

    found: list[Layer] = []
    while len(found) < count:
        n, side, c, k = between(1, 512), between(5, 224), channels(), channels()
        r, stride = int(random.choice(len(FILTERS), p=FILTERS)) + 1, int(random.integers(1, 3))
        pad = r // 2 if random.random() < 0.8 else 0
        layer = Layer(n, side, side, c, k, r, stride, pad)
        largest = 4 * n * max(side * side * c, layer.outputs[0] * layer.outputs[1] * k)  # in fp32
        if min(layer.outputs) >= 1 and largest < MOST_TENSOR_BYTES and layer.flops < MOST_FLOPS:
            found.append(layer)
    return tuple(found)


class Plans:
    """The calls of layers, out of plans of small networks, each made once.

    A layer stands between a 1x1 convolution, so that it has an error signal to send down (not behind images), and a global
    mean, so that one comes.
    """

    def __init__(self, executor: Executor, precision: str) -> None:
        self.executor, self.precision = executor, precision
        self._kept: dict[tuple[Layer, bool, str], tuple[Call, ...]] = {}

    def calls(self, layer: Layer, direction: str) -> list[Call]:
        """What runs the layer: its own calls of the plan. Raises UnsupportedError where no kernel does."""
        if direction in OPS:
            return [call for call in self._own(layer, False, "train") if isinstance(call.op, OPS[direction])]
        return list(self._own(layer, True, "predict" if direction == "fused_pool_fwd" else "train"))

    def _own(self, layer: Layer, fused: bool, mode: str) -> tuple[Call, ...]:
        key = (layer, fused, mode)
        if key not in self._kept:
            manual_seed(0)
            model = nn.Sequential()
            if layer.c > IMAGE_CHANNELS:
                model.add_module("stem", nn.Conv2d(layer.c, layer.c, 1, bias=False))
            conv = nn.Conv2d(
                layer.c, layer.k, layer.r, stride=layer.stride, padding=layer.pad, groups=layer.groups, bias=fused
            )
            model.add_module(BLOCK, nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)) if fused else nn.Sequential(conv))
            model.add_module("tail", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
            plan = outline(
                model,
                mode=mode,
                batch=layer.n,
                sample=(layer.c, layer.h, layer.w),
                executor=self.executor,
                loss=nn.CrossEntropyLoss(),
                optimizer=SGD(1e-3),
                precision=self.precision,
            )
            own = (call for call in plan.program.calls if call.layer.startswith(BLOCK))
            self._kept[key] = tuple(call for call in own if call.phase in ("forward", "backward"))
        return self._kept[key]


def kept_bytes(calls: Sequence[Call]) -> int:
    """What a block's forward keeps for its backward, beyond its input and its output."""
    forward = [call for call in calls if call.phase == "forward"]
    output = forward[-1].outputs[0]
    made = {s for call in forward for s in call.outputs if s != output}
    kept: set[Slot] = set()
    for call in calls:
        if call.phase == "backward":
            kept |= {
                s
                for s in made
                if any((s.region, s.offset, s.spec) == (i.region, i.offset, i.spec) for i in call.inputs)
            }
            made -= {
                s
                for s in made
                if any(s.region == w.region and s.offset < w.end and w.offset < s.end for w in call.written)
            }
    return sum(s.spec.nbytes for s in kept)


def least_bytes(call: Call) -> int:
    """Fewest bytes that a call moves. Of an image under a stride beyond the filter only what the filter meets is read."""
    op, nbytes = call.op, call.op.bytes(call.input_specs, call.output_specs)
    if not isinstance(op, ConvFprop | ConvWgrad):
        return nbytes
    x, second = call.input_specs[:2]
    filter_sides = second.shape[1:3] if isinstance(op, ConvFprop) else op.filter
    met = [
        min(side, count * taps)
        for side, count, taps in zip(
            x.shape[1:3], op.output_hw(*x.shape[1:3], *filter_sides), filter_sides, strict=True
        )
    ]
    return nbytes - x.nbytes + x.nbytes * met[0] * met[1] // (x.shape[1] * x.shape[2])


def layer_of(call: Call) -> tuple[str, Layer | None]:
    """Direction and layer of a convolution's call; no layer where its filters, strides or borders are not square."""
    op = call.op
    if not isinstance(op, ConvGeometry):
        raise TypeError(f"{op.name} is not a convolution")
    first, second = call.input_specs[:2]
    if isinstance(op, ConvFprop):
        direction, (n, h, w, c), (k, r, s, _) = "fprop", first.shape, second.shape
    elif isinstance(op, ConvDgrad):
        direction, n, (h, w), (k, r, s, c) = "dgrad", first.shape[0], op.image, second.shape
        c *= op.groups
    else:
        direction, (n, h, w, c), k, (r, s) = "wgrad", first.shape, second.shape[3], call.output_specs[0].shape[1:3]
    if r != s or len(set(op.pad)) > 1 or op.stride[0] != op.stride[1] or op.dilation != (1, 1):
        return direction, None
    return direction, Layer(n, h, w, c, k, r, op.stride[0], op.pad[0], op.groups)
