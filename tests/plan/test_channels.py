"""Channels of zeros between layers: the same losses and gradients as without, and nobody outside sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import event, given, settings

from parcnn import cat, data, manual_seed, nn
from parcnn.cpu import CpuExecutor
from parcnn.errors import ShapeError, UnsupportedError
from parcnn.nn import functional as F
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.pool import PoolFprop
from parcnn.ops.shape import ChannelPad, ChannelSlice
from parcnn.optim import SGD, AdamW, Muon
from parcnn.plan import channels
from parcnn.plan.optimizer import Optimizer
from parcnn.plan.options import Options
from parcnn.plan.trace import Tensor
from parcnn.train import Trainer
from parcnn.train.session import Session
from tests.plan.networks import Problem, networks
from tests.plan.step import Step, check_gradients, feed_of, make_plan, step_of
from tests.plan.test_gradients import CALM


class Padding(CpuExecutor):
    """An executor some of whose convolutions would be run on copies with channels of a multiple."""

    concurrent = True
    multiple = 4
    convolutions: tuple[type[Op], ...] = (ConvFprop, ConvDgrad, ConvWgrad)

    def pads_to(self, op: Op, inputs: tuple[Spec, ...]) -> int:
        return self.multiple if isinstance(op, self.convolutions) else 1


@pytest.fixture
def padding() -> Iterator[Padding]:
    executor = Padding(threads=1)
    yield executor
    executor.close()


def _images(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape)


def _classes(n: int, classes: int = 3) -> np.ndarray:
    return (np.arange(n) % classes).astype(np.int32)


def _stored(step: Step) -> dict[str, tuple[int, ...]]:
    """Shapes, with zeros, of the weights that have any, by name."""
    layout = step.plan.layout
    return {layout.names[v]: packing.stored for v, packing in layout.packings.items() if packing.stored}


def _zeros_behind(step: Step) -> list[np.ndarray]:
    """What lies in the executor's memory behind the weights' own elements."""
    layout, found = step.plan.layout, []
    for variable, packing in layout.packings.items():
        if packing.stored:
            whole = step.regions["weights"].read(packing.spec(variable, layout.dtype), layout.offsets[variable])
            own = packing.pack(np.ones(variable.shape))
            found.append(whole[own == 0])
    return found


@pytest.mark.parametrize(
    ("multiple", "convolutions"), [(2, Padding.convolutions), (4, Padding.convolutions), (4, (ConvWgrad,))]
)
@settings(CALM, max_examples=60)
@given(problem=networks())
def test_gradients_are_the_loss_derivatives(
    padding: Padding, multiple: int, convolutions: tuple[type[Op], ...], problem: Problem
) -> None:
    padding.multiple, padding.convolutions = multiple, convolutions
    step = step_of(padding, problem.model, problem.images, problem.targets, loss=problem.loss)
    event(f"{len(_stored(step))} weights with zeros")
    check_gradients(step, problem.model)
    for zeros in _zeros_behind(step):
        assert not zeros.any()


@settings(CALM, max_examples=100)
@given(problem=networks())
def test_results_are_those_without(cpu: CpuExecutor, padding: Padding, problem: Problem) -> None:
    for layer in problem.model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # a mask goes by an element's place in memory
    with_zeros, without = (
        step_of(executor, problem.model, problem.images, problem.targets, loss=problem.loss)
        for executor in (padding, cpu)
    )
    loss, moved = with_zeros.gradients()
    expected, expected_moved = without.gradients()
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for weight, array in moved.items():
        scale = max(np.abs(a).max() for a in expected_moved.values())
        np.testing.assert_allclose(array, expected_moved[weight], rtol=1e-9, atol=1e-11 * scale, err_msg=weight)


class Wide(nn.Module):
    """Odd channels in every place that keeps zeros, and borders: input, grouped convolution, sigmoid, cat, loss."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = 0.5
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.project = nn.Conv2d(6, 7, 1)
        self.grouped = nn.Conv2d(7, 14, 3, groups=7)
        self.mix = nn.Conv2d(14, 5, 1)
        self.gate = nn.Conv2d(5, 5, 1)
        self.first, self.second = nn.Linear(10 * 4, 21, bias=False), nn.Linear(21, 3)
        self.dense_norm = nn.BatchNorm1d(21)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.max_pool2d(F.gelu(self.norm(self.depthwise(x))) + x, 2)
        x = self.mix(self.grouped(F.silu(self.project(x))))
        x = cat([x, F.sigmoid(self.gate(x))], 1)
        x = F.tanh(self.dense_norm(self.first(F.adaptive_avg_pool2d(x, 2).flatten(1))))
        return self.second(F.dropout(x, self.drop))


