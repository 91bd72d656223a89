// Depthwise convolution and its input gradient: every channel has a filter of its own, R = S and the stride compile-time.
//
//     y[n,p,q,c]  = act(bias[c] + sum_{r,s} x[n, p*stride+r-top, q*stride+s-left, c] * w[c,r,s])
//     dx[n,h,w,c] = (sum_{r,s} dy[n, (h+top-r)/stride, (w+left-s)/stride, c] * w[c,r,s] + addend[n,h,w,c]) * act'(saved)
//
// x (N,H,W,C), w (C,R,S), y (N,P,Q,C), bias (C) f32. One-dimensional grid: (items of strips and pieces) x (slices of the
// channels, innermost); block (channels / VEC of a slice, items). See conv_depthwise.cuh for what a thread owns.
//
// conv_depthwise_fprop: BEHIND + 1 rows of outputs are under way; a row of x, read once, has its part in each of them.
// conv_depthwise_dgrad, stride 1: the same, of dy with the filter mirrored. Larger strides: the thread keeps the BEHIND + 1
//   rows of dy that STRIDE rows of dx are made of.
// A 3x3 filter lies in registers, a larger one in shared memory as floats.
//
// Bytes: x (dy) once and the halo of strips again, y (dx) once, saved and addend once.
// Preconditions: C % VEC == 0; tensors aligned to 16 bytes; dilation 1; fewer than 2^31 elements.
#include "conv_depthwise.cuh"

#define FILTER_IN_REGISTERS (FILTER <= 3)

// The filters of the thread's channels, taps in reverse order where Mirror.
template <bool Mirror> struct Filter {
#if FILTER_IN_REGISTERS
    float tap[TAPS][VEC];

    __device__ __forceinline__ Filter(const ELEMENT *w, int channel, float *, const Depthwise &g) {
        filter_taps<Mirror>(w + min(channel, g.c - VEC) * TAPS, tap);  // a thread without channels reads the last ones'
    }

    __device__ __forceinline__ Floats<VEC> at(int t) const {
        Floats<VEC> r;
#pragma unroll
        for (int e = 0; e < VEC; ++e) r.v[e] = tap[t][e];
        return r;
    }
#else
    const float *first;
    int step;

    // All threads of the block must call.
    __device__ __forceinline__ Filter(const ELEMENT *w, int channel, float *shared, const Depthwise &g) {
        step = blockDim.x * VEC;
        const int first_channel = channel - threadIdx.x * VEC, count = min(step, g.c - first_channel) * TAPS;
        for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += blockDim.x * blockDim.y) {
            int c = i / TAPS, t = i % TAPS;
            shared[(Mirror ? TAPS - 1 - t : t) * step + c] = load<1>(w + first_channel * TAPS + i).v[0];
        }
        __syncthreads();
        first = shared + threadIdx.x * VEC;
    }

    __device__ __forceinline__ Floats<VEC> at(int t) const { return load<VEC>(first + t * step); }
#endif
};

