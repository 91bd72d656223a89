// Batch normalisation of x (rows, C); rows = N*H*W. With xhat = (x - mean) * rstd:
//   forward    y = act(gamma*xhat + beta), or act(gamma*xhat + beta + addend); training: mean and rstd = 1/sqrt(var + eps) of
//              this batch, and running += momentum * (batch - running), the variance unbiased there; inference: the running
//              statistics
//   backward   dz = dy * act'(gamma*xhat + beta), recomputed;  dbeta = sum dz;  dgamma = sum dz*xhat;
//              training: dx = gamma*rstd * (dz - (dbeta + xhat*dgamma)/rows);  frozen statistics: dx = gamma*rstd * dz
//
// x, addend, y, dy and dx are float or bf16; everything else is float, and so is all arithmetic: bf16 is rounded to once, at
// the store.
// Backward recomputes the forward's float before the activation, bit for bit, and cuts off where that was zero or less. The
// rounding to bf16 has no part in it: where a positive float rounds to a zero y (up to 2^-134), dy still passes.
//
// Two launches: a pass that leaves one partial result a block and channel, and a pass whose blocks each merge the partial
//   results of their channels, in the same order, and then write (it walks the tensor backwards: what the first pass read
//   last is still in the L2 cache).
// One launch (`_single`), for few rows: a block owns all rows of a few channels and keeps them in shared memory between the
//   sums and the writing; each thread reads there only what it put there itself.
// In every pass a block has 2^lanes_log2 lanes along channels (VEC each) and its other threads along rows; it takes tiles of
//   UNROLL rows a thread. blockIdx.x: group of channels; blockIdx.y: which tiles. What is done once a channel (square root,
//   divisions, running statistics) the block's first threads do, one a channel.
// Variances: the mean comes before the squared deviations from it, and is corrected by the deviations. In two launches a
//   thread takes both of UNROLL rows at a time and merges them (Chan, Golub & LeVeque 1979): no difference of large numbers.
//   Every order is fixed.
// Bytes: forward reads x twice (training, two launches) and the addend once, writes y; backward reads dy and x twice (frozen or
//   one launch: once), writes dx.
// Preconditions: C is a multiple of VEC and tensors start on 16 bytes; rows below 2^31; blockDim.x a power of two, at least
//   32 and a block's channels, 2^lanes_log2 * VEC, which are at most GROUP but in one launch. y may be the addend (in inference
//   x, too), dx dy or x: an element is read for the last time by the thread that writes it.
// Macros: ELEMENT (float, bf16), VEC; ENTRY: which kernel is compiled; ADDEND 1: forward has an addend.
#include "batch_norm.cuh"

#define MOMENTS 0
#define TRAIN 1
#define TRAIN_SINGLE 2
#define INFER 3
#define GRADIENTS 4
#define SUM_GRADIENTS 5
#define DGRAD 6
#define DGRAD_SINGLE 7

#ifndef ADDEND
#define ADDEND 0
#endif

#define UNROLL (sizeof(Element) == 2 ? 8 : 4)  // rows of a tile that a thread has
#define GROUP 32  // most channels of a block, but in one launch
#define MOMENTS_THREADS 1024
#define SUM_THREADS 512
#define WRITE_THREADS 256
#define SINGLE_THREADS (sizeof(Element) == 2 ? 512 : 1024)
#define CHUNKS 4  // of a thread's rows in one launch: the first are summed while the others are on their way

// The same channels of a row as they lie in memory: what waits in registers or in shared memory is not yet converted.
template <int Bytes> struct Words;
template <> struct Words<2> { typedef u16 Type; };
template <> struct Words<4> { typedef u32 Type; };
template <> struct Words<8> { typedef uint2 Type; };
template <> struct Words<16> { typedef uint4 Type; };
typedef Words<VEC * sizeof(Element)>::Type Word;

__device__ __forceinline__ Vector to_floats(const Word &word) { return load<VEC>(reinterpret_cast<const Element *>(&word)); }

