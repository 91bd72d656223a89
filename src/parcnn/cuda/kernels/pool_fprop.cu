// Pooling of x (N,H,W,C) into y (N,P,Q,C).
//   max        y = largest element of the window, idx = its position (row-major, the first of equals; the first NaN wins)
//              of act(x): monotone activations are applied to the maximum. Others (ACT = 1) fall up to a point and then rise:
//              the largest of them is that of the largest x or of the least. `kept` (if not null) gets the winner's x.
//   avg        y = sum of the window / divisor; divisor given, or the window's overlap with the (padded) image
//   adaptive   y = mean of rows floor(p*H/P) .. ceil((p+1)*H/P), columns likewise
//
// pool_fprop: a thread makes VEC neighbouring channels of one output; threads run along channels, then pixels.
// pool_fprop_shared: a block of up to 256 threads (a power of two) makes 2^lanes_log2 vectors of one output, its other threads
//   share the window out; their results are merged in a fixed order. For few outputs with large windows (global pools).
// Bytes: x read once where windows do not overlap, else from cache; y, idx written once.
// Sums are floats; what is stored is rounded once.
// Preconditions: C is a multiple of VEC and tensors start on 16 bytes; every count below 2^31.
// Macros: those of pool.cuh; BATCHED: how many taps are loaded before the first is used; ACT; SHARED: the entry is pool_fprop_shared.
#include "pool.cuh"

#ifndef ACT
#define ACT 0
#endif
#ifndef SHARED
#define SHARED 0
#endif
// Blocks on a multiprocessor, at least: enough taps are then under way, and nothing spills.
#if BATCHED > 4 || ACT
#define BLOCKS 2
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define BLOCKS 3
#else
#define BLOCKS 4
#endif

struct Result {
    Floats<VEC> value;
    int position[VEC];
#if ACT
    Floats<VEC> least;
    int least_at[VEC];
#endif
};

// Two bf16 at once: all bits of a half are set where v takes the place of `best`, or is less than `least`.
#ifdef HOST_EMULATION
constexpr bool HAS_PAIRS = true;
__device__ __forceinline__ u32 mask_of(bool low, bool high) { return (low ? 0xffffu : 0) | (high ? 0xffff0000u : 0); }
__device__ __forceinline__ u32 beats_bf16x2(u32 v, u32 best) {
    return mask_of(beats(low_bf16(v), low_bf16(best)), beats(high_bf16(v), high_bf16(best)));
}
__device__ __forceinline__ u32 less_bf16x2(u32 v, u32 least) {
    return mask_of(low_bf16(v) < low_bf16(least), high_bf16(v) < high_bf16(least));
}
#elif __CUDA_ARCH__ >= 900
#include "bf16_pairs.cuh"
constexpr bool HAS_PAIRS = true;
__device__ __forceinline__ u32 less_bf16x2(u32 v, u32 least) {
    u32 mask;
    asm("set.lt.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(v), "r"(least));
    return mask;
}
#else
constexpr bool HAS_PAIRS = false;
__device__ __forceinline__ u32 beats_bf16x2(u32, u32) { return 0; }
__device__ __forceinline__ u32 less_bf16x2(u32, u32) { return 0; }
#endif
constexpr bool PAIRED = HAS_PAIRS && KIND == MAX && sizeof(ELEMENT) == 2 && VEC > 1;

// What a thread has seen of its window.
struct Seen {
    Result r;
    u32 value[VEC / 2 + 1], at[VEC / 2 + 1];  // PAIRED: two values, two positions a word
    u32 least[VEC / 2 + 1], least_at[VEC / 2 + 1];

    __device__ __forceinline__ Seen(int first) {
        const float infinity = __int_as_float(0x7f800000);
        r.value = splat<VEC>(KIND == MAX ? -infinity : 0.0f);
#pragma unroll
        for (int e = 0; e < VEC; ++e) r.position[e] = first;
#pragma unroll
        for (int e = 0; e < VEC / 2; ++e) value[e] = 0xff80ff80u, least[e] = 0x7f807f80u, at[e] = least_at[e] = first * 0x10001u;
#if ACT
        r.least = splat<VEC>(infinity);
#pragma unroll
        for (int e = 0; e < VEC; ++e) r.least_at[e] = first;
#endif
    }

    template <class Elements> __device__ __forceinline__ void take(const Elements &x, int position) {
        if constexpr (PAIRED) {
            const u32 positions = position * 0x10001u;
#pragma unroll
            for (int e = 0; e < VEC / 2; ++e) {
                const u32 v = x.word[e], wins = beats_bf16x2(v, value[e]);
                value[e] = (v & wins) | (value[e] & ~wins), at[e] = (positions & wins) | (at[e] & ~wins);
#if ACT
                const u32 loses = less_bf16x2(v, least[e]);
                least[e] = (v & loses) | (least[e] & ~loses), least_at[e] = (positions & loses) | (least_at[e] & ~loses);
#endif
            }
            return;
        }
        const Floats<VEC> v = widen(x);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            if (KIND != MAX) {
                r.value.v[e] += v.v[e];
            } else if (beats(v.v[e], r.value.v[e])) {
                r.value.v[e] = v.v[e];
                r.position[e] = position;
            }
#if ACT
            if (v.v[e] < r.least.v[e]) r.least.v[e] = v.v[e], r.least_at[e] = position;
#endif
        }
    }

    __device__ __forceinline__ Result result() {
        if constexpr (PAIRED) {
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                r.value.v[e] = e % 2 ? high_bf16(value[e / 2]) : low_bf16(value[e / 2]);
                r.position[e] = e % 2 ? at[e / 2] >> 16 : at[e / 2] & 0xffff;
#if ACT
                r.least.v[e] = e % 2 ? high_bf16(least[e / 2]) : low_bf16(least[e / 2]);
                r.least_at[e] = e % 2 ? least_at[e / 2] >> 16 : least_at[e / 2] & 0xffff;
#endif
            }
        }
        return r;
    }
};

