// Gradient of a convolution with respect to its input; dy (N,P,Q,K), w (K,R,S,C), dx (N,H,W,C), fp32.
//
//     dx[n,h,w,c] = act'(saved) * (addend[n,h,w,c] + sum_{r,s,k} dy[n,p,q,k] * w[k,r,s,c])
//         over the taps with h + top = p*stride + r*dilation and w + left = q*stride + s*dilation
//
// Implicit GEMM. M = input pixels, N = channels, reduction (r,s,k). grid (M tiles, N tiles, classes): pixels whose h modulo
//   the stride (and w likewise) are equal form a class; they meet the same taps, every (stride / gcd(stride, dilation))-th,
//   and a class is a convolution of stride 1: taps that meet no output cost nothing. Block and thread as in conv_common.cuh.
// ROUTED = 1: dy is the error of the 2x2-pooled output. For max-pooling a pixel before the pool has it where idx names it
//   the winner, else 0; for average-pooling it has a quarter. Routing happens between the load and shared memory: the
//   error before the pool is never written.
//
// Bytes: dy, w (and idx, saved, addend) are read once from memory, their overlap comes from L2; dx is written once.
// Preconditions: pointers aligned to 16 bytes; VEC_K = 4 needs K % 4 == 0, VEC_C = 4 needs C % 4 == 0; every tensor has
// less than 2^31 elements; image sides and filter spans are below 2^14. dx may be the memory of saved or addend.

#include "conv_common.cuh"

#define NO_TAP (1 << 16)  // from where there is no output

// Twin of the struct that conv_dgrad.py builds.
struct Classes {
    int rows;              // pixels of a class, those beyond the image too: n * h * w
    int h, w;              // ceil(image side / stride)
    int step_h, step_w;    // every so many-th tap is live
    int back_h, back_w;    // outputs from one live tap to the next
    int taps_s;            // live taps along s, at most
    FastDiv by_h, by_w, by_k, by_taps_s, by_fewer_s;
};

// First tap that meets pixels of class `phase`: phase + pad = tap * dilation modulo stride; `taps` where there is none.
__device__ __forceinline__ int first_tap(int phase, int pad, int dilation, int stride, int taps) {
    for (int tap = 0; tap < min(taps, stride); ++tap)
        if ((phase + pad - tap * dilation) % stride == 0) return tap;
    return taps;
}

