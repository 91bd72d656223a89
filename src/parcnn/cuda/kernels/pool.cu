// Pooling of x (N,H,W,C) into y (N,P,Q,C), and the way back.
//   max        y = largest element of the window, idx = its position (row-major, the first of equals; the first NaN wins)
//              of act(x): monotone activations are applied to the maximum. Others (ACT = 1) fall up to a point and then rise:
//              the largest of them is that of the largest x or of the least. `kept` (if not null) gets the winner's x.
//   avg        y = sum of the window / divisor; divisor given, or the window's overlap with the (padded) image
//   adaptive   y = mean of rows floor(p*H/P) .. ceil((p+1)*H/P), columns likewise
//   dgrad      dx[pixel] = sum over the windows that cover it of dy (max: where idx says so; else dy / divisor)
//
// pool_fprop: a thread makes VEC neighbouring channels of one output; threads run along channels, then pixels.
// pool_fprop_shared: a block of up to 256 threads (a power of two) makes 2^lanes_log2 vectors of one output, its other threads
//   share the window out; their results are merged in a fixed order. For few outputs with large windows (global pools).
// pool_dgrad: a thread makes VEC channels of one pixel; a gather, so nothing is added to memory.
// pool_dgrad_apart, for windows that do not overlap: a thread makes VEC channels of `stride` pixels of an image's row, those
//   from one window's start to the next one's; it reads that window's error once.
// pool_dgrad_twos, for windows of 3 or 4 and strides of 2: a thread makes VEC channels of 2 x 2 pixels, which four windows
//   cover, so that each error is read four times, not nine.
// Bytes: x (dy, idx) read once where windows do not overlap, else from cache; y, idx (dx) written once.
// Sums are floats; what is stored is rounded once.
// Preconditions: C is a multiple of VEC and tensors start on 16 bytes; every count below 2^31.
// Macros: ELEMENT (float or bf16), KIND (0 max, 1 avg, 2 adaptive), BITS (of an index: 2, 4, 8 or 32; max only; the first two
// share bytes, and VEC is at least 4), VEC (at most 16 bytes of elements), and for the way forward BATCHED: how many taps are
// loaded before the first is used, and ACT.
#include "conv_common.cuh"

#define THREADS 256
#define MAX 0
#define AVG 1
#define ADAPTIVE 2
#ifndef BATCHED
#define BATCHED 1
#endif
#ifndef ACT
#define ACT 0
#endif
#ifndef BITS
#define BITS 8  // idx is null
#endif
// Blocks on a multiprocessor, at least: enough taps are then under way, and nothing spills.
#if BATCHED > 4 || ACT
#define BLOCKS 2
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define BLOCKS 3
#else
#define BLOCKS 4
#endif

struct Axis {
    int in, out, kernel, stride, pad, dilation;
    FastDiv by_stride, by_dilation;
    FastDiv by_in, by_out;  // adaptive only
};

struct Window {
    Axis h, w;
    int divisor;      // 0: count elements
    int include_pad;  // of the padding too
    int act;          // before a maximum; ACT_*
};

// Taps of one output along one axis: those in first .. last-1 lie inside the image, tap t at start + t * step.
struct Taps {
    int start, step, first, last;
};

__device__ __forceinline__ Taps taps_of(int o, const Axis &a) {
    if (KIND == ADAPTIVE) {
        int start = quotient(o * a.in, a.by_out), end = quotient((o + 1) * a.in + a.out - 1, a.by_out);
        return {start, 1, 0, end - start};
    }
    int start = o * a.stride - a.pad;
    int first = start < 0 ? quotient(-start + a.dilation - 1, a.by_dilation) : 0;
    int last = start < a.in ? min(a.kernel, quotient(a.in - start + a.dilation - 1, a.by_dilation)) : 0;
    return {start, a.dilation, first, max(first, last)};
}

// Elements of the window that the divisor counts along one axis.
__device__ __forceinline__ int counted(const Taps &taps, const Axis &a, int include_pad) {
    if (KIND == ADAPTIVE || !include_pad) return taps.last - taps.first;
    return min(a.kernel, quotient(a.in + a.pad - taps.start + a.dilation - 1, a.by_dilation));
}

__device__ __forceinline__ float divisor_of(const Taps &h, const Taps &w, const Window &window) {
    if (window.divisor) return (float)window.divisor;
    return (float)counted(h, window.h, window.include_pad) * (float)counted(w, window.w, window.include_pad);
}

struct Result {
    Floats<VEC> value;
    int position[VEC];
#if ACT
    Floats<VEC> least;
    int least_at[VEC];
#endif
};

