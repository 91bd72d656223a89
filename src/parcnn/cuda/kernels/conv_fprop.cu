// Convolution forward with bias, activation and 2x2 pooling in one kernel; x (N,H,W,C), w (K,R,S,C), y (N,P,Q,K), fp32.
//
//     y[n,p,q,k] = pool(act(bias[k] + sum_{r,s,c} x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c] * w[k,r,s,c]))
//
// conv_fprop: implicit GEMM. M = output pixels (window by window where there is a pool), N = filters, reduction (r,s,c).
//   grid (M tiles, N tiles); a block owns BM x BN outputs and walks the reduction in tiles of BK, STAGES deep, copied to
//   shared memory beside the arithmetic; a thread owns TM x TN outputs, SLICES lanes share them (conv_common.cuh).
//   A filter that covers the whole unpadded image is a matrix product: the launcher says so with H = W = R = S = 1.
// conv_fprop_direct: few channels, pooled, stride 1. grid (tiles of pooled pixels of some images, groups of filters); a
//   block keeps its part of the images and its filters in shared memory; a thread owns a pooled pixel's four outputs of
//   KT filters, y = threadIdx.y picks the filters, so that a warp reads the same weight.
//
// Bytes: x is read once from memory (its overlap and its repetition over N tiles comes from L2), w once, y and the 2-bit
// indices are written once; the tensor before the pool exists in registers only.
// Preconditions: pointers aligned to 16 bytes; VEC = 4 needs C % 4 == 0; every tensor has less than 2^31 elements; image
// sides and filter spans are below 2^14; rows % 4 == 0 with a pool.

#include "conv_common.cuh"

#ifdef BM

#define NO_TAP (1 << 16)  // from where there is no image

extern "C" __global__ void __launch_bounds__(SLICES *(BM / TM) * (BN / TN))
    conv_fprop(const float *__restrict__ x, const float *__restrict__ w, const float *__restrict__ bias, float *__restrict__ y,
               u8 *__restrict__ idx, Conv g) {
    typedef Place<BM, BN, TM, TN, SLICES> Thread;
    constexpr int THREADS = Thread::Threads, CHUNKS = BK / VEC, STEP = THREADS / CHUNKS;
    constexpr int A_LOADS = (BM + STEP - 1) / STEP, B_LOADS = (BN + STEP - 1) / STEP;
    constexpr int A_TILE = BM * (BK + 4), STAGE = A_TILE + BN * (BK + 4);
    constexpr int UNROLL = TM * TN >= 32 ? 1 : 4;  // more would cost registers
    constexpr bool FEW_COLUMNS = TM > TN;          // what a thread has less of stays in registers
    constexpr int FEW = FEW_COLUMNS ? TN : TM, MANY = FEW_COLUMNS ? TM : TN;
    static_assert(THREADS % CHUNKS == 0 && BK % (4 * SLICES) == 0, "threads do not divide the tile");
    static_assert((STEP & STEP - 1) == 0, "slot(first + i * STEP) is not slot(first) + slot(i * STEP)");
    DYNAMIC_SHARED(float, shared);

    const Thread thread;
    const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
    const int chunk = threadIdx.x % CHUNKS * VEC, first = threadIdx.x / CHUNKS;
    const int a_first = slot<BM>(first) * (BK + 4) + chunk, b_first = A_TILE + slot<BN>(first) * (BK + 4) + chunk;

    // The rows that this thread copies: where their receptive field starts.
    u32 row_offset[A_LOADS];  // modulo 2^32: it may lie outside of x, where a tap is inside
    int row_hw[A_LOADS];
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
        int m = m0 + first + i * STEP;
        Pixel o = output_pixel(g, m < g.rows ? m : 0);
        int h = o.p * g.stride_h - g.pad_h, left = o.q * g.stride_w - g.pad_w;
        row_offset[i] = (((u32)o.n * g.h + h) * g.w + left) * g.c;
        row_hw[i] = m < g.rows ? pack_hw(h, left) : ROW_DEAD;
    }

    await_predecessors();
    const int tiles = (g.taps_c + BK - 1) / BK;
    auto copy_tile = [&](int tile) {
        if (tile < tiles) {
            float *a = shared + tile % STAGES * STAGE + a_first, *b = shared + tile % STAGES * STAGE + b_first;
            int j = tile * BK + chunk, c, s;
            int r = divide(divide(j, g.by_c, c), g.by_s, s);
            const bool live = j < g.taps_c;
            int dh = live ? r * g.dilation_h : NO_TAP, dw = s * g.dilation_w;
            u32 offset = ((u32)dh * g.w + dw) * g.c + c;
#pragma unroll
            for (int i = 0; i < A_LOADS; ++i) {
                bool here = inside(row_hw[i], dh, dw, g.h, g.w);
                if (BM % STEP == 0 || first + i * STEP < BM)
                    copy_async<VEC>(a + slot<BM>(i * STEP) * (BK + 4), x + (here ? row_offset[i] + offset : 0), here);
            }
#pragma unroll
            for (int i = 0; i < B_LOADS; ++i) {
                int row = first + i * STEP;
                bool here = live && n0 + row < g.k;
                if (BN % STEP == 0 || row < BN)
                    copy_async<VEC>(b + slot<BN>(i * STEP) * (BK + 4), w + (here ? (n0 + row) * g.taps_c + j : 0), here);
            }
        }
        copy_async_commit();
    };

    float acc[TM][TN] = {};
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) copy_tile(tile);
    for (int tile = 0; tile < tiles; ++tile) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        copy_tile(tile + STAGES - 1);
        const float *a_tile = shared + tile % STAGES * STAGE, *b_tile = a_tile + A_TILE;
