"""torch.nn.Module's semantics: what is registered, walked, switched, saved and loaded."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from parcnn import manual_seed, nn
from parcnn.cpu import CpuExecutor
from parcnn.errors import ArgumentError, CheckpointError, ParcnnError, UnknownNameError
from parcnn.models import CifarNet, LeNet5, create, names
from tests.plan.step import make_plan


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.scale = nn.Parameter(np.ones(3, np.float32))
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
        self.extra: nn.Module | None = None
        self.width = 7


SMALL_KEYS = [
    "scale", "conv.weight", "conv.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    "norm.num_batches_tracked", "head.1.weight", "head.1.bias",
]  # fmt: skip

LENET_SHAPES = {
    "conv1.weight": (6, 1, 5, 5), "conv1.bias": (6,), "conv2.weight": (16, 6, 5, 5), "conv2.bias": (16,),
    "fc1.weight": (120, 400), "fc1.bias": (120,), "fc2.weight": (84, 120), "fc2.bias": (84,),
    "fc3.weight": (10, 84), "fc3.bias": (10,),
}  # fmt: skip


def _cifarnet_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, channels) in enumerate([(3, 64), (64, 128), (128, 256)]):
        for j, c in [(1, inputs), (2, channels)]:
            shapes[f"blocks.{i}.conv{j}.weight"] = (channels, c, 3, 3)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"blocks.{i}.norm{j}.{name}"] = (channels,)
            shapes[f"blocks.{i}.norm{j}.num_batches_tracked"] = ()
    return shapes | {"head.weight": (10, 256), "head.bias": (10,)}


# -- keys and shapes of torch -----------------------------------------------------------------------------------------


def test_state_dict_has_torchs_keys_in_torchs_order() -> None:
    assert list(Small().state_dict()) == SMALL_KEYS


@pytest.mark.parametrize(("model", "shapes"), [(LeNet5(), LENET_SHAPES), (CifarNet(), _cifarnet_shapes())])
def test_shipped_models_have_torchs_keys_and_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    assert {name: array.shape for name, array in model.state_dict().items()} == shapes
    for name, array in model.state_dict().items():
        assert array.dtype == (np.int64 if name.endswith("num_batches_tracked") else np.float32)


def test_models_by_name() -> None:
    assert names() == ("lenet5", "cifarnet")
    assert create("cifarnet", num_classes=3).state_dict()["head.weight"].shape == (3, 256)
    with pytest.raises(ParcnnError, match="lenet5, cifarnet"):
        create("resnet99")


def test_a_shared_module_is_saved_under_each_name() -> None:
    """As torch does it; its parameters are trained once."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = self.a

    model = Shared()
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias"]
    assert [name for name, _ in model.named_modules()] == ["", "a"]
    model.load_state_dict(model.state_dict())


def test_an_absent_bias_is_not_saved() -> None:
    layer = nn.Conv2d(1, 2, 3, bias=False)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]
    tied = nn.Linear(2, 2)
    tied.bias = None
    assert list(tied.state_dict()) == ["weight"]


def test_state_dict_is_a_copy() -> None:
    layer = nn.Linear(2, 2)
    layer.state_dict()["weight"][...] = 7
    assert not (layer.weight.data == 7).any()


# -- loading ----------------------------------------------------------------------------------------------------------


def test_loading_copies_every_value() -> None:
    source, target = Small(), Small()
    random = np.random.default_rng(0)
    for _, variable in source.named_variables():
        variable.assign(random.uniform(0, 9, variable.shape))
    state = source.state_dict()
    versions = [v.version for _, v in target.named_variables()]
    target.load_state_dict(state)
    for name, array in target.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    assert all(v.version > before for (_, v), before in zip(target.named_variables(), versions, strict=True))
    state["conv.weight"][...] = 0
    assert target.conv.weight.data.any(), "the model does not look into the state it was given"