def test_which_weights_get_zeros(padding: Padding) -> None:
    step = step_of(padding, Wide(), _images(2, 3, 10, 10), _classes(2))
    vectors = dict.fromkeys(["weight", "bias", "running_mean", "running_var"], (8,))
    assert _stored(step) == {
        "stem.weight": (8, 3, 3, 3), "stem.bias": (8,),
        "depthwise.weight": (8, 3, 3, 1),
        **{f"norm.{name}": shape for name, shape in vectors.items()},
        "project.weight": (7, 1, 1, 8),  # what it makes goes into groups
        "first.weight": (24, 2, 2, 10),
        **{f"dense_norm.{name}": (24,) for name in vectors},
        "second.weight": (3, 1, 1, 24),
    }  # fmt: skip
    check_gradients(step, Wide())
    names = [type(call.op) for call in step.plan.program.calls]
    assert ChannelSlice in names  # of cat's gradient alone
    assert ChannelPad not in names


@pytest.mark.parametrize(
    ("layers", "stored"),
    [
        ([nn.Conv2d(1, 2, 1), nn.Conv2d(2, 8, 1)], {"0.weight": (4, 1, 1, 1), "0.bias": (4,), "1.weight": (8, 1, 1, 4)}),
        ([nn.Conv2d(1, 9, 1), nn.Conv2d(9, 8, 1)], {"0.weight": (12, 1, 1, 1), "0.bias": (12,), "1.weight": (8, 1, 1, 12)}),
        ([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 8, 1)], {}),  # three zeros for each channel are too many
        ([nn.Conv2d(1, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 8, 1)], {}),
        ([nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 8, 1)], {}),
        ([nn.Conv2d(1, 6, 1), nn.Sigmoid(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(6, 8, 1)], {}),
        ([nn.Conv2d(1, 6, 1), nn.MaxPool2d(2, 1, 1, dilation=2), nn.Conv2d(6, 8, 1)], {}),  # -inf where it sees no pixel
        ([nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6, eps=0.0), nn.Conv2d(6, 8, 1)], {}),  # 0 / 0
        ([nn.Conv2d(1, 6, 1), nn.Conv2d(6, 8, 1, groups=2)], {}),
        ([nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 1)], {}),
    ],
)  # fmt: skip
def test_what_keeps_its_channels(
    padding: Padding, layers: Sequence[nn.Module], stored: dict[str, tuple[int, ...]]
) -> None:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(layers[-1].out_channels, 3)]
    step = step_of(padding, nn.Sequential(*layers, *head), _images(2, 1, 4, 4), _classes(2))
    assert _stored(step) == stored


