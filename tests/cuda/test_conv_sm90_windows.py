"""Convolutions on Hopper that pool by other windows than 2x2, maxima and means: as exact as the rest, in every tile; what is
fused, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parcnn import nn, optim
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, conv_sm90, pool
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_sm90_choice import candidates
from parcnn.cuda.kernels.conv_sm90_tiles import Shape
from parcnn.cuda.launch import Kernel
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.pool import PoolDgrad, PoolFprop, PoolWindow
from parcnn.ops.program import Call, Slot
from parcnn.plan.describe import outline
from tests.cuda.compare import MakeExecutor, emulates, makers, places
from tests.cuda.test_conv_sm90 import H200, Problem, bits_of, call_of, check_exact, forced, random_of, sizes_of
from tests.op_runner import run_op

make_fixture = makers()
WINDOWS = {
    "3x3": PoolWindow("max", (3, 3), (3, 3)),
    "3x3 stride 2": PoolWindow("max", (3, 3), (2, 2)),
    "3x3 stride 2, padded": PoolWindow("max", (3, 3), (2, 2), (1, 1)),
    "3x3 stride 2, ceil": PoolWindow("max", (3, 3), (2, 2), ceil_mode=True),
    "2x2 stride 1": PoolWindow("max", (2, 2), (1, 1)),
    "2x2 padded": PoolWindow("max", (2, 2), (2, 2), (1, 1)),
    "gaps": PoolWindow("max", (2, 1), (3, 4)),
    "4x3 stride 3x1": PoolWindow("max", (4, 3), (3, 1), (2, 0)),
    "mean 3x3": PoolWindow("avg", (3, 3), (3, 3)),
    "mean 3x3 stride 2, padded": PoolWindow("avg", (3, 3), (2, 2), (1, 1)),
    "mean 3x3 stride 2, padding not counted": PoolWindow("avg", (3, 3), (2, 2), (1, 1), count_include_pad=False),
    "mean 3x3 stride 2, ceil": PoolWindow("avg", (3, 3), (2, 2), ceil_mode=True),
    "mean 4x4 stride 3, padded, ceil": PoolWindow("avg", (4, 4), (3, 3), (1, 2), ceil_mode=True),
    "mean 2x2 padded, a third": PoolWindow("avg", (2, 2), (2, 2), (1, 1), divisor=3),
    "mean 4x3 stride 3x1": PoolWindow("avg", (4, 3), (3, 1), (2, 0), count_include_pad=False),
}
# A pool of its own shares windows of sixteen elements among threads, and so adds in another order.
ADDED_IN_ORDER = [name for name, w in WINDOWS.items() if w.kind == "avg" and w.kernel[0] * w.kernel[1] < 16]
PROBLEMS = {
    "few channels": Problem(5, 13, 11, 24, 64),
    "64 channels": Problem(5, 13, 11, 64, 72),
    "many channels": Problem(3, 9, 10, 128, 256),
    "pointwise": Problem(5, 14, 13, 64, 128, 1, 1, (0, 0, 0, 0)),
    "5x5": Problem(3, 27, 27, 64, 64, 5, 5, (2, 2, 2, 2)),
    "stride 2": Problem(4, 21, 30, 64, 128, stride=(2, 2)),
    "dilated": Problem(2, 14, 15, 64, 72, pad=(2, 2, 2, 2), dilation=(2, 3)),
    "larger than a tile": Problem(2, 40, 37, 32, 64),
    "small images": Problem(70, 6, 5, 64, 64),
}
NOT_FINITE = ("3x3 stride 2, padded", "mean 3x3 stride 2, padding not counted")  # in the emulation
windows = pytest.mark.parametrize("window", WINDOWS)
problems = pytest.mark.parametrize("name", PROBLEMS)


def op_and_operands(name: str, window: str) -> tuple[Op, list[np.ndarray]]:
    kind = "pooled" if len(name) % 2 else "plain pooled"
    op = pooled_by(PROBLEMS[name].op(kind), WINDOWS[window])
    return op, PROBLEMS[name].integers(kind, random_of(name, window))


def pooled_by(op: Op, window: PoolWindow) -> ConvFprop:
    assert isinstance(op, ConvFprop)
    return replace(op, pool=window.kind, window=window)


@windows
@problems
def test_launches_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, window: str) -> None:
    op, operands = op_and_operands(name, window)
    call = call_of(op, operands)
    found, listed = conv_sm90.candidates(call, H200), set(conv_sm90.variants())
    assert found
    for variant in found:
        assert {launch.kernel for launch in conv_sm90.launches(call, H200, variant)} <= listed
        run_op(forced(null, variant, monkeypatch), op, bits_of(op, operands))


@windows
@problems
def test_tiles_cover_every_output_once(name: str, window: str) -> None:
    op, operands = op_and_operands(name, window)
    sizes = sizes_of(op, operands)
    for variant in candidates(sizes, H200):
        w, h, n = variant.tile
        across, down = tiles.pooled_by(WINDOWS[window], w, 1), tiles.pooled_by(WINDOWS[window], h, 0)
        x, y, z = tiles.patches(sizes, variant.tile)
        p, q = sizes.pooled
        assert (x - 1) * across < q <= x * across
        assert (y - 1) * down < p <= y * down
        assert (z - 1) * n < sizes.n <= z * n


def test_only_hopper_fuses_them_and_only_where_it_pays() -> None:
    def fused(
        window: PoolWindow,
        side: int,
        c: int,
        k: int,
        arch: str = "sm_90a",
        r: int = 3,
        stride: int = 1,
        dilation: int = 1,
    ) -> bool:
        x, w = Spec((64, side, side, c), "bf16"), Spec((k, r, r, c), "bf16")
        pad, strides, dilations = (r // 2,) * 4, (stride, stride), (dilation, dilation)
        op = ConvFprop(stride=strides, pad=pad, dilation=dilations, pool=window.kind, window=window)
        return REGISTRY.on(arch).supports(op, (x, w))

    overlapping, apart = WINDOWS["3x3 stride 2"], WINDOWS["3x3"]
    assert fused(overlapping, 13, 256, 256)  # a tile has the whole image
    assert not fused(overlapping, 56, 64, 64)
    assert not fused(WINDOWS["2x2 stride 1"], 13, 64, 64)
    assert fused(apart, 56, 512, 512)
    assert not fused(apart, 56, 512, 512, "sm_90")
    assert not fused(apart, 56, 512, 512, "sm_80")
    assert not fused(apart, 56, 66, 64)  # channels by eights
    assert not fused(replace(apart, dilation=(2, 2)), 56, 64, 64)
    assert not fused(PoolWindow("max", (5, 5), (5, 5)), 56, 64, 64)
    for mean in (False, True):  # where tiles of windows read as much of x as others
        window = replace(apart, kind="avg" if mean else "max")
        assert fused(window, 57, 64, 64)
        assert fused(window, 57, 32, 64, r=1)
        assert fused(window, 57, 64, 64, r=5, dilation=2)
        assert not fused(window, 57, 32, 64)
        assert not fused(window, 57, 64, 64, r=5)
        assert not fused(window, 57, 64, 64, stride=2)


def test_means_are_fused_where_maxima_are() -> None:
    wide = [PoolWindow(kernel=(5, 5), stride=(5, 5)), PoolWindow(kernel=(3, 3), stride=(3, 3), dilation=(2, 2))]
    found = set()
    for window in (*WINDOWS.values(), *wide):
        for side, c, k in ((13, 256, 256), (56, 64, 64), (56, 66, 64)):
            inputs = (Spec((64, side, side, c), "bf16"), Spec((k, 3, 3, c), "bf16"))
            ops = [pooled_by(ConvFprop(pad=(1, 1, 1, 1)), replace(window, kind=kind)) for kind in ("max", "avg")]
            maximum, mean = ((conv_sm90.supports(op, inputs), conv_sm90.gains(op, inputs)) for op in ops)
            assert maximum == mean
            found.add(mean)
    assert {(None, True), (None, False)} < found
    assert any(reason for reason, _ in found)


@pytest.mark.parametrize("mode", ["train", "predict"])
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_a_plan_with_means(null: CudaExecutor, mode: str, act: str | None) -> None:
    """Behind an activation they are the convolution's only where no gradient asks for what comes before them."""
    acts = {None: [], "relu": [nn.ReLU()], "gelu": [nn.GELU()]}[act]
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), *acts, nn.AvgPool2d(3, 2)]
    train: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "optimizer": optim.SGD()} if mode == "train" else {}
    plan = outline(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 36, 10)), mode=mode, batch=64, sample=(64, 13, 13),
        executor=null, precision="bf16", **train,
    )  # fmt: skip
    calls = plan.program.calls
    fused = [c for c in calls if isinstance(c.op, ConvFprop) and c.op.window]
    assert len(fused) == (act is None or mode == "predict")
    assert len([c for c in calls if isinstance(c.op, PoolFprop)]) == 1 - len(fused)
    assert len([c for c in calls if isinstance(c.op, PoolDgrad)]) == (mode == "train")
    assert not [c for c in calls if isinstance(c.op, ConvDgrad | ConvWgrad) and c.op.pool]
    for call in fused:
        assert isinstance(call.op, ConvFprop)
        assert (call.op.act, call.op.pool, len(call.outputs)) == (act, "avg", 1)
        assert [k.defines[3] for k in null.kernels(call)] == [("POOL", tiles.OTHER_WINDOWS)]


