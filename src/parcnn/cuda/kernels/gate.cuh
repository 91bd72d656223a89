// Activations of the tensor cores' epilogues as gates, without branches, so that many elements are under way at once. With s =
// 1 / (1 + exp(-p(x))), where p(x) = x, or of both gelu x * q(u), polynomials q and p' of u = min(x*x, 25):
//
//     silu, gelu     x * s      derivative  s + x * (s - s*s) * p'(u)
//     sigmoid        s          (its derivative follows from its output)
//
// gate.py has the polynomials. Beside bf16's rounding what exp and the reciprocal are off by does not count.
#pragma once

#include "common.cuh"

#define GATE_TERMS 9        // twin of gate.py's
#define GATE_MOST 25.0f     // likewise

// 2 to the x, and 1 / x, to some 2^-22 of themselves; what is subnormal is zero.
#ifdef HOST_EMULATION
inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
#else
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

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

// IsPlain: p(x) = x.
template <bool IsPlain> __device__ __forceinline__ float gate_of(const Gate &g, float x) {
    const float q = IsPlain ? -1.44269504f : polynomial(g.exponent, fminf(x * x, GATE_MOST));
    return reciprocal_approx(1.0f + exp2_approx(x * q));
}

template <bool IsPlain> __device__ __forceinline__ float gated_slope(const Gate &g, float x) {
    const float s = gate_of<IsPlain>(g, x), towards = x * (s - s * s);
    return IsPlain ? s + towards : s + towards * polynomial(g.slope, fminf(x * x, GATE_MOST));
}