// Rows of outputs from the image's rows, Stride of them a row: finish(sums) for each row of the strip in its turn. Sums begin at
// `start`.
template <int Stride, bool Mirror, class Finish>
__device__ __forceinline__ void correlate(const ELEMENT *x, const Filter<Mirror> &filter, const Spot &spot, const Depthwise &g,
                                          const Floats<VEC> &start, Finish finish) {
    constexpr int Behind = (FILTER - 1) / Stride, Seen = (COLUMNS - 1) * Stride + FILTER;
    // After so many rows each sum is in its own register again: nothing moves. (Of 7x7 filters the code would be too long.)
    constexpr int Period = FILTER <= 5 ? Behind + 1 : 1;
    const int left = spot.column * Stride - g.left, row_step = g.w * g.c;
    const u32 mask = columns_inside<Seen>(left, g.w);
    const int end = min(spot.row + g.rows, g.p), stop = end + Behind;
    int row = spot.row * Stride - g.top;  // the next to be fetched
    const int last = min((end - 1) * Stride - g.top + FILTER, g.h);  // rows before it are seen
    const ELEMENT *from = x + ((long long)spot.image * g.h + row) * row_step + (long long)left * g.c + spot.channel;

    float sums[Behind + 1][COLUMNS][VEC];
    Pixels<Seen> ahead[AHEAD];
    auto begin = [&](float (&row_sums)[COLUMNS][VEC]) {
#pragma unroll
        for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
            for (int e = 0; e < VEC; ++e) row_sums[q][e] = start.v[e];
    };
    auto fetch_row = [&](Pixels<Seen> &pixels) {
        pixels = fetch_pixels<Seen>(from, g.c, row >= 0 && row < last ? mask : 0);
        ++row, from += row_step;
    };
#pragma unroll
    for (int i = 0; i <= Behind; ++i) begin(sums[i]);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) fetch_row(ahead[i]);

    for (int first = spot.row; first < stop; first += Period) {
#pragma unroll
        for (int p = first; p < first + Period; ++p) {
            if (p == stop) return;
#pragma unroll
            for (int j = 0; j < Stride; ++j) {
                const Pixels<Seen> pixels = ahead[0];
#pragma unroll
                for (int i = 0; i + 1 < AHEAD; ++i) ahead[i] = ahead[i + 1];
                fetch_row(ahead[AHEAD - 1]);
#if FILTER_IN_REGISTERS
#pragma unroll
                for (int at = 0; at < Seen; ++at) {
                    const Floats<VEC> v = widen(pixels.at[at]);
#pragma unroll
                    for (int i = 0; i <= Behind; ++i) {
                        const int r = j + (Behind - i) * Stride;
#pragma unroll
                        for (int q = 0; q < COLUMNS; ++q) {
                            const int s = at - q * Stride;
                            if (r >= FILTER || s < 0 || s >= FILTER) continue;
#pragma unroll
                            for (int e = 0; e < VEC; ++e) sums[i][q][e] += v.v[e] * filter.tap[r * FILTER + s][e];
                        }
                    }
                }
#else
                float v[Seen][VEC];
                widen_pixels(pixels, v);
#pragma unroll
                for (int i = 0; i <= Behind; ++i) {
                    const int r = j + (Behind - i) * Stride;
                    if (r >= FILTER) continue;
#pragma unroll
                    for (int s = 0; s < FILTER; ++s) {
                        const Floats<VEC> tap = filter.at(r * FILTER + s);
#pragma unroll
                        for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                            for (int e = 0; e < VEC; ++e) sums[i][q][e] += v[q * Stride + s][e] * tap.v[e];
                    }
                }
#endif
            }
            if (p >= spot.row + Behind) finish(sums[0]);
#pragma unroll
            for (int i = 0; i < Behind; ++i)
#pragma unroll
                for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                    for (int e = 0; e < VEC; ++e) sums[i][q][e] = sums[i + 1][q][e];
            begin(sums[Behind]);
        }
    }
}

