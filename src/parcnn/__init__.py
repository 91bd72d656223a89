"""Convolutional networks defined in Python and trained by CUDA kernels.

The package's names load on first use, so that `import parcnn` is fast and imports no CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Trainer": "parcnn.train",
    "predict": "parcnn.train",
    "Options": "parcnn.plan.options",
    "Tensor": "parcnn.plan.trace",
    "cat": "parcnn.plan.trace",
    "flatten": "parcnn.plan.trace",
    "manual_seed": "parcnn.nn.init",
    "relu": "parcnn.nn.functional",
    "sigmoid": "parcnn.nn.functional",
    "tanh": "parcnn.nn.functional",
}
_ROOMS = ("cpu", "cuda", "data", "errors", "models", "nn", "ops", "optim", "plan", "train")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _ROOMS:
        return import_module(f"parcnn.{name}")
    raise AttributeError(f"module 'parcnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_ROOMS])
