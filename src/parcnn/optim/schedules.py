"""Learning-rate schedules: a factor on the optimizer's lr for every step of a training run.

A schedule is a pure function of the step and the length of the run, so that a whole epoch's rates are put on the device
at once, and a resumed run continues where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from parcnn.optim.optimizers import check


class Schedule(Protocol):
    """factor(step, total) -> the factor on lr, for steps 0 <= step < total (arrays of steps give arrays)."""

    def factor(self, step: np.ndarray, total: int) -> np.ndarray:
        """The factor on lr at each of `step`."""


@dataclass(frozen=True)
class Warmup:
    """Base of schedules: the factor rises linearly from near 0 over the first `warmup` share of the run.

    Schedules raise ArgumentError for values out of range.
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.warmup < 1, f"{type(self).__name__}.warmup", "0 <= warmup < 1, a share of the run", self.warmup)

    def factor(self, step: np.ndarray, total: int) -> np.ndarray:
        """The factor on lr at each of `step`."""
        rise = self.warmup * total
        progress = (np.asarray(step, np.float64) - rise) / max(total - rise, 1)
        shaped = self.shape(np.clip(progress, 0, 1))
        return np.where(np.asarray(step) < rise, (np.asarray(step) + 1) / (rise + 1), shaped)

    def shape(self, progress: np.ndarray) -> np.ndarray:
        """The factor after warm-up, for progress 0..1."""
        return np.ones_like(progress)


@dataclass(frozen=True)
class ConstantLR(Warmup):
    """lr as it is."""


@dataclass(frozen=True)
class CosineLR(Warmup):
    """Half a cosine from 1 to `final` (Loshchilov & Hutter 2017)."""

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.final >= 0, "CosineLR.final", ">= 0", self.final)

    def shape(self, progress: np.ndarray) -> np.ndarray:
        return self.final + (1 - self.final) * (1 + np.cos(np.pi * progress)) / 2


@dataclass(frozen=True)
class LinearLR(Warmup):
    """A line from 1 to `final`."""

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.final >= 0, f"{type(self).__name__}.final", ">= 0", self.final)

    def shape(self, progress: np.ndarray) -> np.ndarray:
        return 1 + (self.final - 1) * progress


@dataclass(frozen=True)
class TriangularLR(LinearLR):
    """A line up to the peak at `warmup` of the run, then one down (Smith 2017)."""

    warmup: float = 0.2


@dataclass(frozen=True)
class StepLR(Warmup):
    """`gamma` ** (number of milestones passed); milestones are shares of the run after its warm-up."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = list(self.milestones) == sorted(self.milestones) and all(0 <= m <= 1 for m in self.milestones)
        check(rising, "StepLR.milestones", "rising shares of the run, 0 to 1", self.milestones)
        check(self.gamma > 0, "StepLR.gamma", "> 0", self.gamma)

    def shape(self, progress: np.ndarray) -> np.ndarray:
        passed = sum((progress >= m).astype(np.float64) for m in self.milestones)
        return np.power(self.gamma, passed)
