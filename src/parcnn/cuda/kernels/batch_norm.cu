// Batch normalisation of x (rows, C); rows = N*H*W. With xhat = (x - mean) * rstd:
//   forward    y = act(gamma*xhat + beta); training: mean and rstd = 1/sqrt(var + eps) of this batch, and
//              running += momentum * (batch - running), the variance unbiased there; inference: the running statistics
//   backward   dz = dy * act'(gamma*xhat + beta), recomputed;  dbeta = sum dz;  dgamma = sum dz*xhat;
//              training: dx = gamma*rstd * (dz - (dbeta + xhat*dgamma)/rows);  frozen statistics: dx = gamma*rstd * dz
//
// Large tensors: a pass that leaves one partial result a block and channel, a small launch that merges them, a pass that
//   writes (it walks the tensor backwards: what the first pass read last is still in the L2 cache).
// Few rows (`_single`): one launch; a block owns a few channels, reads their column twice, the second time from cache.
// In every pass a block has 2^lanes_log2 lanes along channels (VEC each) and its other threads along rows; it takes tiles of
//   UNROLL rows a thread. blockIdx.x: group of channels; blockIdx.y: which tiles.
// Variances: a thread takes the mean and the sum of squared deviations of UNROLL rows at a time and merges them (Chan,
//   Golub & LeVeque 1979), threads and blocks likewise: no difference of large numbers. Every order is fixed.
// Bytes: forward reads x twice (training), writes y; backward reads dy and x twice (frozen: once), writes dx.
// Preconditions: for VEC = 4, C is a multiple of 4 and tensors start on 16 bytes; rows below 2^31; blockDim.x a power of
//   two, at most 512, and at least 2^lanes_log2. dx may be dy or x: an element is read for the last time by the thread that
//   writes it.
// Macro: VEC.
#include "common.cuh"

#define MAX_THREADS 512
#define UNROLL 4

typedef Floats<VEC> Vector;

struct Shape {
    int rows, channels, lanes_log2;
};

// What a thread works on.
struct Place {
    int c;            // its first channel
    int row;          // its first row in a tile; the next are `row_step` apart
    int row_step;     // threads along rows
    int tile_rows;
    int tiles;
    bool live;        // it has channels
};

__device__ __forceinline__ Place place(const Shape &shape) {
    Place at;
    int lane = threadIdx.x & ((1 << shape.lanes_log2) - 1);
    at.c = ((blockIdx.x << shape.lanes_log2) + lane) * VEC;
    at.live = at.c < shape.channels;
    at.row = threadIdx.x >> shape.lanes_log2;
    at.row_step = blockDim.x >> shape.lanes_log2;
    at.tile_rows = at.row_step * UNROLL;
    at.tiles = (int)(((long long)shape.rows + at.tile_rows - 1) / at.tile_rows);
    return at;
}

// Rows of a tile that the thread has (0..UNROLL), and where the first one's channels start.
__device__ __forceinline__ int rows_in(const Place &at, const Shape &shape, int tile, size_t &start) {
    long long row = (long long)tile * at.tile_rows + at.row;
    start = row * shape.channels + at.c;
    long long left = (long long)shape.rows - row;
    return left <= 0 ? 0 : (int)min((left + at.row_step - 1) / at.row_step, (long long)UNROLL);
}

// Rows of all tiles that block `block` of `blocks` takes.
__device__ __forceinline__ float rows_of_block(int block, int blocks, int rows, int tile_rows) {
    int tiles = (int)(((long long)rows + tile_rows - 1) / tile_rows);
    if (block >= tiles) return 0.0f;
    long long own = (long long)((tiles - 1 - block) / blocks + 1) * tile_rows;
    bool has_last = (tiles - 1 - block) % blocks == 0;
    return (float)(has_last ? own - ((long long)tiles * tile_rows - rows) : own);
}