// Where single floats are copied, compilers would rather spill one register than have a block less on a multiprocessor, unless
// one is said to be enough.
extern "C" __global__ void __launch_bounds__(SLICES *(BM / TM) * (BN / TN), VEC_C == 1)
    conv_dgrad(const float *__restrict__ dy, const float *__restrict__ w, const u8 *__restrict__ idx, const float *saved,
               const float *addend, float *dx, Conv g, Classes f) {
    typedef Place<BM, BN, TM, TN, SLICES> Thread;
    constexpr int THREADS = Thread::Threads;
    constexpr int CHUNKS_A = BK / VEC_K, STEP_A = THREADS / CHUNKS_A, LOADS_A = (BM + STEP_A - 1) / STEP_A;
    constexpr int CHUNKS_B = BN / VEC_C, STEP_B = THREADS / CHUNKS_B, LOADS_B = (BK + STEP_B - 1) / STEP_B;
    constexpr int A_TILE = BM * (BK + 4), STAGE = A_TILE + BK * (BN + 4);
    constexpr int UNROLL = TM * TN >= 32 ? 1 : 4;  // more would cost registers: 128 hold an 8 x 8 tile without spills
    static_assert(THREADS % CHUNKS_A == 0 && THREADS % CHUNKS_B == 0 && BK % (4 * SLICES) == 0, "threads do not divide the tile");
    static_assert((STEP_A & STEP_A - 1) == 0 && (STEP_B & STEP_B - 1) == 0,
                  "slot(first + i * STEP) is not slot(first) + slot(i * STEP)");
    DYNAMIC_SHARED(float, shared);

    const Thread thread;
    const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
    const int phase_h = blockIdx.z / g.stride_w, phase_w = blockIdx.z % g.stride_w;
    const int r0 = first_tap(phase_h, g.pad_h, g.dilation_h, g.stride_h, g.r);
    const int s0 = first_tap(phase_w, g.pad_w, g.dilation_w, g.stride_w, g.s);
    const int taps_r = (g.r - r0 + f.step_h - 1) / f.step_h, taps_s = (g.s - s0 + f.step_w - 1) / f.step_w;
    const FastDiv by_taps_s = taps_s == f.taps_s ? f.by_taps_s : f.by_fewer_s;
    const int depth = taps_r * taps_s * g.k;
    const int outputs_h = ROUTED ? 2 * g.p : g.p, outputs_w = ROUTED ? 2 * g.q : g.q;

    // The rows that this thread copies: the output that their first live tap meets.
    const int chunk_a = threadIdx.x % CHUNKS_A * VEC_K, first_a = threadIdx.x / CHUNKS_A;
    u32 row_base[LOADS_A];  // its place in dy modulo 2^32: it may lie outside, where a later tap is inside; ROUTED: its image's
                            // first row of pooled outputs
    int row_pq[LOADS_A];
#pragma unroll
    for (int i = 0; i < LOADS_A; ++i) {
        int m = m0 + first_a + i * STEP_A, h, left;
        int n = divide(divide(m < f.rows ? m : 0, f.by_w, left), f.by_h, h);
        int p = h + (phase_h + g.pad_h - r0 * g.dilation_h) / g.stride_h;
        int q = left + (phase_w + g.pad_w - s0 * g.dilation_w) / g.stride_w;
        row_base[i] = ROUTED ? n * g.p : (((u32)n * g.p + p) * g.q + q) * g.k;
        row_pq[i] = m < f.rows ? pack_hw(p, q) : ROW_DEAD;
    }
    const int chunk_b = threadIdx.x % CHUNKS_B * VEC_C, first_b = threadIdx.x / CHUNKS_B;
    const int a_first = slot<BM>(first_a) * (BK + 4) + chunk_a, b_first = A_TILE + slot<BK>(first_b) * (BN + 4) + chunk_b;
    const bool live_b = n0 + chunk_b < g.c;
    const int first_w = (r0 * g.s + s0) * g.c + n0 + chunk_b;

    await_predecessors();
    const int tiles = (depth + BK - 1) / BK;
#if ROUTED
    float routed[LOADS_A][VEC_K];
#endif
    // Start the copies of a tile; what must be routed waits in registers for `store_routed`.
    auto copy_tile = [&](int tile) {
        if (tile < tiles) {
            float *a = shared + tile % STAGES * STAGE + a_first, *b = shared + tile % STAGES * STAGE + b_first;
            int j = tile * BK + chunk_a, k, s;
            int r = divide(divide(j, f.by_k, k), by_taps_s, s);
            int dp = j < depth ? -r * f.back_h : NO_TAP, dq = -s * f.back_w;
#pragma unroll
            for (int i = 0; i < LOADS_A; ++i) {
                bool here = inside(row_pq[i], dp, dq, outputs_h, outputs_w);
                if (BM % STEP_A != 0 && first_a + i * STEP_A >= BM) continue;
#if ROUTED
                int p = unpack_h(row_pq[i]) + dp, q = unpack_w(row_pq[i]) + dq;
                int pixel = (row_base[i] + (p >> 1)) * g.q + (q >> 1);
                float value[VEC_K];
                u32 winners = 0;
                if (here) {
                    if (VEC_K == 4) {
                        float4 v = load4(dy + pixel * g.k + k);
#pragma unroll
                        for (int e = 0; e < VEC_K; ++e) value[e] = at(v, e);
                    } else {
                        value[0] = dy[pixel * g.k + k];
                    }
                    if (g.pool == POOL_MAX) winners = (u32)idx[pixel * ((g.k + 3) / 4) + k / 4] >> 2 * (k % 4);
                }
#pragma unroll
                for (int e = 0; e < VEC_K; ++e) {
                    bool won = (winners >> 2 * e & 3) == (u32)(2 * (p & 1) + (q & 1));
                    routed[i][e] = !here ? 0.0f : g.pool == POOL_AVG ? 0.25f * value[e] : won ? value[e] : 0.0f;
                }
#else
                copy_async<VEC_K>(a + slot<BM>(i * STEP_A) * (BK + 4),
                                  dy + (here ? row_base[i] + (dp * g.q + dq) * g.k + k : 0), here);
#endif
            }
#pragma unroll
            for (int i = 0; i < LOADS_B; ++i) {
                int row = first_b + i * STEP_B;
                if (BK % STEP_B != 0 && row >= BK) continue;
                int jb = tile * BK + row, kb, sb;
                int rb = divide(divide(jb, f.by_k, kb), by_taps_s, sb);
                bool here = live_b && jb < depth;
                copy_async<VEC_C>(
                    b + slot<BK>(i * STEP_B) * (BN + 4),
                    w + (here ? first_w + kb * g.taps_c + (rb * f.step_h * g.s + sb * f.step_w) * g.c : 0), here);
            }
        }
        copy_async_commit();
    };
    auto store_routed = [&](int tile) {
#if ROUTED
        if (tile >= tiles) return;
        float *a = shared + tile % STAGES * STAGE + a_first;
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            if (BM % STEP_A != 0 && first_a + i * STEP_A >= BM) continue;
#pragma unroll
            for (int e = 0; e < VEC_K; ++e) a[slot<BM>(i * STEP_A) * (BK + 4) + e] = routed[i][e];
        }
#endif
    };

    float acc[TM][TN] = {};
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) {
        copy_tile(tile);
        store_routed(tile);
    }
    for (int tile = 0; tile < tiles; ++tile) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        copy_tile(tile + STAGES - 1);
        const float *a_tile = shared + tile % STAGES * STAGE, *b_tile = a_tile + A_TILE;
