"""Moments that the Hopper convolutions take of their outputs for a batch norm, and what the batch norm makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import parcnn
from parcnn import data, nn, optim
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, conv_sm90
from parcnn.cuda.kernels import conv_sm90_tiles as tiles
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.kernels.conv_sm90_choice import candidates
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvFprop
from parcnn.ops.norm import BatchNormTrain
from parcnn.plan.describe import outline
from parcnn.plan.options import Options
from parcnn.train import Trainer
from tests.cuda.bf16 import from_bits, to_bits
from tests.cuda.compare import MakeExecutor, emulates, makers, places
from tests.cuda.conv_problems import MOMENT_STEPS, MOMENT_TILE, UNIT, check_moments
from tests.cuda.test_conv_sm90 import H200, PROBLEMS, Problem, bits_of, call_of, forced, on_cpu, random_of, sizes_of
from tests.op_runner import run_op

make_fixture = makers()
LARGE = {
    "many tiles of 64 channels": Problem(900, 9, 8, 64, 64),
    "groups of channels in turn": Problem(400, 6, 6, 128, 320),
    "stages shared by groups": Problem(30000, 1, 1, 64, 192, 1, 1, (0, 0, 0, 0)),
    "one pixel of many images": Problem(500, 3, 3, 64, 256),
    "few channels": Problem(500, 9, 8, 24, 64),
    "clipped windows": Problem(100, 27, 19, 64, 128),
}


def with_moments(problem: Problem, kind: str) -> ConvFprop:
    op = problem.op(kind)
    assert isinstance(op, ConvFprop)
    return replace(op, moments=True)


@pytest.mark.parametrize("kind", ["fprop", "fused", "gelu"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_launches_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    problem = PROBLEMS[name]
    op, operands = with_moments(problem, kind), problem.integers(kind, random_of(name, kind))
    listed = set(conv_sm90.variants())
    call = call_of(op, operands)
    for variant in conv_sm90.candidates(call, H200):
        run_op(forced(null, variant, monkeypatch), op, bits_of(op, operands))
        # The workspace is the plan's; here it is the first candidate's.
        workspace = conv_sm90.workspace_bytes(op, call.input_specs, call.output_specs, H200, variant)
        assert call.workspace is not None
        own = replace(call, workspace=replace(call.workspace, spec=Spec((workspace,), "u8")))
        assert {launch.kernel for launch in conv_sm90.launches(own, H200, variant)} <= listed


@pytest.mark.parametrize("name", [*PROBLEMS, *LARGE])
def test_the_image_ends_within_tiles_where_the_table_says(name: str) -> None:
    problem = {**PROBLEMS, **LARGE}[name]
    sizes = sizes_of(problem.op("fprop"), problem.integers("fprop", random_of(name)))
    for variant in candidates(sizes, H200):
        table = conv_sm90._inside(sizes, variant)
        masks = np.unpackbits(np.frombuffer(table[:256], np.uint8).reshape(8, 32), axis=1, bitorder="little")
        counts, whole = np.frombuffer(table[256:288], np.float32), np.frombuffer(table[288:], np.int32)
        assert [
            row[:count].all() and not row[count]
            for row, count in zip(np.pad(masks, ((0, 0), (0, 1))), whole, strict=True)
        ] == [True] * 8
        (w, h, n), row = variant.tile, tiles.footprint(sizes, variant).row
        total = 0
        for z in range(0, sizes.n, n):
            for y in range(0, sizes.p, h):
                for x in range(0, sizes.q, w):
                    ends = (x + w > sizes.q) | (y + h > sizes.p) << 1 | (z + n > sizes.n) << 2
                    left = [
                        min(t, e - at)
                        for t, e, at in zip((n, h, w), (sizes.n, sizes.p, sizes.q), (z, y, x), strict=True)
                    ]
                    inner = tiles.images_inner(sizes, variant)
                    bits = np.pad(masks[ends], (0, n * h * row))[: n * h * row]
                    bits = bits.reshape(h, row, n).transpose(2, 0, 1) if inner else bits.reshape(n, h, row)
                    assert bits.sum() == bits[: left[0], : left[1], : left[2]].sum() == np.prod(left) == counts[ends]
                    total += np.prod(left)
        assert total == sizes.n * sizes.p * sizes.q


def test_who_takes_moments() -> None:
    x, w = Spec((8, 9, 9, 64), "bf16"), Spec((64, 3, 3, 64), "bf16")
    hopper = REGISTRY.on("sm_90a")
    assert hopper.supports(ConvFprop(moments=True), (x, w))
    assert not REGISTRY.on("sm_89").supports(ConvFprop(moments=True), (x, w))
    for op, inputs in (
        (ConvFprop(moments=True, pool="max"), (x, w)),
        (ConvFprop(moments=True), (Spec((8, 2, 9, 64), "bf16"), w)),  # no outputs
        (ConvFprop(moments=True), (Spec((8, 9, 9, 3), "bf16"), Spec((64, 3, 3, 3), "bf16"))),
        (ConvFprop(moments=True, groups=64), (x, Spec((64, 3, 3, 1), "bf16"))),
        (ConvFprop(moments=True, groups=64), (Spec((8, 56, 56, 64), "bf16"), Spec((64, 3, 3, 1), "bf16"))),
        (ConvFprop(moments=True, groups=2), (Spec(x.shape), Spec((64, 3, 3, 32)))),
        (ConvFprop(moments=True), (Spec(x.shape), Spec(w.shape))),
    ):
        assert not hopper.supports(op, inputs), (op, inputs)


def test_moments_are_taken_where_they_gain(null: CudaExecutor) -> None:
    norm, channels = BatchNormTrain(moments=True), [*[Spec((64,))] * 4, Spec((2, 64))]
    assert null.can_fuse(norm, (Spec((256, 28, 28, 64), "bf16"), *channels))
    assert not null.can_fuse(norm, (Spec((512, 8, 8, 48), "bf16"), *channels)), "a pass is short"
    assert not null.can_fuse(norm, (Spec((512, 1, 1, 2**15), "bf16"), *channels)), "its rows are kept in shared memory"
    assert null.can_fuse(BatchNormTrain(), (Spec((8, 8, 8, 64), "bf16"), *channels[:4]))


def network() -> nn.Module:
    parcnn.manual_seed(5)
    norm = [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), *norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


@pytest.mark.parametrize(("batch", "taken"), [(64, True), (8, False)])
def test_a_plan_takes_them_of_large_tensors(null: CudaExecutor, batch: int, taken: bool) -> None:
    options = {"executor": null, "loss": nn.CrossEntropyLoss(), "optimizer": optim.SGD(0.1), "precision": "bf16"}
    calls = outline(network(), mode="train", batch=batch, sample=(3, 56, 56), **options).program.calls
    assert [call.op.moments for call in calls if isinstance(call.op, ConvFprop)] == [False, taken, False]
    assert [call.op.moments for call in calls if isinstance(call.op, BatchNormTrain)] == [taken]


# On the host's emulation and the device


@places("name", [(name,) for name in (*PROBLEMS, *LARGE)], lambda name: name in ("64 channels", "images of 3x3"))
def test_moments_are_those_of_the_stored_values(make: MakeExecutor, name: str) -> None:
    """y is the plain kernel's, bit for bit; so are the moments, each time."""
    problem = {**PROBLEMS, **LARGE}[name]
    operands = problem.normals("fused", random_of(name))
    op, bits = with_moments(problem, "fused"), bits_of(problem.op("fused"), operands)
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        executor = make([Forced(conv_sm90, variant)])
        y, moments = run_op(executor, op, bits)
        (plain,) = run_op(executor, problem.op("fused"), bits)
        np.testing.assert_array_equal(y, plain, err_msg=str(variant))
        check_moments(y, moments, variant)
        if name in LARGE:
            np.testing.assert_array_equal(run_op(executor, op, bits)[1], moments, err_msg=str(variant))