__device__ __forceinline__ float normalise(float x, float mean, float scale, float beta, int relu) {
    float z = (x - mean) * scale + beta;
    return relu ? activate<ACT_RELU>(z) : z;
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

// Moments of the rows in the tiles of this block; complete in the threads of row 0. Scratch: one entry a thread.
__device__ __forceinline__ Moments block_moments(const float *x, const Place &at, const Shape &shape, float *counts,
                                                 Vector *means, Vector *m2s) {
    Moments own = {0.0f, splat<VEC>(0.0f), splat<VEC>(0.0f)};
    if (at.live)
        for (int tile = blockIdx.y; tile < at.tiles; tile += gridDim.y) {
            size_t start;
            int count = rows_in(at, shape, tile, start);
            Vector v[UNROLL];
#pragma unroll
            for (int j = 0; j < UNROLL; ++j)
                v[j] = j < count ? load<VEC>(x + start + (size_t)j * at.row_step * shape.channels) : splat<VEC>(0.0f);
            Vector mean = splat<VEC>(0.0f), m2 = splat<VEC>(0.0f);
            float share = 1.0f / (float)max(count, 1);
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
#pragma unroll
                for (int j = 0; j < UNROLL; ++j) mean.v[e] += v[j].v[e];
                mean.v[e] *= share;
#pragma unroll
                for (int j = 0; j < UNROLL; ++j) {
                    float d = j < count ? v[j].v[e] - mean.v[e] : 0.0f;
                    m2.v[e] += d * d;
                }
            }
            merge(own, (float)count, mean, m2);
        }
    for (int half = at.row_step / 2; half > 0; half /= 2) {
        if (at.row >= half && at.row < 2 * half) {
            counts[threadIdx.x] = own.count;
            means[threadIdx.x] = own.mean;
            m2s[threadIdx.x] = own.m2;
        }
        __syncthreads();
        int other = threadIdx.x + (half << shape.lanes_log2);
        if (at.row < half) merge(own, counts[other], means[other], m2s[other]);
    }
    return own;
}

struct Statistics {
    float *running_mean, *running_var, *mean, *rstd;
    float eps, momentum;
};

// mean and m2 (sum of squared deviations) of channel c over all rows: keep them, and move the running statistics.
__device__ __forceinline__ float keep_statistics(const Statistics &s, int c, float mean, float m2, int rows) {
    float rstd = 1.0f / sqrtf(m2 / rows + s.eps);
    s.mean[c] = mean;
    s.rstd[c] = rstd;
    s.running_mean[c] += s.momentum * (mean - s.running_mean[c]);
    s.running_var[c] += s.momentum * (m2 / max(rows - 1, 1) - s.running_var[c]);
    return rstd;
}

// y for the tiles of this block, last tiles first.
__device__ __forceinline__ void write_normalised(const float *x, float *y, const Place &at, const Shape &shape,
                                                 const Vector &mean, const Vector &scale, const Vector &beta, int relu) {
    for (int tile = at.tiles - 1 - (int)blockIdx.y; tile >= 0; tile -= gridDim.y) {
        size_t start;
        int count = rows_in(at, shape, tile, start);
        Vector v[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; ++j)
            if (j < count) v[j] = load<VEC>(x + start + (size_t)j * at.row_step * shape.channels);
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            if (j >= count) break;
#pragma unroll
            for (int e = 0; e < VEC; ++e) v[j].v[e] = normalise(v[j].v[e], mean.v[e], scale.v[e], beta.v[e], relu);
            store<VEC>(y + start + (size_t)j * at.row_step * shape.channels, v[j]);
        }
    }
}

// partial: means (gridDim.y, C), then sums of squared deviations (gridDim.y, C).
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_moments(const float *__restrict__ x, float *__restrict__ partial, Shape shape) {
    __shared__ float counts[MAX_THREADS];
    __shared__ Vector means[MAX_THREADS], m2s[MAX_THREADS];
    Place at = place(shape);
    Moments own = block_moments(x, at, shape, counts, means, m2s);
    if (at.live && at.row == 0) {
        store<VEC>(partial + (size_t)blockIdx.y * shape.channels + at.c, own.mean);
        store<VEC>(partial + (size_t)(gridDim.y + blockIdx.y) * shape.channels + at.c, own.m2);
    }
}

