"""torch.nn's modules, by the same names, with the same arguments, initial values and state_dict keys."""

from parcnn.nn import functional
from parcnn.nn.layers import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    Dropout,
    Flatten,
    GELU,
    Identity,
    Linear,
    MaxPool2d,
    MSELoss,
    ReLU,
    Sigmoid,
    SiLU,
    Tanh,
)
from parcnn.nn.module import Buffer, Module, ModuleList, Parameter, Sequential

__all__ = [
    "AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "BatchNorm1d", "BatchNorm2d", "Buffer", "Conv2d",
    "CrossEntropyLoss", "Dropout", "Flatten", "GELU", "Identity", "Linear", "MSELoss", "MaxPool2d", "Module",
    "ModuleList", "Parameter", "ReLU", "Sequential", "SiLU", "Sigmoid", "Tanh", "functional",
]  # fmt: skip