@places(
    "name",
    [("64 channels",), ("odd blocks of channels",), ("64 to 192 pointwise",)],
    lambda name: name != "64 to 192 pointwise",
)
def test_moments_of_integers(make: MakeExecutor, name: str) -> None:
    """The oracle's, which sees the same y; a channel of one value only has no spread at all."""
    problem = PROBLEMS[name]
    op, operands = with_moments(problem, "fused"), problem.integers("fused", random_of(name))
    operands[1][3], operands[2][3] = 0, 3
    y, (mean, m2) = on_cpu(op, operands)
    for variant in conv_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        got, moments = run_op(make([Forced(conv_sm90, variant)]), op, bits_of(op, operands))
        np.testing.assert_array_equal(from_bits(got), y)
        np.testing.assert_allclose(moments[0], mean, rtol=MOMENT_STEPS * UNIT, atol=MOMENT_STEPS * UNIT)
        np.testing.assert_allclose(moments[1], m2, rtol=1e-5)
        assert (moments[0, 3], moments[1, 3]) == (3, 0)


def identity(k: int) -> np.ndarray:
    """Filters 1x1 that give x's 64 channels again and again."""
    w = np.zeros((k, 1, 1, 64))
    w[np.arange(k), 0, 0, np.arange(k) % 64] = 1
    return w


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["near 1000", "from 1000 to 0", "from 0 to 1000", "one that differs", "equal"])
@pytest.mark.parametrize("k", [64, 128, 192])
def test_a_large_mean_does_not_cancel(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, k: int, data: str) -> None:
    """Outputs near 1000, where bf16 numbers are 4 apart, with a deviation of 4; and means that change from tile to tile."""
    random = np.random.default_rng(k)
    problem = Problem(70, 11, 13, 64, k, 1, 1, (0, 0, 0, 0))
    x = 1000 + 4 * random.integers(-2, 3, (70, 11, 13, 64)).astype(float)
    x *= np.where(np.arange(64) % 3 == 1, -0.25, 1)
    small = from_bits(to_bits(random.standard_normal(x.shape)))
    if data == "from 1000 to 0":
        x[25:] = small[25:]
    elif data == "from 0 to 1000":
        x[:25] = small[:25]
    elif data == "one that differs":
        x[40:, 7:] = x[0, 0, 0]
        x[3, 4, 5] = 0
    elif data == "equal":
        x[:] = x[0, 0, 0]
    x[..., ::5] = small[..., ::5]  # channels without a large mean among them
    op = with_moments(problem, "fprop")
    for variant in conv_sm90.candidates(call_of(op, [x, identity(k)]), cuda.device):
        y, moments = run_op(forced(cuda, variant, monkeypatch), op, bits_of(op, [x, identity(k)]))
        np.testing.assert_array_equal(from_bits(y), x[..., np.arange(k) % 64])
        check_moments(y, moments, variant)
        if data == "equal":
            np.testing.assert_array_equal(moments[1, 1:5], 0)
            np.testing.assert_array_equal(moments[0, 1:5], x[0, 0, 0, 1:5])