// A block of 32 x 16 threads for 32 channels. tile_rows: of the pass that wrote the partial moments.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_merge_moments(const float *__restrict__ partial, Statistics s, int partials, int tile_rows, int rows, int channels) {
    __shared__ float sums[2][16][32];
    int lane = threadIdx.x & 31, part = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
    bool live = c < channels;
    const float *means = partial + c, *m2s = partial + (size_t)partials * channels + c;
    float mean = 0.0f, m2 = 0.0f;
#pragma unroll 4
    for (int i = part; live && i < partials; i += 16)
        mean += rows_of_block(i, partials, rows, tile_rows) / rows * means[(size_t)i * channels];
    sums[0][part][lane] = mean;
    __syncthreads();
    mean = 0.0f;
    for (int i = 0; i < 16; ++i) mean += sums[0][i][lane];
#pragma unroll 4
    for (int i = part; live && i < partials; i += 16) {
        float d = means[(size_t)i * channels] - mean;
        m2 += m2s[(size_t)i * channels] + rows_of_block(i, partials, rows, tile_rows) * d * d;
    }
    sums[1][part][lane] = m2;
    __syncthreads();
    if (part > 0 || !live) return;
    m2 = 0.0f;
    for (int i = 0; i < 16; ++i) m2 += sums[1][i][lane];
    keep_statistics(s, c, mean, m2, rows);
}

// Normalise with mean and rstd; or, with from_variance, `rstd` holds a variance.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_normalise(const float *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                     const float *__restrict__ mean, const float *__restrict__ rstd, float *y, Shape shape, float eps,
                     int from_variance, int relu) {
    Place at = place(shape);
    if (!at.live) return;
    Vector g = load<VEC>(gamma + at.c), r = load<VEC>(rstd + at.c);
#pragma unroll
    for (int e = 0; e < VEC; ++e) g.v[e] *= from_variance ? 1.0f / sqrtf(r.v[e] + eps) : r.v[e];
    write_normalised(x, y, at, shape, load<VEC>(mean + at.c), g, load<VEC>(beta + at.c), relu);
}

// grid: (groups of channels, 1)
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_train_single(const float *__restrict__ x, const float *__restrict__ gamma, const float *__restrict__ beta,
                        float *__restrict__ y, Statistics s, Shape shape, int relu) {
    __shared__ float counts[MAX_THREADS];
    __shared__ Vector means[MAX_THREADS], m2s[MAX_THREADS];
    Place at = place(shape);
    Moments own = block_moments(x, at, shape, counts, means, m2s);
    int lane = threadIdx.x & ((1 << shape.lanes_log2) - 1);
    if (at.live && at.row == 0) {
        Vector rstd;
#pragma unroll
        for (int e = 0; e < VEC; ++e) rstd.v[e] = keep_statistics(s, at.c + e, own.mean.v[e], own.m2.v[e], shape.rows);
        means[lane] = own.mean;  // entries of row 0: the merge of the rows does not use them
        m2s[lane] = rstd;
    }
    __syncthreads();
    if (!at.live) return;
    Vector scale = load<VEC>(gamma + at.c);
#pragma unroll
    for (int e = 0; e < VEC; ++e) scale.v[e] *= m2s[lane].v[e];
    write_normalised(x, y, at, shape, means[lane], scale, load<VEC>(beta + at.c), relu);
}

// ---- Gradients ------------------------------------------------------------------------------------------------------

// The layer's constants of a thread's channels.
struct Affine {
    Vector mean, rstd, gamma, beta;
};

