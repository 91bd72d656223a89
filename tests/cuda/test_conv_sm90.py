"""bf16 convolution on Hopper's tensor cores: on the host's emulation and the null driver, and on the device.

Where the operands are small integers every sum is exact, so the kernels must give the oracle's very bits, ties and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_mma_lines, conv_sm90, conv_sm90_sizes, conv_unpool
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_sm90_cost import deal
from parcnn.cuda.kernels.conv_sm90_sizes import Sizes
from parcnn.cuda.kernels.conv_sm90_tiles import Shape, Variant
from parcnn.cuda.launch import Device
from parcnn.ops.base import ACTIVATIONS, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Executor, Slot
from tests.cuda import conv_problems
from tests.cuda.bf16 import from_bits, to_bits
from tests.cuda.compare import MakeExecutor, emulates, listing, makers, places
from tests.cuda.conv_problems import Arrays, on_cpu, random_of, specs_of, tensors_of
from tests.op_runner import run_op

H200 = Device("H200", "sm_90a", 132)
make_fixture = makers(listing(conv_unpool.variants()))
KINDS = (
    "fprop",
    "fused",
    "add",
    "fused add",
    "pooled",
    "dgrad",
    "dgrad pooled",
    "dgrad relu",
    "dgrad add tanh",
    "mean",
    "dgrad mean",
    "maxima",
    "kept",
)


@dataclass(frozen=True)
class Problem:
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 3
    s: int = 3
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def op(self, kind: str) -> Op:
        geometry = {"stride": self.stride, "pad": self.pad, "dilation": self.dilation}
        if kind.startswith("dgrad"):
            pool, add = "max" if "pooled" in kind else "avg" if "mean" in kind else None, "add" in kind
            act = next((a for a in ACTIVATIONS if a in kind.split()), None)
            return ConvDgrad(**geometry, image=(self.h, self.w), pool=pool, act=act, add=add)
        return {
            "fprop": ConvFprop(**geometry),
            "fused": ConvFprop(**geometry, bias=True, act="relu"),
            "pooled": ConvFprop(**geometry, bias=True, act="relu", pool="max"),
            "add": ConvFprop(**geometry, add=True),
            "fused add": ConvFprop(**geometry, bias=True, act="relu", add=True),
            **{act: ConvFprop(**geometry, bias=True, act=act) for act in ACTIVATIONS},
            **{f"{act} add": ConvFprop(**geometry, bias=True, act=act, add=True) for act in ACTIVATIONS},
            "kept": ConvFprop(**geometry, bias=True, act="relu", keep=True),
            **{f"{act} kept": ConvFprop(**geometry, bias=True, act=act, keep=True) for act in ACTIVATIONS},
            **{f"{act} pooled": ConvFprop(**geometry, bias=True, act=act, pool="max") for act in ACTIVATIONS},
            "mean": ConvFprop(**geometry, bias=True, act="relu", pool="avg"),
            "plain pooled": ConvFprop(**geometry, pool="max"),
            "maxima": ConvFprop(**geometry, bias=True, act="relu", pool="max", indices=False),
            "plain maxima": ConvFprop(**geometry, pool="max", indices=False),
        }[kind]

    def has(self, kind: str) -> bool:
        """Whether there is such a call, with outputs."""
        op = self.op(kind)
        if isinstance(op, ConvFprop) and (op.add or op.keep) and min(self.c, self.k) <= conv_sm90.FEW_CHANNELS:
            return False
        p, q = op.pooled_hw(self.h, self.w, self.r, self.s)
        return p > 0 and q > 0

    def integers(self, kind: str, random: np.random.Generator) -> list[np.ndarray]:
        """Operands as floats: -1, 0, 1 (biases up to 8), so sparse that sums stay below 256, where bf16 has all integers."""
        terms = self.r * self.s * (self.k if kind.startswith("dgrad") else self.c)
        density = min(1.0, 40 / np.sqrt(terms))

        def ternary(*shape: int) -> np.ndarray:
            return random.integers(-1, 2, shape) * (random.random(shape) < density).astype(float)

        return self._operands(kind, ternary, lambda *shape: random.integers(-8, 9, shape).astype(float), random)

    def extremes(
        self, kind: str, random: np.random.Generator, pixels: Sequence[tuple[int, ...]], biases: Sequence[int]
    ) -> list[np.ndarray]:
        """Integers, and what is not finite at some `pixels` and `biases`; of tanh so large ones that nothing but zeros, ones
        and minus ones may come out."""
        operands = self.integers(kind, random)
        if kind == "tanh pooled":
            operands[0][operands[0] != 0] *= 64
            operands[2][...] = 64 * np.sign(operands[2]) + 0.0
            return operands
        operands[1][operands[1] == 0] = 1  # an infinity times zero would be no infinity
        for at, value in zip(pixels, (np.nan, np.inf, -np.inf, np.nan), strict=False):
            operands[0][at] = value
        if not kind.startswith("plain"):
            for channel, value in zip(biases, (np.inf, -np.inf, np.nan), strict=False):
                operands[2][channel] = value
        return operands

    def normals(self, kind: str, random: np.random.Generator) -> list[np.ndarray]:
        """Operands that bf16 has, standard normal."""

        def normal(*shape: int) -> np.ndarray:
            return from_bits(to_bits(random.standard_normal(shape)))

        return self._operands(kind, normal, lambda *shape: random.standard_normal(shape).astype(np.float32), random)

    def _operands(self, kind, tensor, bias, random) -> list[np.ndarray]:
        op, w = self.op(kind), tensor(self.k, self.r, self.s, self.c)
        out = (self.n, *op.pooled_hw(self.h, self.w, self.r, self.s), self.k)
        if isinstance(op, ConvFprop):
            addend = [tensor(*out)] if op.add else []
            return [tensor(self.n, self.h, self.w, self.c), w, *([bias(self.k)] if op.bias else []), *addend]
        idx = [random.integers(0, 4, out).astype(np.uint8)] if op.pool == "max" else []
        like_dx = [tensor(self.n, self.h, self.w, self.c) for _ in range((op.act is not None) + op.add)]
        return [tensor(*out), w, *idx, *like_dx]


PROBLEMS = {
    "one pixel": Problem(1, 1, 1, 8, 8, 1, 1, (0, 0, 0, 0)),
    "few channels": Problem(5, 13, 11, 24, 64),
    "32 channels, 5x5": Problem(5, 13, 11, 32, 40, 5, 5, (2, 2, 2, 2)),
    "64 channels": Problem(5, 13, 11, 64, 64),
    "odd blocks of channels": Problem(5, 13, 11, 72, 136),
    "many channels": Problem(3, 9, 10, 128, 256),
    "3x3 image of 1x1 tiles": Problem(70, 3, 3, 64, 256),
    "no padding": Problem(5, 13, 11, 64, 128, pad=(0, 0, 0, 0)),
    "asymmetric": Problem(3, 12, 9, 64, 64, 2, 4, (0, 3, 2, 1)),
    "many small images": Problem(37, 7, 7, 64, 136),
    "images of 3x3": Problem(70, 3, 3, 128, 256),
    "pointwise": Problem(5, 13, 11, 64, 128, 1, 1, (0, 0, 0, 0)),
    "pointwise, padded": Problem(3, 6, 7, 16, 24, 1, 1, (2, 2, 2, 2)),
    "linear": Problem(300, 1, 1, 256, 72, 1, 1, (0, 0, 0, 0)),
    "filter covers the image": Problem(37, 4, 5, 16, 72, 4, 5, (0, 0, 0, 0)),
    "wide image": Problem(1, 4, 130, 16, 64),
    "padding beyond the filter": Problem(2, 5, 5, 64, 64, pad=(4, 4, 4, 4)),
    "dilated": Problem(2, 14, 15, 64, 72, pad=(2, 2, 2, 2), dilation=(2, 3)),
    "stride 2": Problem(5, 13, 11, 64, 128, stride=(2, 2)),
    "stride 2 pointwise": Problem(5, 14, 12, 128, 192, 1, 1, (0, 0, 0, 0), (2, 2)),
    "strides 3 and 1": Problem(4, 16, 9, 24, 72, 5, 3, (2, 1, 2, 1), (3, 1)),
    "stride beyond the filter": Problem(3, 17, 14, 64, 128, 2, 3, (1, 0, 0, 2), (3, 4)),
    "stride and dilation": Problem(3, 19, 15, 64, 72, 3, 3, (2, 3, 4, 3), (2, 3), (2, 2)),
    "4x4 stride 2": Problem(5, 13, 11, 64, 72, 4, 4, (1, 1, 1, 1), (2, 2)),
    "6x4 stride 2": Problem(3, 26, 18, 24, 136, 6, 4, (2, 1, 3, 2), (2, 2)),
    "6x6 stride 3": Problem(3, 19, 21, 64, 64, 6, 6, (2, 2, 2, 2), (3, 3)),
    "stride is the dilation": Problem(3, 18, 17, 32, 64, 3, 3, (2, 2, 2, 2), (2, 2), (2, 2)),
    "stride is the image": Problem(20, 4, 4, 64, 128, 4, 4, (0, 0, 0, 0), (4, 4)),
    "pixels apart": Problem(3, 13, 11, 64, 72, 1, 1, (2, 3, 1, 0), (2, 3)),
    "columns apart": Problem(3, 15, 17, 24, 136, 3, 1, (1, 0, 1, 2), (2, 3)),
    "64 to 256 pointwise": Problem(300, 3, 2, 64, 256, 1, 1, (0, 0, 0, 0)),
    "64 to 192 pointwise": Problem(300, 3, 2, 64, 192, 1, 1, (0, 0, 0, 0)),
}
CASES = [(name, kind) for name, problem in PROBLEMS.items() for kind in KINDS if problem.has(kind)]
EMULATED = {
    "64 channels": ("fprop", "fused add", "pooled", "dgrad add tanh", "maxima", "kept"),
    "odd blocks of channels": ("mean", "dgrad pooled"),
    "many small images": ("fused", "pooled", "dgrad relu"),
    "many channels": ("fused", "add", "pooled", "maxima", "dgrad mean", "kept"),
    "no padding": ("fused", "dgrad pooled"),
    "images of 3x3": ("fprop", "dgrad relu"),
    "6x4 stride 2": ("fused",),
    "strides 3 and 1": ("fprop",),
    "stride 2": ("fused add", "dgrad", "dgrad add tanh"),
    "asymmetric": ("dgrad relu",),
    "4x4 stride 2": ("dgrad",),
    "6x6 stride 3": ("dgrad relu",),
    "stride beyond the filter": ("dgrad",),
    "stride is the dilation": ("dgrad add tanh",),
    "pointwise": ("fprop", "pooled"),
    "linear": ("fused", "fused add", "kept"),
    "64 to 192 pointwise": ("fused", "add", "maxima"),
}
cases = pytest.mark.parametrize(("name", "kind"), CASES, ids=[" ".join(case) for case in CASES])


def bits_of(op: Op, operands: list[np.ndarray]) -> list[np.ndarray]:
    """Operands as the device takes them."""
    return tensors_of(op, operands, "bf16")


def call_of(op: Op, operands: list[np.ndarray], variant: Variant | None = None) -> Call:
    """The call as a launcher sees it, in no place."""
    inputs = specs_of(op, operands, "bf16")
    scratch = conv_sm90.workspace_bytes(op, inputs, op.infer(*inputs), H200, variant)
    workspace = Slot(Spec((scratch,), "u8"), "arena") if scratch else None
    return Call(
        op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)), workspace
    )


def sizes_of(op: Op, operands: list[np.ndarray]) -> Sizes:
    """The convolution that the kernel computes, taken from what the launcher makes of it."""
    call = call_of(op, operands)
    return conv_sm90_sizes.sizes_of(call)


def forced(executor: CudaExecutor, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> CudaExecutor:
    monkeypatch.setattr(executor, "registry", Registry([Forced(conv_sm90, variant)], REGISTRY.folder))
    return executor


def check_exact(
    executor: Executor, op: Op, operands: list[np.ndarray], where: object = "", true: Arrays | None = None
) -> None:
    conv_problems.check_exact(executor, op, operands, "bf16", true, where)


# Without a GPU


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("64 channels", "gelu"), ("many channels", "silu pooled")])
def test_launches_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """Each candidate compiles, and keeps to its parameter table, its tensor maps' rules, the device and the plan's memory."""
    problem = PROBLEMS[name]
    op, operands = problem.op(kind), problem.integers(kind, random_of(name, kind))
    found = conv_sm90.candidates(call_of(op, operands), H200)
    assert found
    for variant in found:
        run_op(forced(null, variant, monkeypatch), op, bits_of(op, operands))


def test_the_registry_of_hopper_finds_it(null: CudaExecutor) -> None:
    problem = Problem(250, 13, 11, 64, 64)  # small ones are another family's
    op, operands = problem.op("fused"), problem.integers("fused", random_of())
    specs = call_of(op, operands).input_specs
    assert null.registry.find(op, specs, H200) is conv_sm90
    assert "conv_sm90" in null.kernel_name(op, specs, op.infer(*specs))
    assert CudaExecutor.null("sm_89").registry.find(op, specs, H200) is conv_mma_lines


def test_every_variant_is_listed() -> None:
    listed = {*conv_sm90.variants(), *conv_unpool.variants()}
    for name, kind in CASES:
        op = PROBLEMS[name].op(kind)
        operands = PROBLEMS[name].integers(kind, random_of())
        for variant in conv_sm90.candidates(call_of(op, operands), H200):
            call = call_of(op, operands, variant)
            assert {launch.kernel for launch in conv_sm90.launches(call, H200, variant)} <= listed


def test_what_it_refuses() -> None:
    x, w, b = Spec((2, 8, 8, 64), "bf16"), Spec((64, 3, 3, 64), "bf16"), Spec((64,))
    assert conv_sm90.supports(ConvFprop(bias=True), (x, w, b)) is None
    refused = [
        (ConvFprop(), (Spec((2, 8, 8, 64)), w), "bf16"),
        (ConvFprop(), (x, Spec((64, 3, 3, 64))), "bf16"),
        (ConvFprop(bias=True), (x, w, Spec((64,), "bf16")), "bias"),
        (ConvFprop(stride=(1, 9)), (x, w), "9"),
        (ConvFprop(), (Spec((2, 8, 8, 20), "bf16"), Spec((64, 3, 3, 20), "bf16")), "multiples of 8"),
        (ConvFprop(), (x, Spec((10, 3, 3, 64), "bf16")), "multiples of 8"),
        (ConvFprop(pad=(2**14, 0, 0, 0)), (x, w), "16384"),
        (ConvFprop(), (Spec((2**20, 8, 8, 64), "bf16"), w), "2**31"),
        (ConvDgrad(image=(99, 99), stride=(5, 4)), (Spec((2, 20, 25, 64), "bf16"), w), "16 together"),
        (ConvDgrad(image=(99, 9), stride=(9, 1)), (Spec((2, 11, 7, 64), "bf16"), w), "at most 8"),
        (ConvDgrad(image=(8, 8), add=True), (Spec((2, 6, 6, 64), "bf16"), w, Spec(x.shape)), "f32"),
        (ConvFprop(add=True), (x, w, Spec((2, 6, 6, 64))), "addend must be bf16"),
        (ConvFprop(add=True, pool="max"), (x, w, Spec((2, 3, 3, 64), "bf16")), "pool"),
        (ConvFprop(add=True, moments=True), (x, w, Spec((2, 6, 6, 64), "bf16")), "moments"),
        (ConvFprop(add=True), (x, Spec((32, 3, 3, 64), "bf16"), Spec((2, 6, 6, 32), "bf16")), "64 -> 32"),
        (ConvFprop(add=True), (Spec((2, 8, 8, 32), "bf16"), Spec((64, 3, 3, 32), "bf16"), x), "32 -> 64"),
        (ConvWgrad(filter=(3, 3)), (x, Spec((2, 6, 6, 64), "bf16")), "neither"),
        (ConvDgrad(image=(6, 6), pool="avg"), (Spec((2**20, 3, 3, 64), "bf16"), Spec((64, 1, 1, 8), "bf16")), "2**31"),
    ]
    for op, inputs, reason in refused:
        assert reason in (conv_sm90.supports(op, inputs) or "supported"), op


@pytest.mark.parametrize("what", ["add", "keep"])
def test_who_has_a_second_tensor(what: str) -> None:
    x, w, y = Spec((250, 9, 9, 64), "bf16"), Spec((64, 3, 3, 64), "bf16"), Spec((250, 7, 7, 64), "bf16")
    addend = (y,) if what == "add" else ()

    def supports(arch: str, given: bool, x: Spec, w: Spec, **more: Any) -> bool:
        op = ConvFprop(act="gelu", **{what: given}, **more)
        return REGISTRY.on(arch).supports(op, (x, w, *addend) if given else (x, w))

    assert supports("sm_90a", True, x, w)
    for arch, images, filters, groups in (
        ("sm_89", x, w, 1),
        ("sm_90a", Spec((250, 9, 9, 44), "bf16"), Spec((64, 3, 3, 44), "bf16"), 1),
        ("sm_90a", Spec((250, 9, 9, 3), "bf16"), Spec((64, 3, 3, 3), "bf16"), 1),
        ("sm_90a", x, Spec((64, 3, 3, 32), "bf16"), 2),
    ):
        assert supports(arch, False, images, filters, groups=groups)
        assert not supports(arch, True, images, filters, groups=groups)
    assert not supports("sm_90a", True, x, w, pool="max")
    assert not supports("sm_90a", True, x, w, moments=True)
    assert not REGISTRY.on("sm_90a").supports(ConvFprop(act="gelu", add=True, keep=True), (x, w, y))
    in_fp32 = ConvFprop(act="gelu", **{what: True})
    assert not REGISTRY.on("sm_90a").supports(in_fp32, tuple(Spec(s.shape) for s in (x, w, *addend)))


IMAGE_TILES = [(constants, tile) for constants, compiled in tiles.IMAGE_TILES.items() for tile in compiled]
image_tiles = pytest.mark.parametrize(("constants", "tile"), IMAGE_TILES, ids=str)


def of_images(constants: tuple[int, int], n: int, h: int, w: int, c: int, k: int) -> tuple[Problem, str]:
    """A problem that tiles of several images with those constants take, and what their stages serve."""
    side = 1 if constants == (1, 1) else 3
    return Problem(n, h, w, c, k, side, side, (side // 2,) * 4), "column" if constants == (3, 1) else "tap"


# On the host's emulation and the device


@places("name kind", CASES, lambda name, kind: kind in EMULATED.get(name, ()))
def test_every_candidate_is_exact(make: MakeExecutor, name: str, kind: str) -> None:
    problem = PROBLEMS[name]
    op, operands = problem.op(kind), problem.integers(kind, random_of(name, kind))
    true = on_cpu(op, operands)
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant, true)


SERVES = {
    "tap": [(11, 5, 3), (5, 2, 6), (1, 1, 64), (11, 13, 1), (8, 4, 2)],
    "column": [(11, 13, 1), (8, 13, 1), (11, 6, 1), (4, 3, 1), (4, 6, 3), (1, 13, 5), (5, 3, 8), (2, 6, 8), (6, 6, 4)],
    "window": [(8, 13, 1), (8, 4, 1), (8, 31, 1), (11, 13, 1), (12, 4, 1)],
}


EMULATED_TILES = {
    ("tap", "fused", 64, 192), ("tap", "dgrad relu", 136, 72), ("column", "dgrad add tanh", 256, 128),
    ("column", "maxima", 64, 192), ("tap", "pooled", 256, 128), ("window", "fused", 136, 32),
    ("column", "fused add", 256, 128), ("tap", "add", 64, 192), ("tap", "fused add", 136, 72),
}  # fmt: skip


@places(
    "serves kind c k",
    [
        (serves, kind, c, k)
        for c, k in ((24, 64), (64, 64), (64, 192), (136, 72), (256, 128), (136, 32), (16, 136))
        for kind in KINDS
        for serves in SERVES
        if Problem(7, 13, 11, c, k).has(kind)
    ],
    lambda *case: case in EMULATED_TILES,
)
def test_tiles(make: MakeExecutor, serves: str, kind: str, c: int, k: int) -> None:
    """Tiles that hang over every border, in rings of as few stages as there may be, and of as many."""
    problem = Problem(7, 13, 11, c, k)
    op, operands = problem.op(kind), problem.integers(kind, random_of(serves, kind, c, k))
    sizes = sizes_of(op, operands)
    even = (lambda v: v + v % 2) if sizes.pool else (lambda v: v)
    ran = 0
    true = on_cpu(op, operands)
    for w, h, n in SERVES[serves][: 1 if emulates(make) else None]:
        for channels in (32, 128) if emulates(make) else (32, 64, 128):
            for x_stages, splits in ((0, 1), (2, 1), (0, 2), (2, 3)):
                shape = Shape(serves, (even(w), even(h), n), channels, x_stages, False, splits)
                variant = tiles.fit(sizes, shape, H200)
                if variant is not None:
                    check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant, true)
                    ran += 1
    assert ran


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fused", "dgrad"])
@pytest.mark.parametrize(("c", "k"), [(64, 64), (72, 256)])
@pytest.mark.parametrize("channels", [64, 128])
def test_columns_of_many_images(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, kind: str, c: int, k: int, channels: int
) -> None:
    """Columns of taps beside an image's sides are left out; tiles are dealt out, or too many for that."""
    problem = Problem(260, 3, 11, c, k)
    op, operands = problem.op(kind), problem.integers(kind, random_of(kind, c, k))
    sizes, dealt, true = sizes_of(op, operands), set(), on_cpu(op, operands)
    for tile in ((1, 3, 2), (1, 3, 42), (2, 3, 20), (12, 3, 1)):
        variant = tiles.fit(sizes, Shape("column", tile, channels), cuda.device)
        assert variant is not None
        dealt.add(conv_sm90._order(sizes, variant, cuda.device) is not None)
        check_exact(forced(cuda, variant, monkeypatch), op, operands, variant, true)
    assert dealt == {True, False}


