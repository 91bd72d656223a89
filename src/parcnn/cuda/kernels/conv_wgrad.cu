// Gradient of a convolution with respect to its filters and bias; x (N,H,W,C), dy (N,P,Q,K), dw (K,R,S,C), db (K), fp32.
//
//     dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c]
//     db[k]       = sum_{n,p,q} dy[n,p,q,k]
//
// conv_wgrad: implicit GEMM. M = filters, N = (r,s,c), reduction over output pixels. grid (M tiles, N tiles, splits): a
//   split sums its own run of `chunk` pixels; block and thread as in conv_common.cuh. Blocks of the first N tile also add
//   up their dy for db. With one split the sums are the result, else they are rows [split][dw, then db] of `partial`.
// conv_wgrad_sum: adds the splits' rows in a fixed order; grid over elements, PARTS threads share an element.
// ROUTED = 1: dy is the error of the 2x2-pooled output, routed on its way to shared memory as in conv_dgrad.cu; four
//   neighbouring pixels of the reduction are a pooling window, so that an error and its index are loaded once.
//
// Bytes: x and dy (and idx) are read once from memory, their repetition over tiles comes from L2; dw and db are written
// once, and `splits` times to the workspace and back where there are several.
// Preconditions: pointers aligned to 16 bytes; VEC_K = 4 needs K % 4 == 0, VEC_C = 4 needs C % 4 == 0; every tensor has
// less than 2^31 elements; image sides and filter spans are below 2^14; chunk % BK == 0.

#include "conv_common.cuh"

#ifdef BM

#define NO_TAP (1 << 16)  // from where there is no image