__device__ __forceinline__ Affine load_affine(const float *gamma, const float *beta, const float *mean, const float *rstd,
                                              int c) {
    return {load<VEC>(mean + c), load<VEC>(rstd + c), load<VEC>(gamma + c), load<VEC>(beta + c)};
}

// dz and xhat of one element, the activation's derivative by the forward's own expression.
__device__ __forceinline__ float error_before_act(const Affine &a, int e, float dy, float x, int relu, float &xhat) {
    float centred = x - a.mean.v[e];
    xhat = centred * a.rstd.v[e];
    return relu ? activation_dgrad<ACT_RELU>(dy, centred * (a.gamma.v[e] * a.rstd.v[e]) + a.beta.v[e]) : dy;
}

// Sums of dz*xhat and dz over this block's tiles; complete in the threads of row 0. With dx (frozen statistics) also
// writes dx = gamma*rstd*dz. Scratch: one entry a thread.
__device__ __forceinline__ void block_gradients(const float *dy, const float *x, float *dx, const Affine &a, const Place &at,
                                                const Shape &shape, int relu, Vector &dgamma, Vector &dbeta,
                                                Vector *dgammas, Vector *dbetas) {
    dgamma = dbeta = splat<VEC>(0.0f);
    if (at.live)
        for (int tile = blockIdx.y; tile < at.tiles; tile += gridDim.y) {
            size_t start;
            int count = rows_in(at, shape, tile, start);
            Vector vx[UNROLL], vdy[UNROLL];
#pragma unroll
            for (int j = 0; j < UNROLL; ++j)
                if (j < count) {
                    vx[j] = load<VEC>(x + start + (size_t)j * at.row_step * shape.channels);
                    vdy[j] = load<VEC>(dy + start + (size_t)j * at.row_step * shape.channels);
                }
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) {
                if (j >= count) break;
#pragma unroll
                for (int e = 0; e < VEC; ++e) {
                    float xhat, dz = error_before_act(a, e, vdy[j].v[e], vx[j].v[e], relu, xhat);
                    dbeta.v[e] += dz;
                    dgamma.v[e] += dz * xhat;
                    vdy[j].v[e] = a.gamma.v[e] * a.rstd.v[e] * dz;
                }
                if (dx) store<VEC>(dx + start + (size_t)j * at.row_step * shape.channels, vdy[j]);
            }
        }
    for (int half = at.row_step / 2; half > 0; half /= 2) {
        if (at.row >= half && at.row < 2 * half) {
            dgammas[threadIdx.x] = dgamma;
            dbetas[threadIdx.x] = dbeta;
        }
        __syncthreads();
        int other = threadIdx.x + (half << shape.lanes_log2);
        if (at.row < half) {
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                dgamma.v[e] += dgammas[other].v[e];
                dbeta.v[e] += dbetas[other].v[e];
            }
        }
    }
}

// dx for the tiles of this block, last tiles first.
__device__ __forceinline__ void write_dx(const float *dy, const float *x, float *dx, const Affine &a, const Place &at,
                                         const Shape &shape, int relu, Vector dgamma, Vector dbeta) {
    float share = 1.0f / (float)shape.rows;
    Vector scale;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        scale.v[e] = a.gamma.v[e] * a.rstd.v[e];
        dgamma.v[e] *= share;
        dbeta.v[e] *= share;
    }
    for (int tile = at.tiles - 1 - (int)blockIdx.y; tile >= 0; tile -= gridDim.y) {
        size_t start;
        int count = rows_in(at, shape, tile, start);
        Vector vx[UNROLL], vdy[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; ++j)
            if (j < count) {
                vx[j] = load<VEC>(x + start + (size_t)j * at.row_step * shape.channels);
                vdy[j] = load<VEC>(dy + start + (size_t)j * at.row_step * shape.channels);
            }
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            if (j >= count) break;
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                float xhat, dz = error_before_act(a, e, vdy[j].v[e], vx[j].v[e], relu, xhat);
                vdy[j].v[e] = scale.v[e] * (dz - (dbeta.v[e] + xhat * dgamma.v[e]));
            }
            store<VEC>(dx + start + (size_t)j * at.row_step * shape.channels, vdy[j]);
        }
    }
}

