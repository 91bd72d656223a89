"""The error behind a pool, spread over its windows once for all gradients that would each do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from parcnn import models, nn
from parcnn.cpu import CpuExecutor
from parcnn.cuda.executor import CudaExecutor
from parcnn.nn import functional as F
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvUnpool, ConvWgrad
from parcnn.ops.norm import BatchNormDgrad, BatchNormTrain
from parcnn.ops.program import Call
from parcnn.optim import SGD
from parcnn.plan.describe import outline
from parcnn.plan.options import Options
from tests.plan.step import check_gradients, step_of


class Unpooling(CpuExecutor):
    """An executor whose gradients of `kinds` unpool their error."""

    concurrent = True
    kinds: tuple[type[Op], ...] = (ConvDgrad, ConvWgrad)

    def unpools(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        return isinstance(op, self.kinds)


@pytest.fixture
def unpooling() -> Iterator[Unpooling]:
    executor = Unpooling(threads=1)
    yield executor
    executor.close()


def _model(pool: nn.Module, act: nn.Module | None, features: int, **geometry: int) -> nn.Module:
    block = [nn.Conv2d(3, 8, **{"kernel_size": 3, **geometry}), *([act] if act else []), pool]
    return nn.Sequential(nn.Conv2d(2, 3, 1), *block, nn.Flatten(), nn.Linear(8 * features, 4))


def _backward(calls: Sequence[Call]) -> list[str]:
    return [call.op.name for call in calls if call.phase == "backward" and call.layer.split(".")[0] in ("1", "2", "3")]


@pytest.mark.parametrize(
    ("size", "features", "geometry"),
    [((8, 6), 6, {"padding": 0}), ((9, 7), 12, {"padding": 1}), ((9, 8), 1, {"stride": 3}), ((7, 7), 9, {"kernel_size": 1}),
     ((5, 11), 10, {"padding": 2, "dilation": 2}), ((6, 5), 4, {"kernel_size": 2}),
     ((9, 9), 4, {"kernel_size": 1, "stride": 2})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    ("pool", "act"), [("max", "relu"), ("max", "tanh"), ("max", None), ("avg", None), ("avg", "relu")]
)
def test_gradients_of_an_unpooled_error(
    unpooling: Unpooling, size: tuple[int, int], features: int, geometry: dict[str, int], pool: str, act: str | None
) -> None:
    """Odd images too, whose last rows and columns the pool drops."""
    random = np.random.default_rng(0)
    images, targets = random.standard_normal((3, 2, *size)), np.array([0, 3, 1], np.int32)
    reduce = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
    model = _model(reduce, {"relu": nn.ReLU(), "tanh": nn.Tanh(), None: None}[act], features, **geometry)
    step = step_of(unpooling, model, images, targets)
    check_gradients(step, model)
    fused = pool == "max" or act is None  # an average of an activation's outputs stays a call of its own
    assert (_backward(step.plan.program.calls).count("conv_unpool") == 1) == fused
    plain = CpuExecutor(threads=1)
    loss, moved = step.gradients()
    loss_routed, routed = step_of(plain, model, images, targets).gradients()
    plain.close()
    assert loss == loss_routed
    for name, gradient in moved.items():
        np.testing.assert_allclose(gradient, routed[name], rtol=1e-10, atol=1e-14)


def _calls(executor: CpuExecutor, model: nn.Module, options: Options | None = None) -> Sequence[Call]:
    images, targets = np.random.default_rng(0).standard_normal((3, 2, 8, 6)), np.zeros(3, np.int32)
    return step_of(executor, model, images, targets, options=options).plan.program.calls


def test_one_call_for_both_gradients_takes_the_derivative_along(unpooling: Unpooling) -> None:
    above = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]  # no convolution whose epilogue has the derivative
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), *above)
    calls = _calls(unpooling, model)
    (unpool,) = [call for call in calls if isinstance(call.op, ConvUnpool)]
    assert unpool.op == ConvUnpool("max", "relu")
    assert unpool.output_specs[0].shape == (3, 6, 4, 8)
    readers = [call for call in calls if unpool.outputs[0] in call.inputs]
    assert {type(call.op) for call in readers} == {ConvDgrad, ConvWgrad}
    assert all(call.op.pool is None and "u2" not in {s.spec.dtype for s in call.inputs} for call in readers)
    assert not any(call.op.name == "act_dgrad" for call in calls)


def test_nothing_changes_where_one_gradient_routes_on_the_fly(unpooling: Unpooling, cpu: CpuExecutor) -> None:
    unpooling.kinds = (ConvWgrad,)
    model = _model(nn.MaxPool2d(2), nn.ReLU(), 6)
    assert [call.op for call in _calls(unpooling, model)] == [call.op for call in _calls(cpu, model)]


def test_a_first_layer_has_no_dgrad(unpooling: Unpooling) -> None:
    unpooling.kinds = (ConvWgrad,)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 4))
    names = [call.op.name for call in _calls(unpooling, model) if call.phase == "backward"]
    assert names.count("conv_unpool") == 1
    assert check_gradients(step_of(unpooling, model, np.ones((3, 2, 8, 6)), np.zeros(3, np.int32)), model)


class Twice(nn.Module):
    """Two pooled convolutions whose outputs meet: one error, and the indices of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: F.Tensor) -> F.Tensor:
        x = F.relu(self.first(x))
        both = F.max_pool2d(F.relu(self.second(x)), 2) + F.max_pool2d(self.third(x), 2)
        return self.head(both.flatten(1))