#if STRIDE > 1
// Rows of dx from the rows of dy, STRIDE rows a row: finish(sums) for each row from the strip's first on. Strips and pieces begin
// where a filter would: rows h with (h + top) % STRIDE == 0, columns likewise; so the first and the last may lie outside dx.
template <class Finish>
__device__ __forceinline__ void spread(const ELEMENT *dy, const Filter<false> &filter, const Spot &spot, const Depthwise &g,
                                       Finish finish) {
    static_assert(COLUMNS % STRIDE == 0, "a piece begins where a filter would");
    constexpr int Seen = COLUMNS / STRIDE + BEHIND, Period = FILTER <= 5 ? BEHIND + 1 : 1;
    const int left = (spot.column + g.left) / STRIDE - BEHIND, row_step = g.w * g.c;
    const u32 mask = columns_inside<Seen>(left, g.w);
    int row = (spot.row + g.top) / STRIDE - BEHIND;  // the next to be fetched
    const int stop = (min(g.rows, g.p - spot.row) + STRIDE - 1) / STRIDE;
    const ELEMENT *from = dy + ((long long)spot.image * g.h + row) * row_step + (long long)left * g.c + spot.channel;

    float rows[BEHIND + 1][Seen][VEC];  // of dy, the newest last
    Pixels<Seen> next;
    auto fetch_row = [&]() {
        next = fetch_pixels<Seen>(from, g.c, (u32)row < (u32)g.h ? mask : 0);
        ++row, from += row_step;
    };
    auto advance = [&]() {
#pragma unroll
        for (int i = 0; i < BEHIND; ++i)
#pragma unroll
            for (int j = 0; j < Seen; ++j)
#pragma unroll
                for (int e = 0; e < VEC; ++e) rows[i][j][e] = rows[i + 1][j][e];
        widen_pixels(next, rows[BEHIND]);
        fetch_row();
    };
    fetch_row();
#pragma unroll
    for (int i = 0; i < BEHIND; ++i) advance();
    for (int first = 0; first < stop; first += Period) {
#pragma unroll
        for (int p = first; p < first + Period; ++p) {
            if (p == stop) return;
            advance();
#pragma unroll
            for (int u = 0; u < STRIDE; ++u) {
                float sums[COLUMNS][VEC] = {};
#pragma unroll
                for (int r = u; r < FILTER; r += STRIDE)
#pragma unroll
                    for (int s = 0; s < FILTER; ++s) {
                        const Floats<VEC> tap = filter.at(r * FILTER + s);
#pragma unroll
                        for (int q = s % STRIDE; q < COLUMNS; q += STRIDE)
#pragma unroll
                            for (int e = 0; e < VEC; ++e)
                                sums[q][e] += rows[BEHIND - r / STRIDE][BEHIND + q / STRIDE - s / STRIDE][e] * tap.v[e];
                    }
                finish(sums);
            }
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(128, BLOCKS)
    conv_depthwise_fprop(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ w, const float *__restrict__ bias,
                         ELEMENT *__restrict__ y, Depthwise g) {
    DYNAMIC_SHARED(float, shared);
    await_predecessors();
    int slice;
    const int item = quotient(blockIdx.x, g.by_slices) * blockDim.y + threadIdx.y;
    divide(blockIdx.x, g.by_slices, slice);
    const Spot spot = spot_of(min(item, g.items - 1), slice, g);
    const bool live = item < g.items && spot.channel < g.c;
    const Filter<false> filter(w, spot.channel, shared, g);
    if (!live) return;
    const Floats<VEC> start = bias ? load<VEC>(bias + spot.channel) : splat<VEC>(0.0f);
    const u32 mask = columns_inside<COLUMNS>(spot.column, g.q);
    ELEMENT *to = y + (((long long)spot.image * g.p + spot.row) * g.q + spot.column) * g.c + spot.channel;
    correlate<STRIDE, false>(x, filter, spot, g, start, [&](float (&sums)[COLUMNS][VEC]) {
#pragma unroll
        for (int q = 0; q < COLUMNS; ++q) {
            Floats<VEC> out;
#pragma unroll
            for (int e = 0; e < VEC; ++e) out.v[e] = g.act ? activate<ACT_RELU>(sums[q][e]) : sums[q][e];
            if (mask >> q & 1) store<VEC>(to + q * g.c, out);
        }
        to += g.q * g.c;
    });
}

extern "C" __global__ void __launch_bounds__(128, BLOCKS)
    conv_depthwise_dgrad(const ELEMENT *__restrict__ dy, const ELEMENT *__restrict__ w, const ELEMENT *saved, const ELEMENT *addend,
                         ELEMENT *dx, Depthwise g) {
    DYNAMIC_SHARED(float, shared);
    await_predecessors();
    int slice;
    const int item = quotient(blockIdx.x, g.by_slices) * blockDim.y + threadIdx.y;
    divide(blockIdx.x, g.by_slices, slice);
    const Spot spot = spot_of(min(item, g.items - 1), slice, g);
    const bool live = item < g.items && spot.channel < g.c;
    const Filter<STRIDE == 1> filter(w, spot.channel, shared, g);
    if (!live) return;
    const u32 mask = columns_inside<COLUMNS>(spot.column, g.q);
    int row = spot.row;
    long long at = (((long long)spot.image * g.p + row) * g.q + spot.column) * g.c + spot.channel;
    auto finish = [&](float (&sums)[COLUMNS][VEC], bool fused) {
        const u32 here = STRIDE == 1 || (u32)row < (u32)g.p ? mask : 0;
#pragma unroll
        for (int q = 0; q < COLUMNS; ++q) {
            if (!(here >> q & 1)) continue;
            const long long own = at + q * g.c;
            Floats<VEC> out;
#pragma unroll
            for (int e = 0; e < VEC; ++e) out.v[e] = sums[q][e];
            if (fused && addend) {
                const Floats<VEC> other = load<VEC>(addend + own);
#pragma unroll
                for (int e = 0; e < VEC; ++e) out.v[e] += other.v[e];
            }
            if (fused && g.act) {
                const Floats<VEC> kept = load<VEC>(saved + own);
#pragma unroll
                for (int e = 0; e < VEC; ++e) out.v[e] = activation_dgrad_of(out.v[e], kept.v[e], g.act);
            }
            store<VEC>(dx + own, out);
        }
        ++row, at += g.q * g.c;
    };
    // What is fused makes the code of a row several times as long: a walk of its own does without.
    auto fused = [&](float (&sums)[COLUMNS][VEC]) { finish(sums, true); };
    auto plain = [&](float (&sums)[COLUMNS][VEC]) { finish(sums, false); };
#if STRIDE == 1
    if (addend || g.act)
        correlate<1, true>(dy, filter, spot, g, splat<VEC>(0.0f), fused);
    else
        correlate<1, true>(dy, filter, spot, g, splat<VEC>(0.0f), plain);
#else
    if (addend || g.act)
        spread(dy, filter, spot, g, fused);
    else
        spread(dy, filter, spot, g, plain);
#endif
}
