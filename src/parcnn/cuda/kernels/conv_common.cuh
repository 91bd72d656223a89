// What the convolution kernels share: the problem, its enumeration of output pixels, and the register-tile product.
//
// Thread layout of a block of THREADS = SLICES * (BM / TM) * (BN / TN): SLICES neighbouring lanes own the same TM x TN
// outputs and take the reduction in turns; their sums are added by shuffles at the end. A thread's rows come in groups of
// four neighbours (a pooling window, where there is a pool), its columns in groups of four neighbouring channels.
#pragma once

#include "common.cuh"

#define POOL_NONE 0
#define POOL_MAX 1
#define POOL_AVG 2

// Twin of conv_common.py's `Conv.argument`.
struct Conv {
    int rows;              // output pixels, or four for each pooled pixel: n * p * q * (pool ? 4 : 1)
    int h, w, c;           // image
    int k, r, s;           // filters
    int taps_c;            // r * s * c
    int p, q;              // outputs after the pool
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int pool, act;
    FastDiv by_p, by_q, by_c, by_s;
};

struct Pixel {
    int n, p, q;
};

// Output pixel (before the pool) of row m. With a pool, the four rows of a window are neighbours.
__device__ __forceinline__ Pixel output_pixel(const Conv &g, int m) {
    Pixel o;
    int window = g.pool ? m >> 2 : m;
    o.n = divide(divide(window, g.by_q, o.q), g.by_p, o.p);
    if (g.pool) {
        o.p = 2 * o.p + (m >> 1 & 1);
        o.q = 2 * o.q + (m & 1);
    }
    return o;
}

// An image position (each side within +-2^15) in one register; ROW_DEAD lies outside every image.
#define ROW_DEAD ((int)0xC0000000)
__device__ __forceinline__ int pack_hw(int h, int w) { return (int)((u32)h << 16 | ((u32)w & 0xffffu)); }
__device__ __forceinline__ int unpack_h(int hw) { return hw >> 16; }
__device__ __forceinline__ int unpack_w(int hw) { return (int)(short)(hw & 0xffff); }

__device__ __forceinline__ bool inside(int hw, int dh, int dw, int h, int w) {
    return (u32)(unpack_h(hw) + dh) < (u32)h && (u32)(unpack_w(hw) + dw) < (u32)w;
}

// Copy Vec floats to shared memory beside the arithmetic, or zeros.
template <int Vec> __device__ __forceinline__ void copy_async(float *shared, const float *source, bool live) {
    if (Vec == 4)
        copy_async16(shared, source, live);
    else
        copy_async4(shared, source, live);
}

// Copy an element to shared memory, as a float, or zero. A float comes beside the arithmetic.
__device__ __forceinline__ void copy_element(float *shared, const float *source, bool live) { copy_async4(shared, source, live); }
__device__ __forceinline__ void copy_element(float *shared, const bf16 *source, bool live) {
    *shared = live ? load<1>(source).v[0] : 0.0f;
}

__device__ __forceinline__ float at(float4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Channels n .. n+3 of a row of k channels; `whole`: k is a multiple of 4, so that 16 bytes go at once.
__device__ __forceinline__ void store_channels(float *row, int n, int k, bool whole, float4 v) {
    if (whole) {
        store4(row + n, v);
        return;
    }
    row[n] = v.x;
    if (n + 1 < k) row[n + 1] = v.y;
    if (n + 2 < k) row[n + 2] = v.z;
    if (n + 3 < k) row[n + 3] = v.w;
}

__device__ __forceinline__ float4 load_channels(const float *row, int n, int k, bool whole) {
    if (whole) return load4(row + n);
    return make_float4(row[n], n + 1 < k ? row[n + 1] : 0.0f, n + 2 < k ? row[n + 2] : 0.0f, n + 3 < k ? row[n + 3] : 0.0f);
}

// Where a thread stands in the block's tile.
template <int BlockM, int BlockN, int ThreadM, int ThreadN, int Slices> struct Place {
    static constexpr int Rows = BlockM / ThreadM, Columns = BlockN / ThreadN, Threads = Slices * Rows * Columns;
    static constexpr int LanesN = Columns < 8 ? Columns : 8;
    static constexpr bool Paired = Slices == 1 && LanesN == 8 && Rows % 4 == 0;
    int slice, tm, tn;

    // Lanes read 16 bytes in halves of a warp, at once where lane i reads the word of lane i ^ 1, or lane i ^ 2, for all i
    // of a half: so a warp's 4 x 8 places have the lowest bit of tm in bit 0 of the lane, tn in the next three.
    __device__ __forceinline__ Place() {
        int t = threadIdx.x / Slices;
        slice = threadIdx.x % Slices;
        tm = Paired ? t / 32 * 4 % Rows + t / 16 % 2 * 2 + t % 2 : t / LanesN % Rows;
        tn = (Paired ? t / 2 % 8 : t % LanesN) + t / (LanesN * Rows) * LanesN;
    }

    // Row (column) of the tile that the thread's i-th one is.
    __device__ __forceinline__ int row(int i) const { return i / 4 * (4 * Rows) + tm * 4 + i % 4; }
    __device__ __forceinline__ int column(int j) const { return j / 4 * (4 * Columns) + tn * 4 + j % 4; }
};

// Shared memory holds a tile either *row-wise*, [slot(row)][BK + 4] with the reduction innermost, or *column-wise*,
// [reduction][extent + 4] with the row innermost. slot() puts rows 4i + j of neighbouring i side by side: then the lanes
// of a warp, whose rows are four apart, read 16-byte words of different banks.
template <int Rows> __device__ __forceinline__ int slot(int row) { return row % 4 * (Rows / 4) + row / 4; }

// The thread's i-th row of a row-wise tile: four values of the reduction from 4 * k4 on.
template <int Extent, int PerThread, int Depth>
__device__ __forceinline__ float4 row_fragment(const float *tile, int t, int i, int k4) {
    int at_slot = i % 4 * (Extent / 4) + i / 4 * (Extent / PerThread) + t;
    return load4(tile + at_slot * (Depth + 4) + 4 * k4);
}

// Add the slices' sums; every slice gets them.
template <int ThreadM, int ThreadN, int Slices> __device__ __forceinline__ void add_slices(float (&acc)[ThreadM][ThreadN]) {
    if (Slices > 1) {
#pragma unroll
        for (int i = 0; i < ThreadM; ++i)
#pragma unroll
            for (int j = 0; j < ThreadN; ++j) acc[i][j] = warp_sum<Slices>(acc[i][j]);
    }
}

// Activations that are chosen at run time; the first derivative is of those of FROM_OUTPUT. Of several values: one choice for all.
template <int Kind, int Count> __device__ __forceinline__ void activate_each(float (&v)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) v[i] = activate<Kind>(v[i]);
}

