"""Initial values and the arguments that layers refuse."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import pytest

from parcnn import nn
from parcnn.errors import ArgumentError, ParcnnError, UnsupportedError
from parcnn.models import LeNet5


@pytest.fixture(autouse=True)
def seeded() -> None:
    nn.init.manual_seed(0)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Conv2d(24, 64, (3, 5)), 24 * 15),
        (nn.Conv2d(100, 70, 1), 100),
        (nn.Conv2d(24, 64, (3, 5), groups=4), 6 * 15),
        (nn.Conv2d(300, 300, 3, groups=300), 9),
        (nn.Linear(300, 200), 300),
        (nn.Linear(1, 5000), 1),
    ],
)
def test_weights_and_biases_are_uniform_within_torchs_bound(layer: nn.Module, fan_in: int) -> None:
    """kaiming_uniform(a=sqrt(5)) is uniform in +-1/sqrt(fan_in); so are biases."""
    bound = 1 / sqrt(fan_in)
    for parameter in layer.parameters():
        values = parameter.data / bound
        n = values.size
        assert parameter.data.dtype == np.float32
        assert np.abs(values).max() <= 1
        assert np.abs(values).max() > 1 - 20 / n
        assert abs(values.mean()) < 4 / sqrt(3 * n)  # four standard errors
        assert abs(values.std() - 1 / sqrt(3)) < 4 * 0.26 / sqrt(n)


def test_batch_norm_starts_as_identity() -> None:
    norm = nn.BatchNorm2d(3)
    for variable, value in [(norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)]:
        np.testing.assert_array_equal(variable.data, np.full(3, value, np.float32))
    assert norm.num_batches_tracked.data == 0


def test_a_seed_gives_the_same_weights_and_layers_differ() -> None:
    first = LeNet5().state_dict()
    nn.init.manual_seed(0)
    second, third = LeNet5().state_dict(), LeNet5().state_dict()
    nn.init.manual_seed(1)
    other = LeNet5().state_dict()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert not np.array_equal(first[name], third[name])
        assert not np.array_equal(first[name], other[name])


BAD: list[tuple[Callable[[], nn.Module], type[ParcnnError], str]] = [
    (lambda: nn.Conv2d(0, 2, 3), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, -1, 3), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 0), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, stride=0), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, dilation=(1, 0)), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, padding=-1), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, padding="full"), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, padding="same", stride=2), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, (3, 3, 3)), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 2.5), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(3, 2, 3, groups=2), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 3, 3, groups=2), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, groups=0), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, groups=2.0), ArgumentError, "Conv2d"),
    (lambda: nn.Conv2d(2, 2, 3, padding_mode="reflect"), UnsupportedError, "Conv2d"),
    (lambda: nn.Linear(0, 2), ArgumentError, "Linear"),
    (lambda: nn.Dropout(1.0), ArgumentError, "Dropout"),
    (lambda: nn.Dropout(-0.5), ArgumentError, "Dropout"),
    (lambda: nn.BatchNorm2d(3, affine=False), UnsupportedError, "BatchNorm2d"),
    (lambda: nn.BatchNorm1d(3, track_running_stats=False), UnsupportedError, "BatchNorm1d"),
    (lambda: nn.BatchNorm2d(3, momentum=None), UnsupportedError, "BatchNorm2d"),
    (lambda: nn.BatchNorm2d(0), ArgumentError, "BatchNorm2d"),
    (lambda: nn.BatchNorm2d(3, eps=-1.0), ArgumentError, "BatchNorm2d"),
    (lambda: nn.GELU("erf"), ArgumentError, "GELU"),
    (lambda: nn.CrossEntropyLoss(weight=np.ones(3)), UnsupportedError, "CrossEntropyLoss"),
    (lambda: nn.CrossEntropyLoss(ignore_index=0), UnsupportedError, "CrossEntropyLoss"),
    (lambda: nn.CrossEntropyLoss(reduction="sum"), UnsupportedError, "CrossEntropyLoss"),
    (lambda: nn.CrossEntropyLoss(label_smoothing=1.5), ArgumentError, "CrossEntropyLoss"),
    (lambda: nn.MSELoss(reduction="none"), UnsupportedError, "MSELoss"),
]


@pytest.mark.parametrize(("make", "error", "where"), BAD)
def test_arguments_that_are_refused(make: Callable[[], nn.Module], error: type[ParcnnError], where: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert caught.value.where == where
    assert caught.value.expected is not None
    if error is UnsupportedError:
        assert caught.value.remedy


def test_numpy_integers_are_sizes() -> None:
    layer = nn.Conv2d(1, 2, np.int64(3), padding=(np.int32(1), 2))
    assert layer.weight.shape == (2, 1, 3, 3)
    assert layer.padding == (1, 2)


def test_a_filter_of_a_group_has_the_groups_channels() -> None:
    layer = nn.Conv2d(8, 12, (3, 5), groups=np.int64(4))
    assert {name: value.shape for name, value in layer.state_dict().items()} == {"weight": (12, 2, 3, 5), "bias": (12,)}
    assert layer.groups == 4
    assert "groups=4" in repr(layer)
    assert "groups" not in repr(nn.Conv2d(8, 12, 3))
