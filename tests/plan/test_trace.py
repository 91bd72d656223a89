"""Shapes by torch's rules, torch's element order through views, and every error that a wrong network gets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil, floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parcnn import cat, flatten, nn
from parcnn.cpu import CpuExecutor
from parcnn.errors import ArgumentError, ParcnnError, ShapeError, UnknownNameError, UnsupportedError
from parcnn.nn import functional as F
from parcnn.ops.base import Spec
from parcnn.plan.build import build
from parcnn.plan.describe import describe
from parcnn.plan.trace import Tensor
from parcnn.train import Trainer
from tests.plan.step import Step, feed_of, lay_out, make_plan

Compute = Callable[[Tensor], Any]


class Net(nn.Module):
    def __init__(self, compute: Compute, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.compute = compute
        if layer is not None:
            self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.compute(x)


def _shape(cpu: CpuExecutor, compute: Compute, shape: tuple[int, ...]) -> tuple[int, ...]:
    model = compute if isinstance(compute, nn.Module) else Net(compute)
    plan = make_plan(cpu, model, np.zeros(shape), np.zeros(shape[0], np.int32), mode="predict")
    return plan.output_shape


def _predict(cpu: CpuExecutor, compute: Compute, x: np.ndarray) -> np.ndarray:
    """What a function on tensors gives for an array, in logical order; always of two dimensions."""
    targets = np.zeros(len(x), np.int32)
    layer = compute if isinstance(compute, nn.Module) else None
    plan = make_plan(cpu, Net(lambda t: flatten(compute(t), 1), layer), x, targets, mode="predict")
    step = Step(cpu, plan, x, targets)
    step.fill()
    step.loaded.run()
    return step.regions["out"].read(Spec((len(x), plan.output_shape[1]), "f64"))


# -- shapes -----------------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SMALL = st.tuples(st.integers(1, 3), st.integers(1, 3))


def _conv_extent(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """torch.nn.Conv2d's documentation."""
    return floor((size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1)


@given(image=SIZES, kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), stride=SMALL, pad=SMALL, dilation=SMALL)
def test_convolution(cpu: CpuExecutor, image: Any, kernel: Any, stride: Any, pad: Any, dilation: Any) -> None:
    expected = tuple(map(_conv_extent, image, kernel, stride, pad, dilation))
    layer = nn.Conv2d(3, 5, kernel, stride, pad, dilation)
    if min(expected) >= 1:
        assert _shape(cpu, layer, (2, 3, *image)) == (2, 5, *expected)
    else:
        with pytest.raises(ShapeError, match="kernel is larger than the padded image"):
            _shape(cpu, layer, (2, 3, *image))


@given(image=SIZES, kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), dilation=SMALL)
def test_same_padding_keeps_the_image(cpu: CpuExecutor, image: Any, kernel: Any, dilation: Any) -> None:
    layer = nn.Conv2d(1, 2, kernel, padding="same", dilation=dilation)
    assert _shape(cpu, layer, (2, 1, *image)) == (2, 2, *image)


def test_same_padding_of_an_even_kernel_is_longer_at_the_end(cpu: CpuExecutor) -> None:
    """A 2x2 kernel sees its own pixel and the ones right of and below it."""
    layer = nn.Conv2d(1, 1, 2, padding="same", bias=False)
    layer.weight.assign(np.array([[[[1, 10], [100, 1000]]]], np.float32))
    x = np.array([[[[1, 2], [3, 4]]]], np.float64)
    result = _predict(cpu, layer, x)
    np.testing.assert_array_equal(result, [[1 + 20 + 300 + 4000, 2 + 400, 3 + 40, 4]])


