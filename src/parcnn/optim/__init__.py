"""Optimizers and learning-rate schedules. They describe; the plan turns them into ops, the executors compute."""

from parcnn.optim.muon import Muon
from parcnn.optim.optimizers import SGD, Adam, AdamW
from parcnn.optim.schedules import ConstantLR, CosineLR, LinearLR, Schedule, StepLR, TriangularLR

__all__ = ["SGD", "Adam", "AdamW", "ConstantLR", "CosineLR", "LinearLR", "Muon", "Schedule", "StepLR", "TriangularLR"]
