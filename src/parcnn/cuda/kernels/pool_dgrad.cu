// The way back through a pool: dx (N,H,W,C) from dy (N,P,Q,C), and idx of a maximum.
//   dx[pixel] = sum over the windows that cover it of dy (max: where idx says so; else dy / divisor)
//
// pool_dgrad: a thread makes VEC channels of one pixel; a gather, so nothing is added to memory.
// pool_dgrad_apart, for windows that do not overlap: a thread makes VEC channels of `stride` pixels of an image's row, those
//   from one window's start to the next one's; it reads that window's error once.
// pool_dgrad_twos, for windows of 3 or 4 and strides of 2: a thread makes VEC channels of 2 x 2 pixels, which four windows
//   cover, so that each error is read four times, not nine.
// Bytes: dy, idx read once where windows do not overlap, else from cache; dx written once.
// Sums are floats; what is stored is rounded once.
// Preconditions: C is a multiple of VEC and tensors start on 16 bytes; every count below 2^31.
// Macros: those of pool.cuh; WINDOWS: which entry it is (0 pool_dgrad, 1 pool_dgrad_apart, 2 pool_dgrad_twos).
#include "pool.cuh"

#define ANY 0
#define APART 1

#if WINDOWS == ANY
// Outputs lo .. hi whose windows may cover position i of the image.
__device__ __forceinline__ void covering(int i, const Axis &a, int &lo, int &hi) {
    if (KIND == ADAPTIVE) {
        lo = quotient(i * a.out, a.by_in);
        hi = quotient((i + 1) * a.out + a.in - 1, a.by_in) - 1;
        return;
    }
    int above = i + a.pad - (a.kernel - 1) * a.dilation;
    lo = above <= 0 ? 0 : quotient(above + a.stride - 1, a.by_stride);
    hi = min(quotient(i + a.pad, a.by_stride), a.out - 1);
}

// Which tap of output o lies at position i of the image; -1: none (a dilated window steps over it).
__device__ __forceinline__ int tap_at(int i, int o, const Axis &a) {
    int rest, tap = divide(i + a.pad - o * a.stride, a.by_dilation, rest);
    return rest ? -1 : tap;
}