class TwoSided(nn.Module):
    """Two convolutions, and what `join` makes of them for a third."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], widths: tuple[int, int] = (6, 6)) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(1, width, 1) for width in widths)
        self.out, self.join = nn.Conv2d(6, 8, 1), join

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.join(self.a(x), self.b(x))).mean((2, 3))


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: F.relu(a) + F.sigmoid(b),
        lambda a, b: F.sigmoid(b) + F.relu(a),
        lambda a, b: F.sigmoid(a + b),
    ],
)
def test_sums_have_the_channels_of_both_sides(padding: Padding, join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert _stored(step_of(padding, TwoSided(join), _images(2, 1, 4, 4), _classes(2))) == {}


def test_what_nobody_reads_has_no_say(padding: Padding) -> None:
    step = step_of(padding, TwoSided(lambda a, b: (F.sigmoid(a), a + b)[1]), _images(2, 1, 4, 4), _classes(2))
    assert _stored(step)["a.weight"] == _stored(step)["b.weight"] == (8, 1, 1, 1)


def test_a_filter_of_groups_and_of_all_channels(padding: Padding) -> None:
    """Zeros behind the channels of each group are no zeros behind all."""

    class Regrouped(TwoSided):
        def forward(self, x: Tensor) -> Tensor:
            return (F.conv2d(self.a(x), self.out.weight) + F.conv2d(self.b(x), self.out.weight, groups=2)).mean((2, 3))

    step = step_of(padding, model := Regrouped(F.relu, (6, 12)), _images(2, 1, 4, 4), _classes(2))
    assert _stored(step) == {}
    check_gradients(step, model)


@pytest.mark.parametrize("between", [[], [nn.BatchNorm2d(6)]])
def test_fused_windows_of_no_pixels(between: Sequence[nn.Module]) -> None:
    """Their maximum is -inf, in what convolution or batch norm it may be fused."""

    class FusesAll(Padding):
        def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
            return True

        def workspace_bytes(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
            return 0

    layers = [nn.Conv2d(1, 6, 1), *between, nn.MaxPool2d(2, 1, 1, dilation=2), nn.Conv2d(6, 8, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    plan = make_plan(FusesAll(threads=1), model, _images(2, 1, 4, 4), _classes(2))
    assert not any(isinstance(call.op, PoolFprop) for call in plan.program.calls)
    assert not any(packing.stored for packing in plan.layout.packings.values())


def test_only_where_a_call_would_pad(padding: Padding) -> None:
    """The channels on both sides of such a convolution, nowhere else; a gradient counts where it is computed."""

    class One(Padding):
        asked: ClassVar[list[Op]] = []
        batches: ClassVar[set[int]] = set()

        def pads_to(self, op: Op, inputs: tuple[Spec, ...]) -> int:
            self.asked.append(op)
            self.batches.add(inputs[0].shape[0])
            return 4 if isinstance(op, ConvWgrad) and inputs[0].shape[-1] == 6 else 1

    layers = [nn.Conv2d(2, 5, 1), nn.Conv2d(5, 6, 1), nn.ReLU(), nn.Conv2d(6, 7, 1), nn.Conv2d(7, 9, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3))
    step = step_of(One(threads=1), model, _images(2, 2, 4, 4), _classes(2))
    assert _stored(step) == {
        "1.weight": (8, 1, 1, 5), "1.bias": (8,), "3.weight": (8, 1, 1, 8), "3.bias": (8,), "4.weight": (9, 1, 1, 8),
    }  # fmt: skip
    assert sum(isinstance(op, ConvDgrad) for op in One.asked) == 4  # not of the images
    assert One.batches == {channels.BATCH}  # whatever the plan's is
    assert _stored(step_of(One(threads=1), model, _images(1, 2, 4, 4), _classes(1), mode="eval")) == _stored(step)


@pytest.mark.parametrize("first", ["train", "eval", "predict"])
@pytest.mark.parametrize(("layer", "act"), [(nn.BatchNorm2d(6), None), (nn.GELU(), None), (nn.ReLU(), "relu")])
def test_any_plan_decides_alike(layer: nn.Module, act: str | None, first: str) -> None:
    """In training a convolution takes moments for the batch norm behind it, which none on copies does; without, a GELU."""

    class Choosy(Padding):
        def pads_to(self, op: Op, inputs: tuple[Spec, ...]) -> int:
            wanted = isinstance(op, ConvFprop) and not op.moments and op.act == act and inputs[1].shape[1:3] == (3, 3)
            return 4 if wanted else 1

    layers = [nn.Conv2d(4, 6, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    step = step_of(Choosy(threads=1), nn.Sequential(*layers), _images(2, 4, 4, 4), _classes(2), mode=first)
    vectors = {f"1.{name}": (8,) for name, _ in layer.named_variables() if name != "num_batches_tracked"}
    assert _stored(step) == {"0.weight": (8, 3, 3, 4), "0.bias": (8,), **vectors, "4.weight": (4, 1, 1, 8)}


def test_option(padding: Padding) -> None:
    step = step_of(padding, Wide(), _images(2, 3, 10, 10), _classes(2), options=Options(pad_channels=False))
    assert not _stored(step)


def test_rules_that_look_at_a_weights_shape(cpu: CpuExecutor, padding: Padding) -> None:
    """Muon's step of a weight depends on its sides; what `others` trains gets its zeros."""
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    steps = [
        step_of(executor, model, _images(2, 1, 6, 6), _classes(2), optimizer=Muon(exclude=("0.*", "5.*")))
        for executor in (padding, cpu)
    ]
    assert not _stored(steps[0])  # both sides of the convolution in the middle
    losses = [step.run(lr=0.1) for step in steps]
    assert losses[0] == losses[1]


