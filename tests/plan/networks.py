"""Small random networks of odd shapes: chains, residuals, concatenations, dead branches, shared and frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from hypothesis import strategies as st

from parcnn import cat, nn
from parcnn.nn import functional as F
from parcnn.nn.functional import Loss
from parcnn.ops.pool import PoolWindow
from parcnn.plan.trace import Tensor

ACTS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
KINDS = (
    "conv", "conv", "conv", "act", "act", "pool", "conv_act_pool", "norm", "residual", "residual_pool", "twice", "cat",
    "dead", "shared", "dropout", "reshape",
)  # fmt: skip


class RandomNet(nn.Module):
    """What `networks` draws: `steps` names its layers and how their results are joined."""

    def __init__(self, layers: list[nn.Module], joins: list[str], head: list[nn.Module], start: str) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.ModuleList(head)
        self.joins, self.start = joins, start

    def forward(self, x: Tensor) -> Tensor:
        for layer, join in zip(self.layers, self.joins, strict=True):
            x = JOINS[join](x, layer)
        if self.start == "mean":
            x = x.mean((2, 3))
        elif self.start == "flatten":
            x = x.flatten(1)
        for layer in self.head:
            x = layer(x)
        return x.view(x.size(0), -1)

    def extra_repr(self) -> str:
        return f"joins={self.joins}, start={self.start!r}"


def _ignoring(x: Tensor, layer: nn.Module) -> Tensor:
    layer(x)  # a dead branch
    return x


def _ignoring_first(x: Tensor, layer: nn.Module) -> Tensor:
    layer(F.relu(x))  # a dead branch that shares its weights with the live one
    return layer(x)


def _there_and_back(x: Tensor, layer: nn.Module) -> Tensor:
    n, c, h, w = x.shape
    return layer(x.flatten(1)).reshape(n, c, h, w)


JOINS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "plain": lambda x, layer: layer(x),
    "residual": lambda x, layer: x + layer(x),
    "residual_first": lambda x, layer: layer(x) + x,
    "residual_relu": lambda x, layer: F.relu(x + layer(x)),
    "two_residuals": lambda x, layer: layer(x) + layer(layer(x)),
    "twice": lambda x, layer: layer(x + x),
    "cat": lambda x, layer: cat([x, layer(x)], 1),
    "cat_twice": lambda x, layer: layer(cat([x, x], dim=1)),
    "dead": _ignoring,
    "dead_shared": _ignoring_first,
    "shared": lambda x, layer: layer(layer(x)),
    "there_and_back": _there_and_back,
}


@dataclass
class Problem:
    """A network, what it is fed with, and its loss."""

    model: RandomNet
    images: np.ndarray
    targets: np.ndarray
    loss: Callable[[Any, Any], Loss]


@st.composite
def convs(draw: st.DrawFn, c: int, h: int, w: int, keep: bool, out: int | None = None) -> nn.Conv2d:
    """A convolution that fits an image; with `keep` its output has the image's size."""
    k = out or draw(st.one_of(st.integers(1, 5), st.sampled_from([c, 2 * c])))
    groups = draw(st.sampled_from([g for g in range(1, gcd(c, k) + 1) if c % g == k % g == 0]))
    r, s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    bias = draw(st.booleans())
    if keep:
        return nn.Conv2d(c, k, (r, s), padding="same", dilation=dilation, groups=groups, bias=bias)
    pad = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    extent = [min(n, (size + 2 * p - 1) // d + 1) for n, size, p, d in zip((r, s), (h, w), pad, dilation, strict=True)]
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return nn.Conv2d(c, k, tuple(extent), stride, pad, dilation, groups, bias)


def _conv_size(conv: nn.Conv2d, h: int, w: int) -> tuple[int, int]:
    if conv.padding == "same":
        return h, w
    sizes = zip((h, w), conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    p, q = ((n + 2 * pad - d * (r - 1) - 1) // stride + 1 for n, r, stride, pad, d in sizes)
    return p, q


@st.composite
def pools(draw: st.DrawFn, h: int, w: int) -> tuple[nn.Module, int, int]:
    """A pool that fits, and its output's size."""
    kind = draw(st.sampled_from(["max", "avg", "adaptive"]))
    if kind == "adaptive":
        p, q = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        return nn.AdaptiveAvgPool2d((p, q)), p, q
    if draw(st.booleans()) and min(h, w) >= 2:
        return (nn.MaxPool2d if kind == "max" else nn.AvgPool2d)(2), h // 2, w // 2
    kernel = (draw(st.integers(1, min(3, h))), draw(st.integers(1, min(3, w))))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    pad = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    ceil = draw(st.booleans())
    p, q = PoolWindow(kind, kernel, stride, pad, ceil_mode=ceil).output_hw(h, w)
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, pad, ceil_mode=ceil), p, q
    include, divisor = draw(st.booleans()), draw(st.sampled_from([None, None, 3]))
    return nn.AvgPool2d(kernel, stride, pad, ceil, include, divisor), p, q


@st.composite
def networks(draw: st.DrawFn, most: int = 6) -> Problem:
    """A network of up to `most` steps over 2 to 4 small images."""
    nn.init.manual_seed(draw(st.integers(0, 1000)))
    n, c = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    first = (c, h, w)
    layers: list[nn.Module] = []
    joins: list[str] = []

    def append(layer: nn.Module, join: str = "plain") -> None:
        layers.append(layer)
        joins.append(join)

    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(KINDS))
        act = ACTS[draw(st.sampled_from(list(ACTS)))]
        if kind in ("conv", "conv_act_pool"):
            conv = draw(convs(c, h, w, keep=False))
            append(conv)
            c, (h, w) = conv.out_channels, _conv_size(conv, h, w)
            if kind == "conv_act_pool":
                pool = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2)
                parts = [act(), pool] if draw(st.booleans()) else [pool, act()]
                for part in parts if min(h, w) >= 2 else []:
                    append(part)
                h, w = (h // 2, w // 2) if min(h, w) >= 2 else (h, w)
        elif kind == "act":
            append(act(), draw(st.sampled_from(["plain", "residual", "twice"])))
        elif kind == "pool":
            pool, h, w = draw(pools(h, w))
            append(pool)
        elif kind == "norm":
            norm = nn.BatchNorm2d(c, eps=1e-2)
            if draw(st.booleans()):
                norm.eval()  # frozen statistics
            append(norm, draw(st.sampled_from(["plain", "plain", "residual", "residual_first", "residual_relu"])))
            if draw(st.booleans()):
                append(act())
        elif kind in ("residual", "shared", "dead"):
            options = {
                "residual": ["residual", "residual_first", "residual_relu", "two_residuals"],
                "shared": ["shared", "two_residuals", "dead_shared"],
                "dead": ["dead"],
            }
            append(draw(convs(c, h, w, keep=True, out=c)), draw(st.sampled_from(options[kind])))
        elif kind == "residual_pool":
            append(nn.MaxPool2d(3, 1, 1), draw(st.sampled_from(["residual", "residual_first", "residual_relu"])))
        elif kind == "twice":
            conv = draw(convs(c, h, w, keep=True))
            append(conv, "twice")
            c = conv.out_channels
        elif kind == "cat" and c <= 6:
            if draw(st.booleans()):
                conv = draw(convs(c, h, w, keep=True))
                append(conv, "cat")
                c += conv.out_channels
            else:
                conv = draw(convs(2 * c, h, w, keep=True))
                append(conv, "cat_twice")
                c = conv.out_channels
        elif kind == "dropout":
            append(nn.Dropout(draw(st.sampled_from([0.2, 0.5]))))
        elif kind == "reshape":
            append(act(), "there_and_back")
    start = draw(st.sampled_from(["flatten", "mean", "flatten", "none"]))
    head: list[nn.Module] = []
    if start != "none":
        features = c if start == "mean" else c * h * w
        if draw(st.booleans()):
            width = draw(st.integers(1, 7))
            head = [nn.Linear(features, width, bias=draw(st.booleans())), act()]
            features = width
            if draw(st.booleans()):
                head += [nn.BatchNorm1d(width, eps=1e-2)]
        classes = draw(st.integers(2, 5))
        head += [nn.Linear(features, classes)]
    else:
        head = [draw(convs(c, h, w, keep=True, out=c))]
        classes = c * h * w
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    images = random.standard_normal((n, *first))
    model = RandomNet(layers, joins, head, start)
    for parameter in model.parameters():  # batch norm's ones and zeros hide errors
        parameter.assign(parameter.data + random.uniform(0.05, 0.3, parameter.shape).astype(np.float32))
        if draw(st.integers(0, 5)) == 0 and parameter is not head[-1].weight:
            parameter.requires_grad = False
    if draw(st.booleans()):
        smoothing = draw(st.sampled_from([0.0, 0.1]))
        targets = random.integers(0, classes, n).astype(np.int32)
        return Problem(model, images, targets, nn.CrossEntropyLoss(label_smoothing=smoothing))
    return Problem(model, images, random.standard_normal((n, classes)), nn.MSELoss())
