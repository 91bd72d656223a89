"""Sums that Hopper's input gradients take for a batch norm below, and what the batch norm makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import parcnn
from parcnn import data, nn, optim
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, batch_norm, conv_sm90, conv_unpool
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_sm90_tiles import Shape
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvDgrad
from parcnn.ops.norm import BatchNormDgrad, BatchNormTrain
from parcnn.ops.pool import PoolWindow
from parcnn.plan.describe import outline
from parcnn.plan.options import Options
from parcnn.train import Trainer
from tests.cuda.bf16 import from_bits, to_bits
from tests.cuda.compare import MakeExecutor, emulates, listing, makers, places
from tests.cuda.conv_problems import UNIT, norm_below
from tests.cuda.test_conv_sm90 import (
    H200,
    PROBLEMS,
    Problem,
    bits_of,
    call_of,
    check_exact,
    forced,
    on_cpu,
    random_of,
    sizes_of,
)
from tests.op_runner import run_op

OTHERS = (*conv_unpool.variants(), *batch_norm.variants())
make_fixture = makers(listing(OTHERS))
CASES = {
    **{
        name: PROBLEMS[name]
        for name in ("64 channels", "odd blocks of channels", "many channels", "many small images", "images of 3x3",
                     "no padding", "wide image", "padding beyond the filter", "dilated")
    },
    "few channels below": Problem(5, 13, 11, 8, 40),
    "more groups of channels than blocks": Problem(9, 6, 6, 1096, 64),
}  # fmt: skip
KINDS = ("dgrad", "dgrad pooled", "dgrad mean")
CONFIGURATIONS = [
    (name, kind, act)
    for name, problem in CASES.items()
    for kind in KINDS
    for act in ("none", "relu")
    if problem.has(kind)
]


def of(problem: Problem, kind: str, act: str) -> ConvDgrad:
    op = problem.op(kind)
    assert isinstance(op, ConvDgrad)
    return replace(op, sums=True, act="relu" if act == "relu" else None)


def exact_operands(problem: Problem, kind: str, random: np.random.Generator) -> list[np.ndarray]:
    return [*problem.integers(kind, random), *norm_below((problem.n, problem.h, problem.w, problem.c), random)]


def real_operands(problem: Problem, kind: str, random: np.random.Generator) -> list[np.ndarray]:
    """With the statistics of x, whose mean is not small against its deviation."""
    x = from_bits(to_bits(random.standard_normal((problem.n, problem.h, problem.w, problem.c)) + 2))
    gamma, beta = (random.standard_normal(problem.c).astype(np.float32) for _ in range(2))
    mean, rstd = x.mean((0, 1, 2)).astype(np.float32), (1 / np.sqrt(x.var((0, 1, 2)) + 1e-5)).astype(np.float32)
    return [*problem.normals(kind, random), x, gamma, beta, mean, rstd]


# Without a GPU


@pytest.mark.parametrize(("name", "kind", "act"), [case for case in CONFIGURATIONS if case[2] == "relu"])
def test_launches_are_right(
    null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, act: str
) -> None:
    problem = CASES[name]
    op, operands = of(problem, kind, act), exact_operands(problem, kind, random_of(name, kind))
    listed = {*conv_sm90.variants(), *OTHERS}
    found = conv_sm90.candidates(call_of(op, operands), H200)
    assert found
    for variant in found:
        assert variant.splits == 1
        run_op(forced(null, variant, monkeypatch), op, bits_of(op, operands))
        call = call_of(op, operands, variant)
        assert {launch.kernel for launch in conv_sm90.launches(call, H200, variant)} <= listed


def test_who_takes_sums() -> None:
    dy, w, x = (Spec(shape, "bf16") for shape in ((8, 9, 9, 64), (64, 3, 3, 64), (8, 9, 9, 64)))
    norm = (x, *[Spec((64,))] * 4)
    op = ConvDgrad(pad=(1, 1, 1, 1), image=(9, 9), sums=True)
    hopper = REGISTRY.on("sm_90a")
    assert hopper.supports(op, (dy, w, *norm))
    assert hopper.supports(replace(op, act="relu"), (dy, w, *norm))
    assert not REGISTRY.on("sm_89").supports(op, (dy, w, *norm))
    few, empty = Spec((8, 9, 9, 32), "bf16"), Spec((0, 9, 9, 64), "bf16")
    for other, inputs in (
        (replace(op, act="tanh"), (dy, w, *norm)),
        (replace(op, add=True), (dy, w, *norm, x)),
        (replace(op, pad=(0, 0, 0, 0)), (dy, Spec((64, 1, 1, 64), "bf16"), *norm)),
        (replace(op, stride=(2, 2)), (Spec((8, 5, 5, 64), "bf16"), w, *norm)),
        (op, (few, Spec((32, 3, 3, 64), "bf16"), *norm)),
        (op, (empty, w, empty, *norm[1:])),
        (ConvDgrad(image=(3, 3), sums=True), (Spec((8, 1, 1, 64), "bf16"), w, Spec((8, 3, 3, 64), "bf16"), *norm[1:])),
        (replace(op, groups=64), (dy, Spec((64, 3, 3, 1), "bf16"), *norm)),
        (replace(op, groups=2), (dy, Spec((64, 3, 3, 32), "bf16"), *norm)),
        (op, tuple(Spec(s.shape) for s in (dy, w, *norm))),
        (op, (dy, w, x, *[Spec((64,), "bf16")] * 4)),
        (replace(op, groups=2), (Spec(dy.shape), Spec((64, 3, 3, 32)), Spec(x.shape), *norm[1:])),
        (op, (Spec((8, 9, 9, 60), "bf16"), Spec((60, 3, 3, 64), "bf16"), *norm)),
    ):
        assert not hopper.supports(other, inputs), (other, inputs)


def test_sums_are_taken_where_they_gain(null: CudaExecutor) -> None:
    norm = BatchNormDgrad(sums=True)

    def takes(*shape: int, op: BatchNormDgrad = norm) -> bool:
        x, channel = Spec(shape, "bf16"), Spec(shape[-1:])
        return null.can_fuse(op, (x, x, *[channel] * 6))

    assert takes(256, 28, 28, 64)
    assert not takes(32, 28, 28, 64), "a pass is short"
    assert not takes(512, 1, 1, 2**15), "its rows are kept in shared memory"
    assert not takes(256, 28, 28, 64, op=replace(norm, window=PoolWindow())), (
        "behind a pool the norm spreads the error itself"
    )


def network(act: bool = True) -> nn.Module:
    """The second convolution's input gradient takes the first norm's sums, the last one's, 1x1, none."""
    parcnn.manual_seed(5)
    layers: list[nn.Module] = []
    for c, side in ((3, 3), (64, 3), (64, 1)):
        layers += [nn.Conv2d(c, 64, side, padding=side // 2, bias=False), nn.BatchNorm2d(64)]
        layers += [nn.ReLU()] * act
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize(("batch", "taken"), [(64, True), (8, False)])
def test_a_plan_takes_them_of_large_tensors(null: CudaExecutor, batch: int, taken: bool, act: bool) -> None:
    options = {"executor": null, "loss": nn.CrossEntropyLoss(), "optimizer": optim.SGD(0.1), "precision": "bf16"}
    calls = outline(network(act), mode="train", batch=batch, sample=(3, 56, 56), **options).program.calls
    found = [(call.op.sums, call.op.act) for call in calls if isinstance(call.op, ConvDgrad)]
    assert found[1:] == [(False, None), (taken, "relu" if taken and act else None)]  # the linear layer's is the first
    norms = [(call.op.sums, call.op.act) for call in calls if isinstance(call.op, BatchNormDgrad)]
    left = "relu" if act else None
    assert norms == [(False, left), (False, left), (taken, None if taken else left)]


def test_a_plan_with_a_filter_that_covers_the_image(null: CudaExecutor) -> None:
    """It is a matrix product, whose kernels take no sums."""
    layers = [nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 64, 3), nn.Flatten()]
    plan = outline(
        nn.Sequential(*layers, nn.Linear(64, 10)), mode="train", batch=4096, sample=(3, 3, 3), executor=null,
        loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(0.1), precision="bf16",
    )  # fmt: skip
    assert not [call for call in plan.program.calls if isinstance(call.op, ConvDgrad) and call.op.sums]


# On the host's emulation and the device


EMULATED = {
    ("64 channels", "dgrad", "relu"), ("odd blocks of channels", "dgrad", "none"), ("dilated", "dgrad", "relu"),
    ("no padding", "dgrad", "relu"), ("few channels below", "dgrad mean", "none"),
    ("many small images", "dgrad pooled", "relu"),
}  # fmt: skip


@places("name kind act", CONFIGURATIONS, lambda *case: case in EMULATED)
def test_every_candidate_is_exact(make: MakeExecutor, name: str, kind: str, act: str) -> None:
    problem = CASES[name]
    op, operands = of(problem, kind, act), exact_operands(problem, kind, random_of(name, kind, act))
    true = on_cpu(op, operands)
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant, true)


