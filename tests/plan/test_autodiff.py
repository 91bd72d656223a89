"""Where gradients meet, end and are shared: the cases that chains of layers do not have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from parcnn import cat, nn
from parcnn.cpu import CpuExecutor
from parcnn.errors import ArgumentError
from parcnn.nn import functional as F
from parcnn.ops.conv import ConvFprop, ConvWgrad
from parcnn.ops.norm import BatchNormTrain
from parcnn.ops.update import Update
from parcnn.optim import SGD
from parcnn.plan.build import build
from parcnn.plan.options import Options
from parcnn.plan.trace import Tensor
from tests.plan.step import Step, check_gradients, feed_of, lay_out, make_plan, step_of


class Net(nn.Module):
    """A forward() written in the test, over named layers."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def _data(shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    return random.standard_normal(shape), random.integers(0, classes, shape[0]).astype(np.int32)


def _step(cpu: CpuExecutor, model: nn.Module, options: Options | None = None, classes: int = 3) -> Step:
    images, targets = _data((3, 2, 5, 7), classes)
    return step_of(cpu, model, images, targets, options=options)


OPTIONS = (Options(), Options(update_bytes=0), Options(slack_bytes=0), Options(fuse=False, parallel=False))


@pytest.mark.parametrize("options", OPTIONS)
def test_sum_of_an_image_and_its_convolution(cpu: CpuExecutor, options: Options) -> None:
    """dL/dx = dgrad(dy) + dy: the error that is added is the one that dgrad reads around each pixel."""

    def compute(net: nn.Module, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.head((x + net.frozen(x)).flatten(1))

    frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)  # without a weight gradient dy dies at dgrad
    model = Net(compute, first=nn.Conv2d(2, 4, 1), frozen=frozen, head=nn.Linear(4 * 35, 3))
    check_gradients(_step(cpu, model, options), model)


@pytest.mark.parametrize("options", OPTIONS)
def test_two_convolutions_that_meet(cpu: CpuExecutor, options: Options) -> None:
    """The first one's error signal needs its weights as they were before their update."""

    def compute(net: nn.Module, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.head(F.relu(net.a(x) + net.b(x)).flatten(1))

    layers = {"a": nn.Conv2d(4, 5, 3, padding=1), "b": nn.Conv2d(4, 5, 1)}
    model = Net(compute, first=nn.Conv2d(2, 4, 1), **layers, head=nn.Linear(5 * 35, 3))
    check_gradients(_step(cpu, model, options), model)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_weight_shared_with_a_dead_branch_is_still_updated(cpu: CpuExecutor, options: Options) -> None:
    """Whether the dead branch is dropped, or kept for batch norm's running statistics."""

    def compute(net: nn.Module, x: Tensor) -> Tensor:
        net.conv(F.relu(x))
        net.norm(net.conv(x + x))
        return net.head(net.conv(x).flatten(1))

    model = Net(compute, conv=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Linear(4 * 15, 3))
    step = _step(cpu, model, options)
    moved = check_gradients(step, model)
    assert np.abs(moved["conv.weight"]).min() > 0
    assert np.abs(moved["norm.running_mean"]).min() > 0, "torch too moves the statistics of a batch norm nobody reads"
    assert not moved["norm.weight"].any()
    ops = [type(call.op) for call in step.plan.program.calls]
    assert ops.count(BatchNormTrain) == 1
    assert ops.count(ConvFprop) == 3, "the branch that has no effect is not computed"


def test_a_dead_branch_does_not_keep_others_from_fusing(cpu: CpuExecutor) -> None:
    def compute(net: nn.Module, x: Tensor) -> Tensor:
        x = net.conv(x)
        F.tanh(x)
        return net.head(F.max_pool2d(F.relu(x), 2).flatten(1))

    model = Net(compute, conv=nn.Conv2d(2, 4, 3, padding=1), head=nn.Linear(4 * 6, 3))
    for mode in ("train", "eval", "predict"):
        plan = make_plan(cpu, model, *_data((3, 2, 5, 7), 3), mode=mode)
        names = [call.op.name for call in plan.program.calls if call.phase == "forward"]
        assert names == ["conv_fprop", "conv_fprop"] + ["cross_entropy"] * (mode != "predict") + ["write_output"] * (
            mode == "predict"
        )


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss()])
def test_a_loss_on_a_flattened_image(cpu: CpuExecutor, loss: nn.Module) -> None:
    """The output's elements are brought into the targets' order, and that is not the loss."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten())
    images, _ = _data((3, 2, 5, 7), 3)
    random = np.random.default_rng(0)
    floats = random.standard_normal((3, 45))
    targets = floats if isinstance(loss, nn.MSELoss) else random.integers(0, 45, 3).astype(np.int32)
    check_gradients(step_of(cpu, model, images, targets, loss=loss), model)


def test_a_layer_named_loss_is_a_layer(cpu: CpuExecutor) -> None:
    model = Net(lambda net, x: net.loss(x.flatten(1)), loss=nn.Linear(70, 3))
    check_gradients(_step(cpu, model), model)


@pytest.mark.parametrize("options", OPTIONS)
def test_values_used_twice(cpu: CpuExecutor, options: Options) -> None:
    def compute(net: nn.Module, x: Tensor) -> Tensor:
        x = net.first(x)
        x = x + x
        x = cat([x, F.gelu(x), x], 1)
        return net.head(F.silu(x).flatten(1))

    model = Net(compute, first=nn.Conv2d(2, 3, 2), head=nn.Linear(9 * 24, 3))
    check_gradients(_step(cpu, model, options), model)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_linear_used_twice(cpu: CpuExecutor, options: Options) -> None:
    def compute(net: nn.Module, x: Tensor) -> Tensor:
        x = net.first(x.flatten(1))
        return net.head(F.tanh(net.again(F.tanh(net.again(x)))))

    model = Net(compute, first=nn.Linear(70, 6), again=nn.Linear(6, 6), head=nn.Linear(6, 3))
    step = _step(cpu, model, options)
    check_gradients(step, model)
    updated = sum(c.op.count for c in step.plan.program.calls if isinstance(c.op, Update))
    assert updated == 6, "a shared weight is updated once, with the sum of its gradients"


def test_one_parameter_in_two_layers(cpu: CpuExecutor) -> None:
    """Tied by assignment, as torch users do it."""
    a, b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    b.weight = a.weight
    model = Net(
        lambda net, x: net.head(net.b(F.relu(net.a(net.first(x)))).flatten(1)),
        first=nn.Conv2d(2, 3, 1), a=a, b=b, head=nn.Linear(105, 3),
    )  # fmt: skip
    moved = check_gradients(_step(cpu, model), model)
    assert "b.weight" not in moved


def test_frozen_layers_cost_nothing(cpu: CpuExecutor) -> None:
    """No weight gradient is computed for them, and below the lowest trained layer no error signal."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3).requires_grad_(False), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.Conv2d(4, 4, 1).requires_grad_(False), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    step = _step(cpu, model)
    check_gradients(step, model)
    calls = step.plan.program.calls
    assert [c.layer for c in calls if isinstance(c.op, ConvWgrad)] == ["6", "2"]
    assert [c.layer for c in calls if c.op.name == "conv_dgrad"] == ["6", "4"]


