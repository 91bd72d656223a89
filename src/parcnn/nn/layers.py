"""Layers with torch.nn's names, arguments, default initial values and state_dict keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from parcnn.errors import ArgumentError, ShapeError, UnsupportedError
from parcnn.nn import functional as F
from parcnn.nn.functional import IntPair, Loss
from parcnn.nn.init import fan_in_bound, uniform
from parcnn.nn.module import Buffer, Module, Parameter
from parcnn.ops.base import pair
from parcnn.plan.trace import Tensor


class Conv2d(Module):
    """2-D convolution: weight (out_channels, in_channels/groups, R, S), bias (out_channels).

    padding: int, pair, 'valid' or 'same'. groups = in_channels: a depthwise convolution. Raises ArgumentError for sizes below
    1 and for groups that do not divide the channels, UnsupportedError for padding modes other than zeros.
    """

    bias: Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = (
            pair(kernel_size, "Conv2d"),
            pair(stride, "Conv2d"),
            pair(dilation, "Conv2d"),
        )
        self.padding = padding if isinstance(padding, str) else pair(padding, "Conv2d")
        if min(in_channels, out_channels, *self.kernel_size, *self.stride, *self.dilation) < 1:
            raise ArgumentError(
                "sizes of a convolution are at least 1", where="Conv2d", expected=">= 1", got=self.extra_repr()
            )
        F.conv_padding(self.padding, self.stride, self.dilation, self.kernel_size, "Conv2d")
        F.conv_groups(groups, in_channels, "in_channels", "Conv2d")
        F.conv_groups(groups, out_channels, "out_channels", "Conv2d")
        if padding_mode != "zeros":
            raise UnsupportedError(
                "a padding mode", where="Conv2d", expected="padding_mode='zeros'", got=f"padding_mode={padding_mode!r}",
                remedy="leave it at its default",
            )  # fmt: skip
        seen = in_channels // groups  # channels that a filter sees
        bound = fan_in_bound(seen * self.kernel_size[0] * self.kernel_size[1])
        self.weight = Parameter(uniform((out_channels, seen, *self.kernel_size), bound))
        self.register_parameter("bias", Parameter(uniform((out_channels,), bound)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding!r}, dilation={self.dilation}"
        return text + (f", groups={self.groups}" if self.groups != 1 else "")


class Linear(Module):
    """y = x @ weight^T + bias; weight (out_features, in_features)."""

    bias: Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if min(in_features, out_features) < 1:
            raise ArgumentError(
                "features are at least 1", where="Linear", expected=">= 1", got=(in_features, out_features)
            )
        bound = fan_in_bound(in_features)
        self.weight = Parameter(uniform((out_features, in_features), bound))
        self.register_parameter("bias", Parameter(uniform((out_features,), bound)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class MaxPool2d(Module):
    """Maximum over windows; stride defaults to kernel_size."""

    def __init__(
        self,
        kernel_size: IntPair,
        stride: IntPair | None = None,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.return_indices, self.ceil_mode = return_indices, ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride or self.kernel_size}, padding={self.padding}"


class AvgPool2d(Module):
    """Mean over windows; stride defaults to kernel_size."""

    def __init__(
        self,
        kernel_size: IntPair,
        stride: IntPair | None = None,
        padding: IntPair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__()
        self.arguments: tuple[Any, ...] = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, *self.arguments)

    def extra_repr(self) -> str:
        return f"kernel_size={self.arguments[0]}, stride={self.arguments[1]}, padding={self.arguments[2]}"


class AdaptiveAvgPool2d(Module):
    """Mean over windows chosen for an output of output_size."""

    def __init__(self, output_size: int | tuple[int | None, int | None] | None) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveMaxPool2d(Module):
    """Maximum over equal windows; the image's sides must be multiples of output_size."""

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(x, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class ReLU(Module):
    """max(x, 0)."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class GELU(Module):
    """x * Phi(x); approximate='tanh' for its tanh form."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ArgumentError("unknown form", where="GELU", expected="'none' or 'tanh'", got=approximate)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(Module):
    """x * sigmoid(x)."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return F.tanh(x)


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        return F.sigmoid(x)


class Identity(Module):
    """Its input; takes and ignores any arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class Flatten(Module):
    """(N, C, H, W) -> (N, C*H*W)."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(self.start_dim, self.end_dim)


class Dropout(Module):
    """Zero elements with probability p in training."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ArgumentError("dropout's p", where="Dropout", expected="0 <= p < 1", got=p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class BatchNorm2d(Module):
    """Batch normalisation of (N, C, H, W) over all axes but C (Ioffe & Szegedy 2015).

    Raises UnsupportedError for affine=False, track_running_stats=False and momentum=None.
    """

    running_mean: Buffer
    running_var: Buffer

    ndim, takes = 4, "(N, C, H, W)"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        if not affine or not track_running_stats or momentum is None:
            raise UnsupportedError(
                "batch norm without affine, running statistics or momentum",
                where=type(self).__name__,
                expected="affine=True, track_running_stats=True, a float momentum",
                got=f"affine={affine}, track_running_stats={track_running_stats}, momentum={momentum}",
                remedy="leave them at their defaults; requires_grad_(False) freezes scale and shift",
            )
        if num_features < 1 or eps < 0:
            raise ArgumentError(
                "a value out of range",
                where=type(self).__name__,
                expected="num_features >= 1 and eps >= 0",
                got=f"num_features={num_features}, eps={eps}",
            )
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = Parameter(np.ones(num_features, np.float32))
        self.bias = Parameter(np.zeros(num_features, np.float32))
        self.register_buffer("running_mean", np.zeros(num_features, np.float32))
        self.register_buffer("running_var", np.ones(num_features, np.float32))
        self.register_buffer("num_batches_tracked", np.zeros((), np.int64))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.ndim:
            raise ShapeError(
                f"{type(self).__name__} takes {self.takes}",
                where=x.trace.layer,
                expected=self.takes,
                got=x.shape,
                remedy="use BatchNorm2d on images (N, C, H, W), BatchNorm1d on features (N, C)",
            )
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class BatchNorm1d(BatchNorm2d):
    """Batch normalisation of (N, C)."""

    ndim, takes = 2, "(N, C)"


class CrossEntropyLoss(Module):
    """Mean cross entropy of logits and class numbers. Raises UnsupportedError for weight, ignore_index, reduction != 'mean'."""

    def __init__(
        self,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None or ignore_index != -100 or reduction != "mean":
            raise UnsupportedError(
                "class weights, ignore_index and other reductions",
                where="CrossEntropyLoss",
                expected="weight=None, ignore_index=-100, reduction='mean'",
                got=f"weight={weight}, ignore_index={ignore_index}, reduction={reduction!r}",
                remedy="leave them at their defaults; leave samples out of the data set to ignore them",
            )
        if not 0 <= label_smoothing < 1:
            expected = "0 <= label_smoothing < 1"
            raise ArgumentError(
                "a value out of range", where="CrossEntropyLoss", expected=expected, got=label_smoothing
            )
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, target: Tensor) -> Loss:
        return F.cross_entropy(x, target, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"


class MSELoss(Module):
    """Mean of (x - target)^2. Raises UnsupportedError for reduction != 'mean'."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction != "mean":
            raise UnsupportedError(
                "another reduction", where="MSELoss", expected="'mean'", got=reduction, remedy="scale the learning rate"
            )

    def forward(self, x: Tensor, target: Tensor) -> Loss:
        return F.mse_loss(x, target)
