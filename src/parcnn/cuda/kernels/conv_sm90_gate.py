"""The polynomials of gelu as Hopper's epilogues compute it, as a gate x * sigmoid(p(x)): `Gate` of conv_sm90_gate.cuh."""

from __future__ import annotations

from math import e, log2, pi, sqrt

import numpy as np

TERMS, MOST = 9, 36.0  # twins of the header's
_ROOT = 2 * sqrt(2 / pi)
# p(x) / x as a polynomial of x*x up to 36. Of gelu it is log(Phi(x) / Phi(-x)) / x, Phi the normal distribution's, fitted so
# that p is off by 3.6e-5 at most: the gate by 2**-14 of itself, the derivative by 2**-15.
GATES: dict[str, tuple[float, ...]] = {
    "gelu_tanh": (_ROOT, 0.044715 * _ROOT),
    "gelu": (
        1.595665454864502, 0.07281330227851868, -0.00012054579565301538, -0.00010341478628106415, 7.85304291639477e-06,
        -3.1862748528510565e-07, 7.61566720797191e-09, -1.0046101450722489e-10, 5.64076183765666e-13,
    ),
}  # fmt: skip


def gate_of(act: str | None) -> tuple[np.float32, ...]:
    """The fields of the activation's `Gate`; zeros where it needs none."""
    terms = GATES.get(act or "", ())
    padded = (*terms, *[0.0] * (TERMS - len(terms)))
    exponent = (np.float32(-log2(e) * term) for term in padded)
    slope = (np.float32((2 * i + 1) * term) for i, term in enumerate(padded))
    return *exponent, *slope
