// Pairs of bf16 in a register, by instructions of sm_90 and later; and the best of a pooling window.
#pragma once

#include "common.cuh"

#ifndef HOST_EMULATION
// Maximum of each half; NaN where either is NaN.
__device__ __forceinline__ u32 max_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// All bits of a half are set where the two are equal numbers.
__device__ __forceinline__ u32 equals_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("set.eq.u32.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// All bits of a half are set where v takes the place of `best` in a maximum (`beats` of common.cuh).
__device__ __forceinline__ u32 beats_bf16x2(u32 v, u32 best) {
    u32 not_less_or_equal;
    asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(not_less_or_equal) : "r"(v), "r"(best));
    return not_less_or_equal & equals_bf16x2(best, best);
}

// A 2x2 window of two channels, row-major: its maximum, at least `floor`, and which is the first of those that equal it (of
// NaN, the last).
struct Best {
    u32 value, index;

    __device__ __forceinline__ Best(u32 v0, u32 v1, u32 v2, u32 v3, u32 floor) {
        v0 = max_bf16x2(v0, floor);  // where none is above the floor, all equal it: then the first wins
        value = max_bf16x2(max_bf16x2(v0, v1), max_bf16x2(v2, v3));
        const u32 is0 = equals_bf16x2(v0, value), is1 = equals_bf16x2(v1, value), is2 = equals_bf16x2(v2, value);
        index = ~is0 & (((is1 | ~is2) & 0x00010001u) | (~is1 & 0x00020002u));
    }
};
#endif