// How many rows from `row` on the thread has, and where the first one's channels start.
__device__ __forceinline__ int rows_from(u32 row, const Part &at, const Shape &shape, size_t &start) {
    start = (size_t)row * shape.channels + at.c;
    int left = at.live ? (int)((u32)shape.rows - row) : 0;
    return left <= 0 ? 0 : ((left - 1) >> at.step_log2) + 1;
}

// Those of a tile, at most UNROLL.
__device__ __forceinline__ int rows_in(int tile, const Part &at, const Shape &shape, size_t &start) {
    return min(rows_from(((u32)tile * UNROLL << at.step_log2) + at.row, at, shape, start), UNROLL);
}

__device__ __forceinline__ void load_rows(const Element *x, int count, size_t step, Word (&v)[UNROLL]) {
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) v[j] = j < count ? load_word<Word>(x + j * step) : Word();
}

// ---- Statistics -----------------------------------------------------------------------------------------------------

// Merge `count` rows; the others are zero.
__device__ __forceinline__ void add_rows(Moments &own, const Word (&rows)[UNROLL], int count) {
    Vector v[UNROLL], mean, m2;
    float share = count == UNROLL ? 1.0f / UNROLL : 1.0f / (float)max(count, 1);
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) v[j] = to_floats(rows[j]);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) sum += v[j].v[e];
        mean.v[e] = sum * share;
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            float d = j < count ? v[j].v[e] - mean.v[e] : 0.0f;
            squares += d * d;
        }
        m2.v[e] = squares;
    }
    merge(own, (float)count, mean, m2);
}

// Write y of a row's channels.
__device__ __forceinline__ void normalise(Element *y, const Word &x, const Word &addend, const Normal &n, int relu) {
    Vector v = to_floats(x), a = ADDEND ? to_floats(addend) : splat<VEC>(0.0f);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        float z = (v.v[e] - n.mean.v[e]) * n.scale.v[e] + n.shift.v[e];
        if (ADDEND) z += a.v[e];
        v.v[e] = relu ? activate<ACT_RELU>(z) : z;
    }
    store<VEC>(y, v);
}

// A thread's rows of a tile: they may still be on their way.
struct Rows {
    Word x[UNROLL], addend[UNROLL];
};

__device__ __forceinline__ void load_operands(const Element *x, const Element *addend, int count, size_t step, Rows &rows) {
    load_rows(x, count, step, rows.x);
    if (ADDEND) load_rows(addend, count, step, rows.addend);
}

__device__ __forceinline__ void write_rows(Element *y, const Rows &rows, int count, size_t step, const Normal &n, int relu) {
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
        if (j >= count) break;
        normalise(y + j * step, rows.x[j], rows.addend[j], n, relu);
    }
}

#if ENTRY == MOMENTS
// partial: means (gridDim.y, C), then sums of squared deviations (gridDim.y, C). split: of this pass.
extern "C" __global__ void __launch_bounds__(MOMENTS_THREADS)
batch_norm_moments(const Element *__restrict__ x, float *__restrict__ partial, Split split, Shape shape) {
    await_predecessors();
    __shared__ float4 scratch[3 * MOMENTS_THREADS / 32 * GROUP / 4];
    Part at = part_of(shape);
    Moments own = {0.0f, splat<VEC>(0.0f), splat<VEC>(0.0f)};
    for (int tile = blockIdx.y; tile < shape.tiles; tile += gridDim.y) {
        size_t start;
        int count = rows_in(tile, at, shape, start);
        Word v[UNROLL];
        load_rows(x + start, count, at.step, v);
        add_rows(own, v, count);
    }
    float rows = rows_of_block(blockIdx.y, split, shape.rows);
    Channel all = merge_threads(own, rows, at, shape.lanes_log2, &scratch->x);
    int i = threadIdx.x, c = (blockIdx.x << shape.lanes_log2) * VEC + i;
    if (i < VEC << shape.lanes_log2 && c < shape.channels) {
        partial[(size_t)blockIdx.y * shape.channels + c] = all.mean;
        partial[(size_t)(gridDim.y + blockIdx.y) * shape.channels + c] = all.m2;
    }
}
#endif

