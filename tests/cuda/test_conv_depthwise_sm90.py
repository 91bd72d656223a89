"""Depthwise 3x3 convolutions through Hopper's copy engine: on the host's emulation of it, and on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import Registry, conv_depthwise_sm90
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_depthwise_sm90 import LEAST_PIXELS, MOST_BLOCK_THREADS, SHARED_BYTES, WARP, cut
from parcnn.cuda.launch import Device
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Executor, Slot
from tests.cuda.bf16 import stored, values_of
from tests.cuda.compare import WHERE, CheckedEmulation, check, random_fixture  # noqa: F401
from tests.cuda.host_emulation import runner
from tests.cuda.test_conv_depthwise import KINDS, ONES, Problem, call_of, with_sum
from tests.op_runner import run_op

H200 = Device("H200", "sm_90a", 132)
MakeExecutor = Callable[[Any], Executor]
PROBLEMS = {
    "one pixel": Problem(3, 1, 1, 8, 3, pad=ONES),
    "odd sides": Problem(2, 9, 11, 24, 3, pad=ONES),
    "without padding": Problem(2, 7, 6, 16, 3),
    "uneven padding": Problem(2, 5, 8, 40, 3, pad=(0, 2, 1, 0)),
    "most padding": Problem(3, 4, 3, 8, 3, pad=(2, 2, 2, 2)),
    "a row at the bottom": Problem(3, 1, 4, 8, 3, pad=(0, 1, 2, 1)),
    "a row at the top": Problem(3, 1, 4, 8, 3, pad=(2, 1, 0, 1)),
    "many images of one row": Problem(70, 1, 9, 32, 3, pad=ONES),
    "several slices of channels": Problem(3, 4, 5, 520, 3, pad=ONES),
    "several pieces of columns": Problem(2, 3, 300, 16, 3, pad=ONES),
    "rows of 7": Problem(3, 9, 7, 24, 3, pad=ONES),
    "rows of 7, most padding below": Problem(40, 3, 7, 8, 3, pad=(0, 1, 2, 1)),
    "rows of 7, most padding above": Problem(40, 1, 7, 8, 3, pad=(2, 1, 1, 1)),
    "rows of 7, without padding above and below": Problem(5, 4, 7, 8, 3, pad=(0, 1, 0, 1)),
    "rows of 7 of other 7": Problem(3, 5, 7, 8, 3, pad=(1, 0, 1, 2)),
}
LARGE = {
    "many images": Problem(400, 5, 3, 8, 3, pad=ONES),
    "112x112x32": Problem(1, 112, 112, 32, 3, pad=ONES),
    "56x56x96": Problem(2, 56, 56, 96, 3, pad=ONES),
    "28x28x144": Problem(5, 28, 28, 144, 3, pad=ONES),
    "14x14x384": Problem(7, 14, 14, 384, 3, pad=ONES),
    "7x7x512": Problem(9, 7, 7, 512, 3, pad=ONES),
}
# Shapes of networks, of which no result is asked here.
WHOLE = [(256, 112, 112, 32), (256, 56, 56, 96), (256, 28, 28, 144), (256, 14, 14, 384), (256, 7, 7, 512)]
WHOLE += [(1, 224, 224, 8), (32, 130, 50, 1000), (2**19, 1, 1, 8)]


@pytest.fixture(autouse=True)
def small_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images are refused because others are faster: here they are taken."""
    monkeypatch.setattr(conv_depthwise_sm90, "LEAST_PIXELS", 0)


def specs(kind: str, n: int, h: int, w: int, c: int) -> Call:
    image, filters = Spec((n, h, w, c), "bf16"), Spec((c, 3, 3, 1), "bf16")
    op, inputs = {
        "fprop": (ConvFprop(pad=ONES, groups=c), (image, filters)),
        "dgrad": (ConvDgrad(pad=ONES, groups=c, image=(h, w)), (image, filters)),
        "wgrad": (ConvWgrad(pad=ONES, groups=c, filter=(3, 3)), (image, image)),
    }[kind]
    return Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_blocks_fit_and_every_row_has_one(kind: str, shape: tuple[int, int, int, int]) -> None:
    call = specs(kind, *shape)
    listed = set(conv_depthwise_sm90.variants())
    variants = conv_depthwise_sm90.candidates(call, H200)
    assert len({str(v) for v in variants}) == len(variants) >= 1
    for variant in variants:
        if kind == "wgrad":
            nbytes = conv_depthwise_sm90.workspace_bytes(call.op, call.input_specs, call.output_specs, H200, variant)
            call = replace(call, workspace=Slot(Spec((nbytes,), "u8"), "arena"))
        launch = conv_depthwise_sm90.launches(call, H200, variant)[0]
        lanes, pieces, images = variant.lanes, variant.pieces, variant.images
        threads = prod(launch.block)
        assert launch.kernel in listed
        assert lanes * pieces * images + (0 if kind == "wgrad" else WARP) <= threads <= MOST_BLOCK_THREADS
        assert ceil(threads / WARP) * WARP * variant.resident <= variant.form.threads
        assert variant.resident * launch.shared_bytes <= SHARED_BYTES
        own = cut(conv_depthwise_sm90._walk(call.op, call.input_specs, call.output_specs), variant, H200)
        assert own.parts <= own.count
        assert own.count * images >= shape[0] * shape[1]
        assert own.units * lanes * variant.form.vec * pieces * variant.form.columns >= shape[2] * shape[3]
        assert launch.grid == (own.parts * own.units, 1, 1)