class Branching(nn.Module):
    """Trains with a head beside its own, which reads the same tensor in ways that zeros would change."""

    def __init__(self, aside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 8, 1)
        self.side = nn.Conv2d(6, 6, 1)
        self.out = nn.Linear(8, 3)
        self.aside = aside

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.training:
            x = self.b(self.aside(x)) + self.b(self.side(x))
        else:
            x = self.b(x)
        return self.out(x.mean((2, 3)))


@pytest.mark.parametrize("first", ["predict", "train"])
@pytest.mark.parametrize(
    "aside",
    [
        F.relu,
        F.sigmoid,
        nn.BatchNorm2d(6),
        lambda x: x.flatten(1).view(x.size(0), 6, 3, 3),
        lambda x: x.flatten(1).view(x.size(0), 6, 9, 1).flatten(1).view(x.size(0), 6, 3, 3),  # by way of torch's order
        lambda x: F.avg_pool2d(cat([x, x], 1).flatten(1).view(x.size(0), 6, 6, 3), (2, 1)),
    ],
)
def test_plans_that_disagree(cpu: CpuExecutor, padding: Padding, aside: Callable[[Tensor], Tensor], first: str) -> None:
    """The first plan of a model decides; a later one adds and drops channels where it reads a tensor in other ways."""
    images, targets = _images(2, 2, 5, 5), _classes(2)
    model = Branching(aside)
    results = []
    for executor in (padding, cpu):
        session = Session(model, executor, loss=nn.CrossEntropyLoss(), optimizer=SGD(lr=1.0), precision="fp64")
        for mode in ("predict", "train") if first == "predict" else ("train", "predict"):
            model.train(mode == "train")
            plan = session.plan(mode, 2, feed_of(images, targets))
            if mode == "train":
                trained = Step(executor, plan, images, targets)
        results.append(trained.gradients())
        if first == "predict" and executor is padding:
            assert _stored(trained)["a.weight"] == (8, 3, 3, 2)
            assert not any(zeros.any() for zeros in _zeros_behind(trained))
            check_gradients(trained, model)
    (loss, moved), (expected, expected_moved) = results
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for weight, array in moved.items():
        np.testing.assert_allclose(array, expected_moved[weight], rtol=1e-9, atol=1e-12, err_msg=weight)


@pytest.mark.parametrize("shared", ["filters", "bias"])
def test_zeros_that_do_not_fit_a_later_layer(padding: Padding, shared: str) -> None:
    """What layers share, and only the first plan's gave zeros, is refused."""

    class Sharing(TwoSided):
        def forward(self, x: Tensor) -> Tensor:
            a, b, weight = self.a(x), self.b(x), self.out.weight
            y = F.conv2d(a, weight)
            if self.training:
                y = y + (F.conv2d(b, weight, groups=2) if shared == "filters" else F.conv2d(a, weight, self.a.bias))
            return y.mean((2, 3))

    model = Sharing(F.relu, (6, 12))
    model.out = nn.Conv2d(6, 6, 1)
    session = Session(model, padding, loss=nn.CrossEntropyLoss(), optimizer=SGD(), precision="fp64")
    feed = feed_of(_images(2, 1, 4, 4), _classes(2))
    model.eval()
    session.plan("predict", 2, feed)
    model.train()
    with pytest.raises(UnsupportedError, match="shared with a layer of an earlier plan") as caught:
        session.plan("train", 2, feed)
    assert "pad_channels=False" in str(caught.value)