template <int Count> __device__ __forceinline__ void activate_each(float (&v)[Count], int act) {
    switch (act) {
        case ACT_GELU: return activate_each<ACT_GELU>(v);
        case ACT_GELU_TANH: return activate_each<ACT_GELU_TANH>(v);
        case ACT_SILU: return activate_each<ACT_SILU>(v);
        case ACT_TANH: return activate_each<ACT_TANH>(v);
        case ACT_SIGMOID: return activate_each<ACT_SIGMOID>(v);
    }
}

__device__ __forceinline__ float activation_dgrad_of(float dy, float saved, int act) {
    return act == ACT_RELU   ? activation_dgrad<ACT_RELU>(dy, saved)
           : act == ACT_TANH ? activation_dgrad<ACT_TANH>(dy, saved)
                             : activation_dgrad<ACT_SIGMOID>(dy, saved);
}

// Of those that are not.
__device__ __forceinline__ float activation_dgrad_by_input(float dy, float saved, int act) {
    return act == ACT_GELU        ? activation_dgrad<ACT_GELU>(dy, saved)
           : act == ACT_GELU_TANH ? activation_dgrad<ACT_GELU_TANH>(dy, saved)
                                  : activation_dgrad<ACT_SILU>(dy, saved);
}

__device__ __forceinline__ float any_activation_dgrad(float dy, float saved, int act) {
    const bool from_output = act == ACT_RELU || act == ACT_TANH || act == ACT_SIGMOID;
    return from_output ? activation_dgrad_of(dy, saved, act) : activation_dgrad_by_input(dy, saved, act);
}

// Every value of v after the activation, one of ACT_*; all threads of a launch have the same one. `activate_row` does others than
// ReLU, which is everywhere: rows take turns in the place of the first, so that its code is there once.
template <int Rows, int Columns, class Activate>
__device__ __forceinline__ void activate_rows(float (&v)[Rows][Columns], int act, Activate activate_row) {
    if (act == ACT_RELU) {
#pragma unroll
        for (int i = 0; i < Rows; ++i) activate_each<ACT_RELU>(v[i]);
        return;
    }
    if (act == ACT_NONE) return;
#pragma unroll 1
    for (int turn = 0; turn < Rows; ++turn) {
        float row[Columns];
#pragma unroll
        for (int j = 0; j < Columns; ++j) row[j] = v[0][j];
        activate_row(row);
#pragma unroll
        for (int i = 0; i + 1 < Rows; ++i)
#pragma unroll
            for (int j = 0; j < Columns; ++j) v[i][j] = v[i + 1][j];
#pragma unroll
        for (int j = 0; j < Columns; ++j) v[Rows - 1][j] = row[j];
    }
}

template <int Rows, int Columns> __device__ __forceinline__ void activate_all(float (&v)[Rows][Columns], int act) {
    activate_rows(v, act, [&](float (&row)[Columns]) { activate_each(row, act); });
}

// Pool the four values of a window; `bits` gets the winner.
__device__ __forceinline__ float pool_window(float v0, float v1, float v2, float v3, int pool, u32 &bits) {
    if (pool == POOL_AVG) return 0.25f * ((v0 + v1) + (v2 + v3));
    float best = v0;
    bits = 0;
    if (beats(v1, best)) best = v1, bits = 1;
    if (beats(v2, best)) best = v2, bits = 2;
    if (beats(v3, best)) best = v3, bits = 3;
    return best;
}