def _pool_extent(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> int:
    """torch's pooling rule: with ceil_mode a window must start inside the image or its left padding."""
    out = (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1
    if not ceil_mode:
        return floor(out)
    return ceil(out) - 1 if (ceil(out) - 1) * stride >= size + pad else ceil(out)


@given(
    image=SIZES, kernel=st.integers(1, 4), stride=st.integers(1, 4), pad=st.integers(0, 2), dilation=st.integers(1, 2),
    ceil_mode=st.booleans(), average=st.booleans(),
)  # fmt: skip
def test_pools(
    cpu: CpuExecutor, image: Any, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool, average: bool
) -> None:
    pad = min(pad, kernel // 2)
    dilation = 1 if average else dilation
    expected = tuple(_pool_extent(size, kernel, stride, pad, dilation, ceil_mode) for size in image)
    if average:
        layer = nn.AvgPool2d(kernel, stride, pad, ceil_mode)
    else:
        layer = nn.MaxPool2d(kernel, stride, pad, dilation, ceil_mode=ceil_mode)
    if min(expected) >= 1:
        assert _shape(cpu, layer, (2, 3, *image)) == (2, 3, *expected)
    else:
        with pytest.raises(ShapeError, match="window is larger than the padded image"):
            _shape(cpu, layer, (2, 3, *image))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.MaxPool2d(3), (2, 3)),
        (nn.MaxPool2d((2, 5), (3, 1)), (2, 7)),
        (nn.AvgPool2d(2), (3, 5)),
        (nn.AdaptiveAvgPool2d(4), (4, 4)),
        (nn.AdaptiveAvgPool2d((9, None)), (9, 11)),
        (nn.AdaptiveAvgPool2d((None, 20)), (7, 20)),
        (nn.AdaptiveMaxPool2d(1), (1, 1)),
        (nn.AdaptiveMaxPool2d((7, 11)), (7, 11)),
        (nn.AdaptiveMaxPool2d((None, 1)), (7, 1)),
        (nn.Identity(1, two=2), (7, 11)),
        (nn.BatchNorm2d(3), (7, 11)),
        (nn.Dropout(0.3), (7, 11)),
        (nn.GELU(), (7, 11)),
    ],
)
def test_layers_of_images(cpu: CpuExecutor, layer: nn.Module, expected: tuple[int, int]) -> None:
    assert _shape(cpu, layer, (2, 3, 7, 11)) == (2, 3, *expected)


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda x: x.view(x.size(0), -1), (2, 231)),
        (lambda x: x.view((x.size(0), -1)), (2, 231)),
        (lambda x: x.reshape(x.shape[0], 231), (2, 231)),
        (lambda x: x.reshape(-1, 3 * 7 * 11), (2, 231)),
        (lambda x: x.flatten(1), (2, 231)),
        (lambda x: x.flatten(-3, -1), (2, 231)),
        (lambda x: flatten(x, 1), (2, 231)),
        (lambda x: x.flatten(1).flatten(1), (2, 231)),
        (lambda x: x.flatten(1, 1), (2, 3, 7, 11)),
        (lambda x: x.view(*x.size()), (2, 3, 7, 11)),
        (lambda x: x.flatten(1).view(2, 7, 11, -1), (2, 7, 11, 3)),
        (lambda x: x.mean((2, 3)), (2, 3)),
        (lambda x: x.mean(dim=[-1, -2]), (2, 3)),
        (lambda x: x.mean((2, 3), keepdim=True), (2, 3, 1, 1)),
        (lambda x: cat([x, x, x], 1), (2, 9, 7, 11)),
        (lambda x: cat((x, x), dim=-3), (2, 6, 7, 11)),
        (lambda x: cat([x.flatten(1), x.mean((2, 3))], -1), (2, 234)),
        (lambda x: cat([x], 1) + x, (2, 3, 7, 11)),
        (lambda x: x.contiguous(), (2, 3, 7, 11)),
    ],
)
def test_shapes_of_torch_idioms(cpu: CpuExecutor, compute: Compute, expected: tuple[int, ...]) -> None:
    assert _shape(cpu, compute, (2, 3, 7, 11)) == expected