// dgammas, dbetas: partial sums (gridDim.y, C). With from_variance (frozen statistics) `rstd` holds a variance and dx is
// written here; else dx is null.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_gradients(const float *dy, const float *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                     const float *__restrict__ mean, const float *__restrict__ rstd, float *dx, float *__restrict__ dgammas,
                     float *__restrict__ dbetas, Shape shape, float eps, int from_variance, int relu) {
    __shared__ Vector scratch[2][MAX_THREADS];
    Place at = place(shape);
    Affine a;
    if (at.live) {
        a = load_affine(gamma, beta, mean, rstd, at.c);
#pragma unroll
        for (int e = 0; e < VEC; ++e)
            if (from_variance) a.rstd.v[e] = 1.0f / sqrtf(a.rstd.v[e] + eps);
    }
    Vector dgamma, dbeta;
    block_gradients(dy, x, dx, a, at, shape, relu, dgamma, dbeta, scratch[0], scratch[1]);
    if (at.live && at.row == 0) {
        store<VEC>(dgammas + (size_t)blockIdx.y * shape.channels + at.c, dgamma);
        store<VEC>(dbetas + (size_t)blockIdx.y * shape.channels + at.c, dbeta);
    }
}

// A block of 32 x 16 threads for 32 channels; blockIdx.y: dgamma or dbeta.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_sum_gradients(const float *__restrict__ dgammas, const float *__restrict__ dbetas, float *__restrict__ dgamma,
                         float *__restrict__ dbeta, int partials, int channels) {
    __shared__ float sums[16][32];
    const float *source = blockIdx.y ? dbetas : dgammas;
    int lane = threadIdx.x & 31, part = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = part; c < channels && i < partials; i += 16) sum += source[(size_t)i * channels + c];
    sums[part][lane] = sum;
    __syncthreads();
    if (part > 0 || c >= channels) return;
    sum = 0.0f;
    for (int i = 0; i < 16; ++i) sum += sums[i][lane];
    (blockIdx.y ? dbeta : dgamma)[c] = sum;
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_dgrad(const float *dy, const float *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                 const float *__restrict__ mean, const float *__restrict__ rstd, const float *__restrict__ dgamma,
                 const float *__restrict__ dbeta, float *dx, Shape shape, int relu) {
    Place at = place(shape);
    if (!at.live) return;
    write_dx(dy, x, dx, load_affine(gamma, beta, mean, rstd, at.c), at, shape, relu, load<VEC>(dgamma + at.c),
             load<VEC>(dbeta + at.c));
}

// grid: (groups of channels, 1)
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
batch_norm_dgrad_single(const float *dy, const float *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                        const float *__restrict__ mean, const float *__restrict__ rstd, float *dx, float *__restrict__ dgammas,
                        float *__restrict__ dbetas, Shape shape, int relu) {
    __shared__ Vector scratch[2][MAX_THREADS];
    Place at = place(shape);
    Affine a;
    if (at.live) a = load_affine(gamma, beta, mean, rstd, at.c);
    Vector dgamma, dbeta;
    block_gradients(dy, x, nullptr, a, at, shape, relu, dgamma, dbeta, scratch[0], scratch[1]);
    int lane = threadIdx.x & ((1 << shape.lanes_log2) - 1);
    if (at.live && at.row == 0) {
        store<VEC>(dgammas + at.c, dgamma);
        store<VEC>(dbetas + at.c, dbeta);
        scratch[0][lane] = dgamma;  // entries of row 0: the sum over the rows does not use them
        scratch[1][lane] = dbeta;
    }
    __syncthreads();
    if (at.live) write_dx(dy, x, dx, a, at, shape, relu, scratch[0][lane], scratch[1][lane]);
}