# On the host's emulation and the device


@places(
    "name window",
    [(name, window) for window in WINDOWS for name in PROBLEMS],
    lambda name, window: name == "64 channels" or (name, window) == ("many channels", "3x3 stride 2, padded"),
)
def test_every_candidate_is_exact(make: MakeExecutor, name: str, window: str) -> None:
    op, operands = op_and_operands(name, window)
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant)


@places(
    "kind window",
    [(k, w) for k in ("pooled", "plain pooled") for w in WINDOWS],
    lambda kind, window: window in NOT_FINITE,
)
def test_what_is_not_finite(make: MakeExecutor, kind: str, window: str) -> None:
    """NaN and infinities of both signs in one window, alone, and in a corner; a bias that is not finite."""
    problem = Problem(3, 13, 11, 64, 72)
    pixels = ((0, 5, 4, 7), (0, 6, 5, 3), (1, 5, 5, 3), (1, 6, 4, 0), (2, 12, 10, 1), (2, 0, 0, 9))
    values = (np.inf, -np.inf, np.inf, np.inf, np.nan, -np.inf)
    operands = problem.extremes(kind, random_of(kind, window), (), (3, 17, 70))
    for at, value in zip(pixels, values, strict=True):
        operands[0][at] = value
    op = pooled_by(problem.op(kind), WINDOWS[window])
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant)