def test_what_a_tensor_says_of_itself(cpu: CpuExecutor) -> None:
    def compute(x: Tensor) -> Tensor:
        assert x.shape == x.size() == (2, 3, 7, 11)
        assert (x.size(1), x.size(-1), x.dim(), x.ndim, x.numel()) == (3, 11, 4, 4, 462)
        n, c, h, w = x.shape
        assert repr(x) == "Tensor(2, 3, 7, 11) of model"
        return x.view(n, c * h * w)

    assert _shape(cpu, compute, (2, 3, 7, 11)) == (2, 231)


# -- torch's order of elements ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "same"),
    [
        (lambda x: x.flatten(1), lambda x: x.reshape(2, -1)),
        (lambda x: F.relu(x.flatten(1)), lambda x: np.maximum(x, 0).reshape(2, -1)),
        (lambda x: x.flatten(1).view(2, 5, 4, 3), lambda x: x),
        (lambda x: F.max_pool2d(x.flatten(1).view(2, 6, 5, 2), 2), lambda x: _max2(x.reshape(2, 6, 5, 2))),
        (lambda x: F.max_pool2d(x.flatten(1).view(2, 3, 4, 5), 2), lambda x: _max2(x.reshape(2, 3, 4, 5))),
        (lambda x: cat([x, x + x], 1), lambda x: np.concatenate([x, 2 * x], 1)),
        (
            lambda x: cat([x.flatten(1), x.view(2, -1) + x.flatten(1).view(2, 5, 3, 4).flatten(1)], 1),
            lambda x: np.concatenate([x.reshape(2, -1), 2 * x.reshape(2, -1)], 1),
        ),
        (lambda x: x.mean((2, 3)), lambda x: x.mean((2, 3))),
        (lambda x: x.flatten(1) + x.flatten(1).view(2, 10, 3, 2).flatten(1), lambda x: 2 * x),
    ],
)
def test_views_keep_torchs_order(cpu: CpuExecutor, compute: Compute, same: Callable[[np.ndarray], np.ndarray]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 3))
    np.testing.assert_allclose(_predict(cpu, compute, x), same(x).reshape(2, -1), rtol=1e-14)


def _max2(x: np.ndarray) -> np.ndarray:
    n, c, h, w = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def test_an_input_of_features(cpu: CpuExecutor) -> None:
    x = np.random.default_rng(0).standard_normal((2, 12))
    np.testing.assert_array_equal(_predict(cpu, lambda t: t.view(2, 3, 2, 2), x), x)


# -- errors -----------------------------------------------------------------------------------------------------------

