"""Muon over several steps against its published code, written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from parcnn import nn
from parcnn.cpu import CpuExecutor
from parcnn.errors import ArgumentError
from parcnn.ops.matmul import MatMul
from parcnn.ops.muon import MuonDirection, MuonUpdate
from parcnn.ops.update import AdamUpdate, SgdUpdate
from parcnn.optim import SGD, Adam, AdamW, Muon
from parcnn.plan.options import Options
from parcnn.plan.variable import Layout
from tests.plan.step import Step, make_plan

RATES = np.array([0.1, 0.05, 0.2, 0.03])


@pytest.fixture(scope="module")
def cpu() -> Iterator[CpuExecutor]:
    executor = CpuExecutor(threads=1)
    yield executor
    executor.close()


def zeropower(
    g: np.ndarray, steps: int, coefficients: tuple[float, ...] = (3.4445, -4.7750, 2.0315), eps: float = 1e-7
) -> np.ndarray:
    """zeropower_via_newtonschulz5 of Jordan's code, without its rounding to bf16."""
    a, b, c = coefficients
    x = g / (np.linalg.norm(g) + eps)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Reference:
    """Jordan's Muon for one weight."""

    def __init__(self, optimizer: Muon) -> None:
        self.optimizer, self.buffer = optimizer, np.zeros(())

    def update(self, w: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        o = self.optimizer
        self.buffer = o.momentum * self.buffer + g
        u = g + o.momentum * self.buffer if o.nesterov else self.buffer
        u = zeropower(u.reshape(len(u), -1), o.ns_steps, o.ns_coefficients, o.eps).reshape(w.shape)
        rows, columns = len(w), w.size // len(w)
        factor = (
            0.2 * max(rows, columns) ** 0.5 if o.adjust_lr_fn == "match_rms_adamw" else max(1, rows / columns) ** 0.5
        )
        if o.renormalize:
            w = w * len(w) ** 0.5 / np.linalg.norm(w)
        return w * (1 - lr * o.weight_decay) - lr * factor * u


OPTIMIZERS = [
    Muon(),
    Muon(momentum=0.6, nesterov=False, ns_steps=3, weight_decay=0.3),
    Muon(adjust_lr_fn="match_rms_adamw", others=SGD(0.5, momentum=0.9)),
    Muon(renormalize=True, ns_coefficients=(2.0, -1.5, 0.5), ns_steps=9),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("outputs", [3, 9], ids=["wide", "tall"])
def test_steps_of_a_regression(cpu: CpuExecutor, optimizer: Muon, outputs: int) -> None:
    """The bias is as if its own optimizer had it alone."""
    random, steps, batch = np.random.default_rng(1), len(RATES), 4
    x, y = random.standard_normal((steps * batch, 5)), random.standard_normal((steps * batch, outputs))
    model = nn.Linear(5, outputs)
    plan = make_plan(cpu, model, x, y, optimizer=optimizer, batch=batch, steps=steps, loss=nn.MSELoss())
    step = Step(cpu, plan, x, y)
    step.run(optimizer.hyper(RATES, 0), steps=steps)

    w, b = model.weight.data.astype(np.float64), model.bias.data.astype(np.float64)
    reference, bias_only = Reference(optimizer), optimizer.others
    bias = _torch_rule(bias_only)
    for t, lr in enumerate(RATES, 1):
        rows = slice((t - 1) * batch, t * batch)
        error = 2 * (x[rows] @ w.T + b - y[rows]) / (batch * outputs)
        w, b = reference.update(w, error.T @ x[rows], lr), bias(b, error.sum(0), lr * bias_only.lr / optimizer.lr, t)
    after = step.read_weights()
    np.testing.assert_allclose(after["weight"], w, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(after["bias"], b, rtol=1e-9, atol=1e-11)


def _torch_rule(optimizer: SGD | Adam) -> Callable[[np.ndarray, np.ndarray, float, int], np.ndarray]:
    """SGD with momentum, or AdamW, of a bias."""
    buffers = [np.zeros(()), np.zeros(())]

    def sgd(w: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
        assert isinstance(optimizer, SGD)
        buffers[0] = optimizer.momentum * buffers[0] + g
        return w - lr * buffers[0]

    def adamw(w: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
        assert isinstance(optimizer, AdamW)
        (beta1, beta2), decay = optimizer.betas, optimizer.weight_decay
        buffers[0] = beta1 * buffers[0] + (1 - beta1) * g
        buffers[1] = beta2 * buffers[1] + (1 - beta2) * g * g
        m, v = buffers[0] / (1 - beta1**t), buffers[1] / (1 - beta2**t)
        return w * (1 - lr * decay) - lr * m / (np.sqrt(v) + optimizer.eps)

    return sgd if isinstance(optimizer, SGD) else adamw


class Net(nn.Module):
    """Filters wide and tall, norms, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8 * 6 * 6, 4)

    def forward(self, x: Any) -> Any:
        x = nn.functional.relu(self.norm(self.stem(x)))
        return self.head(nn.functional.relu(self.body(x)).flatten(1))


def batch_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    return random.standard_normal((count, 1, 6, 6)), random.integers(0, 4, count).astype(np.int32)


def test_filters_move_along_orthogonal_directions(cpu: CpuExecutor) -> None:
    """Five steps of the iteration bring the singular values of what a weight moves by to about lr, in torch's layout too."""
    images, targets = batch_of(24)
    model, optimizer = Net(), Muon(adjust_lr_fn="original")
    step = Step(cpu, make_plan(cpu, model, images, targets, optimizer=optimizer), images, targets)
    step.run(optimizer.hyper(np.array([0.5]), 0))
    after = step.read_weights()
    for name in ("stem.weight", "body.weight", "head.weight"):
        before = next(v.data for n, v in model.named_parameters() if n == name).astype(np.float64)
        moved = (before - after[name]).reshape(len(before), -1) / 0.5
        rows, columns = moved.shape
        values = np.linalg.svd(moved, compute_uv=False) / max(1, rows / columns) ** 0.5
        assert values.max() < 1.3
        assert np.median(values) > 0.6, name


def test_who_updates_what(cpu: CpuExecutor) -> None:
    images, targets = batch_of(8)
    plan = make_plan(cpu, Net(), images, targets, optimizer=Muon(exclude=("head.*",), others=SGD(momentum=0.5)))
    rules = {plan.layout.names[v]: type(rule) for v, rule in plan.layout.rules.items()}
    assert {name for name, rule in rules.items() if rule is Muon} == {"stem.weight", "body.weight"}
    assert set(rules.values()) == {Muon, SGD}
    ops = [call.op for call in plan.program.calls if call.phase == "update"]
    (direction,) = (op for op in ops if isinstance(op, MuonDirection))
    assert direction.count == 2
    assert sum(isinstance(op, MatMul) for op in ops) == 3 * 5
    assert sum(isinstance(op, MuonUpdate) for op in ops) == 1
    assert sum(op.count for op in ops if isinstance(op, SgdUpdate)) == 5


def test_weights_wait_for_each_other(cpu: CpuExecutor) -> None:
    """Where others are updated layer by layer, too."""
    images, targets = batch_of(8)
    plan = make_plan(cpu, Net(), images, targets, optimizer=Muon(), options=Options(update_bytes=0))
    counts = [call.op.count for call in plan.program.calls if isinstance(call.op, MuonDirection)]
    assert counts == [3]
    assert sum(isinstance(call.op, AdamUpdate) for call in plan.program.calls) > 1


def test_state_has_a_momentum_for_weights_and_what_others_need() -> None:
    model = Net()
    layout = Layout.of(model.named_variables(), "f32")
    layout.add_state(Muon(exclude=("stem.weight",)))
    slots = {layout.names[v]: len(offsets) for v, offsets in layout.state_offsets.items()}
    expected = {"body.weight": 1, "head.weight": 1, "stem.weight": 2, "stem.bias": 2}
    assert {name: slots[name] for name in expected} == expected
    ends = sorted((at, at + 4 * v.data.size) for v, offsets in layout.state_offsets.items() for at in offsets)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= layout.optimizer_bytes


def test_a_resumed_run_has_the_same_table() -> None:
    optimizer = Muon(lr=0.1, others=Adam(0.3))
    rates = np.linspace(0.1, 1, 10)
    whole, rest = optimizer.hyper(rates, 0), optimizer.hyper(rates[4:], 4)
    np.testing.assert_allclose(whole[:, 0], 3 * rates)
    np.testing.assert_array_equal(whole[:, 3], rates)
    np.testing.assert_array_equal(whole[4:], rest)


BAD: list[Callable[[], Any]] = [
    lambda: Muon(lr=0.0),
    lambda: Muon(momentum=1.0),
    lambda: Muon(weight_decay=-1.0),
    lambda: Muon(ns_steps=0),
    lambda: Muon(ns_coefficients=(1.0, 2.0)),
    lambda: Muon(ns_coefficients=(1.0, 0.0, 2.0)),
    lambda: Muon(eps=0.0),
    lambda: Muon(adjust_lr_fn="none"),
    lambda: Muon(others=None),  # type: ignore[arg-type]
    lambda: Muon(exclude=("tail.*",)).rules({"head.weight": (3, 4)}),
]


@pytest.mark.parametrize("make", BAD)
def test_values_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.where.startswith("Muon.")
    assert caught.value.expected