TILES = {
    "tap": [(11, 5, 3), (5, 2, 6), (1, 1, 64), (8, 4, 2), (4, 3, 20)],
    "column": [(11, 6, 1), (4, 3, 1), (4, 6, 3), (1, 13, 5), (5, 3, 8)],
    "window": [(8, 13, 1), (8, 4, 1), (8, 31, 1), (11, 13, 1), (12, 4, 1)],
}


@places(
    "serves c k",
    [(serves, c, k) for c, k in ((64, 64), (192, 64), (72, 136)) for serves in TILES],
    lambda serves, c, k: c == 72,
)
def test_tiles(make: MakeExecutor, serves: str, c: int, k: int) -> None:
    """Tiles that hang over every border, with and without rings as short as may be."""
    problem, ran = Problem(7, 13, 11, c, k), 0
    op, operands = of(problem, "dgrad", "relu"), exact_operands(problem, "dgrad", random_of(serves, c, k))
    sizes, true = sizes_of(op, operands), on_cpu(op, operands)
    for tile in TILES[serves][: 1 if emulates(make) else None]:
        for channels in (64, 128):
            for x_stages in (0, 2):
                variant = tiles.fit(sizes, Shape(serves, tile, channels, x_stages), H200)
                if variant is not None:
                    check_exact(make([Forced(conv_sm90, variant)]), op, operands, variant, true)
                    ran += 1
    assert ran


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["none", "relu"])
def test_every_compiled_tile(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    problem = Problem(70, 7, 9, 136, 72)
    op, operands = of(problem, "dgrad", act), exact_operands(problem, "dgrad", random_of(act))
    sizes, true, kernels = sizes_of(op, operands), on_cpu(op, operands), set()
    for channels in (64, 128):
        for serves in ("tap", "column", "window"):
            for pixels in tiles.compiled_pixels(sizes, serves, channels):
                tile = (2, 4, pixels // 8) if serves == "tap" else (8, pixels // 8, 1)
                variant = tiles.fit(sizes, Shape(serves, tile, channels), cuda.device)
                assert variant is not None
                check_exact(forced(cuda, variant, monkeypatch), op, operands, variant, true)
                kernels |= {
                    launch.kernel for launch in conv_sm90.launches(call_of(op, operands, variant), H200, variant)
                }
    sums = [k for k in conv_sm90.variants() if dict(k.defines).get("MOMENTS") and dict(k.defines)["FLIPPED"]]
    assert sums
    assert set(sums) <= kernels


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize(
    "problem", [Problem(60, 27, 19, 64, 128), Problem(400, 6, 6, 320, 128), CASES["many channels"]]
)
def test_sums_are_those_of_the_stored_errors(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, problem: Problem, act: str
) -> None:
    """dz is what the plain kernel writes, cut off where the forward's output is zero; the sums err by the longest chain of
    additions: a thread's pixels of a tile and four lanes, what a thread adds of the rows, their threads."""
    random = random_of(problem, act)
    op, operands = of(problem, "dgrad", act), real_operands(problem, "dgrad", random)
    bits = bits_of(op, operands)
    x, gamma, beta, mean, rstd = bits[2:]
    variance = (1 / rstd.astype(float) ** 2 - 1e-5).astype(np.float32)
    norm = BatchNormTrain(act=op.act)
    for variant in conv_sm90.candidates(call_of(op, operands), H200):
        executor = forced(cuda, variant, monkeypatch)
        dz, dgamma, dbeta = run_op(executor, op, bits)
        (plain,) = run_op(executor, replace(op, act=None, sums=False), bits[:2])
        executor.registry = REGISTRY.on("sm_90a")
        count = np.float32(problem.n * problem.h * problem.w)
        moments = np.array([mean, variance * count], np.float32)
        y, _, own_rstd = run_op(
            executor, replace(norm, moments=True), [x, gamma, beta, mean.copy(), variance.copy(), moments]
        )[:3]
        np.testing.assert_allclose(own_rstd, rstd, rtol=1e-6)
        if act == "relu":
            unsure = np.abs((from_bits(x) - mean) * rstd * gamma + beta) < 1e-4  # rstd's last bits
            assert unsure.mean() < 1e-3
            np.testing.assert_array_equal(np.where(unsure, 0, dz), np.where(unsure | (from_bits(y) == 0), 0, plain))
        else:
            np.testing.assert_array_equal(dz, plain)
        errors = from_bits(dz).reshape(-1, problem.c)
        xhat = ((from_bits(x) - mean.astype(float)) * rstd.astype(float)).reshape(-1, problem.c)
        chain = (256 // 4 + 2 + 64 + 16 + 8) * UNIT
        for got, terms in ((dgamma, errors * xhat), (dbeta, errors)):
            assert (np.abs(got - terms.sum(0)) <= chain * np.abs(terms).sum(0)).all(), variant
        again = run_op(forced(cuda, variant, monkeypatch), op, bits)
        for one, other in zip(again, (dz, dgamma, dbeta), strict=True):
            np.testing.assert_array_equal(one, other)


@places("act", [("none",), ("relu",)], lambda act: True)
def test_what_is_no_number_stays_in_its_channel(make: MakeExecutor, act: str) -> None:
    """In dy, in x, in a batch norm's numbers: as the oracle has it, and everywhere else too."""
    problem = CASES["64 channels"]
    op, operands = of(problem, "dgrad", act), exact_operands(problem, "dgrad", random_of(act))
    dy, w, x, gamma, beta, mean, _ = operands
    w[w == 0] = 1  # an infinity times zero would be no infinity
    dy[0, 5, 5, 3], dy[4, 12, 10, 60] = np.nan, np.inf
    x[1, 2, 3, 7], x[2, 2, 3, 8], x[3, 0, 0, 9] = np.nan, np.inf, -np.inf
    beta[11], mean[12], gamma[13] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        true = on_cpu(op, operands)
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        dz, *sums = run_op(make([Forced(conv_sm90, variant)]), op, bits_of(op, operands))
        np.testing.assert_array_equal(from_bits(dz), true[0], err_msg=str(variant))
        for got, expected in zip(sums, true[1:], strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=str(variant))


@pytest.mark.gpu
def test_gradients_of_a_step(cuda: CudaExecutor) -> None:
    """With sums or with a pass over dx and x: the weights after a step differ by no more than roundings of the error."""
    random, found = np.random.default_rng(2), []
    images = data.from_arrays(random.integers(0, 256, (64, 3, 56, 56), np.uint8), random.integers(0, 10, 64))
    for fuse in (True, False):
        run = Trainer(
            network(), optim.SGD(0.1), device=cuda, precision="bf16", batch_size=64, options=Options(fuse=fuse)
        )
        run.fit(images, 1)
        found.append(
            {name: np.asarray(v) for name, v in run.model.state_dict().items() if name.endswith(("weight", "bias"))}
        )
    started = network().state_dict()
    for name, value in found[0].items():
        moved, apart = np.abs(value - np.asarray(started[name])), np.abs(value - found[1][name])
        assert apart.max() <= 0.02 * moved.max(), name
