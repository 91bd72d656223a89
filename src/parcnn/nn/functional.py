"""torch.nn.functional's names on symbolic tensors: each checks its shapes and writes its op into the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from numbers import Integral
from typing import Any, NoReturn

from parcnn.errors import ArgumentError, ShapeError, UnknownNameError, UnsupportedError
from parcnn.ops.base import ACTIVATIONS, ZERO_AT_ZERO, Value, image_of, pair
from parcnn.ops.conv import ConvFprop
from parcnn.ops.loss import CrossEntropy, MeanSquaredError
from parcnn.ops.norm import BatchNormInfer, BatchNormTrain
from parcnn.ops.pointwise import Act, Dropout
from parcnn.ops.pool import AdaptiveAvgFprop, PoolFprop
from parcnn.plan.trace import Tensor, flatten
from parcnn.plan.variable import Packing, Variable

IntPair = int | tuple[int, int]
OutputSize = int | tuple[int | None, int | None] | None


@dataclass(frozen=True)
class Loss:
    """The result of a loss function: a scalar that training minimises, and the count of right answers where there is one."""

    value: Value
    correct: Value | None = None


def conv2d(
    x: Tensor,
    weight: Variable,
    bias: Variable | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation of x (N,C,H,W) with weight (K,C/groups,R,S), torch.nn.functional.conv2d's arguments.

    padding: an int, a pair, 'valid', or 'same' (stride 1; an odd total puts one more row and column at the end).
    groups: the first K/groups filters see the first C/groups channels, and so on; groups = C is a depthwise convolution.
    Raises ShapeError (channels, kernel larger than the padded image), ArgumentError (also where groups does not divide K),
    UnsupportedError (a weight that layers share got zeros by an earlier plan that lacks this one: `parcnn.plan.channels`).
    """
    _need_image(x, "conv2d")
    where = x.trace.layer
    k, c, r, s = weight.shape
    conv_groups(groups, k, "filters", where)
    if x.shape[1] != c * groups:
        raise ShapeError(
            "the input has another number of channels than the filter",
            where=where,
            expected=f"(N, {c * groups}, H, W)",
            got=x.shape,
            remedy=f"in_channels={x.shape[1]} fits this input",
        )
    stride, dilation = _sizes("stride", stride, 1, where), _sizes("dilation", dilation, 1, where)
    pad = conv_padding(padding, stride, dilation, (r, s), where)
    op = ConvFprop(stride=stride, pad=pad, dilation=dilation, groups=int(groups), bias=bias is not None)
    n, _, h, w = x.shape
    p, q = op.output_hw(h, w, r, s)
    if p < 1 or q < 1:
        raise ShapeError(
            "the kernel is larger than the padded image",
            where=where,
            expected=f"an image of at least {dilation[0] * (r - 1) + 1}x{dilation[1] * (s - 1) + 1} with its padding",
            got=f"{h + pad[0] + pad[2]}x{w + pad[1] + pad[3]}",
            remedy="use a smaller kernel, more padding, or fewer pools before this layer",
        )
    filters = x.trace.variable(weight, Packing((k, c, r, s)))
    if 1 < groups == k == x.shape[1]:  # depthwise: channels of zeros are groups of their own
        op, k = replace(op, groups=filters.shape[0]), filters.shape[0]
    if groups > 1:  # zeros behind a group's channels would not be behind all
        _need_same_zeros(filters, (k, r, s, c), where)
    return Tensor(x.trace, _convolve(x, op, filters, bias), (n, weight.shape[0], p, q))


def _convolve(x: Tensor, op: ConvFprop, filters: Value, bias: Variable | None) -> Value:
    """Emit a convolution, on the channels that its filters have, zeros among them. Raises UnsupportedError."""
    operands = [x.image(filters.shape[3] * op.groups), filters]
    if bias is not None:
        operands.append(x.trace.variable(bias))
        _need_same_zeros(operands[2], filters.shape[:1], x.trace.layer)
    return x.trace.emit(op, *operands)[0]


def _need_same_zeros(weight: Value, shape: tuple[int, ...], where: str) -> None:
    """Raise UnsupportedError where a weight that layers share has zeros that fit those of the first plan alone."""
    if weight.shape != shape:
        raise UnsupportedError(
            f"{weight.label} is shared with a layer of an earlier plan, where it got channels of zeros",
            where=where,
            expected=f"{shape} in memory",
            got=weight.shape,
            remedy="give Options(pad_channels=False)",
        )