class TorchLike:
    """What a torch tensor answers to."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def detach(self) -> TorchLike:
        return self

    def cpu(self) -> TorchLike:
        return self

    def numpy(self) -> np.ndarray:
        return self._array


def test_loading_takes_torch_tensors() -> None:
    layer = nn.Linear(2, 3)
    layer.load_state_dict({"weight": TorchLike(np.full((3, 2), 5.0)), "bias": TorchLike(np.arange(3))})
    assert layer.weight.data.dtype == np.float32
    np.testing.assert_array_equal(layer.weight.data, np.full((3, 2), 5))
    np.testing.assert_array_equal(layer.bias.data, [0, 1, 2])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("conv.bias"), "missing ['conv.bias']"),
        (lambda s: s.update(other=np.zeros(2)), "unknown ['other']"),
        (lambda s: s.update({"conv.weight": np.zeros((2, 1, 3, 5))}), "(2, 1, 3, 5)"),
        (lambda s: s.update({"scale": np.zeros(())}), "()"),
        (lambda s: s.update({"scale": np.array(["a", "b", "c"])}), "<U1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Any, told: str) -> None:
    model = Small()
    before, state = model.state_dict(), {name: array + 1 for name, array in Small().state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError) as caught:
        model.load_state_dict(state)
    assert told in str(caught.value.got)
    assert caught.value.remedy
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_loading_part_of_a_state() -> None:
    model = Small()
    model.load_state_dict({"scale": np.full(3, 9.0), "unknown": np.zeros(1)}, strict=False)
    np.testing.assert_array_equal(model.scale.data, [9, 9, 9])
    with pytest.raises(CheckpointError, match="another shape"):
        model.load_state_dict({"scale": np.zeros(4)}, strict=False)


# -- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [nn.Linear(1, 1), nn.Parameter(np.zeros(1))])
def test_assigning_before_init_is_an_error(value: Any) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            self.child = value
            super().__init__()

    with pytest.raises(AttributeError, match=r"Late.__init__ must call super\(\).__init__\(\) before assigning child"):
        Late()


def test_replacing_and_removing_children() -> None:
    model = Small()
    model.conv = nn.Identity()
    assert "conv.weight" not in model.state_dict()
    model.norm = None
    assert not any(name.startswith("norm") for name in model.state_dict())
    assert model.norm is None
    del model.head
    assert list(model.state_dict()) == ["scale"]
    assert not hasattr(model, "head")
    with pytest.raises(ArgumentError, match="a Module or None"):
        model.conv = 3
    del model.scale
    assert not model.state_dict()
    model.conv = nn.Parameter(np.zeros(1, np.float32))
    assert list(model.state_dict()) == ["conv"]
    assert [name for name, _ in model.named_modules()] == [""]
    model.conv = nn.Linear(1, 1, bias=False)
    assert list(model.state_dict()) == ["conv.weight"]


def test_a_parameter_is_not_replaced_by_an_array() -> None:
    """An array would be neither trained nor saved."""
    layer = nn.BatchNorm2d(2)
    for name in ("weight", "running_mean"):
        with pytest.raises(ArgumentError, match=rf"{name}.assign\("):
            setattr(layer, name, np.ones(2))
    layer.weight.assign(np.full(2, 3.0))
    np.testing.assert_array_equal(layer.state_dict()["weight"], [3, 3])


def test_assign_checks_the_shape() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(ParcnnError, match=r"\(3, 2\)"):
        layer.weight.assign(np.zeros((2, 3)))


def test_a_parameter_shared_by_assignment() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    assert len(list(model.parameters())) == 3


# -- walking and switching --------------------------------------------------------------------------------------------


def test_walking() -> None:
    model = Small()
    assert [name for name, _ in model.named_modules()] == ["", "conv", "norm", "head", "head.0", "head.1"]
    assert next(iter(model.modules())) is model
    assert [name for name, _ in model.named_children()] == ["conv", "norm", "head"]
    assert list(model.children()) == [model.conv, model.norm, model.head]
    assert [name for name, _ in model.named_parameters()] == [
        name for name in SMALL_KEYS if "running" not in name and "tracked" not in name
    ]


def test_train_and_eval_reach_every_module() -> None:
    model = Small()
    assert all(m.training for m in model.modules())
    assert model.eval() is model
    assert not any(m.training for m in model.modules())
    model.head.train()
    assert [m.training for m in model.modules()] == [False, False, False, True, True, True]
    assert model.train() is model
    assert all(m.training for m in model.modules())
    model.train(False)
    assert not any(m.training for m in model.modules())


def test_freezing() -> None:
    model = Small()
    assert model.conv.requires_grad_(False) is model.conv
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["conv.weight", "conv.bias"]
    model.requires_grad_()
    assert all(p.requires_grad for p in model.parameters())
    assert not model.norm.running_mean.requires_grad


def test_forward_takes_keywords() -> None:
    """A submodule may be called as torch allows; symbolic tensors are only needed somewhere among the arguments."""

    class Inner(nn.Module):
        def forward(self, x: Any, *, times: int = 1, other: Any = None) -> Any:
            for _ in range(times):
                x = x + other
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Any) -> Any:
            assert self.inner(x=x, other=x, times=2).shape == x.shape
            return self.inner(x, times=3, other=x)

    plan = make_plan(CpuExecutor(1), Outer(), np.zeros((2, 5)), np.zeros(2, np.int32), mode="predict")
    assert [call.op.name for call in plan.program.calls].count("add") == 3


# -- containers -------------------------------------------------------------------------------------------------------


def test_sequential() -> None:
    parts = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2), nn.Tanh()]
    model = nn.Sequential(*parts)
    assert len(model) == 4
    assert list(model) == parts
    assert model[0] is parts[0]
    assert model[-1] is parts[3]
    with pytest.raises(IndexError):
        model[4]
    tail = model[2:]
    assert isinstance(tail, nn.Sequential)
    assert list(tail) == parts[2:]
    assert list(tail.state_dict()) == ["2.weight", "2.bias"], "a slice keeps its layers' names, as torch's does"
    named = nn.Sequential(OrderedDict(first=parts[0], last=parts[2]))
    assert list(named.state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert named[1] is parts[2]
    assert named.first is parts[0]


def test_module_list() -> None:
    parts = [nn.Linear(1, 1), nn.Linear(1, 2)]
    layers = nn.ModuleList(parts[:1]).append(parts[1])
    assert list(layers) == parts
    assert len(layers) == 2
    assert layers[1] is parts[1]
    assert isinstance(layers[1:], nn.ModuleList)
    assert list(layers[1:].state_dict()) == ["0.weight", "0.bias"]
    assert list(layers.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_repr_shows_the_tree() -> None:
    assert repr(nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.ReLU()))) == (
        "Sequential(\n  (0): Linear(3, 2)\n  (1): Sequential(\n    (0): ReLU()\n  )\n)"
    )


def test_a_layer_that_parcnn_does_not_have() -> None:
    with pytest.raises(UnknownNameError) as caught:
        nn.ConvTranspose2d(1, 2, 3)
    assert "ConvTranspose2d" in caught.value.what
    assert "Conv2d" in str(caught.value.expected)
    assert caught.value.remedy
    assert not hasattr(nn, "LSTM")
    with pytest.raises(UnknownNameError, match="leaky_relu"):
        nn.functional.leaky_relu(3)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ArgumentError, match=r"(?s)manual_seed.*0 to 2\*\*64 - 1"):
        manual_seed(seed)
