"""What the tensor cores' epilogues compute for gelu, in fp32 on the host, against the functions in float64."""

from __future__ import annotations

from math import erfc, sqrt

import numpy as np
import pytest

from parcnn.cpu.pointwise import activate, activate_backward
from parcnn.cuda.kernels.gate import GATES, MOST, TERMS, gate_of

X = np.linspace(-5, 5, 20_001).astype(np.float32)


def polynomial(terms: tuple[np.float32, ...], u: np.ndarray) -> np.ndarray:
    """As gate.cuh sums it."""
    total = np.full_like(u, terms[-1])
    for term in terms[-2::-1]:
        total = total * u + term
    return total


def gate_and_slope(act: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 / (1 + exp(-p(x))) and the derivative of x times that."""
    fields = gate_of(act)
    u = np.minimum(x * x, np.float32(MOST))
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp2(x * polynomial(fields[:TERMS], u)))
    return s, s + x * (s - s * s) * polynomial(fields[TERMS:], u)


@pytest.mark.parametrize("act", GATES)
def test_the_gate_is_the_activation(act: str) -> None:
    """To 2**-17 of itself, 2**-8 of what bf16 rounds by, as far as the normal distribution's tail is above 2e-7. The
    derivative, which is zero somewhere, to less than `conv_problems.check_close` takes a term to err by."""
    s, slope = gate_and_slope(act, X)
    true, slope_true, one = np.empty(X.size), np.empty(X.size), np.ones(X.size)
    activate(act, X.astype(np.float64), true)
    activate_backward(act, one, X.astype(np.float64), slope_true)
    inside = X != 0
    assert (np.abs(X * s - true)[inside] <= 2.0**-17 * np.abs(true)[inside]).all()
    assert (np.abs(slope - slope_true) <= 1.1 * 2.0**-19).all()


def test_the_gate_of_gelu_is_the_normal_distribution() -> None:
    s, _ = gate_and_slope("gelu", X)
    phi = np.array([erfc(-float(x) / sqrt(2)) / 2 for x in X])
    assert np.abs(s / phi - 1).max() < 2.0**-17
    beyond = np.linspace(-9, -5, 401).astype(np.float32)
    s, _ = gate_and_slope("gelu", beyond)
    phi = np.array([erfc(-float(x) / sqrt(2)) / 2 for x in beyond])
    assert np.abs(beyond * (s - phi)).max() < 2.0**-21


@pytest.mark.parametrize("act", GATES)
def test_beyond_the_polynomial_gates_are_open_or_shut(act: str) -> None:
    x = np.array([6.5, 20.0, 1e5, 1e30, -20.0, -1e5, -1e30], np.float32)
    with np.errstate(over="ignore"):
        s, slope = gate_and_slope(act, x)
    np.testing.assert_allclose(s, [1] * 4 + [0] * 3, atol=1e-8)
    np.testing.assert_allclose(slope, [1] * 4 + [0] * 3, atol=1e-7)
    assert np.isnan(gate_and_slope(act, np.array([np.nan], np.float32))).all()