// Whether (v, at) takes the place of (best, best_at) when two parts of a window are merged.
__device__ __forceinline__ bool takes_over(float v, int at, float best, int best_at) {
    return beats(v, best) || (at < best_at && !beats(best, v));
}

// Elements that change nothing.
template <int V> __device__ __forceinline__ void set_neutral(Floats<V> &r) { r = splat<V>(KIND == MAX ? __int_as_float(0xff800000) : 0.0f); }
template <int V> __device__ __forceinline__ void set_neutral(Pairs<V> &r) {
#pragma unroll
    for (int e = 0; e < (V + 1) / 2; ++e) r.word[e] = KIND == MAX ? 0xff80ff80u : 0u;
}

// All taps of a window of SIDE x SIDE: their places in it are constants, and all loads are under way at once.
constexpr int SIDE = BATCHED == 4 ? 2 : 3;
__device__ __forceinline__ Result reduce_side(const ELEMENT *x, Taps h, Taps w, const Window &window, int channels) {
    Seen seen(h.first * SIDE + w.first);
    Fetched<ELEMENT, VEC> fetched[SIDE * SIDE];
    bool live[SIDE * SIDE];
#pragma unroll
    for (int t = 0; t < SIDE * SIDE; ++t) {
        const int r = t / SIDE, s = t % SIDE;
        live[t] = h.first <= r && r < h.last && w.first <= s && s < w.last;
        set_neutral(fetched[t]);
        const int pixel = (h.start + r * h.step) * window.w.in + w.start + s * w.step;
        if (live[t]) fetched[t] = fetch<VEC>(x + pixel * channels);
    }
#pragma unroll
    for (int t = 0; t < SIDE * SIDE; ++t)
        if (!ACT || live[t]) seen.take(fetched[t], t);
    return seen.result();
}

// Taps part, part + parts, ... of the window, in that order. x points at the image's channels of this thread.
__device__ __forceinline__ Result reduce_taps(const ELEMENT *x, Taps h, Taps w, const Window &window, int channels, int part,
                                              int parts) {
    Seen seen(h.first * window.w.kernel + w.first);
    int width = w.last - w.first, count = (h.last - h.first) * width;
    if (count == 0) return seen.result();
    int step_h = parts / width, step_w = parts - step_h * width;
    int th = part / width, tw = part - th * width;
    for (int t = part; t < count; t += BATCHED * parts) {
        Fetched<ELEMENT, VEC> fetched[BATCHED];
        int position[BATCHED];
#pragma unroll
        for (int j = 0; j < BATCHED; ++j) {
            int a = h.first + th, b = w.first + tw;
            position[j] = a * window.w.kernel + b;
            int pixel = (h.start + a * h.step) * window.w.in + w.start + b * w.step;
            if (t + j * parts < count) fetched[j] = fetch<VEC>(x + pixel * channels);
            th += step_h, tw += step_w;
            if (tw >= width) tw -= width, ++th;
        }
#pragma unroll
        for (int j = 0; j < BATCHED; ++j) {
            if (t + j * parts >= count) break;
            seen.take(fetched[j], position[j]);
        }
    }
    return seen.result();
}

