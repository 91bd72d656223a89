// Twins of bf16_pairs.cuh's instructions and their like for cuda_emulation.h: maxima of numbers, comparisons of pairs, ReLU.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

inline unsigned round_to_bf16(float v) {
    return v != v ? 0x7fffu : (__float_as_uint(v) + 0x7fffu + (__float_as_uint(v) >> 16 & 1u)) >> 16;
}

// of(a, b) of both halves, as bits of bf16.
template <class Of> unsigned of_halves(unsigned a, unsigned b, Of of) {
    return of(a & 0xffffu, b & 0xffffu) | of(a >> 16, b >> 16) << 16;
}
inline float half_of(unsigned bits) { return __uint_as_float(bits << 16); }

}  // namespace emulation

// NaN where either is; -0 is less than 0.
inline float max_number(float a, float b) { return a != a || b != b ? NAN : a == b && std::signbit(a) ? b : a < b ? b : a; }
inline unsigned max_bf16x2(unsigned a, unsigned b) {
    return emulation::of_halves(a, b, [](unsigned v, unsigned w) {
        return emulation::round_to_bf16(max_number(emulation::half_of(v), emulation::half_of(w)));
    });
}
// Bits that mean nothing are set: who uses them shows.
inline unsigned differ_bf16x2(unsigned a, unsigned b) {
    return emulation::of_halves(a, b, [](unsigned v, unsigned w) { return v != w ? 0xffffu : 0x7fffu; });
}
inline unsigned differ_positive(unsigned a, unsigned b) {
    return emulation::of_halves(a, b, [](unsigned v, unsigned w) { return v != w ? 0xffffu : 0u; });
}
inline unsigned beats_bf16x2(unsigned v, unsigned best) {
    return emulation::of_halves(v, best, [](unsigned a, unsigned b) {
        const float value = emulation::half_of(a), other = emulation::half_of(b);
        return !(value <= other) && other == other ? 0xffffu : 0u;
    });
}
// Rounded; zero where they are not positive, but NaN.
inline unsigned relu_bf16x2(float low, float high) {
    const auto rounded = [](float v) { return emulation::round_to_bf16(v <= 0.0f ? 0.0f : v); };
    return rounded(low) | rounded(high) << 16;
}

// The signs of the bytes of v that the selector's digits 8 to 11 name, as bytes.
inline unsigned signs_of(unsigned v, unsigned selector) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned digit = selector >> 4 * i & 15, byte = v >> 8 * (digit & 3) & 255;
        result |= (digit & 8 ? byte & 128 ? 255u : 0u : byte) << 8 * i;
    }
    return result;
}