def test_a_later_output(cpu: CpuExecutor, padding: Padding) -> None:
    """What training keeps between layers, a prediction may give."""

    class Features(TwoSided):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else self.join(self.a(x), self.b(x))

    images, found = _images(4, 1, 4, 4), []
    for executor in (padding, cpu):
        manual_seed(3)
        model = Features(lambda a, b: F.relu(a + b))
        run = Trainer(model, SGD(0.1), device=executor, precision="fp64", batch_size=2, shuffle=False)
        run.fit(data.from_arrays(images, np.arange(4) % 3), 1)
        model.eval()
        found.append(run.predict(images))
        assert found[-1].shape == (4, 6, 4, 4)
        assert any(packing.stored for packing in run.session.layout.packings.values()) == (executor is padding)
    np.testing.assert_allclose(*found, rtol=1e-12, atol=1e-15)


def test_zeros_are_no_values_of_a_batch_norm(padding: Padding) -> None:
    """A last batch of one image has one value a channel, with zeros behind it or without."""
    layers = [nn.Conv2d(2, 6, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))
    session = Session(model, padding, loss=nn.CrossEntropyLoss(), optimizer=SGD(), precision="fp64")
    feed = feed_of(_images(3, 2, 4, 4), _classes(3))
    plan = session.plan("train", 2, feed)
    assert plan.layout.packings[model[2].weight].stored == (8,)
    with pytest.raises(ShapeError, match="more than one value"):
        session.plan("train", 1, feed)


def test_one_channel_is_no_depthwise_convolution(padding: Padding) -> None:
    padding.multiple = 2
    layers = [nn.Conv2d(2, 1, 1), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 2, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    step = step_of(padding, model, _images(2, 2, 4, 4), _classes(2))
    assert _stored(step)["1.weight"] == (2, 3, 3, 2)
    assert not any(isinstance(call.op, ChannelPad) for call in step.plan.program.calls)
    check_gradients(step, model)


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9, weight_decay=0.01), AdamW(0.01)], ids=repr)
def test_nobody_outside_sees_them(cpu: CpuExecutor, padding: Padding, optimizer: Optimizer, tmp_path: Path) -> None:
    """Checkpoints have the model's own shapes, and training goes on from them with zeros or without."""
    images = np.random.default_rng(0).standard_normal((24, 3, 10, 10))
    some = data.from_arrays(images, np.arange(24) % 3)

    def trainer(executor: CpuExecutor) -> Trainer:
        manual_seed(5)
        model = Wide()
        model.drop = 0.0
        return Trainer(model, optimizer, device=executor, precision="fp64", batch_size=10)

    def trained(*executors: CpuExecutor) -> Trainer:
        """Two epochs on each, from the checkpoint of the one before."""
        for i, executor in enumerate(executors):
            run = trainer(executor)
            if i:
                run.load(tmp_path / "run.safetensors")
            run.fit(some, 2 + 2 * i)
            run.save(tmp_path / "run.safetensors")
        return run

    expected = trained(cpu, cpu)
    shapes = {name: array.shape for name, array in Wide().state_dict().items()}
    for executors in ((padding, padding), (cpu, padding), (padding, cpu)):
        run = trained(*executors)
        has_zeros = any(packing.stored for packing in run.session.layout.packings.values())
        assert has_zeros == (executors[-1] is padding)
        state = run.model.state_dict()
        assert {name: array.shape for name, array in state.items()} == shapes
        for name, array in expected.model.state_dict().items():
            np.testing.assert_allclose(state[name], array, rtol=1e-6, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(run.predict(images), expected.predict(images), rtol=1e-6, atol=1e-9)
