"""The polynomials of gelu as the tensor cores' epilogues compute it, as a gate x * sigmoid(p(x)): `Gate` of gate.cuh."""

from __future__ import annotations

from math import e, log2, pi, sqrt

import numpy as np

TERMS, MOST = 9, 25.0  # twins of the header's
_ROOT = 2 * sqrt(2 / pi)
# p(x) / x as a polynomial of x*x up to 25. Of gelu it is log(Phi(x) / Phi(-x)) / x, Phi the normal distribution's, fitted so
# that p is off by 2.8e-6 at most: the gate by 2**-17 of itself, the derivative by 2**-19.
GATES: dict[str, tuple[float, ...]] = {
    "gelu_tanh": (_ROOT, 0.044715 * _ROOT),
    "gelu": (
        1.5957813262939453, 0.0726313441991806, -3.55763804691378e-05, -0.00012136242730775848, 9.8700838861987e-06,
        -4.474617867344932e-07, 1.230910218197323e-08, -1.9131095319036007e-10, 1.2892078897486225e-12,
    ),
}  # fmt: skip


def gate_of(act: str | None) -> tuple[np.float32, ...]:
    """The fields of the activation's `Gate`; zeros where it needs none."""
    terms = GATES.get(act or "", ())
    padded = (*terms, *[0.0] * (TERMS - len(terms)))
    exponent = (np.float32(-log2(e) * term) for term in padded)
    slope = (np.float32((2 * i + 1) * term) for i, term in enumerate(padded))
    return *exponent, *slope