@places(
    "constants tile kind",
    [
        (*image_tile, kind)
        for kind in ("pooled", "plain pooled", "maxima", "plain maxima", "tanh pooled")
        for image_tile in IMAGE_TILES
    ],
    lambda constants, tile, kind: tile[2] < 64 and kind in ("pooled", "maxima"),
)
def test_pools_within_several_images(
    make: MakeExecutor, constants: tuple[int, int], tile: tuple[int, int, int], kind: str
) -> None:
    """Every kernel: images, rows and columns beyond the last tile, outputs that the floor drops, channels beyond the last; of
    several steps of channels and of one; with what is not finite."""
    across, down, images = tile
    for n, h, w, c, k in (
        (images - 1, down + 1, across + 1, 64, 72),
        (2 * images + 3, 2 * down + 3, 2 * across + 3, 72, 136),
        (images + 1, down + 2, 3 * across - 2, 136, 264),
    )[: 2 if emulates(make) else None]:
        problem, serves = of_images(constants, n, h, w, c, k)
        pixels = ((0, 0, 0, 5), (1, down - 1, 0, 0), (n // 2, 0, across - 1, 3), (n - 1, 1, 1, 3))
        op, operands = problem.op(kind), problem.extremes(kind, random_of(kind, tile, h), pixels, (3, 17, 70))
        sizes, true = sizes_of(op, operands), on_cpu(op, operands)
        for x_stages in (0, 2):
            variant = tiles.fit(sizes, Shape(serves, tile, 128, x_stages), H200)
            assert variant is not None
            check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant, true)
            (launch,) = conv_sm90.launches(call_of(op, operands, variant), H200, variant)
            found = dict(launch.kernel.defines)
            assert (found["POOL"], found["WIDTH"], found["IMAGES"]) == (tiles.WITHIN_IMAGES, across, images)
            assert (found["FILTER"], found["COLUMNS"]) == constants


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "channels", "cb", "serves", "side"),
    [
        (kind, *tile, *stage)
        for tile in ((64, 64), (128, 64), (64, 32))
        for stage in (("tap", 3), ("tap", 1), ("column", 3), ("window", 3), ("column", 2))
        if stage[0] != "window" or tile[0] == 64
        for kind in ("fused", "fused add", "kept", "pooled", "maxima", "dgrad")
        if kind not in ("fused add", "kept") or tile[1] == 64
    ],
)
def test_every_compiled_tile(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, kind: str, channels: int, cb: int, serves: str, side: int
) -> None:
    wide = 32 if cb == 32 else 72
    problem = Problem(70, 7, 9, *((72, wide) if kind == "dgrad" else (wide, 72)), side, side, (side // 2,) * 4)
    op, operands = problem.op(kind), problem.integers(kind, random_of(kind, channels, cb))
    sizes, kernels = sizes_of(op, operands), set()
    for pixels in tiles.compiled_pixels(sizes, serves, channels):
        high = pixels // 16 * 2 if sizes.pool else pixels // 8  # of eight columns
        for tile in {
            "tap": ((2, 4, pixels // 8), (8, 2, pixels // 16)),
            "column": ((2, pixels // 2, 1), (8, high, 1)),
            "window": ((8, high, 1), (8, high - 2, 1)),
        }[serves]:
            variant = tiles.fit(sizes, Shape(serves, tile, channels), cuda.device)
            assert variant is not None
            check_exact(forced(cuda, variant, monkeypatch), op, operands, variant)
            kernels |= {launch.kernel for launch in conv_sm90.launches(call_of(op, operands, variant), H200, variant)}
    pool = {1, 2} if kind in ("pooled", "maxima") else {0}
    filter, columns = tiles.constants(sizes, serves)
    macros = {
        "CB": cb,
        "CHANNELS": channels,
        "FLIPPED": int(kind == "dgrad"),
        "FILTER": filter,
        "COLUMNS": columns,
        "MOMENTS": 0,
    }
    listed = {
        k for k in conv_sm90.variants()
        if k.entry == "conv_sm90" and dict(k.defines)["POOL"] in pool and macros.items() <= dict(k.defines).items()
        and ("SECOND" in dict(k.defines)) == (kind in ("fused add", "kept"))
    }  # fmt: skip
    assert listed == kernels


@places(
    "kind outputs reduced",
    [
        (kind, outputs, reduced)
        for outputs, reduced in ((8, 64), (24, 64), (32, 72))
        for kind in ("fprop", "fused", "gelu", "dgrad", "dgrad relu", "dgrad add tanh")
    ],
    lambda *case: case in (("fused", 24, 64), ("gelu", 32, 72), ("dgrad", 8, 64), ("dgrad add tanh", 32, 72)),
)
def test_every_tile_whose_products_do_two_rows_of_taps(
    make: MakeExecutor, kind: str, outputs: int, reduced: int
) -> None:
    """In images that are tiles and that are none, of any padding; with what is not finite."""
    channels = (outputs, reduced) if "dgrad" in kind else (reduced, outputs)
    kernels = set()
    for h, w, pad in ((33, 20, (1, 1, 1, 1)), (15, 9, (0, 2, 2, 0)), (62, 8, (2, 1, 0, 2))):
        problem = Problem(3, h, w, *channels, pad=pad)
        op, operands = problem.op(kind), problem.integers(kind, random_of(kind, outputs, h))
        sizes = sizes_of(op, operands)
        if kind in ("fprop", "fused", "dgrad"):
            x, operands[1][operands[1] == 0] = operands[0], 1
            x[0, 3, 4, 5], x[1, 0, 0, 0], x[2, 7, 6, 3], x[2, 8, 6, 3] = np.nan, np.inf, -np.inf, np.nan
        single = tiles.fit(sizes, Shape("window", (8, 7, 1), 64), H200)
        assert single is not None
        others = run_op(make([Forced(conv_sm90, single)]), op, bits_of(op, operands))
        true = on_cpu(op, operands)
        compiled = tiles.PIXELS[3, 3][tiles.PAIRED, 64][: 1 if emulates(make) else None]
        for pixels, less, x_stages in product(compiled, (1, 4), (0, 2)):
            tile = (8, pixels // 8 - less, 1)
            variant = tiles.fit(sizes, Shape("window", tile, tiles.PAIRED, x_stages), H200)
            assert variant is not None
            executor = make([Forced(conv_sm90, variant)])
            if kind == "gelu":
                np.testing.assert_array_equal(run_op(executor, op, bits_of(op, operands))[0], others[0], str(variant))
            else:
                check_exact(executor, op, operands, variant, true)
            kernels |= {launch.kernel for launch in conv_sm90.launches(call_of(op, operands, variant), H200, variant)}
    macros = {"CHANNELS": tiles.PAIRED, "FLIPPED": int("dgrad" in kind)}
    listed = {k for k in conv_sm90.variants() if k.entry == "conv_sm90" and macros.items() <= dict(k.defines).items()}
    assert listed == kernels or (emulates(make) and kernels < listed)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300))
def test_random_problems(cuda: CudaExecutor, seed: int) -> None:
    """The default choice on odd problems."""
    random = np.random.default_rng(seed)
    r, s = random.choice([1, 3, 5], 2) if seed % 3 else [random.choice([1, 3, 5])] * 2
    n, h, w = random.integers(1, 6), random.integers(1, 34), random.integers(1, 34)
    pad = random.integers(0, 3, 4) if seed % 2 else [random.integers(0, 3)] * 4
    stride = random.choice([1, 2, 3], 2) if seed % 4 == 0 else (1, 1)
    c, k = random.choice([8, 24, 32, 64, 72, 256]), random.choice([8, 16, 64, 72, 128, 256])
    numbers = [int(v) for v in (n, h, w, c, k, r, s)]
    problem = Problem(*numbers, tuple(map(int, pad)), tuple(map(int, stride)))
    others = ("plain pooled", "plain maxima", "dgrad add", "dgrad sigmoid", "dgrad pooled add relu")
    kinds = [kind for kind in (*KINDS, *others) if problem.has(kind)]
    for kind in kinds:
        check_exact(cuda, problem.op(kind), problem.integers(kind, random), f"{problem} {kind}")


@pytest.mark.gpu
@pytest.mark.parametrize(("stride", "c"), [((2, 2), 24), ((1, 2), 24), ((3, 3), 24), ((2, 2), 136)])
def test_classes_of_a_patch_follow_each_other(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, stride: tuple[int, int], c: int
) -> None:
    """More tiles than the list of their order has entries."""
    problem = Problem(450, 16, 16, c, 72, stride=stride)
    op, operands = problem.op("dgrad"), problem.integers("dgrad", random_of(stride, c))
    sizes = sizes_of(op, operands)
    variant = tiles.fit(sizes, Shape("tap", (8, 8, 1), 64), cuda.device)
    assert variant is not None
    dealt = deal(sizes, variant, cuda.device)
    assert dealt is None or len(dealt) * max(map(len, dealt)) > conv_sm90.ORDER_ENTRIES
    check_exact(forced(cuda, variant, monkeypatch), op, operands, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fprop", "fused", "pooled", "dgrad", "dgrad pooled"])
@pytest.mark.parametrize(
    "name", ["few channels", "64 channels", "many channels", "3x3 image of 1x1 tiles", "pointwise", "stride 2"]
)
def test_real_numbers(cuda: CudaExecutor, name: str, kind: str) -> None:
    """A result errs by its rounding to bf16 and by 2**-19 of the sum of its terms' magnitudes, which fp32 sums keep to."""
    problem = PROBLEMS[name]
    op, operands = problem.op(kind), problem.normals(kind, random_of(name, kind))
    geometry = {"stride": problem.stride, "pad": problem.pad, "dilation": problem.dilation}
    got, *index = run_op(cuda, op, bits_of(op, operands))
    value = from_bits(got)
    assert np.isfinite(value).all()
    if kind != "pooled":
        (true,) = on_cpu(op, operands)
        bare = problem.op({"fused": "fprop"}.get(kind, kind))
        (magnitude,) = on_cpu(
            bare, [np.abs(operands[0]), np.abs(operands[1]), *operands[2:]][: 3 if "dgrad" in kind else 2]
        )
        assert (np.abs(value - true) <= 2.0**-8 * np.abs(true) + 2.0**-19 * magnitude).all()
        return
    before = ConvFprop(**geometry, bias=True, act="relu")
    (full,) = on_cpu(before, operands)
    (magnitude,) = on_cpu(ConvFprop(**geometry), [np.abs(a) for a in operands[:2]])
    n, p, q, k = value.shape
    windows = full[:, : 2 * p, : 2 * q].reshape(n, p, 2, q, 2, k).transpose(0, 1, 3, 5, 2, 4).reshape(n, p, q, k, 4)
    slack = 2.0**-8 * windows.max(-1) + 2.0**-19 * magnitude.max()
    assert (np.abs(value - windows.max(-1)) <= slack).all()
    winner = np.take_along_axis(windows, index[0][..., None].astype(int), -1)[..., 0]
    assert (winner >= windows.max(-1) - 2 * slack).all()


@places(
    "kind c k",
    [
        (kind, c, k)
        for c, k in ((24, 64), (64, 64), (64, 136))
        for kind in ("fprop", "fused", "fused add", "kept", "pooled", "plain pooled", "maxima", "plain maxima", "dgrad")
        if Problem(3, 13, 11, c, k).has(kind)
    ],
    lambda kind, c, k: (c, k) == (64, 64),
)
def test_not_a_number_and_infinity_pass(make: MakeExecutor, kind: str, c: int, k: int) -> None:
    """They reach the outputs that they reach in float64, also from the bias; the first NaN of a window wins it."""
    problem = Problem(3, 13, 11, c, k)
    op, operands = problem.op(kind), problem.integers(kind, random_of(kind, c))
    x = operands[0]
    x[0, 3, 4, 5], x[1, 0, 0, 0], x[2, 7, 7, 3], x[2, 8, 7, 3] = np.nan, np.inf, -np.inf, np.nan
    operands[1][operands[1] == 0] = 1  # infinity times zero depends on which taps are skipped in the padding
    if kind in ("fused", "fused add", "kept", "pooled", "maxima"):
        operands[2][[3, 17, 40]] = np.inf, -np.inf, np.nan
    if kind == "fused add":  # also where the sum is infinite
        operands[3][0, 12, 10, :3], operands[3][1, 0, 0, 3:9] = (np.nan, np.inf, -np.inf), -np.inf
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (problem, kind)
        for problem in (
            Problem(1500, 5, 6, 64, 64),
            Problem(700, 6, 6, 128, 256),
            Problem(900, 9, 8, 24, 64),
            Problem(600, 7, 7, 256, 128),
            Problem(60000, 1, 1, 64, 192, 1, 1, (0, 0, 0, 0)),
            Problem(400, 13, 12, 128, 128, stride=(2, 2)),
        )
        for kind in ("fprop", "fused add", "kept", "pooled", "maxima", "dgrad", "dgrad add tanh")
        if kind not in ("fused add", "kept") or problem.has(kind)
    ],
    ids=str,
)
def test_many_tiles_give_the_same_bits_each_time(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, problem: Problem, kind: str
) -> None:
    """Blocks of many tiles, where rings go round often; eight runs of each candidate, against the first candidate's."""
    op, operands = problem.op(kind), bits_of(problem.op(kind), problem.normals(kind, random_of(problem, kind)))
    exact = bits_of(op, problem.integers(kind, random_of(problem, kind)))
    wanted = None
    for variant in conv_sm90.candidates(call_of(op, problem.integers(kind, random_of())), cuda.device):
        executor = forced(cuda, variant, monkeypatch)
        first = run_op(executor, op, operands)
        for _ in range(7):
            for again, once in zip(run_op(executor, op, operands), first, strict=True):
                np.testing.assert_array_equal(again, once, err_msg=str(variant))
        whole = run_op(executor, op, exact)
        wanted = wanted or whole
        for got, true in zip(whole, wanted, strict=True):
            np.testing.assert_array_equal(got, true, err_msg=str(variant))
    if problem.n < 800:
        check_exact(cuda, op, problem.integers(kind, random_of(problem, kind)))