extern "C" __global__ void __launch_bounds__(SLICES *(BM / TM) * (BN / TN))
    conv_wgrad(const float *__restrict__ x, const float *__restrict__ dy, const u8 *__restrict__ idx, float *__restrict__ dw,
               float *__restrict__ db, float *__restrict__ partial, Conv g, int chunk) {
    typedef Place<BM, BN, TM, TN, SLICES> Thread;
    constexpr int THREADS = Thread::Threads, POSITIONS = ROUTED ? 4 : 1;
    constexpr int CHUNKS_A = BM / VEC_K, STEP_A = THREADS / CHUNKS_A, ROWS_A = BK / POSITIONS;
    constexpr int LOADS_A = (ROWS_A + STEP_A - 1) / STEP_A;
    constexpr int CHUNKS_B = BN / VEC_C, STEP_B = THREADS / CHUNKS_B, LOADS_B = (BK + STEP_B - 1) / STEP_B;
    constexpr int A_TILE = BK * (BM + 4), STAGE = A_TILE + BK * (BN + 4), PARTS = THREADS / BM;
    constexpr int TURN = THREADS / BK;  // tiles whose pixels are located together, one a thread
    constexpr int UNROLL = TM * TN >= 32 ? 4 : 8;
    static_assert(THREADS % CHUNKS_A == 0 && THREADS % CHUNKS_B == 0 && BK % SLICES == 0 && THREADS % BM == 0 && BK % PARTS == 0,
                  "threads do not divide the tile");
    static_assert((THREADS & THREADS - 1) == 0 && TURN >= STAGES, "a turn's pixels are located before its copies start");
    DYNAMIC_SHARED(float, shared);
    // [2][THREADS]: where a pixel's receptive field starts, in x modulo 2^32 (it may lie outside, where a tap is inside) and packed.
    uint2 *pixels = reinterpret_cast<uint2 *>(shared + STAGES * STAGE);

    const Thread thread;
    const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
    const int begin = blockIdx.z * chunk, end = min(g.rows, begin + chunk);
    const int tiles = (end - begin + BK - 1) / BK;

    // Locate the pixels of TURN tiles from `tile` on; those of the TURN tiles before stay.
    auto locate_pixels = [&](int tile) {
        int m = begin + tile * BK + threadIdx.x;
        Pixel o = output_pixel(g, m < end ? m : 0);
        int h = o.p * g.stride_h - g.pad_h, left = o.q * g.stride_w - g.pad_w;
        pixels[(tile * BK & THREADS) + threadIdx.x] =
            make_uint2((((u32)o.n * g.h + h) * g.w + left) * g.c, (u32)(m < end ? pack_hw(h, left) : ROW_DEAD));
    };

    const int chunk_a = threadIdx.x % CHUNKS_A * VEC_K, first_a = threadIdx.x / CHUNKS_A, k = m0 + chunk_a;
    const int chunk_b = threadIdx.x % CHUNKS_B * VEC_C, first_b = threadIdx.x / CHUNKS_B;
    int c, s;
    const int r = divide(divide(n0 + chunk_b, g.by_c, c), g.by_s, s);
    const int dh = n0 + chunk_b < g.taps_c ? r * g.dilation_h : NO_TAP, dx = s * g.dilation_w;
    const u32 offset = ((u32)dh * g.w + dx) * g.c + c;
    const bool live_a = k < g.k;

    await_predecessors();
#if ROUTED
    float error[LOADS_A][VEC_K];
    u32 winners[LOADS_A];
#endif
    // Start the copies of a tile; what must be routed waits in registers for `store_routed`.
    auto copy_tile = [&](int tile) {
        if (tile < tiles) {
            float *a = shared + tile % STAGES * STAGE + first_a * (BM + 4) + chunk_a;
            float *b = shared + tile % STAGES * STAGE + A_TILE + first_b * (BN + 4) + chunk_b;
#pragma unroll
            for (int i = 0; i < LOADS_A; ++i) {
                int row = first_a + i * STEP_A;
                if (ROWS_A % STEP_A != 0 && row >= ROWS_A) continue;
                int m = begin + tile * BK + row * POSITIONS;
                bool here = live_a && m < end;
#if ROUTED
                winners[i] = 0;
#pragma unroll
                for (int e = 0; e < VEC_K; ++e) error[i][e] = 0.0f;
                if (here) {
                    if (VEC_K == 4) {
                        float4 v = load4(dy + m / 4 * g.k + k);
#pragma unroll
                        for (int e = 0; e < VEC_K; ++e) error[i][e] = at(v, e);
                    } else {
                        error[i][0] = dy[m / 4 * g.k + k];
                    }
                    if (g.pool == POOL_MAX) winners[i] = (u32)idx[m / 4 * ((g.k + 3) / 4) + k / 4] >> 2 * (k % 4);
                }
#else
                copy_async<VEC_K>(a + i * STEP_A * (BM + 4), dy + (here ? m * g.k + k : 0), here);
#endif
            }
#pragma unroll
            for (int i = 0; i < LOADS_B; ++i) {
                int row = first_b + i * STEP_B;
                if (BK % STEP_B != 0 && row >= BK) continue;
                uint2 pixel = pixels[(tile * BK & 2 * THREADS - 1) + row];
                bool here = inside((int)pixel.y, dh, dx, g.h, g.w);
                copy_async<VEC_C>(b + i * STEP_B * (BN + 4), x + (here ? pixel.x + offset : 0), here);
            }
        }
        copy_async_commit();
    };
    auto store_routed = [&](int tile) {
#if ROUTED
        if (tile >= tiles) return;
        float *a = shared + tile % STAGES * STAGE;
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            int row = first_a + i * STEP_A;
            if (ROWS_A % STEP_A != 0 && row >= ROWS_A) continue;
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position)
#pragma unroll
                for (int e = 0; e < VEC_K; ++e) {
                    bool won = (winners[i] >> 2 * e & 3) == (u32)position;
                    a[(row * POSITIONS + position) * (BM + 4) + chunk_a + e] =
                        g.pool == POOL_AVG ? 0.25f * error[i][e] : won ? error[i][e] : 0.0f;
                }
        }