// Two bf16 at once.
#if defined(HOST_EMULATION) || __CUDA_ARCH__ >= 900
constexpr bool PAIRED = KIND == MAX && sizeof(ELEMENT) == 2 && VEC > 1;
#else
constexpr bool PAIRED = false;
#endif

#ifdef HOST_EMULATION
__device__ __forceinline__ u32 mask_of(bool low, bool high) { return (low ? 0xffffu : 0) | (high ? 0xffff0000u : 0); }
__device__ __forceinline__ u32 beats_pair(u32 v, u32 best) {
    return mask_of(beats(low_bf16(v), low_bf16(best)), beats(high_bf16(v), high_bf16(best)));
}
__device__ __forceinline__ u32 less_pair(u32 v, u32 least) {
    return mask_of(low_bf16(v) < low_bf16(least), high_bf16(v) < high_bf16(least));
}
#elif __CUDA_ARCH__ >= 900
// All bits of a half are set where v takes the place of `best`.
__device__ __forceinline__ u32 beats_pair(u32 v, u32 best) {
    u32 not_less_or_equal, is_number;
    asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(not_less_or_equal) : "r"(v), "r"(best));
    asm("set.eq.u32.bf16x2 %0, %1, %1;" : "=r"(is_number) : "r"(best));
    return not_less_or_equal & is_number;
}
__device__ __forceinline__ u32 less_pair(u32 v, u32 least) {
    u32 mask;
    asm("set.lt.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(v), "r"(least));
    return mask;
}
#else
__device__ __forceinline__ u32 beats_pair(u32, u32) { return 0; }
__device__ __forceinline__ u32 less_pair(u32, u32) { return 0; }
#endif

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
                const u32 v = x.word[e], wins = beats_pair(v, value[e]);
                value[e] = (v & wins) | (value[e] & ~wins), at[e] = (positions & wins) | (at[e] & ~wins);
#if ACT
                const u32 loses = less_pair(v, least[e]);
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

// Indices of a vector as they lie in memory, at the element `at` of idx.
constexpr int INDEX_BITS = VEC * BITS;
template <int Bits> struct WordOf { using Type = u32; };
template <> struct WordOf<8> { using Type = u8; };
template <> struct WordOf<16> { using Type = u16; };
using IndexWord = WordOf<INDEX_BITS>::Type;

__device__ __forceinline__ void store_index(u8 *idx, size_t at, const int (&position)[VEC]) {
    u8 *p = idx + at * BITS / 8;
    constexpr int InWord = INDEX_BITS < 32 ? VEC : 32 / BITS;
    IndexWord words[VEC / InWord];
#pragma unroll
    for (int i = 0; i < VEC / InWord; ++i) {
        u32 word = position[i * InWord];
#pragma unroll
        for (int e = 1; e < InWord; ++e) word |= (u32)position[i * InWord + e] << BITS * e;
        words[i] = (IndexWord)word;
    }
    if constexpr (INDEX_BITS % 128 == 0) {
#pragma unroll
        for (int i = 0; i < VEC / InWord; i += 4) store_word(p + 4 * i, make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    } else if constexpr (INDEX_BITS == 64) {
        store_word(p, make_uint2(words[0], words[1]));
    } else {
        store_word(p, words[0]);
    }
}

// As they are: nothing waits for the load until one is asked for.
struct Indices {
    static constexpr int InWord = INDEX_BITS < 32 ? VEC : 32 / BITS;
    IndexWord words[VEC / InWord];

    __device__ __forceinline__ int operator[](int e) const {
        return BITS == 32 ? words[e / InWord] : words[e / InWord] >> BITS * (e % InWord) & ((1u << BITS % 32) - 1);
    }
};

__device__ __forceinline__ Indices load_index(const u8 *idx, size_t at) {
    const u8 *p = idx + at * BITS / 8;
    Indices r;
    if constexpr (INDEX_BITS % 128 == 0) {
#pragma unroll
        for (int i = 0; i < VEC / Indices::InWord; i += 4) {
            uint4 four = load_word<uint4>(p + 4 * i);
            r.words[i] = four.x, r.words[i + 1] = four.y, r.words[i + 2] = four.z, r.words[i + 3] = four.w;
        }
    } else if constexpr (INDEX_BITS == 64) {
        uint2 two = load_word<uint2>(p);
        r.words[0] = two.x, r.words[1] = two.y;
    } else {
        r.words[0] = load_word<IndexWord>(p);
    }
    return r;
}

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
