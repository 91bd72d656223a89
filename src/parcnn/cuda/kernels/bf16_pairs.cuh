// Maxima of floats and of pairs of bf16 in a register, by instructions of sm_90 and later; and the best of a pooling window.
#pragma once

#include "common.cuh"

#ifndef HOST_EMULATION
// Maximum; NaN where one is NaN.
__device__ __forceinline__ float max_number(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

// ReLU of two floats, rounded. No zero is negative where no float was -0.
__device__ __forceinline__ u32 relu_bf16x2(float low, float high) {
    u32 two;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

// Maximum of each half; NaN where either is NaN.
__device__ __forceinline__ u32 max_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// The highest bit of each half is set where the bits of the two differ; the others are anything. Read as floats, what differs is
// not zero, or -0, whose bit is there already. (As floats the two themselves would not find a NaN again; min.u16x2 is slow.)
__device__ __forceinline__ u32 differ_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("set.neu.u32.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a ^ b), "r"(0u));
    return d | (a ^ b);
}

// All bits of a half are set where v takes the place of `best` in a maximum (`beats` of common.cuh).
__device__ __forceinline__ u32 beats_bf16x2(u32 v, u32 best) {
    u32 not_less_or_equal, is_number;
    asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(not_less_or_equal) : "r"(v), "r"(best));
    asm("set.eq.u32.bf16x2 %0, %1, %1;" : "=r"(is_number) : "r"(best));
    return not_less_or_equal & is_number;
}
#endif
__device__ __forceinline__ float max_number(float a, float b, float c, float d) { return max_number(max_number(a, b), max_number(c, d)); }

// A 2x2 window of two channels, row-major, of rounded values: its maximum, at least `floor`, and which is the first that has
// its very bits: NaN has but one form here, and zeros are positive where there is a floor, or the sum of anything.
struct Best {
    u32 value, index;

    __device__ __forceinline__ Best(u32 v0, u32 v1, u32 v2, u32 v3, u32 floor) {
        v0 = max_bf16x2(v0, floor);  // where none is above the floor, all equal it: then the first wins
        value = max_bf16x2(max_bf16x2(v0, v1), max_bf16x2(v2, v3));
        const u32 not0 = differ_bf16x2(v0, value), not1 = differ_bf16x2(v1, value), not2 = differ_bf16x2(v2, value);
        const u32 one_or_three = not0 & (~not1 | not2), two_or_three = not0 & not1;
        index = (one_or_three >> 15 & 0x00010001u) | (two_or_three >> 14 & 0x00020002u);
    }
};

// `Best` of values that ReLU gave: as integers they are in the same order, NaN is the largest, and in a difference no half
// borrows from the other.
struct BestPositive {
    u32 value, index;

    __device__ __forceinline__ BestPositive(u32 v0, u32 v1, u32 v2, u32 v3) {
        value = max_bf16x2(max_bf16x2(v0, v1), max_bf16x2(v2, v3));
        const u32 above = value + 0x7fff7fffu, not0 = above - v0, not1 = above - v1, not2 = above - v2;  // the halves' highest bits
        const u32 one_or_three = not0 & (~not1 | not2), two_or_three = not0 & not1 & 0x80008000u;
        index = (one_or_three >> 15 & 0x00010001u) | two_or_three >> 14;
    }
};

// Eight indices, two to a word, as 2 bits each.
__device__ __forceinline__ u32 pack_indices(uint4 index) {
    const u32 nibbles = index.x + (index.y << 4) + (index.z << 8) + (index.w << 12);  // of even channels, and of odd ones
    return (nibbles | nibbles >> 14) & 0xffff;
}