#if ENTRY == TRAIN
// The second pass. split: of the first.
extern "C" __global__ void __launch_bounds__(WRITE_THREADS)
batch_norm_train(const Element *__restrict__ x, const float *__restrict__ gamma, const float *__restrict__ beta,
                 const float *__restrict__ partial, const Element *addend, Element *y, Statistics s, Split split, Shape shape,
                 int relu) {
    await_predecessors();
    __shared__ float4 scratch[3 * WRITE_THREADS / 32 * GROUP / 4];
    Part at = part_of(shape);
    int tile = shape.tiles - 1 - (int)blockIdx.y;
    size_t start;
    int count = rows_in(tile, at, shape, start);
    Rows rows;
    load_operands(x + start, addend + start, count, at.step, rows);  // on their way while the partial results are merged

    // No block has fewer tiles than the last.
    Normal normal = merge_partials(partial, gamma, beta, s, split, shape, at, &scratch->x, blockIdx.y == gridDim.y - 1);
    if (!at.live) return;

    while (true) {
        write_rows(y + start, rows, count, at.step, normal, relu);
        tile -= gridDim.y;
        if (tile < 0) return;
        count = rows_in(tile, at, shape, start);
        load_operands(x + start, addend + start, count, at.step, rows);
    }
}
#endif

#if ENTRY == INFER
// Inference.
extern "C" __global__ void __launch_bounds__(WRITE_THREADS)
batch_norm_infer(const Element *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                 const float *__restrict__ mean, const float *__restrict__ var, const Element *addend, Element *y, Shape shape,
                 float eps, int relu) {
    await_predecessors();
    Part at = part_of(shape);
    if (!at.live) return;
    for (int tile = blockIdx.y; tile < shape.tiles; tile += gridDim.y) {
        size_t start;
        int count = rows_in(tile, at, shape, start);
        Rows rows;
        load_operands(x + start, addend + start, count, at.step, rows);
        Normal normal = {load<VEC>(gamma + at.c), load<VEC>(beta + at.c), load<VEC>(mean + at.c)};
        Vector variance = load<VEC>(var + at.c);
#pragma unroll
        for (int e = 0; e < VEC; ++e) normal.scale.v[e] *= 1.0f / sqrtf(variance.v[e] + eps);
        write_rows(y + start, rows, count, at.step, normal, relu);
    }
}
#endif

// Start copies of rows first..last-1 of a thread to its entries of shared memory, which lie a block's words apart.
__device__ __forceinline__ void keep_rows(Word *kept, const Element *x, int first, int last, size_t step) {
    for (int k = first; k < last; ++k) {
        Word *entry = kept + k * (int)blockDim.x;
        if constexpr (sizeof(Word) == 16)
            copy_async16(reinterpret_cast<float *>(entry), reinterpret_cast<const float *>(x + k * step), true);
        else if constexpr (sizeof(Word) >= 4)
            for (int i = 0; i < sizeof(Word) / 4; ++i)
                copy_async4(reinterpret_cast<float *>(entry) + i, reinterpret_cast<const float *>(x + k * step) + i, true);
        else
            *entry = load_word<Word>(x + k * step);
    }
}

// Wait for a thread's chunk of rows; later ones, and the addend behind them, may still be on their way.
__device__ __forceinline__ void wait_for_chunk(int chunk) {
    if (chunk == 0)
        copy_async_wait<CHUNKS - 1 + ADDEND>();
    else if (chunk == 1)
        copy_async_wait<CHUNKS - 2 + ADDEND>();
    else if (chunk == 2)
        copy_async_wait<CHUNKS - 3 + ADDEND>();
    else
        copy_async_wait<ADDEND>();
}