BAD_FUNCTIONS: list[tuple[str, Compute, type[ParcnnError]]] = [
    ("view of other size", lambda x: x.view(2, 100), ShapeError),
    ("view of two unknowns", lambda x: x.view(-1, -1), ShapeError),
    ("view that splits unevenly", lambda x: x.view(2, 4, -1), ShapeError),
    ("view that joins batches", lambda x: x.view(1, -1), UnsupportedError),
    ("view of three dimensions", lambda x: x.view(2, 3, -1), UnsupportedError),
    ("transposing view", lambda x: x.view(2, 7, 3, 11), UnsupportedError),
    ("flatten everything", lambda x: x.flatten(), UnsupportedError),
    ("flatten what is not there", lambda x: x.flatten(4), ShapeError),
    ("flatten to what is not there", lambda x: x.flatten(1, 7), ShapeError),
    ("mean over channels", lambda x: x.mean(1), UnsupportedError),
    ("mean over everything", lambda x: x.mean(), UnsupportedError),
    ("mean of features", lambda x: x.flatten(1).mean(1), UnsupportedError),
    ("sum with a number", lambda x: x + 1, UnsupportedError),
    ("sum of a number", lambda x: 1.0 + x, UnsupportedError),
    ("sum of two shapes", lambda x: x + x.flatten(1), ShapeError),
    ("product", lambda x: x * 2, UnsupportedError),
    ("difference", lambda x: x - x, UnsupportedError),
    ("quotient", lambda x: 1 / x, UnsupportedError),
    ("negative", lambda x: -x, UnsupportedError),
    ("index", lambda x: x[:, 0], UnsupportedError),
    ("unpacking", lambda x: next(iter(x)), UnsupportedError),
    ("condition", lambda x: F.relu(x) if x else x, UnsupportedError),
    ("unknown method", lambda x: x.permute(0, 2, 3, 1), UnknownNameError),
    ("cat along rows", lambda x: cat([x, x]), UnsupportedError),
    ("cat along a dimension that is not there", lambda x: cat([x, x], 5), UnsupportedError),
    ("cat of nothing", lambda x: cat([], 1), UnsupportedError),
    ("cat of an array", lambda x: cat([x, np.zeros(3)], 1), UnsupportedError),
    ("cat of two sizes", lambda x: cat([x, F.max_pool2d(x, 2)], 1), ShapeError),
    ("cat of image and features", lambda x: cat([x, x.flatten(1)], 1), ShapeError),
    ("pool of features", lambda x: F.max_pool2d(x.flatten(1), 2), ShapeError),
    ("pool too large", lambda x: F.max_pool2d(x, 8), ShapeError),
    ("pool too large when dilated", lambda x: F.max_pool2d(x, 4, dilation=3), ShapeError),
    ("pool padded too much", lambda x: F.avg_pool2d(x, 2, padding=2), ArgumentError),
    ("pool of no size", lambda x: F.max_pool2d(x, 0), ArgumentError),
    ("pool of no stride", lambda x: F.max_pool2d(x, 2, 0), ArgumentError),
    ("pool of no dilation", lambda x: F.max_pool2d(x, 2, dilation=0), ArgumentError),
    ("pool of negative padding", lambda x: F.avg_pool2d(x, 2, padding=-1), ArgumentError),
    ("pool divided by nothing", lambda x: F.avg_pool2d(x, 2, divisor_override=0), ArgumentError),
    ("pool's indices", lambda x: F.max_pool2d(x, 2, return_indices=True), UnsupportedError),
    ("a triple", lambda x: F.max_pool2d(x, (2, 2, 2)), ArgumentError),
    ("a text", lambda x: F.avg_pool2d(x, "2"), ArgumentError),
    ("adaptive pool to nothing", lambda x: F.adaptive_avg_pool2d(x, 0), ArgumentError),
    ("uneven adaptive maximum", lambda x: F.adaptive_max_pool2d(x, 2), UnsupportedError),
    ("adaptive maximum to nothing", lambda x: F.adaptive_max_pool2d(x, 0), ArgumentError),
    ("unknown GELU", lambda x: F.gelu(x, "erf"), ArgumentError),
    ("dropout of everything", lambda x: F.dropout(x, 1.0), ArgumentError),
    ("negative dropout", lambda x: F.dropout(x, -0.1), ArgumentError),
]


@pytest.mark.parametrize(
    ("compute", "error"), [(c, e) for _, c, e in BAD_FUNCTIONS], ids=[n for n, _, _ in BAD_FUNCTIONS]
)
def test_what_forward_must_not_do(cpu: CpuExecutor, compute: Compute, error: type[ParcnnError]) -> None:
    """Inside a named submodule: the error names it, and says what to do."""
    model = nn.Sequential(nn.Identity(), Net(compute))
    with pytest.raises(error) as caught:
        _shape(cpu, model, (2, 3, 7, 11))
    _check(caught.value, "cat" if caught.value.got == [] else "1")


def _check(error: ParcnnError, where: str) -> None:
    assert error.where == where, str(error)
    assert error.expected is not None or error.remedy, f"neither what was expected nor what to do: {error}"
    if isinstance(error, ShapeError | UnsupportedError):
        assert error.remedy, f"no remedy: {error}"