def test_shares_are_of_whole_images_where_that_comes_out_even() -> None:
    form = conv_depthwise_sm90.FORMS[0]
    for n, images, shared in ((256, 256, True), (512, 256, True), (264, 264, True), (300, 264, False), (1, 14, False)):
        call = specs("fprop", n, 14, 14, 64)
        walk = conv_depthwise_sm90._walk(call.op, call.input_specs, call.output_specs)
        own = cut(walk, conv_depthwise_sm90.Variant(form, 16, 4, 1, 7, 2), H200)
        assert own.count == n * 14
        assert own.parts == images
        assert (own.count % own.parts == 0 and own.count // own.parts % 14 == 0) == shared


def test_small_images_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_depthwise_sm90, "LEAST_PIXELS", LEAST_PIXELS)
    for kind, refused in (("fprop", True), ("dgrad", True), ("wgrad", False)):
        call = specs(kind, 256, 2, 4, 512)
        assert ("9 pixels" in (conv_depthwise_sm90.supports(call.op, call.input_specs) or "")) == refused


def test_what_is_measured_comes_first() -> None:
    for (p, q, c, wgrad), variant in conv_depthwise_sm90.MEASURED.items():
        call = specs("wgrad" if wgrad else "fprop", 256, p, q, c)
        found = conv_depthwise_sm90.candidates(call, H200)
        assert found[0] == variant
        assert len(set(found)) == len(found)
        few = specs("wgrad" if wgrad else "fprop", 1, p, q, c)
        assert conv_depthwise_sm90.candidates(few, H200)[0].images == 1


def test_what_it_refuses() -> None:
    x, w, b = Spec((2, 8, 8, 16), "bf16"), Spec((16, 3, 3, 1), "bf16"), Spec((16,))
    assert conv_depthwise_sm90.supports(ConvFprop(groups=16, bias=True, act="relu"), (x, w, b)) is None
    refused: list[tuple[Op, tuple[Spec, ...], str]] = [
        (ConvFprop(groups=16), (Spec(x.shape), Spec(w.shape)), "bf16"),
        (ConvFprop(groups=16, bias=True), (x, w, Spec((16,), "bf16")), "bias"),
        (ConvFprop(groups=16, stride=(2, 2)), (x, w), "stride"),
        (ConvFprop(groups=16, dilation=(2, 2)), (x, w), "dilation"),
        (ConvFprop(groups=16, pad=(3, 0, 0, 0)), (x, w), "padding"),
        (ConvFprop(groups=16, act="gelu"), (x, w), "gelu"),
        (ConvFprop(groups=16), (x, Spec((16, 5, 5, 1), "bf16")), "5"),
        (ConvFprop(groups=12), (Spec((2, 8, 8, 12), "bf16"), Spec((12, 3, 3, 1), "bf16")), "multiple of 8"),
        (ConvFprop(), (x, Spec((16, 3, 3, 16), "bf16")), "not a depthwise"),
        (ConvDgrad(groups=16, image=(10, 10), act="relu"), (x, w, Spec((2, 10, 10, 16), "bf16")), "fused"),
    ]
    for op, inputs, reason in refused:
        assert reason in (conv_depthwise_sm90.supports(op, inputs) or "supported"), op


