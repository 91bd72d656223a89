"""Training in bf16: on the null driver, which checks every launch, and on the GPU, where it must learn as fp32 does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import parcnn
from parcnn import data, models, nn, optim
from parcnn.cpu import CpuExecutor
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import conv_padded
from parcnn.data import Dataset
from parcnn.errors import ArgumentError
from parcnn.ops.conv import ConvFprop
from parcnn.ops.norm import BatchNormInfer, BatchNormTrain
from parcnn.plan.describe import outline
from parcnn.plan.optimizer import Optimizer
from parcnn.plan.options import Options
from parcnn.train import Trainer


def create(network: str) -> nn.Module:
    own = {"mixed": mixed, "pools": pools, "means": means, "norms": norms, "residual": residual}
    if network in own:
        return own[network]()
    return models.create(network, in_channels=3 if network == "cifarnet" else 1)


def trainer(executor: object, network: str = "lenet5", precision: str = "bf16", lr: float = 0.02) -> Trainer:
    parcnn.manual_seed(3)
    model = create(network)
    return Trainer(
        model, optim.SGD(lr, momentum=0.9), schedule=optim.CosineLR(warmup=0.1), device=executor, precision=precision,
        batch_size=32,
    )  # fmt: skip


def noise(count: int, shape: tuple[int, ...]) -> Dataset:
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, count)
    return data.from_arrays(random.integers(0, 256, (count, *shape), np.uint8), labels, name="noise")


def mixed() -> nn.Module:
    """What the shipped networks do not have: few channels, strides, average pools, activations, dropout, a sum of paths."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 10, 5, stride=2, padding=2)
            self.left, self.right = nn.Conv2d(10, 12, 3, padding=1), nn.Conv2d(10, 12, 1)
            self.down = nn.Conv2d(12, 24, 3, stride=2, padding=1)
            self.norm, self.drop = nn.BatchNorm2d(24), nn.Dropout(0.1)
            self.head = nn.Linear(24, 10)

        def forward(self, x: parcnn.Tensor) -> parcnn.Tensor:
            x = nn.functional.gelu(self.stem(x))
            x = nn.functional.avg_pool2d(nn.functional.relu(self.left(x) + self.right(x)), 2)
            x = nn.functional.silu(self.norm(self.down(x)))
            return self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)))

    return Net()


