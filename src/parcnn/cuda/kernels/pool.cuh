// What pool_fprop.cu and pool_dgrad.cu share: windows along an axis, and indices as they lie in memory.
//
// Macros: ELEMENT (float or bf16), KIND (0 max, 1 avg, 2 adaptive), BITS (of an index: 2, 4, 8 or 32; max only; the first two
// share bytes, and VEC is at least 4), VEC (at most 16 bytes of elements).
#pragma once

#include "conv_common.cuh"

#define THREADS 256
#define MAX 0
#define AVG 1
#define ADAPTIVE 2
#ifndef BITS
#define BITS 8  // idx is null
#endif

struct Axis {
    int in, out, kernel, stride, pad, dilation;
    FastDiv by_stride, by_dilation;
    FastDiv by_in, by_out;  // adaptive only
};

struct Window {
    Axis h, w;
    int divisor;      // 0: count elements
    int include_pad;  // of the padding too
    int act;          // before a maximum; ACT_*
};

// Taps of one output along one axis: those in first .. last-1 lie inside the image, tap t at start + t * step.
struct Taps {
    int start, step, first, last;
};

__device__ __forceinline__ Taps taps_of(int o, const Axis &a) {
    if (KIND == ADAPTIVE) {
        int start = quotient(o * a.in, a.by_out), end = quotient((o + 1) * a.in + a.out - 1, a.by_out);
        return {start, 1, 0, end - start};
    }
    int start = o * a.stride - a.pad;
    int first = start < 0 ? quotient(-start + a.dilation - 1, a.by_dilation) : 0;
    int last = start < a.in ? min(a.kernel, quotient(a.in - start + a.dilation - 1, a.by_dilation)) : 0;
    return {start, a.dilation, first, max(first, last)};
}

// Elements of the window that the divisor counts along one axis.
__device__ __forceinline__ int counted(const Taps &taps, const Axis &a, int include_pad) {
    if (KIND == ADAPTIVE || !include_pad) return taps.last - taps.first;
    return min(a.kernel, quotient(a.in + a.pad - taps.start + a.dilation - 1, a.by_dilation));
}

__device__ __forceinline__ float divisor_of(const Taps &h, const Taps &w, const Window &window) {
    if (window.divisor) return (float)window.divisor;
    return (float)counted(h, window.h, window.include_pad) * (float)counted(w, window.w, window.include_pad);
}

// Indices of a vector as they lie in memory, at the element `at` of idx.
constexpr int INDEX_BITS = VEC * BITS;
template <int Bits> struct WordOf { using Type = u32; };
template <> struct WordOf<8> { using Type = u8; };
template <> struct WordOf<16> { using Type = u16; };
using IndexWord = WordOf<INDEX_BITS>::Type;

__device__ __forceinline__ void store_index(u8 *idx, size_t at, const int (&position)[VEC]) {
    u8 *p = idx + at * BITS / 8;
    constexpr int InWord = INDEX_BITS < 32 ? VEC : 32 / BITS;
    IndexWord words[VEC / InWord];
#pragma unroll
    for (int i = 0; i < VEC / InWord; ++i) {
        u32 word = position[i * InWord];
#pragma unroll
        for (int e = 1; e < InWord; ++e) word |= (u32)position[i * InWord + e] << BITS * e;
        words[i] = (IndexWord)word;
    }
    if constexpr (INDEX_BITS % 128 == 0) {
#pragma unroll
        for (int i = 0; i < VEC / InWord; i += 4) store_word(p + 4 * i, make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    } else if constexpr (INDEX_BITS == 64) {
        store_word(p, make_uint2(words[0], words[1]));
    } else {
        store_word(p, words[0]);
    }
}

// As they are: nothing waits for the load until one is asked for.
struct Indices {
    static constexpr int InWord = INDEX_BITS < 32 ? VEC : 32 / BITS;
    IndexWord words[VEC / InWord];

    __device__ __forceinline__ int operator[](int e) const {
        return BITS == 32 ? words[e / InWord] : words[e / InWord] >> BITS * (e % InWord) & ((1u << BITS % 32) - 1);
    }
};

__device__ __forceinline__ Indices load_index(const u8 *idx, size_t at) {
    const u8 *p = idx + at * BITS / 8;
    Indices r;
    if constexpr (INDEX_BITS % 128 == 0) {
#pragma unroll
        for (int i = 0; i < VEC / Indices::InWord; i += 4) {
            uint4 four = load_word<uint4>(p + 4 * i);
            r.words[i] = four.x, r.words[i + 1] = four.y, r.words[i + 2] = four.z, r.words[i + 3] = four.w;
        }
    } else if constexpr (INDEX_BITS == 64) {
        uint2 two = load_word<uint2>(p);
        r.words[0] = two.x, r.words[1] = two.y;
    } else {
        r.words[0] = load_word<IndexWord>(p);
    }
    return r;
}