def test_nothing_to_train_is_an_error(cpu: CpuExecutor) -> None:
    model = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Flatten()).requires_grad_(False)
    images, targets = _data((3, 2, 5, 7), 3)
    with pytest.raises(ArgumentError) as error:
        make_plan(cpu, model, images, targets)
    assert error.value.where == "Sequential"
    assert "requires_grad" in error.value.remedy


def test_a_parameter_thawed_too_late_is_an_error(cpu: CpuExecutor) -> None:
    images, targets = _data((3, 2, 5, 7), 3)
    model = nn.Sequential(nn.Conv2d(2, 2, 3).requires_grad_(False), nn.Flatten(), nn.Linear(30, 3))
    keywords = {"layout": lay_out(model, SGD(momentum=0.9)), "feed": feed_of(images, targets), "executor": cpu}
    model.requires_grad_()
    with pytest.raises(ArgumentError) as error:
        build(model, mode="train", batch=3, loss=nn.CrossEntropyLoss(), optimizer=SGD(momentum=0.9), **keywords)
    assert error.value.where == "0.weight"
    assert "Trainer" in error.value.remedy


def test_a_loss_that_is_none_of_ours_is_an_error(cpu: CpuExecutor) -> None:
    images, targets = _data((3, 2, 5, 7), 3)
    with pytest.raises(ArgumentError) as error:
        make_plan(cpu, nn.Sequential(nn.Flatten(), nn.Linear(70, 3)), images, targets, loss=lambda x, t: x)
    assert error.value.got == "Tensor"
    assert "cross_entropy" in str(error.value.expected)


def test_frozen_statistics_while_the_rest_trains(cpu: CpuExecutor) -> None:
    """norm.eval() in a training model: torch's way to fine-tune; its scale and shift still train."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean.assign(np.array([0.1, -0.2, 0.3, 0.0], np.float32))
    norm.running_var.assign(np.array([0.5, 1.5, 0.9, 2.0], np.float32))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm.eval(), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3))
    moved = check_gradients(_step(cpu, model), model)
    assert not moved["1.running_mean"].any()
    assert np.abs(moved["1.weight"]).min() > 0


def test_losses_and_hits_of_every_step_are_kept(cpu: CpuExecutor) -> None:
    """Three batches in one go: the rows of losses, of corrects, and of the learning rates."""
    images, targets = _data((6, 2, 5, 7), 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(70, 3))
    plan = make_plan(cpu, model, images, targets, batch=2, steps=3, optimizer=SGD(lr=1.0))
    step = Step(cpu, plan, images, targets)
    rates = np.array([[0.1, 1, 1, 0], [0.0, 1, 1, 0], [0.3, 1, 1, 0]])
    step.run(rates, steps=3)
    weight, bias = (v.data.astype(np.float64) for v in model.parameters())
    expected = []
    for i in range(3):
        x, t = images[2 * i : 2 * i + 2].reshape(2, -1), targets[2 * i : 2 * i + 2]
        logits = x @ weight.T + bias
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected.append(-np.log(p[[0, 1], t]).mean())
        error = (p - np.eye(3)[t]) / 2
        weight, bias = weight - rates[i, 0] * error.T @ x, bias - rates[i, 0] * error.sum(axis=0)
    np.testing.assert_allclose(step.losses(3), expected, rtol=1e-12)
    np.testing.assert_allclose(step.read_weights()["1.weight"], weight, rtol=1e-11)
