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
    FastDiv by_units_w, by_tiles_w, by_tiles_h;
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

// Fill `patch` with what the tile at `at` reads, from element `shift` of each row on.
__device__ __forceinline__ void fill(const Problem &g, const u16 *x, Origin at, u32 *patch, int shift) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = at.q * g.step - g.left + shift;
    for (int i = warp; i < g.patch_rows; i += blockDim.x / 32) {
        int h = at.p * g.stride_h - g.top + i;
        bool live = (u32)h < (u32)g.h;
        const u16 *row = x + ((long long)at.n * g.h + (live ? h : 0)) * g.row;
        int count = live ? g.row : 0;
#pragma unroll 4
        for (int j = lane; j < g.pitch; j += 32) patch[i * g.pitch + j] = pair_of(row, first + 2 * j, count);
    }
}
