// What batch_norm.cu and batch_norm_pool.cu share: how threads lie over rows and channels, sums over a block's rows.
//
// Macros: ELEMENT (float, bf16), VEC.
#pragma once

#include "common.cuh"

typedef ELEMENT Element;     // of x, y, dy, dx
typedef Floats<VEC> Vector;  // neighbouring channels in the arithmetic

struct Shape {
    int rows, channels, lanes_log2;
    int tiles;  // of UNROLL rows a thread; in one launch: of one row a thread
};

// What a thread works on.
struct Part {
    int c;           // its first channel
    int lane;        // its place among the threads of a row
    u32 row;         // its first row in a tile; the next are row_step apart
    int step_log2;   // of row_step, the threads along rows
    size_t step;     // elements from one of its rows to the next
    bool live;       // it has channels
};

__device__ __forceinline__ Part part_of(const Shape &shape) {
    Part at;
    at.lane = threadIdx.x & ((1 << shape.lanes_log2) - 1);
    at.c = ((blockIdx.x << shape.lanes_log2) + at.lane) * VEC;
    at.live = at.c < shape.channels;
    at.row = threadIdx.x >> shape.lanes_log2;
    at.step_log2 = 31 - __clz((int)blockDim.x) - shape.lanes_log2;
    at.step = (size_t)shape.channels << at.step_log2;
    return at;
}

// Floats of one sum's scratch: a vector for each lane of each warp.
__device__ __forceinline__ int scratch_floats(int lanes_log2) { return VEC * (blockDim.x / 32) << lanes_log2; }

// Sums over the threads of a block that share a lane, in a fixed order. Those of v[n] come to lie in the order of the
// block's channels from scratch + n * scratch_floats on, which nobody may use since the last barrier.
template <int N>
__device__ __forceinline__ void sum_rows(Vector (&v)[N], const Part &at, int lanes_log2, float *scratch) {
    int warp = threadIdx.x / 32, warps = blockDim.x / 32, entries = warps << lanes_log2;
    auto sum_warp = [&](Vector &sum) {
        for (int offset = 16; offset >> lanes_log2; offset /= 2)
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum.v[e] += __shfl_xor_sync(0xffffffffu, sum.v[e], offset);
    };
#pragma unroll
    for (int n = 0; n < N; ++n) sum_warp(v[n]);
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (threadIdx.x % 32 == at.lane) store<VEC>(scratch + (n * entries + (warp << lanes_log2) + at.lane) * VEC, v[n]);
    __syncthreads();
    // Warp n sums what the warps left of v[n]; its lanes meet their own channels again, as 32 is a multiple of the lanes.
    for (int n = warp; n < N; n += warps) {
        Vector sum = splat<VEC>(0.0f);
        for (int i = threadIdx.x % 32; i < entries; i += 32) {
            Vector other = load<VEC>(scratch + (n * entries + i) * VEC);
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum.v[e] += other.v[e];
        }
        sum_warp(sum);
        __syncwarp();
        if (threadIdx.x % 32 == at.lane) store<VEC>(scratch + (n * entries + at.lane) * VEC, sum);
    }
    __syncthreads();
}

__device__ __forceinline__ Vector product(Vector a, const Vector &b) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) a.v[e] *= b.v[e];
    return a;
}

// ---- Gradients ------------------------------------------------------------------------------------------------------

// The layer's constants of a thread's channels. scale: gamma * rstd.
struct Affine {
    Vector mean, rstd, scale, beta;
};

__device__ __forceinline__ Affine load_affine(const float *gamma, const float *beta, const float *mean, const float *rstd,
                                              const Part &at) {
    if (!at.live) return {};
    Vector r = load<VEC>(rstd + at.c);
    return {load<VEC>(mean + at.c), r, product(load<VEC>(gamma + at.c), r), load<VEC>(beta + at.c)};
}

// Write the block's two sums of each channel, from scratch.
__device__ __forceinline__ void store_sums(float *dgamma, float *dbeta, size_t offset, const float *scratch,
                                           const Shape &shape) {
    int i = threadIdx.x, c = (blockIdx.x << shape.lanes_log2) * VEC + i;
    if (i >= VEC << shape.lanes_log2 || c >= shape.channels) return;
    dgamma[offset + c] = scratch[i];
    dbeta[offset + c] = scratch[scratch_floats(shape.lanes_log2) + i];
}

// Add what the blocks of the pass before left of a thread's channels to sums; those of the block come to lie in scratch.
__device__ __forceinline__ void sum_partials(Vector (&sums)[2], const float *dgammas, const float *dbetas, int partials,
                                             const Part &at, const Shape &shape, float *scratch) {
#pragma unroll 4
    for (int i = at.row; at.live && i < partials; i += 1 << at.step_log2) {
        size_t offset = (size_t)i * shape.channels + at.c;
        Vector g = load<VEC>(dgammas + offset), b = load<VEC>(dbetas + offset);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            sums[0].v[e] += g.v[e];
            sums[1].v[e] += b.v[e];
        }
    }
    sum_rows(sums, at, shape.lanes_log2, scratch);
}

// Means over `rows` of dz*xhat and dz, from the block's sums in scratch.
__device__ __forceinline__ void load_means(Vector (&means)[2], const float *scratch, const Part &at, int lanes_log2, int rows) {
    float share = 1.0f / (float)rows;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        means[n] = load<VEC>(scratch + n * scratch_floats(lanes_log2) + at.lane * VEC);
#pragma unroll
        for (int e = 0; e < VEC; ++e) means[n].v[e] *= share;
    }
}
