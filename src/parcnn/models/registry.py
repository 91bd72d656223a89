"""Networks by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from parcnn.errors import ArgumentError
from parcnn.models.cifarnet import CifarNet
from parcnn.models.lenet5 import LeNet5
from parcnn.nn import Module

_MODELS: dict[str, Callable[..., Module]] = {"lenet5": LeNet5, "cifarnet": CifarNet}


def names() -> tuple[str, ...]:
    """Names that `create` knows."""
    return tuple(_MODELS)


def create(name: str, num_classes: int = 10, in_channels: int = 1) -> Module:
    """A network with fresh weights. Raises ArgumentError for an unknown name."""
    if name not in _MODELS:
        raise ArgumentError("unknown model", got=name, expected=", ".join(_MODELS))
    return _MODELS[name](num_classes=num_classes, in_channels=in_channels)