@places(
    "kind window",
    [(kind, window) for kind in ("fprop", "fused", "gelu", "tanh") for window in ADDED_IN_ORDER],
    lambda kind, window: (kind, window) in (("gelu", NOT_FINITE[1]), ("fused", "mean 3x3 stride 2, ceil")),
)
def test_means_are_those_of_a_pool_of_its_own(make: MakeExecutor, kind: str, window: str) -> None:
    """Bit for bit, whatever the values: it takes the mean of rounded outputs, behind the activation."""
    problem = Problem(3, 13, 11, 136, 72)
    conv, operands = problem.op(kind), problem.normals(kind, random_of(kind, window))
    alone = tiles.fit(sizes_of(conv, operands), Shape("tap", (11, 13, 1), 64), H200)
    assert alone is not None
    (before,) = run_op(make([Forced(conv_sm90, alone)]), conv, bits_of(conv, operands))
    (expected,) = run_op(make([pool]), PoolFprop(**vars(WINDOWS[window])), [before])
    op = pooled_by(conv, WINDOWS[window])
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        (got,) = run_op(make([Forced(conv_sm90, variant)]), op, bits_of(op, operands))
        np.testing.assert_array_equal(got, expected, err_msg=str(variant))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["3x3 stride 2, padded", "mean 3x3 stride 2, padding not counted"])
