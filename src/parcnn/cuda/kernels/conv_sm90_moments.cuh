// Moments of a convolution's outputs for a batch norm behind it: of each channel the mean and the sum of squared deviations
// from it, of the values as they are stored, so after the rounding; of pixels inside the image only.
//
// A thread adds up its own pixels' differences from a value of the channel, the first one that its warp meets: so no large
// numbers cancel, however far from zero a mean is, and a tile needs no exchange between threads. Where a warpgroup's tiles
// are all of the same channels, its sums go on from tile to tile and give one row of `partial` in the end; else each patch
// of pixels gives its own row. conv_moments.cu merges the rows, in their order.
#pragma once

#include "conv_sm90_epilogue.cuh"

#define MOST_PIXELS_BESIDE_SUMS 224

// Which pixels of a tile lie inside the image, a bit each, how many, and how many of them come before the first that does
// not. The index's bits say along which directions the image ends within the tile: width, height, images. Twin: _inside of
// conv_sm90.py.
struct Inside {
    u32 pixels[8][8];
    float count[8];
    int whole[8];
};

__device__ __forceinline__ int ends_within(const Problem &g, const Tile &t) {
    return (t.w + g.tile_w > g.q) | (t.h + g.tile_h > g.p) << 1 | (t.n + g.tile_n > g.n) << 2;
}

// Whether a warpgroup's sums go on from tile to tile: its tiles are of the same channels, and there are registers for them
// beside a product's. Twin: _rows_of_moments of conv_sm90.py.
__device__ __forceinline__ bool keeps_sums(const Problem &g) { return PIXELS <= MOST_PIXELS_BESIDE_SUMS && g.by_k_inner.d == 1 && k_rounds(g) == 1; }

// Of the four lanes that have pixels of the same channels.
__device__ __forceinline__ float sum_of_four(float v) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// partial: counts, means, then sums of squared deviations (of a batch norm's sums dgammas, then dbetas), (rows, K) each.
struct PartialRows {
    float *partial;
    int rows, channels;
};

// Of the thread's two channels, k and k + 8.
struct Moments {
    float count = 0.0f;      // pixels of the warp's
    u32 c = 0;               // what is subtracted, a bf16 number each, alike in the warp's threads of a channel
    float sum[2], squares[2];  // of the thread's differences from it

    // Add the words of a tile, of each eight pixels the thread's two, of channel k and of k + 8. `ends`: into `inside`.
    template <int Pixels> __device__ __forceinline__ void add_tile(const u32 (&words)[Pixels / 4], const Inside &inside, int ends, int lane) {
        if (count == 0.0f) {
            c = __shfl_sync(0xffffffffu, __byte_perm(words[0], words[1], 0x5410), lane & ~3);
            sum[0] = sum[1] = squares[0] = squares[1] = 0.0f;
        }
        const float shift[2] = {low_bf16(c), high_bf16(c)};
        const int whole = inside.whole[ends];
        float tile_sum[2] = {}, tile_squares[2] = {};
#pragma unroll
        for (int first = 0; first < Pixels / 8; first += 4) {  // as many eights as a word of `pixels` has
            const int eights = min(4, Pixels / 8 - first);
            const bool all_inside = (first + eights) * 8 <= whole;
            const u32 bits = all_inside ? 0 : inside.pixels[ends][first / 4] >> lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float v[4][2];
#pragma unroll
                for (int j = 0; j < eights; ++j) {
                    const u32 two = words[2 * (first + j) + i];
                    v[j][0] = low_bf16(two) - shift[i], v[j][1] = high_bf16(two) - shift[i];
                }
                if (!all_inside) {
#pragma unroll
                    for (int j = 0; j < eights; ++j) {
                        if (!(bits >> 8 * j & 1)) v[j][0] = 0.0f;
                        if (!(bits >> 8 * j & 2)) v[j][1] = 0.0f;
                    }
                }
#pragma unroll
                for (int j = 0; j < eights; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) tile_sum[i] += v[j][e], tile_squares[i] += v[j][e] * v[j][e];
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[i] += tile_sum[i], squares[i] += tile_squares[i];
        count += inside.count[ends];
    }

    // Write what the warp has of the channels k and k + 8.
    __device__ __forceinline__ void write(const PartialRows &to, int row, int k, int lane) {
        const size_t plane = (size_t)to.rows * to.channels;
        float *at = to.partial + (size_t)row * to.channels + k;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sum[i] = sum_of_four(sum[i]), squares[i] = sum_of_four(squares[i]);
            if (lane % 4 != 0 || k + 8 * i >= to.channels) continue;
            const float offset = count > 0.0f ? sum[i] / count : 0.0f;
            at[8 * i] = count;
            at[plane + 8 * i] = (i == 0 ? low_bf16(c) : high_bf16(c)) + offset;
            at[2 * plane + 8 * i] = squares[i] - sum[i] * offset;
        }
    }
};