@pytest.mark.gpu
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_channel(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    random = np.random.default_rng(1)
    x = from_bits(to_bits(random.standard_normal((70, 11, 13, 64))))
    w = np.zeros((1, 1, 1, 64))
    problem = Problem(70, 11, 13, 64, 128, 1, 1, (0, 0, 0, 0))
    bias = np.zeros(128, np.float32)
    bias[[3, 70]] = value
    op = replace(problem.op("fused"), act=None, moments=True)
    operands = [x, np.repeat(w, 128, 0), bias]
    for variant in conv_sm90.candidates(call_of(op, operands), cuda.device):
        _, moments = run_op(forced(cuda, variant, monkeypatch), op, bits_of(op, operands))
        assert not np.isfinite(moments[1, [3, 70]]).any(), variant
        np.testing.assert_array_equal(np.delete(moments, [3, 70], 1), 0, err_msg=str(variant))


@pytest.mark.gpu
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("name", ["64 channels", "groups of channels in turn"])
def test_batch_norm_by_given_moments(cuda: CudaExecutor, name: str, act: str | None) -> None:
    """As by the batch norm's own pass over y, up to the rounding of the statistics."""
    problem, random = {**PROBLEMS, **LARGE}[name], random_of(name)
    y, moments = run_op(
        cuda, with_moments(problem, "fprop"), bits_of(problem.op("fprop"), problem.normals("fprop", random))
    )
    gamma, beta, mean = (random.standard_normal(problem.k).astype(np.float32) for _ in range(3))
    rest = [gamma, beta, mean, np.abs(mean) + 1]
    alone = run_op(cuda, BatchNormTrain(act=act), [y, *rest])
    given = run_op(cuda, BatchNormTrain(act=act, moments=True), [y, *rest, moments])
    values = from_bits(y).reshape(-1, problem.k)
    slack = 2 * (MOMENT_TILE + MOMENT_STEPS * UNIT) * np.abs(values).max() / values.std(0).min()
    for i, (one, other) in enumerate(zip(alone[1:], given[1:], strict=True)):
        np.testing.assert_allclose(one, other, rtol=slack, atol=slack, err_msg=f"output {i + 1}")
    # A value may fall on the other side of a rounding to bf16.
    one, other = from_bits(alone[0]), from_bits(given[0])
    assert (np.abs(one - other) <= 2.0**-8 * np.abs(one) + slack * (np.abs(gamma).max() + 1) * 8).all()


@pytest.mark.gpu
def test_running_statistics_of_a_step(cuda: CudaExecutor) -> None:
    """With moments or with a pass over y, which holds the same bits."""
    random, found = np.random.default_rng(2), []
    images = data.from_arrays(random.integers(0, 256, (64, 3, 56, 56), np.uint8), random.integers(0, 10, 64))
    for fuse in (True, False):
        run = Trainer(
            network(), optim.SGD(0.1), device=cuda, precision="bf16", batch_size=64, options=Options(fuse=fuse)
        )
        run.fit(images, 1)
        found.append([np.asarray(v) for name, v in run.model.state_dict().items() if "running" in name])
    assert len(found[0]) == 2
    for given, own in zip(*found, strict=True):
        np.testing.assert_allclose(given, own, rtol=MOMENT_STEPS * UNIT, atol=MOMENT_STEPS * UNIT)


def test_tables_fit_the_largest_kernel() -> None:
    """A bit for each pixel of the widest tile; what the tests take for bf16 numbers."""
    assert max(p for blocks in tiles.PIXELS.values() for pixels in blocks.values() for p in pixels) <= 8 * 32
    assert from_bits(to_bits(np.array([1000.0, 1004.0, -251]))).tolist() == [1000, 1004, -251]