def conv_groups(groups: Any, channels: int, what: str, where: str) -> None:
    """Raises ArgumentError where `groups` is no positive int that divides `channels`, which are the layer's `what`."""
    if not isinstance(groups, Integral) or groups < 1:
        raise ArgumentError("groups is a positive int", where=where, expected=">= 1", got=groups)
    if channels % groups:
        raise ArgumentError(
            f"groups does not divide the {what}",
            where=where,
            expected=f"a divisor of {channels}",
            got=f"groups={groups}",
            remedy=f"use a multiple of {groups} as the number of {what}, or other groups",
        )


def conv_padding(
    padding: IntPair | str, stride: tuple[int, int], dilation: tuple[int, int], kernel: tuple[int, int], where: str
) -> tuple[int, int, int, int]:
    """Padding as (top, left, bottom, right), by torch's rules. Raises ArgumentError."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ArgumentError(
                "padding='same' needs stride 1 (torch's rule)",
                where=where,
                expected="stride=1",
                got=f"stride={stride}",
                remedy="give the padding as numbers",
            )
        total = [d * (n - 1) for d, n in zip(dilation, kernel, strict=True)]
        return (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    if isinstance(padding, str):
        raise ArgumentError("unknown padding", where=where, expected="an int, a pair, 'same' or 'valid'", got=padding)
    top, left = _sizes("padding", padding, 0, where)
    return (top, left, top, left)


def _sizes(name: str, value: int | tuple[int, ...], least: int, where: str) -> tuple[int, int]:
    """A pair of sizes that are at least `least`. Raises ArgumentError."""
    sizes = pair(value, where)
    if min(sizes) < least:
        raise ArgumentError(f"{name} is too small", where=where, expected=f"{name} of at least {least}", got=value)
    return sizes


def linear(x: Tensor, weight: Variable, bias: Variable | None = None) -> Tensor:
    """x (N, in) @ weight (out, in)^T + bias. Runs as a convolution: after a flattened image its filter covers that image.

    Raises ShapeError when the features differ, UnsupportedError as `conv2d` does.
    """
    _need_tensor(x, "linear")
    out_features, in_features = weight.shape
    if x.ndim != 2 or x.shape[1] != in_features:
        remedy = f"in_features={x.shape[1]} fits this input" if x.ndim == 2 else "flatten the image first: x.flatten(1)"
        expected = (x.shape[0], in_features)
        raise ShapeError(
            "the input does not fit the weight", where=x.trace.layer, expected=expected, got=x.shape, remedy=remedy
        )
    h, w = image_of(x.value) if len(x.value.shape) == 4 else (1, 1)
    filters = x.trace.variable(weight, Packing((out_features, x.channels, h, w)))
    value = _convolve(x, ConvFprop(bias=bias is not None), filters, bias)
    return Tensor(x.trace, value, (x.shape[0], out_features))


def _pool(x: Tensor, op: PoolFprop) -> Tensor:
    n, c, h, w = x.shape
    where = x.trace.layer
    if op.pad[0] * 2 > op.kernel[0] or op.pad[1] * 2 > op.kernel[1]:
        limit = (op.kernel[0] // 2, op.kernel[1] // 2)
        raise ArgumentError("a pool's padding is at most half its window", where=where, expected=limit, got=op.pad)
    p, q = op.output_hw(h, w)
    if p < 1 or q < 1:
        window = [d * (k - 1) + 1 for d, k in zip(op.dilation, op.kernel, strict=True)]
        raise ShapeError(
            "the pool's window is larger than the padded image",
            where=where,
            expected=f"an image of at least {window[0]}x{window[1]} with its padding",
            got=f"{h + 2 * op.pad[0]}x{w + 2 * op.pad[1]}",
            remedy="use a smaller window or fewer pools before this layer",
        )
    value = x.trace.emit(op, x.exact if op.may_miss else x.value)[0]  # the maximum of no pixels is no zero
    return Tensor(x.trace, value, (n, c, p, q))


def max_pool2d(
    x: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Maximum over windows of x (N,C,H,W). Raises ShapeError, ArgumentError, UnsupportedError (return_indices)."""
    _need_image(x, "max_pool2d")
    if return_indices:
        raise UnsupportedError(
            "a pool's indices are not given", where=x.trace.layer, expected="return_indices=False", got=True,
            remedy="leave return_indices out",
        )  # fmt: skip
    kernel, strides, pad = _window(kernel_size, stride, padding, x.trace.layer)
    steps = _sizes("dilation", dilation, 1, x.trace.layer)
    return _pool(x, PoolFprop("max", kernel, strides, pad, steps, ceil_mode))