#if ENTRY == TRAIN_SINGLE
// grid: (groups of channels, 1). Shared memory: the rows, those of the addend, then scratch. Without the least number of blocks
// ptxas spills to save registers.
extern "C" __global__ void __launch_bounds__(SINGLE_THREADS, sizeof(Element) == 2 || ADDEND ? 1 : 0)
batch_norm_train_single(const Element *__restrict__ x, const float *__restrict__ gamma, const float *__restrict__ beta,
                        const Element *addend, Element *y, Statistics s, Shape shape, int relu) {
    await_predecessors();
    DYNAMIC_SHARED(Word, shared);
    Part at = part_of(shape);
    int stride = blockDim.x, kept_words = shape.tiles * stride;
    Word *kept = shared + threadIdx.x, *kept_addend = kept + kept_words;
    float *scratch = reinterpret_cast<float *>(shared + (1 + ADDEND) * kept_words);
    size_t start;
    int count = rows_from(at.row, at, shape, start), chunk = (shape.tiles + CHUNKS - 1) / CHUNKS;
#pragma unroll 1
    for (int i = 0; i < CHUNKS; ++i) {
        keep_rows(kept, x + start, i * chunk, min((i + 1) * chunk, count), at.step);
        copy_async_commit();
    }
    if (ADDEND) {
        keep_rows(kept_addend, addend + start, 0, count, at.step);
        copy_async_commit();
    }

    Vector sum[1] = {splat<VEC>(0.0f)};
#pragma unroll 1
    for (int i = 0; i < CHUNKS; ++i) {
        wait_for_chunk(i);
#pragma unroll 4
        for (int k = i * chunk; k < min((i + 1) * chunk, count); ++k) {
            Vector v = to_floats(kept[k * stride]);
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum[0].v[e] += v.v[e];
        }
    }
    int size = scratch_floats(shape.lanes_log2);
    float rows = (float)shape.rows, *means = scratch + 2 * size;
    sum_rows(sum, at, shape.lanes_log2, means);
    Vector mean = load<VEC>(means + at.lane * VEC), sums[2] = {splat<VEC>(0.0f), splat<VEC>(0.0f)};
#pragma unroll
    for (int e = 0; e < VEC; ++e) mean.v[e] /= rows;
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
        Vector v = to_floats(kept[k * stride]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            float d = v.v[e] - mean.v[e];
            sums[0].v[e] += d;
            sums[1].v[e] += d * d;
        }
    }
    sum_rows(sums, at, shape.lanes_log2, scratch);
    int i = threadIdx.x;
    Channel own = i < VEC << shape.lanes_log2 ? correct(means[i] / rows, scratch[i], scratch[size + i], rows) : Channel();
    finish_channel(scratch, own, s, gamma, beta, shape, true);
    __syncthreads();
    if (!at.live) return;
    Normal normal = load_normal(scratch, at, shape.lanes_log2);
    if (ADDEND) copy_async_wait<0>();
#pragma unroll 4
    for (int k = 0; k < count; ++k)
        normalise(y + start + k * at.step, kept[k * stride], ADDEND ? kept_addend[k * stride] : Word(), normal, relu);
}
#endif

// ---- Gradients ------------------------------------------------------------------------------------------------------

// dz of one element, the activation's derivative by the forward's own expression; centred = x - mean.
__device__ __forceinline__ float error_before_act(const Affine &a, int e, float dy, float centred, int relu) {
    return relu ? activation_dgrad<ACT_RELU>(dy, centred * a.scale.v[e] + a.beta.v[e]) : dy;
}

// Add dz*xhat and dz of a row's channels to sums[0] and sums[1]; gamma*rstd*dz comes back.
__device__ __forceinline__ Vector add_row(Vector (&sums)[2], const Affine &a, const Word &dy, const Word &x, int relu) {
    Vector vx = to_floats(x), v = to_floats(dy);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        float centred = vx.v[e] - a.mean.v[e], dz = error_before_act(a, e, v.v[e], centred, relu);
        sums[0].v[e] += dz * (centred * a.rstd.v[e]);
        sums[1].v[e] += dz;
        v.v[e] = a.scale.v[e] * dz;
    }
    return v;
}

