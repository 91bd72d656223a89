"""Training: a Trainer that fits, evaluates and predicts; checkpoints; progress and metrics."""

from parcnn.train.callbacks import Callback, JsonLines, RichProgress
from parcnn.train.device import resolve_executor
from parcnn.train.session import Session
from parcnn.train.trainer import Augment, EpochResult, EvalResult, History, Trainer, predict

__all__ = [
    "Augment", "Callback", "EpochResult", "EvalResult", "History", "JsonLines", "RichProgress", "Session", "Trainer",
    "predict", "resolve_executor",
]  # fmt: skip