def test_errors_that_two_layers_share_are_spread_by_the_indices_of_each(unpooling: Unpooling) -> None:
    random = np.random.default_rng(1)
    model = Twice()
    step = step_of(unpooling, model, random.standard_normal((3, 2, 8, 6)), np.array([0, 3, 1], np.int32))
    check_gradients(step, model)
    ops = [call.op for call in step.plan.program.calls if isinstance(call.op, ConvUnpool)]
    assert len(ops) == 2
    assert set(ops) == {ConvUnpool("max", "relu"), ConvUnpool("max")}


class Around(nn.Module):
    """A way around a pooled convolution: what dgrad reads as the error, before the pool, it also adds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=3), nn.Linear(4, 4)

    def forward(self, x: F.Tensor) -> F.Tensor:
        x = self.first(x)
        y = F.relu(F.max_pool2d(self.second(x), 2) + x)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def test_a_derivative_that_a_gradient_also_adds_stays(unpooling: Unpooling) -> None:
    random = np.random.default_rng(2)
    model = Around()
    step = step_of(unpooling, model, random.standard_normal((3, 2, 4, 4)), np.array([0, 3, 1], np.int32))
    check_gradients(step, model)
    (op,) = [call.op for call in step.plan.program.calls if isinstance(call.op, ConvUnpool)]
    assert op == ConvUnpool("max")


def test_without_fusion_there_is_nothing_to_unpool(unpooling: Unpooling) -> None:
    calls = _calls(unpooling, _model(nn.MaxPool2d(2), nn.ReLU(), 6), Options(fuse=False))
    assert not any(isinstance(call.op, ConvUnpool) for call in calls)


@pytest.mark.parametrize(("channels", "filters", "count"), [(20, 64, 1), (24, 64, 1), (20, 62, 0)])
def test_gradients_of_padded_channels_unpool_once(channels: int, filters: int, count: int) -> None:
    """Where the error itself needs no padding."""
    block = nn.Sequential(nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(nn.Conv2d(3, channels, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plan = outline(
        model, mode="train", batch=128, sample=(3, 32, 32), executor=CudaExecutor.null(), loss=nn.CrossEntropyLoss(),
        optimizer=SGD(), precision="bf16",
    )  # fmt: skip
    calls = [call for call in plan.program.calls if call.layer.startswith("1.")]
    assert sum(isinstance(call.op, ConvUnpool) for call in calls) == count
    pooled = [call.op.pool for call in calls if isinstance(call.op, ConvDgrad | ConvWgrad)]
    assert pooled == ([None, None] if count else ["max", "max"])


@pytest.mark.parametrize(
    ("precision", "arch", "count"),
    [("bf16", "sm_90a", 2), ("bf16", "sm_89", 0), ("fp32", "sm_90a", 2), ("fp32", "sm_89", 2)],
)
def test_who_unpools(precision: str, arch: str, count: int) -> None:
    """Hopper's tensor-core kernels and Winograd's do; all others route the error by its indices, those of first layers too."""
    executor = CudaExecutor.null(arch)
    plan = outline(
        models.create("cifarnet", in_channels=3), mode="train", batch=64, sample=(3, 32, 32), executor=executor,
        loss=nn.CrossEntropyLoss(), optimizer=SGD(), precision=precision,
    )  # fmt: skip
    calls = plan.program.calls
    assert sum(isinstance(call.op, ConvUnpool) for call in calls) == count
    pooled = {call.layer for call in calls if isinstance(call.op, ConvDgrad | ConvWgrad) and call.op.pool}
    assert len(pooled) == 3 - count


@pytest.mark.parametrize(("batch", "family"), [(16, "conv_dgrad"), (64, "conv_winograd_filters")])
def test_a_gradient_that_alone_wants_it_unpools_by_itself(batch: int, family: str) -> None:
    """Of a small batch the filters' gradient does, and the input's routes the pooled error."""
    executor = CudaExecutor.null()
    block = nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(nn.Conv2d(3, 128, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plan = outline(
        model, mode="train", batch=batch, sample=(3, 8, 8), executor=executor, loss=nn.CrossEntropyLoss(), optimizer=SGD()
    )  # fmt: skip
    calls = {type(call.op): call for call in plan.program.calls if call.layer.startswith("1.")}
    names = {
        op: executor.kernel_name(call.op, call.input_specs, call.output_specs)
        for op, call in calls.items()
        if op in (ConvDgrad, ConvWgrad)
    }
    shared = ConvUnpool in calls
    assert shared == (batch == 64)
    assert names[ConvDgrad].startswith(family)
    assert names[ConvWgrad].startswith("conv_winograd_wgrad" if shared else "conv_unpool_float_0 + conv_winograd_wgrad")


@pytest.mark.parametrize("batch", [64, 4096])
def test_few_channels_route_the_error(batch: int) -> None:
    executor = CudaExecutor.null()
    plan = outline(
        models.create("lenet5"), mode="train", batch=batch, sample=(1, 28, 28), executor=executor,
        loss=nn.CrossEntropyLoss(), optimizer=SGD(),
    )  # fmt: skip
    names = [executor.kernel_name(c.op, c.input_specs, c.output_specs) for c in plan.program.calls]
    assert not any("unpool" in name or "winograd" in name for name in names)


class NormsUnpool(CpuExecutor):
    """An executor whose batch norms spread the error behind a maximum, or take that maximum themselves."""

    concurrent = True
    kinds: tuple[type[Op], ...] = (BatchNormDgrad,)

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        return isinstance(op, self.kinds) or super().can_fuse(op, inputs)


@pytest.fixture
def norms() -> Iterator[NormsUnpool]:
    executor = NormsUnpool(threads=1)
    yield executor
    executor.close()


def _normed(pool: nn.Module, act: nn.Module | None, channels: int = 4) -> nn.Module:
    block = [nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels, eps=1e-2), *([act] if act else []), pool]
    return nn.Sequential(*block, nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("size", [(8, 6), (9, 7)], ids=str)
@pytest.mark.parametrize("act", ["relu", "gelu", None])
@pytest.mark.parametrize("kinds", [(BatchNormDgrad,), (BatchNormTrain,), (BatchNormDgrad, BatchNormTrain)])
@pytest.mark.parametrize(
    "pool", [{}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3}, {"ceil_mode": True}], ids=str
)
def test_gradients_of_a_norm_with_the_maximum_behind_it(
    norms: NormsUnpool,
    cpu: CpuExecutor,
    size: tuple[int, int],
    act: str | None,
    pool: dict[str, int],
    kinds: tuple[type[Op], ...],
) -> None:
    """The same as of a norm behind a pool of its own, to the last bit."""
    random = np.random.default_rng(0)
    images, targets = random.standard_normal((3, 2, *size)), np.array([0, 3, 1], np.int32)
    acts = {"relu": nn.ReLU(), "gelu": nn.GELU(), None: None}
    model = _normed(nn.MaxPool2d(**{"kernel_size": 2, **pool}), acts[act])
    norms.kinds = kinds
    step = step_of(norms, model, images, targets)
    check_gradients(step, model)
    names = [call.op.name for call in step.plan.program.calls]
    assert ("pool_dgrad" in names) == (BatchNormDgrad not in kinds)
    assert ("pool_fprop" in names) == (
        BatchNormTrain not in kinds or act == "gelu"
    )  # GELU's winners' inputs are the pool's
    plain = step_of(cpu, model, images, targets)
    assert sum(call.op.name == "pool_dgrad" for call in plain.plan.program.calls) == 1
    (loss, moved), (plain_loss, plainly_moved) = step.gradients(), plain.gradients()
    assert loss == plain_loss
    for name, gradient in moved.items():
        np.testing.assert_array_equal(gradient, plainly_moved[name])


class TwoReaders(nn.Module):
    """A batch norm's output that a pool reads, and another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: F.Tensor) -> F.Tensor:
        x = self.norm(self.conv(x))
        return self.head((F.max_pool2d(x, 2).mean((2, 3)) + x.mean((2, 3))).flatten(1))