#pragma unroll UNROLL
        for (int kk = 0; kk < BK / 4 / SLICES; ++kk) {
            int k4 = kk * SLICES + thread.slice;
            float4 b[4][TN / 4];
#pragma unroll
            for (int u = 0; u < 4; ++u)
#pragma unroll
                for (int j = 0; j < TN; j += 4)
                    b[u][j / 4] = load4(b_tile + slot<BK>(4 * k4 + u) * (BN + 4) + thread.column(j));
#pragma unroll
            for (int i = 0; i < TM; ++i) {
                float4 a = row_fragment<BM, TM, BK>(a_tile, thread.tm, i, k4);
#pragma unroll
                for (int u = 0; u < 4; ++u)
#pragma unroll
                    for (int j = 0; j < TN; ++j) acc[i][j] += at(a, u) * at(b[u][j / 4], j % 4);
            }
        }
        store_routed(tile + STAGES - 1);  // its stage was read a tile ago, before this tile's barrier
    }
    add_slices<TM, TN, SLICES>(acc);
    if (thread.slice != 0) return;

    const bool whole = g.c % 4 == 0;
#pragma unroll
    for (int i = 0; i < TM; ++i) {
        int m = m0 + thread.row(i), h, left;
        if (m >= f.rows) continue;
        int n = divide(divide(m, f.by_w, left), f.by_h, h);
        h = h * g.stride_h + phase_h, left = left * g.stride_w + phase_w;
        if (h >= g.h || left >= g.w) continue;
        int pixel = ((n * g.h + h) * g.w + left) * g.c;
#pragma unroll
        for (int j = 0; j < TN; j += 4) {
            int c = n0 + thread.column(j);
            if (c >= g.c) continue;
            float v[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] = acc[i][j + e];
            if (addend) {
                float4 more = load_channels(addend + pixel, c, g.c, whole);
#pragma unroll
                for (int e = 0; e < 4; ++e) v[e] += at(more, e);
            }
            if (saved) {
                float4 out = load_channels(saved + pixel, c, g.c, whole);
#pragma unroll
                for (int e = 0; e < 4; ++e) v[e] = activation_dgrad_of(v[e], at(out, e), g.act);
            }
            store_channels(dx + pixel, c, g.c, whole, make_float4(v[0], v[1], v[2], v[3]));
        }
    }
}