// count: pixels times vectors of channels.
extern "C" __global__ void __launch_bounds__(THREADS)
pool_dgrad(const ELEMENT *__restrict__ dy, const u8 *__restrict__ idx, ELEMENT *__restrict__ dx, int count, int channels,
           FastDiv by_vectors, FastDiv by_width, FastDiv by_height, const __grid_constant__ Window window) {
    await_predecessors();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    int vector, x, y;
    int n = divide(divide(divide(i, by_vectors, vector), by_width, x), by_height, y);
    int p_lo, p_hi, q_lo, q_hi;
    covering(y, window.h, p_lo, p_hi);
    covering(x, window.w, q_lo, q_hi);
    Floats<VEC> sum = splat<VEC>(0.0f);
    for (int p = p_lo; p <= p_hi; ++p) {
        int r = KIND == ADAPTIVE ? 0 : tap_at(y, p, window.h);
        if (r < 0) continue;
        for (int q = q_lo; q <= q_hi; ++q) {
            int s = KIND == ADAPTIVE ? 0 : tap_at(x, q, window.w);
            if (s < 0) continue;
            size_t at = (((size_t)n * window.h.out + p) * window.w.out + q) * channels + vector * VEC;
            Floats<VEC> error = load<VEC>(dy + at);
#if KIND == MAX
            const Indices winner = load_index(idx, at);
#pragma unroll
            for (int e = 0; e < VEC; ++e)
                if (winner[e] == r * window.w.kernel + s) sum.v[e] += error.v[e];
#else
            float share = 1.0f / divisor_of(taps_of(p, window.h), taps_of(q, window.w), window);
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum.v[e] += error.v[e] * share;
#endif
        }
    }
    store<VEC>(dx + (size_t)i * VEC, sum);
}
#elif WINDOWS == APART
// count: rows of images times cells of a row (windows, and what lies behind the last) times vectors of channels.
extern "C" __global__ void __launch_bounds__(THREADS)
pool_dgrad_apart(const ELEMENT *__restrict__ dy, const u8 *__restrict__ idx, ELEMENT *__restrict__ dx, int count, int channels,
                 FastDiv by_vectors, FastDiv by_cells, FastDiv by_height, const __grid_constant__ Window window) {
    await_predecessors();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    int vector, q, y, r;
    int row = divide(divide(i, by_vectors, vector), by_cells, q), n = divide(row, by_height, y);
    int p = divide(y + window.h.pad, window.h.by_stride, r), width = window.w.kernel;
    Floats<VEC> error = splat<VEC>(0.0f);
    Indices winner = {};
    if (p < window.h.out && q < window.w.out && r < window.h.kernel) {
        size_t at = (((size_t)n * window.h.out + p) * window.w.out + q) * channels + vector * VEC;
        error = load<VEC>(dy + at);
#if KIND == MAX
        winner = load_index(idx, at);
#else
        float share = 1.0f / divisor_of(taps_of(p, window.h), taps_of(q, window.w), window);
#pragma unroll
        for (int e = 0; e < VEC; ++e) error.v[e] *= share;
#endif
    }
    int x = q * window.w.stride - window.w.pad;
    ELEMENT *result = dx + ((size_t)row * window.w.in + x) * channels + vector * VEC;
#pragma unroll 2
    for (int s = 0; s < window.w.stride; ++s, ++x, result += channels) {
        Floats<VEC> value;
#pragma unroll
        for (int e = 0; e < VEC; ++e)
            value.v[e] = s < width && (KIND != MAX || winner[e] == r * width + s) ? error.v[e] : 0.0f;
        if (x >= 0 && x < window.w.in) store<VEC>(result, value);
    }
}
#else
// count: rows of 2 x 2 pixels, from windows' starts on, times the cells of a row times vectors of channels.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
pool_dgrad_twos(const ELEMENT *__restrict__ dy, const u8 *__restrict__ idx, ELEMENT *__restrict__ dx, int count, int channels,
                FastDiv by_vectors, FastDiv by_cells, FastDiv by_height, const __grid_constant__ Window window) {
    await_predecessors();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    int vector, q, p;
    const int n = divide(divide(divide(i, by_vectors, vector), by_cells, q), by_height, p);
    // The windows that start here, and one before in each direction.
    Fetched<ELEMENT, VEC> fetched[4] = {};
    Indices winners[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int row = p - 1 + k / 2, column = q - 1 + k % 2;
        if ((u32)row >= (u32)window.h.out || (u32)column >= (u32)window.w.out) continue;
        const size_t at = (((size_t)n * window.h.out + row) * window.w.out + column) * channels + vector * VEC;
        fetched[k] = fetch<VEC>(dy + at);
#if KIND == MAX
        winners[k] = load_index(idx, at);
#endif
    }
    Floats<VEC> sum[4];
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) sum[pixel] = splat<VEC>(0.0f);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const Floats<VEC> error = widen(fetched[k]);
        float share = 1.0f;
#if KIND != MAX
        share = 1.0f / divisor_of(taps_of(p - 1 + k / 2, window.h), taps_of(q - 1 + k % 2, window.w), window);
#endif
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) {
            const int r = pixel / 2 + 2 - k / 2 * 2, s = pixel % 2 + 2 - k % 2 * 2;
            if (r >= window.h.kernel || s >= window.w.kernel) continue;
            const int tap = r * window.w.kernel + s;
#pragma unroll
            for (int e = 0; e < VEC; ++e)
                if (KIND != MAX || winners[k][e] == tap) sum[pixel].v[e] += KIND == MAX ? error.v[e] : error.v[e] * share;
        }
    }
    const int y = 2 * p - window.h.pad, x = 2 * q - window.w.pad;
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
        const int row = y + pixel / 2, column = x + pixel % 2;
        if ((u32)row < (u32)window.h.in && (u32)column < (u32)window.w.in)
            store<VEC>(dx + (((size_t)n * window.h.in + row) * window.w.in + column) * channels + vector * VEC, sum[pixel]);
    }
}
#endif