def test_every_compiled_tile(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each kernel, of several images where a stage serves one tap, and of several steps of channels."""
    kernels: set[Kernel] = set()
    window = WINDOWS[name]
    for channels, cb in ((64, 64), (128, 64), (64, 32)):
        problem = Problem(9, 12, 15, 32 if cb == 32 else 136, 136)
        op = pooled_by(problem.op("pooled"), window)
        operands = problem.integers("pooled", random_of(channels, cb))
        for pixels in tiles.compiled_pixels(sizes_of(op, operands), "tap", channels):
            for shape in (
                Shape("tap", (5, 3, pixels // 15), channels),
                Shape("column", (15, pixels // 15, 1), channels),
            ):
                variant = tiles.fit(sizes_of(op, operands), shape, cuda.device)
                assert variant is not None
                check_exact(forced(cuda, variant, monkeypatch), op, operands, variant)
                kernels |= {launch.kernel for launch in conv_sm90.launches(call_of(op, operands), H200, variant)}
    assert kernels == {k for k in conv_sm90.variants() if ("POOL", tiles.OTHER_WINDOWS) in k.defines}


@pytest.mark.parametrize(("side", "width"), [(3, 1400), (4, 1100)])
def test_images_too_wide_for_any_tile(null: CudaExecutor, side: int, width: int) -> None:
    window = PoolWindow("max", (side, side), (side, side))
    op = ConvFprop(pad=(1, 1, 1, 1), pool="max", window=window)
    specs = (Spec((1, 64, width, 64), "bf16"), Spec((64, 3, 3, 64), "bf16"))
    assert "no tile" in (conv_sm90.supports(op, specs) or "")
    flat = (Spec((1, side - 1, width // 2, 64), "bf16"), specs[1])
    assert "no window" in (conv_sm90.supports(op, flat) or "")
    narrow = (Spec((1, 64, width // 2, 64), "bf16"), specs[1])
    assert null.can_fuse(op, narrow)


@pytest.mark.parametrize(
    ("image", "filters", "window", "fits"),
    [
        ((500, 7), (11, 11), PoolWindow("max", (3, 1), (1, 1)), True),  # one column of outputs: tiles of fewer rows
        ((3000, 9), (3, 3), PoolWindow("max", (3, 1), (2, 1)), True),
        # A sixteenth of a row: 95 outputs, 285 pixels.
        ((9, 4500), (3, 3), PoolWindow("max", (1, 3), (1, 2)), False),
    ],
    ids=str,
)
def test_tiles_are_no_larger_than_a_copy_with_a_stride(
    image: tuple[int, int], filters: tuple[int, int], window: PoolWindow, fits: bool
) -> None:
    """TMA brings boxes of 256 pixels along an axis, also those that a stride leaves out."""
    op = ConvFprop(stride=(6, 3) if image[0] == 500 else (3, 3), pad=(3, 3, 3, 3), pool="max", window=window)
    inputs = (Spec((3, *image, 64), "bf16"), Spec((40, *filters, 64), "bf16"))
    assert (conv_sm90.supports(op, inputs) is None) == fits
    if fits:
        call = Call(op, *(tuple(Slot(spec, "arena") for spec in specs) for specs in (inputs, op.infer(*inputs))))
        assert all(conv_sm90.launches(call, H200, variant) for variant in (None, *conv_sm90.candidates(call, H200)))