@pytest.fixture(params=WHERE)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeExecutor:
    """Makes an executor that runs one family."""
    if request.param == "gpu":
        cuda = request.getfixturevalue("cuda")

        def on_device(family: Any) -> Executor:
            monkeypatch.setattr(cuda, "registry", Registry([family], runner.KERNELS))
            return cuda

        return on_device
    if not runner.available():
        pytest.skip("the emulation needs g++")
    return lambda family: CheckedEmulation([with_sum(family)], descending=request.param == "descending")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form(make: MakeExecutor, random: np.random.Generator, name: str, kind: str) -> None:
    problem = PROBLEMS[name]
    op, arrays = problem.call(kind, problem.arrays(random))
    variants = conv_depthwise_sm90.candidates(call_of(op, arrays), H200)
    of_form = {variant.form: variant for variant in reversed(variants)}
    for variant in {variants[0], variants[-1], *of_form.values()}:
        check(make(Forced(conv_depthwise_sm90, variant)), op, arrays, ulps=problem.ulps(kind))


@pytest.mark.parametrize("stages", [2, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_rings_of_any_length(make: MakeExecutor, random: np.random.Generator, kind: str, stages: int) -> None:
    for name in ("odd sides", "many images of one row", "rows of 7, most padding below"):
        problem = PROBLEMS[name]
        op, arrays = problem.call(kind, problem.arrays(random))
        variant = replace(conv_depthwise_sm90.candidates(call_of(op, arrays), H200)[0], stages=stages)
        check(make(Forced(conv_depthwise_sm90, variant)), op, arrays, ulps=problem.ulps(kind))


def test_fprop_epilogues(make: MakeExecutor, random: np.random.Generator) -> None:
    problem = PROBLEMS["uneven padding"]
    x, w, b, _ = problem.arrays(random).values()
    for bias in ([], [b]):
        for act in (None, "relu"):
            op = ConvFprop(**problem.geometry, bias=bool(bias), act=act)
            check(make(conv_depthwise_sm90), op, [x, w, *bias], ulps=problem.ulps("fprop"))


def test_the_same_bits_again(make: MakeExecutor, random: np.random.Generator) -> None:
    for name in ("odd sides", "many images of one row"):
        op, arrays = PROBLEMS[name].call("wgrad", PROBLEMS[name].arrays(random))
        assert isinstance(op, ConvWgrad)
        executor = make(conv_depthwise_sm90)
        first, again = run_op(executor, op, arrays), run_op(executor, op, arrays)
        (without,) = run_op(executor, replace(op, bias=False), arrays)
        np.testing.assert_array_equal(first[0], without)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_non_finite_pixel_stays_in_its_channel(make: MakeExecutor, random: np.random.Generator) -> None:
    problem = PROBLEMS["odd sides"]
    arrays = problem.arrays(random)
    x = values_of(arrays["x"])
    x[0, 4, 5, 3], x[1, 2, 2, 0], x[1, 8, 10, 5] = np.nan, np.inf, -np.inf
    op = ConvFprop(**problem.geometry, act="relu")
    (y,) = check(make(conv_depthwise_sm90), op, [stored(x, "bf16"), arrays["w"]], ulps=problem.ulps("fprop"))
    assert np.isnan(values_of(y)).any()


def only(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, family: Any) -> CudaExecutor:
    monkeypatch.setattr(cuda, "registry", Registry([family], runner.KERNELS))
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_networks(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, random: np.random.Generator, name: str, kind: str
) -> None:
    problem = LARGE[name]
    op, arrays = problem.call(kind, problem.arrays(random))
    for variant in conv_depthwise_sm90.candidates(call_of(op, arrays), cuda.device)[::3]:
        executor = only(cuda, monkeypatch, Forced(conv_depthwise_sm90, variant))
        check(executor, op, arrays, ulps=problem.ulps(kind))


@st.composite
def geometries(draw: st.DrawFn) -> Problem:
    pad = draw(st.tuples(*[st.integers(0, 2)] * 4))
    return Problem(
        n=draw(st.integers(1, 40)),
        h=max(1, 3 - pad[0] - pad[2]) + draw(st.integers(0, 20)),
        w=max(1, 3 - pad[1] - pad[3]) + draw(st.integers(0, 20)),
        c=8 * draw(st.integers(1, 9)),
        r=3,
        pad=pad,
    )


@pytest.mark.gpu
def test_any_geometry(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(problem=geometries(), kind=st.sampled_from(KINDS), which=st.integers(0, 99), seed=st.integers(0, 2**32 - 1))
    def any_geometry(problem: Problem, kind: str, which: int, seed: int) -> None:
        op, arrays = problem.call(kind, problem.arrays(np.random.default_rng(seed)))
        variants = conv_depthwise_sm90.candidates(call_of(op, arrays), cuda.device)
        executor = only(cuda, monkeypatch, Forced(conv_depthwise_sm90, variants[which % len(variants)]))
        check(executor, op, arrays, ulps=problem.ulps(kind))

    any_geometry()