@pytest.mark.parametrize(
    "model",
    [_normed(nn.AvgPool2d(2), None), _normed(nn.MaxPool2d(2), None).eval(), TwoReaders()],
    ids=["avg", "frozen", "two"],
)
def test_norms_that_take_no_maximum(norms: NormsUnpool, model: nn.Module) -> None:
    """Behind an average, with frozen statistics, and where the norm's output has a second reader."""
    norms.kinds = BatchNormDgrad, BatchNormTrain
    random = np.random.default_rng(0)
    step = step_of(norms, model, random.standard_normal((3, 2, 8, 6)), np.array([0, 3, 1], np.int32))
    check_gradients(step, model)
    assert sum(call.op.name == "pool_dgrad" for call in step.plan.program.calls) == 1


@pytest.mark.parametrize(
    ("pool", "channels", "taken"),
    [(nn.MaxPool2d(2), 64, True), (nn.MaxPool2d(3, 2, 1), 64, True), (nn.MaxPool2d(3), 20, True),
     (nn.MaxPool2d(3, 1, 1), 64, False), (nn.MaxPool2d(2), 63, False)],
)  # fmt: skip
@pytest.mark.parametrize("arch", ["sm_90a", "sm_89"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_norms_on_a_gpu(pool: nn.Module, channels: int, taken: bool, arch: str, precision: str) -> None:
    """What lies between norm and pool is in no plan, nor is its error: of that size there are the norm's input and what becomes
    of it in its place."""
    executor = CudaExecutor.null(arch)
    plan = outline(
        _normed(pool, nn.ReLU(), channels), mode="train", batch=64, sample=(2, 32, 32), executor=executor,
        loss=nn.CrossEntropyLoss(), optimizer=SGD(), precision=precision,
    )  # fmt: skip
    calls = plan.program.calls
    (norm,) = [i for i, call in enumerate(calls) if isinstance(call.op, BatchNormDgrad)]
    assert any(call.op.name == "pool_dgrad" for call in calls) == (not taken)
    before_pool = calls[norm].outputs[0].spec.nbytes
    assert (plan.arena_bytes < 1.9 * before_pool) == taken
    assert any(call.op.name == "pool_fprop" for call in calls) == (not taken)
    assert executor.kernel_name(calls[norm].op, calls[norm].input_specs, calls[norm].output_specs).startswith(
        "batch_norm_pool_gradients" if taken else "batch_norm_gradients"
    )
