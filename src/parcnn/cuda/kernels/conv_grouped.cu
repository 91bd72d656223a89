// Convolution in groups, fp32: forward, input gradient, gradients of filters and bias. x (N,H,W,C), w (K,R,S,C/groups), y (N,P,Q,K);
// filter k sees the C/groups channels of group k / (K/groups).
//
// Each is a product of matrices a group, gathered as it is read. grid (M tiles x N tiles, runs, groups), block (BM/TM)*(BN/TN); a
// block owns BM x BN sums and walks their depth in tiles of BK in shared memory, a thread owns TM x TN of them.
//   fprop   M = output pixels, N = filters of the group, depth (r, s, channel)      epilogue bias, activation
//   dgrad   M = input pixels, N = channels of the group, depth (r, s, filter)       epilogue addend, activation's derivative
//   wgrad   M = elements of a filter (r, s, channel), N = filters of the group, depth = output pixels of the run: row `run` of
//           `partial` (dw, then db), which conv_wgrad_sum adds up; without `partial` there is one run
// Bytes: x (dy) R*S times from cache and once a tile of N, w once a tile of M, outputs once.
// Preconditions: every tensor has less than 2^31 elements. Macros: BM, BN, BK, TM, TN.
#include "conv_common.cuh"

#define THREADS ((BM / TM) * (BN / TN))

// Twin of `_argument` in conv_grouped.py.
struct Grouped {
    int pixels;             // of y; of dgrad those of x
    int h, w, c, p, q, k, r, s;
    int group_c, group_k;   // channels and filters of a group
    int stride_h, stride_w, top, left, dilation_h, dilation_w;
    int act, n_tiles;
    FastDiv by_rows, by_columns;  // of the pixels
    FastDiv by_depth, by_s;       // channels of a group; of dgrad filters
    FastDiv by_stride_h, by_stride_w, by_n_tiles;
};

struct Spot {
    int image, row, column;
};

__device__ __forceinline__ Spot spot_of(int pixel, const Grouped &g) {
    Spot spot;
    spot.image = divide(divide(pixel, g.by_columns, spot.column), g.by_rows, spot.row);
    return spot;
}

struct Tap {
    int r, s, channel;
};

__device__ __forceinline__ Tap tap_of(int j, const Grouped &g) {
    Tap tap;
    tap.r = divide(divide(j, g.by_depth, tap.channel), g.by_s, tap.s);
    return tap;
}

// x at the tap of an output pixel; 0 in the padding.
__device__ __forceinline__ float seen(const float *x, const Spot &o, const Tap &tap, int group, const Grouped &g) {
    const int h = o.row * g.stride_h - g.top + tap.r * g.dilation_h, w = o.column * g.stride_w - g.left + tap.s * g.dilation_w;
    if ((u32)h >= (u32)g.h || (u32)w >= (u32)g.w) return 0.0f;
    return x[((o.image * g.h + h) * g.w + w) * g.c + group * g.group_c + tap.channel];
}

struct Tiles {
    float a[BK][BM + 1], b[BK][BN + 1];
};

// The sums of a thread: acc[i][j] += A(m0 + its row i, d) * B(n0 + its column j, d) over first <= d < last. The loads take a row
// (column) of the tile and d; both are called by the whole block in the same order. `after(b)` sees each tile of B, [BK][BN].
template <class LoadA, class LoadB, class After>
__device__ __forceinline__ void product(float (&acc)[TM][TN], Tiles &tiles, int first, int last, LoadA load_a, LoadB load_b,
                                        After after) {
    const int tm = threadIdx.x / (BN / TN), tn = threadIdx.x % (BN / TN);
    for (int d0 = first; d0 < last; d0 += BK) {
        __syncthreads();
        for (int e = threadIdx.x; e < BM * BK; e += THREADS) {
            int m, d;
            load_a.split(e, m, d);
            tiles.a[d][m] = d0 + d < last ? load_a(m, d0 + d) : 0.0f;
        }
        for (int e = threadIdx.x; e < BN * BK; e += THREADS) {
            int n, d;
            load_b.split(e, n, d);
            tiles.b[d][n] = d0 + d < last ? load_b(n, d0 + d) : 0.0f;
        }
        __syncthreads();
        after(tiles.b);
#pragma unroll
        for (int d = 0; d < BK; ++d) {
            float own_a[TM], own_b[TN];
#pragma unroll
            for (int i = 0; i < TM; ++i) own_a[i] = tiles.a[d][i * (BM / TM) + tm];
#pragma unroll
            for (int j = 0; j < TN; ++j) own_b[j] = tiles.b[d][j * (BN / TN) + tn];
#pragma unroll
            for (int i = 0; i < TM; ++i)
#pragma unroll
                for (int j = 0; j < TN; ++j) acc[i][j] += own_a[i] * own_b[j];
        }
    }
}

// A load whose neighbours in memory are neighbours in depth, or (Across) in the tile's rows; what it loads is `at(row, d)`.
template <int Extent, bool Across, class At> struct Load {
    At at;
    __device__ __forceinline__ void split(int e, int &row, int &d) const {
        row = Across ? e % Extent : e / BK;
        d = Across ? e / Extent : e % BK;
    }
    __device__ __forceinline__ float operator()(int row, int d) const { return at(row, d); }
};

template <int Extent, bool Across, class At> __device__ __forceinline__ Load<Extent, Across, At> loads(At at) { return {at}; }

struct Nothing {
    __device__ __forceinline__ void operator()(float (&)[BK][BN + 1]) const {}
};

// Rows and columns of the block's tile that a thread owns.
__device__ __forceinline__ int row_of(int i) { return i * (BM / TM) + threadIdx.x / (BN / TN); }
__device__ __forceinline__ int column_of(int j) { return j * (BN / TN) + threadIdx.x % (BN / TN); }