BAD_LAYERS: list[tuple[str, Callable[[], nn.Module], type[ParcnnError]]] = [
    ("channels", lambda: nn.Conv2d(4, 5, 3), ShapeError),
    ("kernel larger than the image", lambda: nn.Conv2d(3, 5, (8, 3)), ShapeError),
    ("dilated kernel larger than the image", lambda: nn.Conv2d(3, 5, 3, padding=1, dilation=5), ShapeError),
    ("linear on an image", lambda: nn.Linear(11, 5), ShapeError),
    ("features", lambda: nn.Sequential(nn.Flatten(), nn.Linear(230, 5)), ShapeError),
    ("batch norm's channels", lambda: nn.BatchNorm2d(5), ShapeError),
    ("batch norm of images on features", lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm2d(231)), ShapeError),
    ("batch norm of features on images", lambda: nn.BatchNorm1d(3), ShapeError),
]


@pytest.mark.parametrize(("layer", "error"), [(c, e) for _, c, e in BAD_LAYERS], ids=[n for n, _, _ in BAD_LAYERS])
def test_layers_that_do_not_fit(cpu: CpuExecutor, layer: Callable[[], nn.Module], error: type[ParcnnError]) -> None:
    built = layer()
    with pytest.raises(error) as caught:
        _shape(cpu, nn.Sequential(nn.Identity(), built), (2, 3, 7, 11))
    _check(caught.value, "1.1" if isinstance(built, nn.Sequential) else "1")


@pytest.mark.parametrize(
    "arguments",
    [{"stride": 0}, {"dilation": 0}, {"padding": -1}, {"padding": "full"}, {"padding": "same", "stride": 2}],
)
def test_sizes_of_a_convolution(cpu: CpuExecutor, arguments: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 2, 3)
    with pytest.raises(ArgumentError) as caught:
        _shape(cpu, nn.Sequential(Net(lambda x: F.conv2d(x, layer.weight, **arguments), layer)), (2, 3, 7, 11))
    _check(caught.value, "0")


@pytest.mark.parametrize(
    ("groups", "error"),
    [(2, ArgumentError), (0, ArgumentError), (3.0, ArgumentError), (9, ShapeError), (1, ShapeError)],
)
def test_groups_of_a_convolution(cpu: CpuExecutor, groups: Any, error: type[ParcnnError]) -> None:
    layer = nn.Conv2d(3, 9, 3, groups=3)
    with pytest.raises(error) as caught:
        _shape(cpu, nn.Sequential(Net(lambda x: F.conv2d(x, layer.weight, groups=groups), layer)), (2, 3, 7, 11))
    _check(caught.value, "0")


def test_a_grouped_convolution_has_its_shape_and_flops(cpu: CpuExecutor) -> None:
    model = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=3)
    assert _shape(cpu, model, (2, 6, 7, 11)) == (2, 12, 4, 6)
    plan = make_plan(cpu, model, np.zeros((2, 6, 7, 11)), np.zeros(2, np.int32), mode="predict")
    assert [row.flops for row in describe(plan, cpu) if row.op == "conv_fprop"] == [2 * 2 * 4 * 6 * 12 * 9 * 2]


def test_the_message_is_for_people(cpu: CpuExecutor) -> None:
    with pytest.raises(ShapeError) as caught:
        _shape(cpu, nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(200, 10)), (2, 3, 7, 11))
    assert str(caught.value) == (
        "2: the input does not fit the weight\n"
        "  expected: (2, 200)\n"
        "  got:      (2, 270)\n"
        "  remedy:   in_features=270 fits this input"
    )


def test_batch_norm_of_single_values_is_for_inference(cpu: CpuExecutor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4))
    images, targets = np.zeros((1, 3, 1, 1)), np.zeros(1, np.int32)
    with pytest.raises(ShapeError, match="more than one value") as caught:
        make_plan(cpu, model, images, targets)
    _check(caught.value, "2")
    assert make_plan(cpu, model, images, targets, mode="eval").output_shape == (1, 4)