// Write dx of a row's channels, from the means of dz*xhat and dz.
__device__ __forceinline__ void write_dx(Element *dx, const Word &dy, const Word &x, const Affine &a,
                                         const Vector (&means)[2], int relu) {
    Vector vx = to_floats(x), v = to_floats(dy);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        float centred = vx.v[e] - a.mean.v[e], dz = error_before_act(a, e, v.v[e], centred, relu);
        v.v[e] = a.scale.v[e] * (dz - (means[1].v[e] + centred * a.rstd.v[e] * means[0].v[e]));
    }
    store<VEC>(dx, v);
}

#if ENTRY == GRADIENTS
// dgammas, dbetas: partial sums (gridDim.y, C). With from_variance (frozen statistics) `rstd` holds a variance and dx is
// written here; else dx is null.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
batch_norm_gradients(const Element *dy, const Element *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                     const float *__restrict__ mean, const float *__restrict__ rstd, Element *dx, float *__restrict__ dgammas,
                     float *__restrict__ dbetas, Shape shape, float eps, int from_variance, int relu) {
    await_predecessors();
    __shared__ float4 scratch[2 * SUM_THREADS / 32 * GROUP / 4];
    Part at = part_of(shape);
    Affine a = load_affine(gamma, beta, mean, rstd, at);
    if (from_variance && at.live) {
#pragma unroll
        for (int e = 0; e < VEC; ++e) a.rstd.v[e] = 1.0f / sqrtf(a.rstd.v[e] + eps);
        a.scale = product(load<VEC>(gamma + at.c), a.rstd);
    }
    Vector sums[2] = {splat<VEC>(0.0f), splat<VEC>(0.0f)};
    for (int tile = blockIdx.y; tile < shape.tiles; tile += gridDim.y) {
        size_t start;
        int count = rows_in(tile, at, shape, start);
        Word vx[UNROLL], vdy[UNROLL];
        load_rows(x + start, count, at.step, vx);
        load_rows(dy + start, count, at.step, vdy);
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            if (j >= count) break;
            Vector frozen = add_row(sums, a, vdy[j], vx[j], relu);
            if (dx) store<VEC>(dx + start + j * at.step, frozen);
        }
    }
    sum_rows(sums, at, shape.lanes_log2, &scratch->x);
    store_sums(dgammas, dbetas, (size_t)blockIdx.y * shape.channels, &scratch->x, shape);
}
#endif

#if ENTRY == SUM_GRADIENTS
// Add `partials` rows of sums (partials, channels): a block of 8 x 64 threads for 8 channels; blockIdx.y: dgamma or dbeta.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
batch_norm_sum_gradients(const float *__restrict__ dgammas, const float *__restrict__ dbetas, float *__restrict__ dgamma,
                         float *__restrict__ dbeta, int partials, int channels) {
    await_predecessors();
    constexpr int Lanes = 8, Parts = SUM_THREADS / Lanes, Warps = SUM_THREADS / 32;
    __shared__ float sums[Warps][Lanes];
    const float *source = blockIdx.y ? dbetas : dgammas;
    int lane = threadIdx.x % Lanes, part = threadIdx.x / Lanes, c = blockIdx.x * Lanes + lane;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = part; c < channels && i < partials; i += Parts) sum += source[(size_t)i * channels + c];
    for (int offset = Lanes; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == lane) sums[threadIdx.x / 32][lane] = sum;
    __syncthreads();
    if (part > 0 || c >= channels) return;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Warps; ++i) sum += sums[i][lane];
    (blockIdx.y ? dbeta : dgamma)[c] = sum;
}
#endif