extern "C" __global__ void __launch_bounds__(THREADS)
    conv_grouped_fprop(const float *__restrict__ x, const float *__restrict__ w, const float *__restrict__ bias,
                       float *__restrict__ y, Grouped g) {
    await_predecessors();
    const int group = blockIdx.z, depth = g.r * g.s * g.group_c;
    __shared__ Tiles tiles;
    int n0;
    const int m0 = divide(blockIdx.x, g.by_n_tiles, n0) * BM;
    n0 *= BN;
    float acc[TM][TN] = {};
    product(
        acc, tiles, 0, depth,
        loads<BM, false>([&](int m, int d) { return m0 + m < g.pixels ? seen(x, spot_of(m0 + m, g), tap_of(d, g), group, g) : 0.0f; }),
        loads<BN, false>([&](int n, int d) { return n0 + n < g.group_k ? w[(group * g.group_k + n0 + n) * depth + d] : 0.0f; }), Nothing());
#pragma unroll
    for (int j = 0; j < TN; ++j) {
        const int n = n0 + column_of(j), k = group * g.group_k + n;
        const float b = bias && n < g.group_k ? bias[k] : 0.0f;
#pragma unroll
        for (int i = 0; i < TM; ++i) acc[i][j] += b;
    }
    activate_all(acc, g.act);
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) {
            const int m = m0 + row_of(i), n = n0 + column_of(j);
            if (m < g.pixels && n < g.group_k) y[m * g.k + group * g.group_k + n] = acc[i][j];
        }
}

// dy at the output that sees an input pixel through a tap; 0 where there is none.
__device__ __forceinline__ float error_at(const float *dy, const Spot &pixel, const Tap &tap, int group, const Grouped &g) {
    const int h = pixel.row + g.top - tap.r * g.dilation_h, w = pixel.column + g.left - tap.s * g.dilation_w;
    if (h < 0 || w < 0) return 0.0f;
    int rest_h, rest_w, p = divide(h, g.by_stride_h, rest_h), q = divide(w, g.by_stride_w, rest_w);
    if (rest_h || rest_w || p >= g.p || q >= g.q) return 0.0f;
    return dy[((pixel.image * g.p + p) * g.q + q) * g.k + group * g.group_k + tap.channel];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    conv_grouped_dgrad(const float *__restrict__ dy, const float *__restrict__ w, const float *saved, const float *addend, float *dx,
                       Grouped g) {
    await_predecessors();
    const int group = blockIdx.z, depth = g.r * g.s * g.group_k, taps = g.r * g.s;
    __shared__ Tiles tiles;
    int n0;
    const int m0 = divide(blockIdx.x, g.by_n_tiles, n0) * BM;
    n0 *= BN;
    float acc[TM][TN] = {};
    auto weight = [&](int n, int d) {
        if (n0 + n >= g.group_c) return 0.0f;
        const Tap tap = tap_of(d, g);
        return w[((group * g.group_k + tap.channel) * taps + tap.r * g.s + tap.s) * g.group_c + n0 + n];
    };
    product(
        acc, tiles, 0, depth,
        loads<BM, false>([&](int m, int d) { return m0 + m < g.pixels ? error_at(dy, spot_of(m0 + m, g), tap_of(d, g), group, g) : 0.0f; }),
        loads<BN, true>(weight), Nothing());
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) {
            const int m = m0 + row_of(i), n = n0 + column_of(j);
            if (m >= g.pixels || n >= g.group_c) continue;
            const int at = m * g.c + group * g.group_c + n;
            float v = acc[i][j] + (addend ? addend[at] : 0.0f);
            dx[at] = g.act ? activation_dgrad_of(v, saved[at], g.act) : v;
        }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    conv_grouped_wgrad(const float *__restrict__ x, const float *__restrict__ dy, float *__restrict__ dw, float *__restrict__ db,
                       float *__restrict__ partial, Grouped g, int run_pixels) {
    await_predecessors();
    const int group = blockIdx.z, elements = g.r * g.s * g.group_c, run = blockIdx.y;
    __shared__ Tiles tiles;
    int n0;
    const int m0 = divide(blockIdx.x, g.by_n_tiles, n0) * BM;
    n0 *= BN;
    const int first = run * run_pixels, last = min(first + run_pixels, g.pixels);
    float acc[TM][TN] = {}, bias_sum = 0.0f;
    const bool sums_bias = db && m0 == 0 && threadIdx.x < BN;
    product(
        acc, tiles, first, last,
        loads<BM, true>([&](int m, int d) { return m0 + m < elements ? seen(x, spot_of(d, g), tap_of(m0 + m, g), group, g) : 0.0f; }),
        loads<BN, true>([&](int n, int d) { return n0 + n < g.group_k ? dy[d * g.k + group * g.group_k + n0 + n] : 0.0f; }),
        [&](float (&b)[BK][BN + 1]) {
            if (!sums_bias) return;
#pragma unroll
            for (int d = 0; d < BK; ++d) bias_sum += b[d][threadIdx.x];
        });
    const int row_size = g.k * elements + (db ? g.k : 0);
    float *dw_out = partial ? partial + run * row_size : dw, *db_out = partial ? dw_out + g.k * elements : db;
#pragma unroll
    for (int j = 0; j < TN; ++j)
#pragma unroll
        for (int i = 0; i < TM; ++i) {
            const int m = m0 + row_of(i), n = n0 + column_of(j);
            if (m < elements && n < g.group_k) dw_out[(group * g.group_k + n) * elements + m] = acc[i][j];
        }
    if (sums_bias && n0 + (int)threadIdx.x < g.group_k) db_out[group * g.group_k + n0 + threadIdx.x] = bias_sum;
}
