"""A model file written for torch works after a change of its imports: the same logits, and the same losses in training.

Run where torch is installed (its CPU build is enough); with a GPU the same tests run on the CUDA executor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from parcnn import nn, optim
from parcnn.data.dataset import Dataset, from_arrays
from parcnn.models import cifarnet, lenet5
from parcnn.ops.program import Executor
from parcnn.train import Trainer, resolve_executor

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:Using padding='same'")]

RESIDUAL = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding="same", bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=0.3)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Branches(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(channels, 6, 1), nn.GELU())
        self.b = nn.Sequential(nn.Conv2d(channels, 5, (3, 2), padding="same", dilation=(1, 2)), nn.SiLU(inplace=True))
        self.c = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(channels, 3, 1), nn.Tanh())

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), self.c(x), F.max_pool2d(x, 3, stride=1, padding=1)], 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12, stride=2))
        self.branches = Branches(12)
        self.norm = nn.BatchNorm2d(26)
        self.pool = nn.AdaptiveAvgPool2d((2, 3))
        self.squeeze = nn.AvgPool2d(2, ceil_mode=True)
        self.head = nn.ModuleList([nn.Linear(26 * 6, 20), nn.Linear(26 * 20, 20)])
        self.bn = nn.BatchNorm1d(20)
        self.last = nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(F.gelu(self.stem(x), approximate="tanh"), kernel_size=3, stride=2, padding=1)
        x = self.norm(self.branches(self.blocks(x)))
        a = self.pool(x).view(x.size(0), -1)
        b = torch.flatten(x, 1)
        x = F.silu(self.head[0](a) + self.head[1](b))
        return self.last(torch.sigmoid(self.bn(x)))
"""

PLAIN = '''
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Layers in torch's other spellings, global mean, and batch norm before a pool with overhanging windows."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 4, padding="same"), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.BatchNorm2d(12, eps=1e-3),
            nn.Conv2d(12, 10, (2, 3), (2, 1), (1, 0), dilation=(2, 1)), nn.Sigmoid(), nn.AvgPool2d(2, 2),
            nn.Conv2d(10, 9, 3, padding=1), nn.Tanh(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Identity(),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(9 * 2 * 3, 16), nn.ReLU(), nn.Linear(16, 10, bias=False))
        self.side = nn.Linear(9, 10)

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x) + self.side(x.mean([2, 3])) + self.side(F.adaptive_avg_pool2d(x, 1).flatten(1))
'''

GROUPED = """
import torch.nn as nn
import torch.nn.functional as F


class Inverted(nn.Module):
    def __init__(self, channels, hidden, stride, kernel):
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden)
        self.norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels, 1, groups=2)
        self.stride = stride

    def forward(self, x):
        y = self.project(F.silu(self.norm(self.depthwise(F.relu(self.expand(x))))))
        return x + y if self.stride == 1 else y


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.blocks = nn.Sequential(Inverted(12, 24, 1, 3), Inverted(12, 36, 2, 5), Inverted(12, 20, 1, 7))
        self.multiplied = nn.Conv2d(12, 24, 3, padding="same", dilation=2, groups=12, bias=False)
        self.grouped = nn.Conv2d(24, 30, (3, 2), (2, 1), (1, 0), groups=6)
        self.last = nn.Linear(30, 10)

    def forward(self, x):
        x = F.relu(self.grouped(F.max_pool2d(F.relu(self.multiplied(self.blocks(F.relu(self.stem(x))))), 2)))
        return self.last(x.mean((2, 3)))
"""

NORMED = """
import torch.nn as nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.body = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=2), nn.BatchNorm2d(16), nn.MaxPool2d(3), nn.ReLU(),
        )
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(self.body(self.stem(x)).mean((2, 3)))
"""

# name: (source for torch, class, shape of an image)
MODELS: dict[str, tuple[str, str, tuple[int, int, int]]] = {
    "lenet5": (inspect.getsource(lenet5), "LeNet5", (1, 28, 28)),
    "cifarnet": (inspect.getsource(cifarnet), "CifarNet", (3, 32, 32)),
    "residual": (RESIDUAL, "Net", (3, 33, 31)),
    "plain": (PLAIN, "Net", (3, 19, 23)),
    "grouped": (GROUPED, "Net", (3, 33, 31)),
    "normed": (NORMED, "Net", (3, 37, 43)),  # maxima behind batch norms
}
TO_TORCH = {"from parcnn.plan.trace import Tensor": "from torch import Tensor", "parcnn": "torch"}
TO_PARCNN = {
    "import torch\n": "import parcnn as torch\n",
    "import torch.nn": "import parcnn.nn",
    "from torch": "from parcnn",
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    chosen = resolve_executor(request.param)
    yield chosen
    chosen.close()


def _made(source: str, name: str, changes: dict[str, str]) -> Any:
    for old, changed in changes.items():
        source = source.replace(old, changed)
    namespace: dict[str, Any] = {"__name__": "model_file"}
    exec(compile(source, "model_file", "exec"), namespace)  # the sources are this test's own
    return namespace[name]()


def _pair(name: str) -> tuple[Any, nn.Module]:
    """The model in torch with random weights and statistics, and in parcnn with the same."""
    source, class_name, _ = MODELS[name]
    ours_is_source = "parcnn" in source
    torch.manual_seed(3)
    theirs = _made(source, class_name, TO_TORCH if ours_is_source else {})
    ours = _made(source, class_name, {} if ours_is_source else TO_PARCNN)
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
                value.copy_(torch.rand_like(value) + 0.5)
            elif key.endswith(("running_mean", "bias")):
                value.copy_(torch.randn_like(value) * 0.3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _images(name: str, count: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, *MODELS[name][2])).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_are_torchs(name: str) -> None:
    theirs, ours = _pair(name)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for key, array in ours.state_dict().items():
        np.testing.assert_array_equal(array, state[key].numpy())
    parameters = [key for key, _ in theirs.named_parameters()]
    assert [key for key, _ in ours.named_parameters()] == parameters
    theirs.load_state_dict({key: torch.from_numpy(array) for key, array in ours.state_dict().items()})


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_torchs(name: str, executor: Executor) -> None:
    theirs, ours = _pair(name)
    images = _images(name, 11)
    theirs.eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images)).numpy()
    logits = Trainer(ours, batch_size=4, device=executor).predict(images)  # batches of 4, 4 and 3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-2, "logits that are all alike compare nothing"


OPTIMIZERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "sgd": (optim.SGD(lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01)),
    "momentum": (
        optim.SGD(lr=0.005, momentum=0.9, weight_decay=1e-2, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9, weight_decay=1e-2, nesterov=True),
    ),
    "dampened": (
        optim.SGD(lr=0.01, momentum=0.8, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, dampening=0.3),
    ),
    "adam": (optim.Adam(weight_decay=1e-3), lambda p: torch.optim.Adam(p, weight_decay=1e-3)),
    "adamw": (
        optim.AdamW(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
    ),
}
STEPS, BATCH = 5, 6


def _torch_losses(model: Any, optimizer: Any, data: Dataset, loss: Any) -> list[float]:
    model.train()
    dtype = next(model.parameters()).dtype
    losses = []
    for i in range(0, STEPS * BATCH, BATCH):
        optimizer.zero_grad()
        labels = torch.from_numpy(data.labels[i : i + BATCH])
        labels = labels.long() if data.labels.dtype.kind == "i" else labels.to(dtype)
        value = loss(model(torch.from_numpy(data.images[i : i + BATCH]).to(dtype)), labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def _classified(name: str) -> Dataset:
    labels = np.random.default_rng(6).integers(0, 10, STEPS * BATCH).astype(np.int32)
    return from_arrays(_images(name, STEPS * BATCH), labels, classes=[str(i) for i in range(10)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_in_float64_are_torchs(name: str, optimizer: str) -> None:
    """Without rounding to speak of, the five steps are the same: losses, weights and running statistics."""
    theirs, ours = _pair(name)
    theirs.double()
    describe, make = OPTIMIZERS[optimizer]
    data, smoothing = _classified(name), 0.1 if optimizer == "adamw" else 0.0
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    expected = _torch_losses(theirs, make(theirs.parameters()), data, criterion)
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    trainer = Trainer(ours, describe, loss, batch_size=BATCH, device="cpu", shuffle=False, precision="fp64")
    np.testing.assert_allclose(trainer.fit(data, epochs=1).losses, expected, rtol=1e-7)
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[key], value.numpy(), rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_lose_as_torch_does(name: str, optimizer: str, executor: Executor) -> None:
    theirs, ours = _pair(name)
    describe, make = OPTIMIZERS[optimizer]
    data = _classified(name)
    expected = _torch_losses(theirs, make(theirs.parameters()), data, torch.nn.CrossEntropyLoss())
    trainer = Trainer(ours, describe, batch_size=BATCH, device=executor, shuffle=False)
    np.testing.assert_allclose(trainer.fit(data, epochs=1).losses, expected, rtol=1e-4, atol=1e-4)


def test_a_regression_loses_as_torchs(executor: Executor) -> None:
    theirs, ours = _pair("plain")
    targets = np.random.default_rng(6).standard_normal((STEPS * BATCH, 10)).astype(np.float32)
    data = from_arrays(_images("plain", STEPS * BATCH), targets)
    describe, make = OPTIMIZERS["momentum"]
    expected = _torch_losses(theirs, make(theirs.parameters()), data, torch.nn.MSELoss())
    trainer = Trainer(ours, describe, nn.MSELoss(), batch_size=BATCH, device=executor, shuffle=False)
    np.testing.assert_allclose(trainer.fit(data, epochs=1).losses, expected, rtol=1e-4, atol=1e-4)


def test_frozen_parts_train_as_torchs(executor: Executor) -> None:
    """Fine-tuning: batch norms in inference mode, a frozen stem, and the rest trained."""
    theirs, ours = _pair("residual")
    for model in (theirs, ours):
        model.stem.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
    data = _classified("residual")

    def freeze_statistics(model: Any) -> None:
        model.blocks.eval()
        model.norm.eval()

    freeze_statistics(ours)
    theirs.train()
    freeze_statistics(theirs)
    theirs.train = lambda: theirs  # keeps what was set here
    describe, make = OPTIMIZERS["momentum"]
    trained = [p for p in theirs.parameters() if p.requires_grad]
    expected = _torch_losses(theirs, make(trained), data, torch.nn.CrossEntropyLoss())
    trainer = Trainer(ours, describe, batch_size=BATCH, device=executor, shuffle=False)
    np.testing.assert_allclose(trainer.fit(data, epochs=1).losses, expected, rtol=1e-4, atol=1e-4)
    for key, value in theirs.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_allclose(ours.state_dict()[key], value.numpy(), rtol=1e-3, atol=1e-3, err_msg=key)