#endif
    };

    locate_pixels(0);
    __syncthreads();
    float acc[TM][TN] = {}, bias_sum = 0.0f;
    const bool sums_bias = db && blockIdx.y == 0;
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) {
        copy_tile(tile);
        store_routed(tile);
    }
    for (int tile = 0; tile < tiles; ++tile) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        copy_tile(tile + STAGES - 1);
        if ((tile + STAGES) % TURN == 0) locate_pixels(tile + STAGES);  // whose copies start behind the next barrier
        const float *a_tile = shared + tile % STAGES * STAGE, *b_tile = a_tile + A_TILE;
#pragma unroll UNROLL
        for (int kk = 0; kk < BK / SLICES; ++kk) {
            int row = kk * SLICES + thread.slice;
            float4 a[TM / 4];
#pragma unroll
            for (int i = 0; i < TM; i += 4) a[i / 4] = load4(a_tile + row * (BM + 4) + thread.row(i));
#pragma unroll
            for (int j = 0; j < TN; j += 4) {
                float4 b = load4(b_tile + row * (BN + 4) + thread.column(j));
                for (int t = 0; t < 4 * TM; ++t) {  // in the order of which compilers make the fewest conflicts of register banks
                    const int e = TM > TN ? t / TM : t % 4, i = TM <= TN ? t / 4 : e % 2 ? TM - 1 - t % TM : t % TM;
                    acc[i][j + e] += at(a[i / 4], i % 4) * at(b, e);
                }
            }
        }
        if (sums_bias) {
#pragma unroll
            for (int row = 0; row < BK; row += PARTS) bias_sum += a_tile[(row + threadIdx.x / BM) * (BM + 4) + threadIdx.x % BM];
        }
        store_routed(tile + STAGES - 1);  // its stage was read a tile ago, before this tile's barrier
    }
    add_slices<TM, TN, SLICES>(acc);

    const int row_size = g.k * g.taps_c + (db ? g.k : 0);
    float *dw_out = partial ? partial + blockIdx.z * row_size : dw;
    float *db_out = partial ? dw_out + g.k * g.taps_c : db;
    if (sums_bias) {
        __syncthreads();
        shared[threadIdx.x] = bias_sum;
        __syncthreads();
        if (threadIdx.x < BM && m0 + threadIdx.x < g.k) {
            float sum = 0.0f;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) sum += shared[part * BM + threadIdx.x];
            db_out[m0 + threadIdx.x] = sum;
        }
    }
    if (thread.slice != 0) return;
    const bool whole = row_size % 4 == 0 && g.taps_c % 4 == 0;
#pragma unroll
    for (int i = 0; i < TM; ++i) {
        int m = m0 + thread.row(i);
        if (m >= g.k) continue;
#pragma unroll
        for (int j = 0; j < TN; j += 4) {
            int n = n0 + thread.column(j);
            if (n >= g.taps_c) continue;
            store_channels(dw_out + m * g.taps_c, n, g.taps_c, whole,
                           make_float4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]));
        }
    }
}

#else

extern "C" __global__ void __launch_bounds__(32 * PARTS)
    conv_wgrad_sum(const float *__restrict__ partial, float *__restrict__ dw, float *__restrict__ db, int dw_size, int row_size,
                   int splits) {
    await_predecessors();
    __shared__ float sums[PARTS][32];
    const int e = blockIdx.x * 32 + threadIdx.x, each = (splits + PARTS - 1) / PARTS;
    const int first = threadIdx.y * each, last = min(splits, first + each);
    float sum = 0.0f;
    if (e < row_size) {
#pragma unroll 8
        for (int split = first; split < last; ++split) sum += partial[split * row_size + e];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || e >= row_size) return;
#pragma unroll
    for (int part = 1; part < PARTS; ++part) sum += sums[part][threadIdx.x];
    if (e < dw_size)
        dw[e] = sum;
    else
        db[e - dw_size] = sum;
}

#endif