#pragma unroll UNROLL
        for (int kk = 0; kk < BK / 4 / SLICES; ++kk) {
            int k4 = kk * SLICES + thread.slice;
            auto row = [&](int i) { return row_fragment<BM, TM, BK>(a_tile, thread.tm, i, k4); };
            auto column = [&](int j) { return row_fragment<BN, TN, BK>(b_tile, thread.tn, j, k4); };
            float4 few[FEW];
#pragma unroll
            for (int f = 0; f < FEW; ++f) few[f] = FEW_COLUMNS ? column(f) : row(f);
#pragma unroll
            for (int m = 0; m < MANY; ++m) {
                float4 one = FEW_COLUMNS ? row(m) : column(m);
#pragma unroll
                for (int u = 0; u < 4; ++u)
#pragma unroll
                    for (int f = 0; f < FEW; ++f) acc[FEW_COLUMNS ? m : f][FEW_COLUMNS ? f : m] += at(one, u) * at(few[f], u);
            }
        }
    }
    add_slices<TM, TN, SLICES>(acc);
    if (thread.slice != 0) return;

    const bool whole = g.k % 4 == 0;
    if (bias) {
#pragma unroll
        for (int j = 0; j < TN; j += 4) {
            int n = n0 + thread.column(j);
            float4 b = n < g.k ? load_channels(bias, n, g.k, whole) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int i = 0; i < TM; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[i][j + e] += at(b, e);
        }
    }
    activate_all(acc, g.act);
#pragma unroll
    for (int j = 0; j < TN; j += 4) {
        int n = n0 + thread.column(j);
        if (n >= g.k) continue;
#pragma unroll
        for (int i = 0; i < TM; i += 4) {
            int m = m0 + thread.row(i);
            if (m >= g.rows) continue;
            if (g.pool) {
                float out[4];
                u32 byte = 0;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    u32 bits = 0;
                    out[e] = pool_window(acc[i][j + e], acc[i + 1][j + e], acc[i + 2][j + e], acc[i + 3][j + e], g.pool, bits);
                    if (n + e < g.k) byte |= bits << 2 * e;
                }
                store_channels(y + m / 4 * g.k, n, g.k, whole, make_float4(out[0], out[1], out[2], out[3]));
                if (idx) idx[m / 4 * ((g.k + 3) / 4) + n / 4] = (u8)byte;
            } else {
#pragma unroll
                for (int a = i; a < i + 4; ++a)
                    if (m + a - i < g.rows)
                        store_channels(y + (m + a - i) * g.k, n, g.k, whole,
                                       make_float4(acc[a][j], acc[a][j + 1], acc[a][j + 2], acc[a][j + 3]));
            }
        }
    }
}

#else

// Twin of the struct that conv_fprop.py builds: the part of the images that a block owns.
struct DirectTile {
    int images, batch, height, width;    // images of a tile (of the batch); pooled pixels a side
    int tiles_h, tiles_w;                // tiles of an image
    int patch_h, patch_w;                // inputs that a tile needs; patch_w is even and one more where needed
    FastDiv by_width, by_height, by_tiles_w, by_tiles_h, by_patch_w, by_patch_h, by_taps_c;
};

