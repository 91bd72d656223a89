"""Updates over several steps against torch.optim's equations, written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from parcnn import nn
from parcnn.cpu import CpuExecutor
from parcnn.errors import ArgumentError
from parcnn.optim import SGD, Adam, AdamW, Muon
from tests.plan.step import Step, make_plan

STEPS, BATCH = 6, 4
RATES = np.array([0.1, 0.05, 0.2, 0.0, 0.03, 0.07])
Update = Callable[[np.ndarray, np.ndarray, float, int], np.ndarray]


@pytest.fixture(scope="module")
def cpu() -> Iterator[CpuExecutor]:
    executor = CpuExecutor(threads=1)
    yield executor
    executor.close()


def _sgd(momentum: float, dampening: float, weight_decay: float, nesterov: bool) -> Update:
    """torch.optim.SGD's algorithm, for one tensor."""
    buffer: list[np.ndarray] = []

    def update(w: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
        g = g + weight_decay * w
        if momentum:
            b = g.copy() if t == 1 else momentum * buffer[-1] + (1 - dampening) * g
            buffer.append(b)
            g = g + momentum * b if nesterov else b
        return w - lr * g

    return update


def _adam(betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool) -> Update:
    """torch.optim.Adam's and AdamW's algorithm, for one tensor."""
    moments = [np.zeros(()), np.zeros(())]

    def update(w: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
        if decoupled:
            w = w - lr * weight_decay * w
        else:
            g = g + weight_decay * w
        moments[0] = betas[0] * moments[0] + (1 - betas[0]) * g
        moments[1] = betas[1] * moments[1] + (1 - betas[1]) * g * g
        m, v = moments[0] / (1 - betas[0] ** t), moments[1] / (1 - betas[1] ** t)
        return w - lr * m / (np.sqrt(v) + eps)

    return update


CASES: list[tuple[Any, Callable[[], Update]]] = [
    (SGD(), lambda: _sgd(0, 0, 0, False)),
    (SGD(weight_decay=0.3), lambda: _sgd(0, 0, 0.3, False)),
    (SGD(momentum=0.9), lambda: _sgd(0.9, 0, 0, False)),
    (SGD(momentum=0.7, dampening=0.4), lambda: _sgd(0.7, 0.4, 0, False)),
    (SGD(momentum=0.7, dampening=0.4, weight_decay=0.2), lambda: _sgd(0.7, 0.4, 0.2, False)),
    (SGD(momentum=0.9, nesterov=True), lambda: _sgd(0.9, 0, 0, True)),
    (SGD(momentum=0.6, nesterov=True, weight_decay=0.1), lambda: _sgd(0.6, 0, 0.1, True)),
    (Adam(), lambda: _adam((0.9, 0.999), 1e-8, 0, False)),
    (Adam(betas=(0.5, 0.7), eps=0.3, weight_decay=0.2), lambda: _adam((0.5, 0.7), 0.3, 0.2, False)),
    (Adam(betas=(0.0, 0.0), eps=1e-3), lambda: _adam((0.0, 0.0), 1e-3, 0, False)),
    (AdamW(), lambda: _adam((0.9, 0.999), 1e-8, 1e-2, True)),
    (AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.4), lambda: _adam((0.8, 0.9), 1e-2, 0.4, True)),
]


@pytest.mark.parametrize(("optimizer", "reference"), CASES, ids=[str(o) for o, _ in CASES])
def test_six_steps_of_a_regression(cpu: CpuExecutor, optimizer: Any, reference: Callable[[], Update]) -> None:
    random = np.random.default_rng(1)
    x, y = random.standard_normal((STEPS * BATCH, 5)), random.standard_normal((STEPS * BATCH, 3))
    model = nn.Linear(5, 3)
    keywords = {"batch": BATCH, "steps": STEPS, "optimizer": optimizer, "loss": nn.MSELoss()}
    step = Step(cpu, make_plan(cpu, model, x, y, **keywords), x, y)
    step.run(optimizer.hyper(RATES, 0), steps=STEPS)

    w, b = model.weight.data.astype(np.float64), model.bias.data.astype(np.float64)
    update_w, update_b = reference(), reference()
    for t, lr in enumerate(RATES, 1):
        rows = slice((t - 1) * BATCH, t * BATCH)
        error = 2 * (x[rows] @ w.T + b - y[rows]) / (BATCH * 3)
        w, b = update_w(w, error.T @ x[rows], lr, t), update_b(b, error.sum(axis=0), lr, t)
    after = step.read_weights()
    np.testing.assert_allclose(after["weight"], w, rtol=1e-10)
    np.testing.assert_allclose(after["bias"], b, rtol=1e-10)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.5), Adam(betas=(0.9, 0.99)), AdamW(betas=(0.0, 0.5))])
def test_a_resumed_run_has_the_same_table(optimizer: Any) -> None:
    rates = np.linspace(0.1, 1, 10)
    whole, rest = optimizer.hyper(rates, 0), optimizer.hyper(rates[4:], 4)
    assert whole.shape == (10, 4)
    np.testing.assert_array_equal(whole[:, 0], rates)
    np.testing.assert_array_equal(whole[4:], rest)


def test_bias_corrections_keep_their_digits() -> None:
    """1 - beta^t for beta near 1 and small t, where the subtraction would cancel."""
    table = Adam(betas=(0.9, 1 - 1e-9)).hyper(np.ones(3), 0)
    np.testing.assert_allclose(table[:, 2], 1e-9 * np.arange(1, 4), rtol=1e-7)


def test_state_tensors() -> None:
    assert [o.slots for o in (SGD(), SGD(momentum=0.9), Adam(), AdamW())] == [0, 1, 2, 2]


BAD: list[Callable[[], Any]] = [
    lambda: SGD(lr=-0.1),
    lambda: SGD(lr=float("nan")),
    lambda: SGD(momentum=1.0),
    lambda: SGD(momentum=-0.1),
    lambda: SGD(weight_decay=-1.0),
    lambda: SGD(nesterov=True),
    lambda: SGD(momentum=0.9, dampening=0.1, nesterov=True),
    lambda: Adam(lr=-1.0),
    lambda: Adam(betas=(0.9, 1.0)),
    lambda: Adam(betas=(-0.1, 0.9)),
    lambda: Adam(betas=(0.9,)),
    lambda: Adam(eps=0.0),
    lambda: AdamW(weight_decay=-0.1),
]


@pytest.mark.parametrize("make", BAD)
def test_values_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.where.startswith(("SGD.", "Adam.", "AdamW."))
    assert caught.value.expected


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW, Muon])
def test_parameters_are_refused_with_what_to_write_instead(optimizer: Callable[..., Any]) -> None:
    parameters = nn.Linear(2, 3).parameters()
    for arguments, named in (((parameters,), {"lr": 0.1}), ((list(parameters), 0.1), {})):
        with pytest.raises(ArgumentError, match=r"(?s)takes no parameters.*\(lr=0\.1\)"):
            optimizer(*arguments, **named)
    assert optimizer(np.float32(0.5)).lr == 0.5