def test_batch_norm_of_a_flattened_image_has_torchs_order(cpu: CpuExecutor) -> None:
    """One scale for each pixel of each channel."""
    norm = nn.BatchNorm1d(2 * 3 * 2)
    scales = np.arange(1.0, 13.0)
    norm.weight.assign(scales)
    images = np.random.default_rng(0).standard_normal((3, 2, 3, 2))
    run = Trainer(nn.Sequential(nn.Flatten(), norm), device=cpu, precision="fp64")
    expected = images.reshape(3, 12) * scales / np.sqrt(1 + norm.eps)
    np.testing.assert_allclose(run.predict(images), expected, rtol=1e-12)


def test_labels_and_losses_that_do_not_fit(cpu: CpuExecutor) -> None:
    images, classes, floats = np.zeros((2, 3, 7, 11)), np.zeros(2, np.int32), np.zeros((2, 4))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(231, 5))
    image = nn.Sequential(nn.Identity())
    for model, targets, loss, error in [
        (image, classes, nn.CrossEntropyLoss(), ShapeError),
        (linear, floats, nn.CrossEntropyLoss(), ShapeError),
        (linear, floats, nn.MSELoss(), ShapeError),
        (linear, classes, nn.MSELoss(), ShapeError),
        (linear, classes, partial(F.cross_entropy, label_smoothing=1.0), ArgumentError),
    ]:
        for mode in ("train", "eval"):
            with pytest.raises(error) as caught:
                make_plan(cpu, model, images, targets, loss=loss, mode=mode)
            _check(caught.value, "loss")


def test_forward_must_return_a_tensor(cpu: CpuExecutor) -> None:
    for result in (None, 3, "text", ()):
        with pytest.raises(ShapeError) as caught:
            _shape(cpu, Net(lambda x, result=result: result), (2, 3, 7, 11))
        _check(caught.value, "Net")


def test_weights_must_belong_to_the_model(cpu: CpuExecutor) -> None:
    stranger = nn.Conv2d(3, 2, 1)
    with pytest.raises(ShapeError, match="not the model's own") as caught:
        _shape(cpu, nn.Sequential(Net(lambda x: F.conv2d(x, stranger.weight))), (2, 3, 7, 11))
    _check(caught.value, "0")


def test_one_weight_as_two_filters(cpu: CpuExecutor) -> None:
    linear = nn.Linear(12, 12)
    model = Net(lambda x: linear(linear(x.flatten(1))), linear)
    with pytest.raises(ShapeError, match="two filters") as caught:
        _shape(cpu, model, (2, 3, 2, 2))
    _check(caught.value, "layer.weight")


@pytest.mark.parametrize("function", ["relu", "sigmoid", "tanh", "silu", "gelu", "dropout"])
def test_functions_on_arrays(function: str) -> None:
    with pytest.raises(UnsupportedError, match="inside a Module's forward"):
        getattr(F, function)(np.zeros((2, 3)))


def test_modules_on_arrays() -> None:
    with pytest.raises(UnsupportedError, match=r"parcnn\.predict"):
        nn.Linear(3, 2)(np.zeros((2, 3)))
    with pytest.raises(UnsupportedError, match="inside a Module's forward"):
        F.max_pool2d(np.zeros((2, 3, 4, 4)), 2)


def test_unknown_mode_and_missing_loss(cpu: CpuExecutor) -> None:
    images, targets, model = np.zeros((2, 3)), np.zeros(2, np.int32), nn.Linear(3, 2)
    with pytest.raises(ArgumentError, match="unknown mode"):
        make_plan(cpu, model, images, targets, mode="test")
    feed, layout = feed_of(images, targets), lay_out(model)
    for mode in ("train", "eval"):
        with pytest.raises(ArgumentError, match="needs a loss"):
            build(model, mode=mode, batch=2, feed=feed, executor=cpu, layout=layout)


def test_hasattr_sees_what_a_tensor_lacks(cpu: CpuExecutor) -> None:
    def compute(x: Tensor) -> Tensor:
        assert not hasattr(x, "permute")
        assert hasattr(x, "flatten")
        return x

    assert _shape(cpu, compute, (2, 3)) == (2, 3)