def pools() -> nn.Module:
    """Pools of all kinds of windows behind activations: alone, and on Hopper in convolutions (the second and the fourth)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (3, 40, 32, 64, 64)
            layers = [nn.Conv2d(c, k, 3, padding=1) for c, k in pairwise(widths)]
            for i, layer in enumerate(layers):
                setattr(self, f"conv{i}", layer)
            self.head = nn.Linear(256, 10)

        def forward(self, x: parcnn.Tensor) -> parcnn.Tensor:
            f = nn.functional
            x = f.max_pool2d(f.gelu(self.conv0(x)), 3, 2, 1)
            x = f.max_pool2d(f.relu(self.conv1(x)), 3, 2)
            x = f.max_pool2d(f.silu(self.conv2(x)), 2, 1)
            x = f.max_pool2d(f.tanh(self.conv3(x)), 3)
            return self.head(x.flatten(1))

    return Net()


def means() -> nn.Module:
    """Averages of several windows, on Hopper in convolutions (but the first, whose activation backward needs)."""
    layers = [
        *(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(40, 64, 3, padding=1), nn.AvgPool2d(3, 2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.AvgPool2d((3, 2), 2), nn.Tanh()),
        *(nn.Conv2d(64, 72, 1), nn.AvgPool2d((2, 3), (1, 3), divisor_override=5)),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72 * 2, 10))


def norms() -> nn.Module:
    """Batch norms with a maximum behind them, of windows that overlap, that do not, and that leave gaps."""

    def block(inputs: int, outputs: int, pool: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), pool]

    layers = [*block(3, 64, nn.MaxPool2d(3, 2, 1)), *block(64, 36, nn.MaxPool2d(2)), *block(36, 72, nn.MaxPool2d(2, 3))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72 * 9, 10))


def residual() -> nn.Module:
    """Blocks of a residual network: a shortcut as it is, and one with a convolution and a norm; few rows at last. A convolution
    with a shortcut and no norm."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(outputs) for _ in range(3))
            self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if (inputs, stride) != (outputs, 1) else None

        def forward(self, x: parcnn.Tensor) -> parcnn.Tensor:
            y = self.norm2(self.conv2(nn.functional.relu(self.norm1(self.conv1(x)))))
            return nn.functional.relu(y + (self.norm3(self.down(x)) if self.down else x))

    class Plain(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x: parcnn.Tensor) -> parcnn.Tensor:
            return nn.functional.relu(x + self.conv(x))

    blocks = [Block(3, 64, 1), Block(64, 64, 1), Plain(64), Block(64, 72, 2), Block(72, 128, 8)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def odd(channels: int) -> nn.Module:
    """Channels that are no multiples of 8, of images, too."""
    blocks = [
        layer
        for c, k in pairwise((channels, 44, 36))
        for layer in (nn.Conv2d(c, k, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    top = [nn.Conv2d(36, 92, 3, padding=1), nn.BatchNorm2d(92), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*blocks, *top, nn.Linear(92, 10))


def families() -> nn.Module:
    """Convolutions by many kernel families: of images, with a pool, depthwise, 1x1; between them a batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def trained_families(executor: CudaExecutor, precision: str) -> dict[str, np.ndarray]:
    """What some steps make of the network's state."""
    parcnn.manual_seed(3)
    run = Trainer(families(), optim.SGD(0.01, momentum=0.9), device=executor, precision=precision, batch_size=64)
    run.fit(noise(64 * 4 + 5, (3, 64, 64)), 2)
    return run.model.state_dict()


@pytest.mark.parametrize(("network", "shape"), [("lenet5", (1, 28, 28)), ("cifarnet", (3, 32, 32))])
def test_every_launch_of_a_run_is_sound(null: CudaExecutor, network: str, shape: tuple[int, ...]) -> None:
    some = noise(32 * 2 + 7, shape)  # and a tail
    run = trainer(null, network)
    run.fit(some, 1)
    run.evaluate(some)
    run.predict(some.images[:5])
    run.session.pull()


@pytest.mark.parametrize("network", [mixed, pools, means, norms, residual])
def test_a_network_of_odd_layers_has_kernels(null: CudaExecutor, network: Callable[[], nn.Module]) -> None:
    run = Trainer(network(), optim.AdamW(1e-3), device=null, precision="bf16", batch_size=16)
    run.fit(noise(40, (3, 32, 32)), 1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_residual_block_needs_no_pass_for_its_sum(null: CudaExecutor, mode: str) -> None:
    """The second norm of each takes the shortcut along, with ReLU; from 4 MB on also by the moments of its convolution. A
    convolution takes it where there is no norm."""
    plan = outline(
        residual(), mode=mode, batch=128, sample=(3, 32, 32), executor=null, loss=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(), precision="bf16",
    )  # fmt: skip
    forward = [call for call in plan.program.calls if call.phase == "forward"]
    assert not [call for call in forward if call.op.name in ("add", "act")]
    sums = [call for call in forward if isinstance(call.op, BatchNormTrain | BatchNormInfer) and call.op.add]
    assert [call.op.act for call in sums] == ["relu"] * 4
    (plain,) = (call.op for call in forward if isinstance(call.op, ConvFprop) and call.op.add)
    assert plain.act == "relu"
    assert [name for call in sums for name in null.kernels(call) if name.entry == "batch_norm_moments"] == []
    if mode == "train":
        assert [call.op.moments for call in sums if isinstance(call.op, BatchNormTrain)] == [True, True, True, False]


def test_a_network_is_padded_once(null: CudaExecutor) -> None:
    """Channels between layers are padded with the weights; what is read from outside, and given to it, at each call."""

    def padded(pad_channels: bool) -> set[str]:
        plan = outline(
            odd(20), mode="train", batch=512, sample=(20, 32, 32), executor=null, loss=nn.CrossEntropyLoss(),
            optimizer=optim.SGD(), precision="bf16", options=Options(pad_channels=pad_channels),
        )  # fmt: skip
        return {call.layer for call in plan.program.calls if conv_padded.KERNEL in null.kernels(call)}

    assert padded(pad_channels=False) == {"0", "3", "6"}
    assert padded(pad_channels=True) == {"0"}


@pytest.mark.parametrize(("precision", "device"), [("bf16", "cpu"), ("fp64", "null"), ("fp8", "cpu")])
def test_a_precision_that_the_device_lacks(null: CudaExecutor, precision: str, device: str) -> None:
    executor = null if device == "null" else CpuExecutor(threads=1)
    with pytest.raises(ArgumentError, match=rf"(?s){re.escape(executor.name)}.*{precision}.*--device"):
        trainer(executor, precision=precision)


@pytest.mark.gpu
def test_it_learns_as_fp32_does(cuda: CudaExecutor) -> None:
    train, held_out = data.load("digits"), data.load("digits", "test")
    accuracies = {}
    for precision in ("fp32", "bf16"):
        run = trainer(cuda, precision=precision, lr=0.03)
        run.fit(train, 10)
        accuracies[precision] = run.evaluate(held_out).accuracy
    assert min(accuracies.values()) > 0.95, accuracies
    assert abs(accuracies["bf16"] - accuracies["fp32"]) <= 0.02, accuracies


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ("lenet5", (1, 28, 28)),
        ("cifarnet", (3, 32, 32)),
        ("mixed", (3, 32, 32)),
        ("pools", (3, 32, 32)),
        ("means", (3, 32, 32)),
        ("norms", (3, 32, 32)),
        ("residual", (3, 32, 32)),
    ],
)
def test_the_first_steps_follow_fp32(cuda: CudaExecutor, network: str, shape: tuple[int, ...]) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        parcnn.manual_seed(3)
        model = create(network)
        run = Trainer(model, optim.SGD(1e-3), device=cuda, precision=precision, batch_size=64, shuffle=False)
        losses[precision] = run.fit(noise(64 * 4, shape), 1).losses
    # Eight bits of mantissa in some ten layers; a wrong gradient or a wrong layer moves the loss by far more.
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.02)


@pytest.mark.gpu
def test_channels_of_zeros_change_no_step(cuda: CudaExecutor) -> None:
    losses = {}
    for pad_channels in (False, True):
        parcnn.manual_seed(3)
        run = Trainer(
            odd(12), optim.SGD(1e-3, momentum=0.9), device=cuda, precision="bf16", batch_size=64, shuffle=False,
            options=Options(pad_channels=pad_channels),
        )  # fmt: skip
        losses[pad_channels] = run.fit(noise(64 * 4, (12, 16, 16)), 1).losses
        assert any(packing.stored for packing in run.session.layout.packings.values()) == pad_channels
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.01)  # other kernels, which sum in another order


@pytest.mark.gpu
@pytest.mark.parametrize(
    "optimizer", [optim.SGD(0.05), optim.SGD(0.05, momentum=0.9), optim.AdamW(1e-2), optim.Muon(0.02)], ids=repr
)
def test_convolutions_read_the_weights_as_they_are_now(cuda: CudaExecutor, optimizer: Optimizer) -> None:
    """After steps of training, with a frozen layer, and after the host wrote weights: as a trainer that starts from them."""
    some = noise(16 * 3 + 5, (3, 32, 32))
    images = np.random.default_rng(1).standard_normal((40, 3, 32, 32), np.float32)
    model = mixed()
    dict(model.named_modules())["left"].requires_grad_(False)
    run = Trainer(model, optimizer, device=cuda, precision="bf16", batch_size=16)
    seen = []
    for epochs in (1, 2):
        run.fit(some, epochs)
        state = run.model.state_dict()
        seen.append((state, run.predict(images)))
        fresh = Trainer(mixed(), optimizer, device=cuda, precision="bf16", batch_size=16)
        fresh.model.load_state_dict(state)
        fresh.normalization = run.normalization
        np.testing.assert_array_equal(fresh.predict(images), seen[-1][1])
    assert (seen[0][1] != seen[1][1]).any()
    run.model.load_state_dict(seen[0][0])
    np.testing.assert_array_equal(run.predict(images), seen[0][1])


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(cuda: CudaExecutor) -> None:
    runs = [trainer(cuda, "cifarnet") for _ in range(2)]
    for run in runs:
        run.fit(noise(32 * 6 + 5, (3, 32, 32)), 2)
    states = [run.model.state_dict() for run in runs]
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_process_without_any_cache_gives_the_same_bits(cuda: CudaExecutor, tmp_path: Path, precision: str) -> None:
    """It compiles all kernels anew, and has nothing that a process remembers."""
    here = trained_families(cuda, precision)
    code = (
        "import sys; import numpy as np; from parcnn.cuda.executor import CudaExecutor\n"
        "from tests.cuda.test_bf16_training import trained_families\n"
        "np.savez(sys.argv[1], **trained_families(CudaExecutor(), sys.argv[2]))\n"
    )
    saved, cache = tmp_path / "state.npz", tmp_path / "cache"
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache)}
    subprocess.run([sys.executable, "-c", code, saved, precision], env=environment, check=True, timeout=300)
    assert len(list((cache / "parcnn" / "cubins").iterdir())) > 20, "kernels were compiled"
    with np.load(saved) as there:
        assert set(there) == set(here)
        for name, values in here.items():
            assert np.isfinite(values).all(), name
            np.testing.assert_array_equal(there[name], values, err_msg=name)
    parcnn.manual_seed(3)
    for name, values in families().state_dict().items():
        assert not np.array_equal(values, here[name]), f"{name} was not trained"


@pytest.mark.gpu
def test_a_checkpoint_of_bf16_serves_the_cpu(cuda: CudaExecutor, tmp_path: Path) -> None:
    train, held_out = data.load("digits"), data.load("digits", "test")
    run = trainer(cuda, lr=0.03)
    run.fit(train, 5)
    run.save(tmp_path / "digits.safetensors")
    on_cpu = trainer(CpuExecutor(), precision="fp32", lr=0.03)
    on_cpu.load(tmp_path / "digits.safetensors")
    ours, theirs = run.predict(held_out.images), on_cpu.predict(held_out.images)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 0.03 * np.abs(theirs).max()
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.98
