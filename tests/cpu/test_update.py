"""Optimizer updates against torch's equations, one scalar at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.ops.update import AdamUpdate, SgdUpdate
from tests.op_runner import run_op

SHAPES = [(5, 3, 3, 2), (1,), (40_000,)]  # the last is larger than one piece of work


def operands(random: np.random.Generator, buffers: int, step: int) -> list[np.ndarray]:
    hyper = np.array([[0.5, 1, 1, 0], [0.01, 1 - 0.9**3, 1 - 0.99**3, 0]])
    state = np.array([1, step, 0, 0, 0, 0, 0, 0], np.int32)
    tensors = [random.standard_normal(s) for _ in range(2) for s in SHAPES]
    tensors += [random.random(s) + 0.1 for _ in range(buffers) for s in SHAPES]
    return [hyper, state, *tensors]


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_sgd(cpu: CpuExecutor, random: np.random.Generator, options: dict, step: int) -> None:
    op = SgdUpdate(count=3, **options)
    arrays = operands(random, op.slots, step)
    results = run_op(cpu, op, arrays)
    for i in range(3):
        w, g = arrays[2 + i], arrays[5 + i]
        g = g + op.weight_decay * w
        if op.momentum:
            buf = arrays[8 + i]
            buf = g if step == 0 else op.momentum * buf + (1 - op.dampening) * g
            np.testing.assert_allclose(results[3 + i], buf, rtol=1e-12)
            g = g + op.momentum * buf if op.nesterov else buf
        np.testing.assert_allclose(results[i], w - 0.01 * g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}])
def test_adam(cpu: CpuExecutor, random: np.random.Generator, options: dict) -> None:
    op = AdamUpdate(count=3, beta1=0.8, beta2=0.95, eps=1e-3, **options)
    arrays = operands(random, 2, 2)
    results = run_op(cpu, op, arrays)
    for i in range(3):
        for j in {0, arrays[2 + i].size - 1, arrays[2 + i].size // 2}:
            w, g, m, v = (float(arrays[k + i].reshape(-1)[j]) for k in (2, 5, 8, 11))
            if op.decoupled:
                w *= 1 - 0.01 * op.weight_decay
            else:
                g += op.weight_decay * w
            m += 0.2 * (g - m)
            v = 0.95 * v + 0.05 * g * g
            w -= 0.01 / (1 - 0.9**3) * m / (math.sqrt(v / (1 - 0.99**3)) + 1e-3)
            for k, expected in ((0, w), (3, m), (6, v)):
                assert results[k + i].reshape(-1)[j] == pytest.approx(expected, rel=1e-12)
