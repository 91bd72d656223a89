// What batch_norm.cu and batch_norm_pool_*.cu share: how threads lie over rows and channels, sums over a block's rows, and what
// is made of partial results.
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

// ---- Statistics -----------------------------------------------------------------------------------------------------

struct Moments {
    float count;
    Vector mean, m2;  // m2: sum of squared deviations from the mean
};

__device__ __forceinline__ void merge(Moments &a, float count, const Vector &mean, const Vector &m2) {
    if (count == 0.0f) return;
    float all = a.count + count, weight = count / all;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        float delta = mean.v[e] - a.mean.v[e];
        a.mean.v[e] += delta * weight;
        a.m2.v[e] += m2.v[e] + delta * delta * (a.count * weight);
    }
    a.count = all;
}

// Of one channel.
struct Channel {
    float mean, m2;
};

// Correct a mean, and the sum of squared deviations from it, by the sum of the deviations, which exact arithmetic would make
// zero (the corrected two-pass algorithm of Chan, Golub & LeVeque).
__device__ __forceinline__ Channel correct(float mean, float deviations, float squares, float rows) {
    float shift = deviations / rows, m2 = squares - deviations * shift;
    return {mean + shift, m2 < 0.0f ? 0.0f : m2};  // NaN stays
}

// Merge what the block's threads have, `rows` rows together. The thread of each of the block's channels (the first ones of the
// block) gets its channel's. Scratch: of three sums.
__device__ __forceinline__ Channel merge_threads(const Moments &own, float rows, const Part &at, int lanes_log2,
                                                 float *scratch) {
    int size = scratch_floats(lanes_log2);
    float weight = own.count / rows, *means = scratch + 2 * size;
    Vector mean[1], sums[2];
#pragma unroll
    for (int e = 0; e < VEC; ++e) mean[0].v[e] = own.mean.v[e] * weight;
    sum_rows(mean, at, lanes_log2, means);
    mean[0] = load<VEC>(means + at.lane * VEC);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        float d = own.mean.v[e] - mean[0].v[e];
        sums[0].v[e] = own.count * d;
        sums[1].v[e] = own.m2.v[e] + own.count * d * d;
    }
    sum_rows(sums, at, lanes_log2, scratch);
    int i = threadIdx.x;
    return i < VEC << lanes_log2 ? correct(means[i], scratch[i], scratch[size + i], rows) : Channel();
}

// How a pass that left partial results was divided.
struct Split {
    FastDiv blocks;
    int tiles, tile_rows;
};

// Rows of all tiles that block `block` took.
__device__ __forceinline__ float rows_of_block(int block, const Split &split, int rows) {
    int rest, more = divide(split.tiles - 1 - block, split.blocks, rest);
    long long own = (more + 1LL) * split.tile_rows;
    if (rest == 0) own -= (long long)split.tiles * split.tile_rows - rows;  // it has the last tile
    return (float)own;
}

struct Statistics {
    float *running_mean, *running_var, *mean, *rstd;
    float eps, momentum;
};

// The thread of each of the block's channels works out what forward does to it, puts that in place of the sums in scratch,
// and where asked keeps the channel's statistics and moves the running ones. A barrier shows the first to the block.
__device__ __forceinline__ void finish_channel(float *scratch, const Channel &own, const Statistics &s, const float *gamma,
                                               const float *beta, const Shape &shape, bool keep) {
    int i = threadIdx.x, c = (blockIdx.x << shape.lanes_log2) * VEC + i, size = scratch_floats(shape.lanes_log2);
    if (i >= VEC << shape.lanes_log2 || c >= shape.channels) return;
    float rstd = 1.0f / sqrtf(own.m2 / (float)shape.rows + s.eps);
    scratch[i] = gamma[c] * rstd;
    scratch[size + i] = beta[c];
    scratch[2 * size + i] = own.mean;
    if (!keep) return;
    s.mean[c] = own.mean;
    s.rstd[c] = rstd;
    s.running_mean[c] += s.momentum * (own.mean - s.running_mean[c]);
    s.running_var[c] += s.momentum * (own.m2 / max(shape.rows - 1, 1) - s.running_var[c]);
}

// Of a thread's channels. scale: gamma * rstd.
struct Normal {
    Vector scale, shift, mean;
};

__device__ __forceinline__ Normal load_normal(const float *scratch, const Part &at, int lanes_log2) {
    const float *own = scratch + at.lane * VEC;
    int size = scratch_floats(lanes_log2);
    return {load<VEC>(own), load<VEC>(own + size), load<VEC>(own + 2 * size)};
}

// What forward does to a thread's channels, by the partial results that the blocks of a pass over rows left: means, then sums of
// squared deviations. `keep`: finish_channel's. Scratch: of three sums.
__device__ __forceinline__ Normal merge_partials(const float *partial, const float *gamma, const float *beta,
                                                 const Statistics &s, const Split &split, const Shape &shape, const Part &at,
                                                 float *scratch, bool keep) {
    int partials = split.blocks.d;
    Moments all = {0.0f, splat<VEC>(0.0f), splat<VEC>(0.0f)};
    const float *means = partial + at.c, *m2s = means + (size_t)partials * shape.channels;
#pragma unroll 4
    for (int i = at.row; at.live && i < partials; i += 1 << at.step_log2) {
        size_t offset = (size_t)i * shape.channels;
        merge(all, rows_of_block(i, split, shape.rows), load<VEC>(means + offset), load<VEC>(m2s + offset));
    }
    Channel own = merge_threads(all, (float)shape.rows, at, shape.lanes_log2, scratch);
    finish_channel(scratch, own, s, gamma, beta, shape, keep);
    __syncthreads();
    return load_normal(scratch, at, shape.lanes_log2);
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
