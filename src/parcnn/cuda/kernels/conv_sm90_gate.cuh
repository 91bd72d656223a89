// Activations of Hopper's epilogues as gates: silu, both gelu and sigmoid by one code without branches, so that many elements are
// under way at once. With u = min(x*x, 36), polynomials q and p' of it, and s = 1 / (1 + exp(-x * q(u))):
//
//     silu, gelu     x * s      derivative  s + x * (s - s*s) * p'(u)
//     sigmoid        s          (its derivative follows from its output)
//
// conv_sm90_gate.py has the polynomials. Beside bf16's rounding what exp and the reciprocal are off by does not count.
#pragma once

#include "sm90.cuh"

#define GATE_TERMS 9        // twin of conv_sm90_gate.py's
#define GATE_MOST 36.0f     // likewise

struct Gate {
    float exponent[GATE_TERMS];  // q times -log2(e)
    float slope[GATE_TERMS];     // p'
};

// A polynomial's value, the constant term first.
__device__ __forceinline__ float polynomial(const float (&terms)[GATE_TERMS], float u) {
    float sum = terms[GATE_TERMS - 1];
#pragma unroll
    for (int i = GATE_TERMS - 2; i >= 0; --i) sum = sum * u + terms[i];
    return sum;
}

__device__ __forceinline__ float gate_of(const Gate &g, float x) {
    return reciprocal_approx(1.0f + exp2_approx(x * polynomial(g.exponent, fminf(x * x, GATE_MOST))));
}

__device__ __forceinline__ float gated_slope(const Gate &g, float x) {
    const float s = gate_of(g, x);
    return s + x * (s - s * s) * polynomial(g.slope, fminf(x * x, GATE_MOST));
}