def avg_pool2d(
    x: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows of x (N,C,H,W). Raises ShapeError, ArgumentError."""
    _need_image(x, "avg_pool2d")
    where = x.trace.layer
    kernel, strides, pad = _window(kernel_size, stride, padding, where)
    if divisor_override == 0:
        raise ArgumentError("divisor_override", where=where, expected="a number other than 0, or None", got=0)
    op = PoolFprop("avg", kernel, strides, pad, (1, 1), ceil_mode, count_include_pad, divisor_override)
    return _pool(x, op)


def _window(
    kernel_size: IntPair, stride: IntPair | None, padding: IntPair, where: str
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride (the kernel's if not given) and padding of a pool. Raises ArgumentError."""
    kernel = _sizes("kernel_size", kernel_size, 1, where)
    strides = kernel if stride is None else _sizes("stride", stride, 1, where)
    return kernel, strides, _sizes("padding", padding, 0, where)


def adaptive_avg_pool2d(x: Tensor, output_size: OutputSize) -> Tensor:
    """Mean over windows chosen so that the output is output_size (None keeps a dimension)."""
    _need_image(x, "adaptive_avg_pool2d")
    n, c = x.shape[:2]
    p, q = _output_size(x, output_size)
    (value,) = x.trace.emit(AdaptiveAvgFprop(out=(p, q)), x.value)
    return Tensor(x.trace, value, (n, c, p, q))


def _output_size(x: Tensor, output_size: OutputSize) -> tuple[int, int]:
    """output_size with its Nones filled in. Raises ArgumentError."""
    size = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    filled = tuple(have if want is None else want for want, have in zip(size, x.shape[2:], strict=False))
    return _sizes("output_size", filled, 1, x.trace.layer)


def adaptive_max_pool2d(x: Tensor, output_size: OutputSize) -> Tensor:
    """Maximum over equal windows. Raises UnsupportedError when the image does not divide evenly."""
    _need_image(x, "adaptive_max_pool2d")
    p, q = _output_size(x, output_size)
    h, w = x.shape[2:]
    if h % p or w % q:
        raise UnsupportedError(
            "adaptive_max_pool2d with windows of different size",
            where=x.trace.layer,
            expected=f"an image whose sides are multiples of {(p, q)}",
            got=(h, w),
            remedy="use output_size=1, an image size that divides evenly, or AdaptiveAvgPool2d",
        )
    return max_pool2d(x, (h // p, w // q))


def _activation(x: Tensor, kind: str) -> Tensor:
    _need_tensor(x, kind)
    if kind not in ACTIVATIONS:
        raise ArgumentError("unknown activation", where=x.trace.layer, expected=ACTIVATIONS, got=kind)
    (value,) = x.trace.emit(Act(kind), x.value if kind in ZERO_AT_ZERO else x.exact)
    return x.with_value(value)


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0). Whether it happens in place is the plan's choice."""
    return _activation(x, "relu")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x * Phi(x) (Hendrycks & Gimpel 2016); approximate='tanh' for its tanh form."""
    return _activation(x, {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate, f"gelu({approximate})"))


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """x * sigmoid(x) (Elfwing et al. 2018)."""
    return _activation(x, "silu")


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    return _activation(x, "tanh")


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _activation(x, "sigmoid")


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p and scale the rest by 1/(1-p), in training plans (Srivastava et al. 2014)."""
    _need_tensor(x, "dropout")
    if not 0 <= p < 1:
        raise ArgumentError("dropout's p", where=x.trace.layer, expected="0 <= p < 1", got=p)
    trace = x.trace
    if not (training and trace.training) or p == 0 or trace.state is None:
        return x
    (value,) = trace.emit(Dropout(p, trace.dropouts), x.value, trace.state)
    trace.dropouts += 1
    return x.with_value(value)


def batch_norm(
    x: Tensor,
    running_mean: Variable,
    running_var: Variable,
    weight: Variable,
    bias: Variable,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel of x (N,C,H,W) or (N,C). Raises ShapeError when the channels differ."""
    _need_tensor(x, "batch_norm")
    trace = x.trace
    c = weight.shape[0]
    if x.ndim not in (2, 4) or x.shape[1] != c:
        raise ShapeError(
            "batch norm over another number of channels",
            where=trace.layer,
            expected=f"(N, {c}, H, W) or (N, {c})",
            got=x.shape,
            remedy=f"num_features={x.shape[1]} fits this input",
        )
    operands = [trace.variable(v) for v in (weight, bias, running_mean, running_var)]
    is_flat = x.ndim == 2 and prod(x.value.shape[1:-1]) > 1  # an image, whose features are in another order
    value = (x.with_value(x.in_user_order()) if is_flat else x).with_channels(operands[0].shape[0])
    batch_statistics = training and trace.training
    if batch_statistics and x.numel() == c:
        raise ShapeError(
            "batch norm needs more than one value a channel in training",
            where=trace.layer,
            expected="at least two values a channel",
            got=x.shape,
            remedy="use a batch of at least 2",
        )
    op = BatchNormTrain(eps, momentum) if batch_statistics else BatchNormInfer(eps)
    return x.with_value(trace.emit(op, value, *operands)[0])


def cross_entropy(x: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Mean cross entropy of logits (N, classes) and class numbers (N). Raises ShapeError, ArgumentError."""
    trace = x.trace
    if x.ndim != 2 or target.value.dtype != "i32" or target.shape != (x.shape[0],):
        raise ShapeError(
            "cross entropy takes logits (N, classes) and class numbers (N)",
            where=trace.layer,
            expected=f"(N, classes) f32 and ({x.shape[0]},) i32",
            got=f"{x.shape} and {target.shape} {target.value.dtype}",
            remedy="flatten the output, or use MSELoss for float targets",
        )
    if not 0 <= label_smoothing < 1:
        raise ArgumentError(
            "label_smoothing", where=trace.layer, expected="0 <= label_smoothing < 1", got=label_smoothing
        )
    op = CrossEntropy(label_smoothing, trace.training)
    loss, correct, *_ = trace.emit(op, x.in_user_order(), target.value)
    return Loss(loss, correct)


def mse_loss(x: Tensor, target: Tensor) -> Loss:
    """Mean of (x - target)^2 over all elements. Raises ShapeError."""
    if x.ndim != 2 or x.shape != target.shape or target.value.dtype == "i32":
        raise ShapeError(
            "MSE needs float targets of the output's shape",
            where=x.trace.layer,
            expected=f"an output (N, F) and float targets of its shape, here {x.shape}",
            got=f"{target.shape} {target.value.dtype}",
            remedy="flatten the output, and use CrossEntropyLoss for class numbers",
        )
    return Loss(x.trace.emit(MeanSquaredError(x.trace.training), x.in_user_order(), target.value)[0])


def _need_tensor(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise UnsupportedError(
            "a function was called on something that is not a tensor of a plan",
            where=name,
            expected="a tensor of forward()",
            got=type(x).__name__,
            remedy="call it inside a Module's forward(); parcnn.predict(model, array) runs a model on a NumPy array",
        )


def _need_image(x: Any, name: str) -> None:
    _need_tensor(x, name)
    if x.ndim != 4:
        raise ShapeError(
            f"{name} takes images",
            where=x.trace.layer,
            expected="(N, C, H, W)",
            got=x.shape,
            remedy="put it before flatten, or x.view(n, c, h, w) the features into an image",
        )


def raise_unknown(room: str, name: str, known: Sequence[str]) -> NoReturn:
    """Raise UnknownNameError for a name that `room` does not have; AttributeError for what Python itself asks for."""
    if name.startswith("_"):
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    raise UnknownNameError(
        f"there is no {name!r}",
        where=room,
        expected=", ".join(known),
        remedy="build it from these, with +, cat and views",
    )


__all__ = [
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "batch_norm", "conv2d", "cross_entropy", "dropout",
    "flatten", "gelu", "linear", "max_pool2d", "mse_loss", "relu", "sigmoid", "silu", "tanh",
]  # fmt: skip


def __getattr__(name: str) -> NoReturn:
    raise_unknown("parcnn.nn.functional", name, __all__)