extern "C" __global__ void __launch_bounds__(256, KT < 8 ? 4 : 3)
    conv_fprop_direct(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ w, const float *__restrict__ bias,
                      ELEMENT *__restrict__ y, u8 *__restrict__ idx, Conv g, DirectTile t) {
    await_predecessors();
    DYNAMIC_SHARED(float, shared);
    float *weights = shared;                                    // [group of the block][tap and channel][KT]
    float *patch = shared + blockDim.y * g.taps_c * KT;         // [image][channel][patch_h][patch_w]
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    int tile_h, tile_w;
    const int image0 = divide(divide((int)blockIdx.x, t.by_tiles_w, tile_w), t.by_tiles_h, tile_h) * t.images;
    const int p0 = tile_h * t.height, q0 = tile_w * t.width, k0 = blockIdx.y * blockDim.y * KT;

    for (int e = thread; e < (int)blockDim.y * KT * g.taps_c; e += threads) {
        int j, k = divide(e, t.by_taps_c, j);
        weights[(k / KT * g.taps_c + j) * KT + k % KT] = k0 + k < g.k ? load<1>(w + (k0 + k) * g.taps_c + j).v[0] : 0.0f;
    }
    for (int e = thread; e < t.images * t.patch_h * t.patch_w * g.c; e += threads) {
        int c, pw, ph;
        int image = divide(divide(divide(e, g.by_c, c), t.by_patch_w, pw), t.by_patch_h, ph);
        int h = 2 * p0 + ph - g.pad_h, left = 2 * q0 + pw - g.pad_w, n = image0 + image;
        bool live = n < t.batch && (u32)h < (u32)g.h && (u32)left < (u32)g.w;
        patch[((image * g.c + c) * t.patch_h + ph) * t.patch_w + pw] =
            live ? load<1>(x + ((n * g.h + h) * g.w + left) * g.c + c).v[0] : 0.0f;
    }
    __syncthreads();

    int pw, ph;
    const int image = divide(divide((int)threadIdx.x, t.by_width, pw), t.by_height, ph);
    const int n = image0 + image, p = p0 + ph, q = q0 + pw, k = k0 + threadIdx.y * KT;
    if (image >= t.images || n >= t.batch || p >= g.p || q >= g.q || k >= g.k) return;

    float acc[4][KT] = {};
    auto tap = [&](const float *weight, float v0, float v1, float v2, float v3) {
        float b[KT];
#pragma unroll
        for (int e = 0; e < KT; e += KT % 4 ? 2 : 4) {
            if (KT % 4 == 0) {
                float4 four = load4(weight + e);
                b[e] = four.x, b[e + 1] = four.y, b[e + 2] = four.z, b[e + 3] = four.w;
            } else {
                float2 two = load2(weight + e);
                b[e] = two.x, b[e + 1] = two.y;
            }
        }
#pragma unroll
        for (int e = 0; e < KT; ++e) acc[0][e] += v0 * b[e], acc[1][e] += v1 * b[e], acc[2][e] += v2 * b[e], acc[3][e] += v3 * b[e];
    };
    const float *weight = weights + threadIdx.y * g.taps_c * KT;
    for (int c = 0; c < g.c; ++c)
        for (int r = 0; r < g.r; ++r) {
            const float *top = patch + ((image * g.c + c) * t.patch_h + 2 * ph + r) * t.patch_w + 2 * pw;
            const float *bottom = top + t.patch_w;
            const float *b = weight + (r * g.s * g.c + c) * KT;
            float2 u = load2(top), v = load2(bottom);
            for (int s = 0; s + 1 < g.s; s += 2) {
                float2 next_u = load2(top + s + 2), next_v = load2(bottom + s + 2);
                tap(b, u.x, u.y, v.x, v.y);
                tap(b + g.c * KT, u.y, next_u.x, v.y, next_v.x);
                b += 2 * g.c * KT;
                u = next_u, v = next_v;
            }
            if (g.s % 2) tap(b, u.x, u.y, v.x, v.y);
        }

    if (bias) {
#pragma unroll
        for (int e = 0; e < KT; ++e) {
            float b = k + e < g.k ? bias[k + e] : 0.0f;
            acc[0][e] += b, acc[1][e] += b, acc[2][e] += b, acc[3][e] += b;
        }
    }
    activate_all(acc, g.act);
    const int pixel = (n * g.p + p) * g.q + q;
    ELEMENT *out = y + pixel * g.k + k;
    constexpr int RUN = KT % 4 ? 2 : 4;
    const bool whole = g.k % RUN == 0;
    u32 bits[KT] = {};
#pragma unroll
    for (int first = 0; first < KT; first += RUN) {
        Floats<RUN> run;
#pragma unroll
        for (int e = 0; e < RUN; ++e) {
            float window[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                window[i] = g.pool == POOL_MAX ? rounded<ELEMENT>(acc[i][first + e]) : acc[i][first + e];
            run.v[e] = pool_window(window[0], window[1], window[2], window[3], g.pool, bits[first + e]);
        }
        if (whole) {
            if (k + first < g.k) store<RUN>(out + first, run);
            continue;
        }
#pragma unroll
        for (int e = 0; e < RUN; ++e)
            if (k + first + e < g.k) store<1>(out + first + e, {run.v[e]});
    }
    if (!idx) return;
#pragma unroll
    for (int first = 0; first < KT; first += 4) {
        u32 byte = 0;
#pragma unroll
        for (int e = first; e < first + 4 && e < KT; ++e) byte |= k + e < g.k ? bits[e] << 2 * (e - first) : 0;
        if (k + first < g.k) idx[pixel * ((g.k + 3) / 4) + (k + first) / 4] = (u8)byte;
    }
}

#endif