#if ACT
// The activation of every element's largest and least x, of which the larger remains: in r.value, with its x in r.least.
template <int Kind> __device__ __forceinline__ void activate_result(Result &r) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        const float x = r.value.v[e], least = r.least.v[e];
        r.least.v[e] = x, r.value.v[e] = activate<Kind>(x);
        if (x > 0.0f) continue;  // below 0 it has no larger value
        const float of_least = activate<Kind>(least);
        if (takes_over(of_least, r.least_at[e], r.value.v[e], r.position[e]))
            r.value.v[e] = of_least, r.least.v[e] = least, r.position[e] = r.least_at[e];
    }
}
#endif

__device__ __forceinline__ void finish(Result r, Taps h, Taps w, const Window &window, ELEMENT *y, u8 *idx, ELEMENT *kept,
                                       size_t at) {
#if KIND == MAX
#if ACT
    if (window.act == ACT_GELU)
        activate_result<ACT_GELU>(r);
    else if (window.act == ACT_GELU_TANH)
        activate_result<ACT_GELU_TANH>(r);
    else
        activate_result<ACT_SILU>(r);
    if (kept) store<VEC>(kept + at, r.least);
#else
    if (window.act == ACT_RELU) {
#pragma unroll
        for (int e = 0; e < VEC; ++e) r.value.v[e] = activate<ACT_RELU>(r.value.v[e]);
    } else if (window.act) {
#pragma unroll
        for (int e = 0; e < VEC; ++e) r.value.v[e] = window.act == ACT_TANH ? activate<ACT_TANH>(r.value.v[e]) : activate<ACT_SIGMOID>(r.value.v[e]);
    }
#endif
    store_index(idx, at, r.position);
#else
    float share = 1.0f / divisor_of(h, w, window);
#pragma unroll
    for (int e = 0; e < VEC; ++e) r.value.v[e] *= share;
#endif
    store<VEC>(y + at, r.value);
}

#if !SHARED
// count: outputs times vectors of channels.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
pool_fprop(const ELEMENT *__restrict__ x, ELEMENT *__restrict__ y, u8 *__restrict__ idx, ELEMENT *__restrict__ kept, int count, int channels,
           FastDiv by_vectors, FastDiv by_q, FastDiv by_p, const __grid_constant__ Window window) {
    await_predecessors();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    int vector, q, p;
    int n = divide(divide(divide(i, by_vectors, vector), by_q, q), by_p, p);
    Taps h = taps_of(p, window.h), w = taps_of(q, window.w);
    const ELEMENT *image = x + (size_t)n * window.h.in * window.w.in * channels + vector * VEC;
    const bool is_side = KIND != ADAPTIVE && window.h.kernel == SIDE && window.w.kernel == SIDE;
    const Result r = is_side ? reduce_side(image, h, w, window, channels) : reduce_taps(image, h, w, window, channels, 0, 1);
    finish(r, h, w, window, y, idx, kept, (size_t)i * VEC);
}
#else
// grid: (outputs, groups of vectors)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
pool_fprop_shared(const ELEMENT *__restrict__ x, ELEMENT *__restrict__ y, u8 *__restrict__ idx, ELEMENT *__restrict__ kept, int channels, int lanes_log2,
                  FastDiv by_q, FastDiv by_p, const __grid_constant__ Window window) {
    await_predecessors();
    __shared__ float values[VEC][THREADS];
    __shared__ int positions[VEC][KIND == MAX ? THREADS : 1];
    int lanes = 1 << lanes_log2, parts = blockDim.x >> lanes_log2;
    int lane = threadIdx.x & (lanes - 1), part = threadIdx.x >> lanes_log2;
    int c = (blockIdx.y * lanes + lane) * VEC;
    bool live = c < channels;
    int q, p, n = divide(divide(blockIdx.x, by_q, q), by_p, p);
    Taps h = taps_of(p, window.h), w = taps_of(q, window.w);
    Result r;
    r.value = splat<VEC>(0.0f);
    if (live) r = reduce_taps(x + (size_t)n * window.h.in * window.w.in * channels + c, h, w, window, channels, part, parts);
    for (int half = parts / 2; half > 0; half /= 2) {
        // The upper half of the parts hands over to the lower half.
        if (live && part >= half && part < 2 * half) {
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                values[e][threadIdx.x] = r.value.v[e];
                if (KIND == MAX) positions[e][threadIdx.x] = r.position[e];
            }
        }
        __syncthreads();
        if (live && part < half) {
            int other = threadIdx.x + half * lanes;
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                float v = values[e][other];
                if (KIND != MAX) {
                    r.value.v[e] += v;
                } else if (takes_over(v, positions[e][other], r.value.v[e], r.position[e])) {
                    r.value.v[e] = v;
                    r.position[e] = positions[e][other];
                }
            }
        }
    }
    if (live && part == 0) finish(r, h, w, window, y, idx, kept, (size_t)blockIdx.x * channels + c);
}
#endif
