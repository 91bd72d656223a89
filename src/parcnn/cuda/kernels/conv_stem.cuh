// Convolutions of few channels, whose filter rows are short runs: S * C <= 32 elements, neighbours in memory as NHWC has them.
//
// A block takes tiles of output pixels: units_h x units_w *units* of 2 rows x 16 columns. The part of the image that a tile
// reads lies in shared memory as it does in global memory, rows of neighbouring elements, zeros beyond the image. The
// reduction is (filter row; run), each run rounded up to what mma.sync takes.
#pragma once

#include "conv_mma.cuh"

#define UNIT_COLUMNS 16

// Twin of the struct that conv_stem.py builds.
struct Problem {
    int h, row;                     // rows of an image, elements of one
    int k, p, q;                    // channels of y; outputs before the pool, of those that its floor keeps
    int run, r;                     // elements of a filter's row, its rows
    int step, left;                 // elements from a column of outputs to the next; of the padding
    int stride_h, top, dilation_h;
    int units_w, units_h;           // of a tile
    int patch_rows, pitch, patch_bytes;  // rows of the image that a tile reads; words of one; bytes of all
    int tiles, act;
    FastDiv by_units_w, by_tiles_w, by_tiles_h, by_fours;  // of words in a row of the patch
};

// A tile: its image, first output row and column.
struct Origin {
    int n, p, q;
};

__device__ __forceinline__ Origin origin_of(const Problem &g, int tile) {
    Origin at;
    at.n = divide(divide(tile, g.by_tiles_w, at.q), g.by_tiles_h, at.p);
    at.q *= UNIT_COLUMNS * g.units_w, at.p *= 2 * g.units_h;
    return at;
}

// Elements i, i + 1 of an image's row; zero where there is none.
__device__ __forceinline__ u32 pair_of(const u16 *row, int i, int count) {
    bool low = (u32)i < (u32)count, high = (u32)(i + 1) < (u32)count;
    if (low && high && ((unsigned long long)(row + i) & 3) == 0) return *reinterpret_cast<const u32 *>(row + i);
    return (low ? (u32)row[i] : 0u) | (high ? (u32)row[i + 1] << 16 : 0u);
}

// Eight elements from any element on, out of the two aligned 16 bytes that they lie in, `offset` elements after the start.
__device__ __forceinline__ uint4 shifted(uint4 a, uint4 b, u32 offset) {
    u32 w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    if (offset & 4) {
#pragma unroll
        for (int e = 0; e < 6; ++e) w[e] = w[e + 2];
    }
    if (offset & 2) {
#pragma unroll
        for (int e = 0; e < 5; ++e) w[e] = w[e + 1];
    }
    if (offset & 1) {
#pragma unroll
        for (int e = 0; e < 4; ++e) w[e] = w[e] >> 16 | w[e + 1] << 16;
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// Fill `patch` with what the tile at `at` reads, from element `shift` of each row on. A row's pitch is a multiple of four words.
// A thread has its loads of several eights under way at once; rows' ends, which are few, come after them.
__device__ __forceinline__ void fill(const Problem &g, const u16 *x, Origin at, u32 *patch, int shift) {
    constexpr int Batch = 2;
    const int first = at.q * g.step - g.left + shift, eights = g.patch_rows * g.by_fours.d;
    for (int begin = threadIdx.x; begin < eights; begin += Batch * blockDim.x) {
        uint4 a[Batch] = {}, b[Batch] = {};
        u32 offset[Batch] = {};
        const u16 *rows[Batch];
        int from[Batch], count[Batch];
#pragma unroll
        for (int e = 0; e < Batch; ++e) {
            int four, i = divide(min(begin + e * (int)blockDim.x, eights - 1), g.by_fours, four), h = at.p * g.stride_h - g.top + i;
            const bool live = (u32)h < (u32)g.h;
            rows[e] = x + ((long long)at.n * g.h + (live ? h : 0)) * g.row, count[e] = live ? g.row : 0;
            from[e] = first + 8 * four;
            if (from[e] < 0 || from[e] + 16 > count[e]) continue;
            offset[e] = (u32)((u64)(rows[e] + from[e]) & 15) / 2;
            a[e] = load_word<uint4>(rows[e] + from[e] - offset[e]);
            b[e] = load_word<uint4>(rows[e] + from[e] - offset[e] + (offset[e] ? 8 : 0));
        }
#pragma unroll
        for (int e = 0; e < Batch; ++e) {
            const int eight = begin + e * (int)blockDim.x;
            uint4 v = shifted(a[e], b[e], offset[e]);
            if (from[e] < 0 || from[e] + 16 > count[e]) {
                v.x = pair_of(rows[e], from[e], count[e]), v.y = pair_of(rows[e], from[e] + 2, count[e]);
                v.z = pair_of(rows[e], from[e] + 4, count[e]), v.w = pair_of(rows[e], from[e] + 6, count[e]);
            }
            if (eight < eights) store_word(patch + 4 * eight, v);
        }
    }
}

// Have L2 bring what the tile at `at` reads.
__device__ __forceinline__ void prefetch_patch(const Problem &g, const u16 *x, Origin at) {
#ifndef HOST_EMULATION
    constexpr int Line = 64;  // elements of 128 bytes
    const int lane = threadIdx.x % 32, first = max(0, at.q * g.step - g.left), end = min(g.row, at.q * g.step - g.left + 2 * g.pitch);
    for (int i = threadIdx.x / 32; i < g.patch_rows; i += blockDim.x / 32) {
        const int h = at.p * g.stride_h - g.top + i;
        if ((u32)h >= (u32)g.h) continue;
        const u16 *row = x + ((long long)at.n * g.h + h) * g.row;
        for (int j = first + lane * Line; j < end; j += 32 * Line) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + j));
    }
#endif
}
