"""Learning-rate schedules at their corners, and the values they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parcnn.errors import ArgumentError
from parcnn.optim import ConstantLR, CosineLR, LinearLR, StepLR, TriangularLR

TOTAL = 100
STEPS = np.arange(TOTAL)


def _warmup(steps: int) -> np.ndarray:
    return (np.arange(steps) + 1) / (steps + 1)


CASES: list[tuple[Any, np.ndarray]] = [
    (ConstantLR(), np.ones(TOTAL)),
    (ConstantLR(warmup=0.1), np.concatenate([_warmup(10), np.ones(90)])),
    (CosineLR(), (1 + np.cos(np.pi * STEPS / TOTAL)) / 2),
    (CosineLR(final=0.1), 0.1 + 0.9 * (1 + np.cos(np.pi * STEPS / TOTAL)) / 2),
    (CosineLR(warmup=0.2), np.concatenate([_warmup(20), (1 + np.cos(np.pi * np.arange(80) / 80)) / 2])),
    (LinearLR(), 1 - STEPS / TOTAL),
    (LinearLR(final=0.5), 1 - 0.5 * STEPS / TOTAL),
    (TriangularLR(), np.concatenate([_warmup(20), 1 - np.arange(80) / 80])),
    (TriangularLR(warmup=0.5, final=0.1), np.concatenate([_warmup(50), 1 - 0.9 * np.arange(50) / 50])),
    (StepLR(), np.repeat([1, 0.1, 0.01], [50, 25, 25])),
    (StepLR(milestones=(0.3,), gamma=0.5), np.repeat([1, 0.5], [30, 70])),
    (StepLR(warmup=0.5, milestones=(0.5,)), np.concatenate([_warmup(50), np.repeat([1, 0.1], 25)])),
]


@pytest.mark.parametrize(("schedule", "expected"), CASES, ids=[str(s) for s, _ in CASES])
def test_factors_of_a_run(schedule: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(schedule.factor(STEPS, TOTAL), expected, rtol=1e-12)
    for step in (0, 19, 20, 99):  # one step at a time as all at once
        assert float(schedule.factor(np.array(step), TOTAL)) == pytest.approx(expected[step], rel=1e-12)


@pytest.mark.parametrize("schedule", [s for s, _ in CASES], ids=[str(s) for s, _ in CASES])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs(schedule: Any, total: int) -> None:
    factors = schedule.factor(np.arange(total), total)
    assert factors.shape == (total,)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert (factors <= 1).all()


BAD: list[Callable[[], Any]] = [
    lambda: ConstantLR(warmup=-0.1),
    lambda: CosineLR(warmup=1.5),
    lambda: CosineLR(final=-1.0),
    lambda: LinearLR(final=-0.1),
    lambda: StepLR(milestones=(0.5, 1.5)),
    lambda: StepLR(milestones=(0.7, 0.2)),
    lambda: StepLR(gamma=0.0),
]


@pytest.mark.parametrize("make", BAD)
def test_values_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert "LR." in caught.value.where
    assert caught.value.expected
