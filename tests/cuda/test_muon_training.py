"""Training with Muon: on the null driver, which checks every launch, and on the GPU, held to the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parcnn
from parcnn import data, models, nn
from parcnn.cpu import CpuExecutor
from parcnn.cuda.executor import CudaExecutor
from parcnn.data import Dataset
from parcnn.ops.matmul import MatMul
from parcnn.ops.muon import MuonDirection
from parcnn.ops.program import Executor
from parcnn.optim import SGD, Muon
from parcnn.train import Trainer
from tests.cuda.bf16 import from_bits
from tests.op_runner import run_op


class Net(nn.Module):
    """Filters wide and tall, norms, biases, a head that Muon leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.hidden = nn.Linear(24 * 3 * 3, 40)
        self.head = nn.Linear(40, 4)

    def forward(self, x: parcnn.Tensor) -> parcnn.Tensor:
        x = nn.functional.relu(self.norm(self.stem(x)))
        x = nn.functional.max_pool2d(nn.functional.relu(self.body(x)), 2)
        return self.head(nn.functional.relu(self.hidden(x.flatten(1))))


def noise(shape: tuple[int, ...] = (1, 6, 6), classes: int = 4, count: int = 96) -> Dataset:
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (count, *shape), np.uint8)
    return data.from_arrays(images, random.integers(0, classes, count), name="noise")


def trainer(executor: Executor, precision: str = "fp32", model: nn.Module | None = None, **more: Any) -> Trainer:
    parcnn.manual_seed(3)
    optimizer = Muon(lr=0.01, exclude=("head.weight",), others=SGD(0.02, momentum=0.9), **more)
    return Trainer(model or Net(), optimizer, device=executor, precision=precision, batch_size=32, shuffle=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_launch_of_a_run_is_sound(null: CudaExecutor, precision: str) -> None:
    run = trainer(null, precision, models.create("cifarnet", in_channels=3), renormalize=True)
    plan = run.plan("train", noise((3, 32, 32), 10))
    products = [c for c in plan.program.calls if isinstance(c.op, MatMul)]
    names = {null.kernel_name(c.op, c.input_specs, c.output_specs) for c in products}
    assert len(products) == 3 * 5
    assert all(name.startswith("gemm_mma") == (precision == "bf16") for name in names)
    run.fit(noise((3, 32, 32), 10, 70), 1)  # and a tail


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Momentum of weights, and what the others have, come back from a checkpoint."""
    executor = CpuExecutor(threads=1)
    whole, first, second = (trainer(executor) for _ in range(3))
    whole.fit(noise(), 2)
    first.fit(noise(), 1)
    first.save(tmp_path / "one.safetensors")
    second.load(tmp_path / "one.safetensors")
    second.fit(noise(), 2)
    for name, wanted in whole.model.state_dict().items():
        np.testing.assert_array_equal(second.model.state_dict()[name], wanted, err_msg=name)
    executor.close()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_follows_the_cpu(cuda: CudaExecutor, precision: str) -> None:
    losses = {}
    for device, kind in ((CpuExecutor(threads=1), "fp32"), (cuda, precision)):
        run = trainer(device, kind)
        losses[device.name] = run.fit(noise(), 4).losses
    assert losses["cpu"][-1] < losses["cpu"][0]
    # Products in bf16 leave singular values a few percent off.
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=1e-3 if precision == "fp32" else 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_give_the_same_bits(cuda: CudaExecutor, precision: str) -> None:
    runs = [trainer(cuda, precision) for _ in range(2)]
    for run in runs:
        run.fit(noise(count=100), 3)
    for name, wanted in runs[0].model.state_dict().items():
        np.testing.assert_array_equal(runs[1].model.state_dict()[name], wanted, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 216), (64, 576), (256, 576), (256, 2304), (512, 64)], ids=str)
def test_singular_values_come_near_one(cuda: CudaExecutor, shape: tuple[int, int]) -> None:
    """Of five steps in bf16 on noise. In exact arithmetic the coefficients' own range is 0.68 to 1.13 (Jordan 2024)."""
    g = np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    x, _ = run_op(cuda, MuonDirection(dtype="bf16"), [g, np.zeros_like(g)])
    optimizer = Muon()
    a, b, c = optimizer.ns_coefficients
    for _ in range(optimizer.ns_steps):
        (gram,) = run_op(cuda, MatMul(transpose_b=True), [x, x])
        (polynomial,) = run_op(cuda, MatMul(transpose_b=True, alpha=c, beta=b), [gram, gram, gram])
        (x,) = run_op(cuda, MatMul(beta=a), [polynomial, x, x])
    values = np.linalg.svd(from_bits(x), compute_uv=False)
    assert 0.6 < values.min() <= values.max() < 1.25, values