#if ENTRY == DGRAD
// The second pass. dgammas, dbetas: `partials` sums of each channel that the first one left; null dgamma: they are the whole
// sums, given.
extern "C" __global__ void __launch_bounds__(WRITE_THREADS)
batch_norm_dgrad(const Element *dy, const Element *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                 const float *__restrict__ mean, const float *__restrict__ rstd, const float *__restrict__ dgammas,
                 const float *__restrict__ dbetas, Element *dx, float *__restrict__ dgamma, float *__restrict__ dbeta,
                 int partials, Shape shape, int relu) {
    await_predecessors();
    __shared__ float4 scratch[2 * WRITE_THREADS / 32 * GROUP / 4];
    Part at = part_of(shape);
    int tile = shape.tiles - 1 - (int)blockIdx.y;
    size_t start;
    int count = rows_in(tile, at, shape, start);
    Word vx[UNROLL], vdy[UNROLL];
    load_rows(x + start, count, at.step, vx);  // on their way while the partial sums are added
    load_rows(dy + start, count, at.step, vdy);

    Vector sums[2] = {splat<VEC>(0.0f), splat<VEC>(0.0f)};
    sum_partials(sums, dgammas, dbetas, partials, at, shape, &scratch->x);
    if (dgamma && blockIdx.y == gridDim.y - 1) store_sums(dgamma, dbeta, 0, &scratch->x, shape);
    if (!at.live) return;
    Affine a = load_affine(gamma, beta, mean, rstd, at);
    load_means(sums, &scratch->x, at, shape.lanes_log2, shape.rows);

    while (true) {
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            if (j >= count) break;
            write_dx(dx + start + j * at.step, vdy[j], vx[j], a, sums, relu);
        }
        tile -= gridDim.y;
        if (tile < 0) return;
        count = rows_in(tile, at, shape, start);
        load_rows(x + start, count, at.step, vx);
        load_rows(dy + start, count, at.step, vdy);
    }
}
#endif

#if ENTRY == DGRAD_SINGLE
// grid: (groups of channels, 1). Shared memory: the rows of x, those of dy, then scratch.
extern "C" __global__ void __launch_bounds__(SINGLE_THREADS)
batch_norm_dgrad_single(const Element *dy, const Element *x, const float *__restrict__ gamma, const float *__restrict__ beta,
                        const float *__restrict__ mean, const float *__restrict__ rstd, Element *dx, float *__restrict__ dgamma,
                        float *__restrict__ dbeta, Shape shape, int relu) {
    await_predecessors();
    DYNAMIC_SHARED(Word, shared);
    Part at = part_of(shape);
    int stride = blockDim.x, kept_words = shape.tiles * stride;
    Word *kept_x = shared + threadIdx.x, *kept_dy = kept_x + kept_words;
    float *scratch = reinterpret_cast<float *>(shared + 2 * kept_words);
    size_t start;
    int count = rows_from(at.row, at, shape, start), chunk = (shape.tiles + CHUNKS - 1) / CHUNKS;
#pragma unroll 1
    for (int i = 0; i < CHUNKS; ++i) {
        keep_rows(kept_x, x + start, i * chunk, min((i + 1) * chunk, count), at.step);
        keep_rows(kept_dy, dy + start, i * chunk, min((i + 1) * chunk, count), at.step);
        copy_async_commit();
    }
    Affine a = load_affine(gamma, beta, mean, rstd, at);

    Vector sums[2] = {splat<VEC>(0.0f), splat<VEC>(0.0f)};
#pragma unroll 1
    for (int i = 0; i < CHUNKS; ++i) {
        wait_for_chunk(i);
#pragma unroll 4
        for (int k = i * chunk; k < min((i + 1) * chunk, count); ++k)
            add_row(sums, a, kept_dy[k * stride], kept_x[k * stride], relu);
    }
    sum_rows(sums, at, shape.lanes_log2, scratch);
    store_sums(dgamma, dbeta, 0, scratch, shape);
    if (!at.live) return;
    load_means(sums, scratch, at, shape.lanes_log2, shape.rows);
#pragma unroll 4
    for (int k = 0; k < count; ++k)
        write_dx(dx + start + k * at.step, kept_dy[k * stride], kept_x[k * stride], a, sums, relu);
}
#endif
