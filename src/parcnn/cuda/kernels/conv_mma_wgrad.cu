// Gradient of a bf16 convolution with respect to its filters and bias on the tensor cores of sm_80 and later; x (N,H,W,C),
// dy (N,P,Q,K) bf16, dw (K,R,S,C/groups), db (K) fp32.
//
//     dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c]
//     db[k]       = sum_{n,p,q} dy[n,p,q,k]
//
// Implicit GEMM. M = filters of a group, N = (r,s,c), reduction over output pixels. grid (tiles, N tiles fastest; splits;
//   groups): a split sums its own run of `chunk` pixels; block and warps as in conv_mma.cuh, both operands column-wise.
//   Blocks of the first N tile also multiply dy by ones for db. With one split the sums are the result, else they are rows
//   [split][dw, then db] of `partial`, which conv_wgrad_sum of conv_wgrad.cu adds.
// ROUTED = 1: dy is the error of the 2x2-pooled output, routed on its way to shared memory; four neighbouring pixels of the
//   reduction are a pooling window, so that an error and its index are loaded once.
// VEC_A (of filters), VEC_B (of channels) = 8: they are copied by 16 bytes; 2: by 4 bytes; 1: elements are gathered through
//   registers.
//
// Bytes: x and dy (and idx) are read once from memory, their repetition over tiles comes from L1 and L2; dw and db are written
// once, and `splits` times to the workspace and back where there are several.
// Preconditions: pointers aligned to 16 bytes; K/groups % VEC_A == C/groups % VEC_B == 0; every tensor has less than
// 2^31 elements; image sides and filter spans are below 2^14; chunk % BK == 0.
//
// Macros: BM, BN, BK, WARPS_M, WARPS_N, STAGES, ROUTED, VEC_A, VEC_B.

#include "conv_mma.cuh"

// Twin of the struct that conv_mma_wgrad.py builds.
struct Problem {
    int rows, chunk;       // output pixels before the pool, those of a split
    int h, w, c, k;        // image; channels of a pixel of x and of dy
    int group_c, group_k;  // channels, filters of a group
    int depth;             // r * s * group_c
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int pool, n_tiles;
    FastDiv by_p, by_q, by_group_c, by_s;  // p and q after the pool
};

extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, 1)
    conv_mma_wgrad(const u16 *__restrict__ x, const u16 *__restrict__ dy, const u8 *__restrict__ idx, float *__restrict__ dw,
                   float *__restrict__ db, float *__restrict__ partial, Problem g) {
    typedef Product<BM, BN, BK, WARPS_M, WARPS_N, true, true> Tile;
    constexpr int POSITIONS = ROUTED ? 4 : 1, ROWS_A = BK / POSITIONS;
    constexpr int CHUNKS_A = BM / 8, STEP_A = Tile::Threads / CHUNKS_A, LOADS_A = (ROWS_A + STEP_A - 1) / STEP_A;
    constexpr int CHUNKS_B = BN / 8, STEP_B = Tile::Threads / CHUNKS_B, LOADS_B = (BK + STEP_B - 1) / STEP_B;
    constexpr int BIAS_TILES = (Tile::TilesM + WARPS_N - 1) / WARPS_N;  // of M, that a warp sums for db
    static_assert(Tile::Threads >= BK, "a thread locates one pixel of a stage");
    DYNAMIC_SHARED(char, shared);
    const u32 ring = shared_address(shared);
    // [STAGES][Threads], of which BK are of a stage: where a pixel's receptive field starts.
    int2 *pixels = reinterpret_cast<int2 *>(shared + STAGES * Tile::StageBytes);

    const Tile tile;
    const int m0 = (int)(blockIdx.x / g.n_tiles) * BM, n0 = (int)(blockIdx.x % g.n_tiles) * BN, group = blockIdx.z;
    const int rows_m = g.group_k - m0;  // that exist
    const int begin = blockIdx.y * g.chunk, end = min(g.rows, begin + g.chunk);
    const int tiles = (end - begin + BK - 1) / BK;

    auto locate = [&](int t) {
        int m = begin + t * BK + threadIdx.x, p, q;
        int n = divide(divide(m < end ? m / POSITIONS : 0, g.by_q, q), g.by_p, p);
        if (ROUTED) p = 2 * p + (m >> 1 & 1), q = 2 * q + (m & 1);
        int h = p * g.stride_h - g.pad_h, left = q * g.stride_w - g.pad_w;
        pixels[t % STAGES * Tile::Threads + threadIdx.x] =
            make_int2(((n * g.h + h) * g.w + left) * g.c, (int)(m < end ? place_of(h, left) : no_place()));
    };

    const int chunk_a = threadIdx.x % CHUNKS_A, first_a = threadIdx.x / CHUNKS_A;
    const int chunk_b = threadIdx.x % CHUNKS_B, first_b = threadIdx.x / CHUNKS_B;
    const int k = group * g.group_k + m0 + chunk_a * 8;  // of dy

    // The columns that this thread copies: displacement of their tap, and of their element.
    u32 displaced[8 / VEC_B];
    int offset[8 / VEC_B];
    const u32 sides = displacement(g.h, g.w);
#pragma unroll
    for (int e = 0; e < 8 / VEC_B; ++e) {
        int j = n0 + chunk_b * 8 + e * VEC_B, c, s;
        int r = divide(divide(j < g.depth ? j : 0, g.by_group_c, c), g.by_s, s);
        displaced[e] = j < g.depth ? displacement(r * g.dilation_h, s * g.dilation_w) : no_displacement();
        offset[e] = (r * g.dilation_h * g.w + s * g.dilation_w) * g.c + group * g.group_c + c;
    }

#if ROUTED
    Chunk errors[LOADS_A];
    u32 winners[LOADS_A];
#elif VEC_A == 1
    Elements errors[LOADS_A];
#endif
#if VEC_B == 1
    Elements values[LOADS_B];
#endif
    auto copy = [&](int t, u32 stage) {
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            int row = first_a + i * STEP_A, m = begin + t * BK + row * POSITIONS;
            if (ROWS_A % STEP_A != 0 && row >= ROWS_A) continue;
            const int pixel = m / POSITIONS;
            const bool live = m < end && chunk_a * 8 < rows_m;
#if !ROUTED && VEC_A == 8
            copy_chunk(stage + chunk_offset<CHUNKS_A, STEP_A>(first_a, i, chunk_a), dy + (pixel * g.k + k), live);
#elif !ROUTED && VEC_A == 2
#pragma unroll
            for (int e = 0; e < 8; e += 2)
                copy_pair(stage + chunk_offset<CHUNKS_A, STEP_A>(first_a, i, chunk_a) + 2 * e, dy + (pixel * g.k + k + e),
                          live && chunk_a * 8 + e < rows_m);
#elif !ROUTED
#pragma unroll
            for (int e = 0; e < 8; ++e) errors[i].of[e] = load_element(dy + (pixel * g.k + k + e), live && chunk_a * 8 + e < rows_m);
#else
            errors[i] = Chunk{};
            winners[i] = 0;
            if (live) {
                if (VEC_A == 8) {
                    errors[i] = chunk_of(*reinterpret_cast<const uint4 *>(dy + pixel * g.k + k));
                    if (ROUTED && g.pool == POOL_MAX) winners[i] = *reinterpret_cast<const u16 *>(idx + pixel * (g.k / 4) + k / 4);
                } else {
                    const int count = min(8, rows_m - chunk_a * 8);
#pragma unroll
                    for (int e = 0; e < 8; ++e) errors[i].put(e, e < count ? dy[pixel * g.k + k + e] : 0);
                    if (ROUTED && g.pool == POOL_MAX) winners[i] = winners_of(idx + pixel * ((g.k + 3) / 4), k, count);
                }
            }
#endif
        }
        int2 starts[LOADS_B];
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) starts[i] = pixels[t % STAGES * Tile::Threads + first_b + i * STEP_B];
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) {
            if (BK % STEP_B != 0 && first_b + i * STEP_B >= BK) continue;
            const int2 pixel = starts[i];
#if VEC_B == 8
            copy_cached_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS_B, STEP_B>(first_b, i, chunk_b), x + (pixel.x + offset[0]),
                              in_image((u32)pixel.y, displaced[0], sides));
#elif VEC_B == 2
#pragma unroll
            for (int e = 0; e < 4; ++e)
                copy_pair(stage + Tile::BytesA + chunk_offset<CHUNKS_B, STEP_B>(first_b, i, chunk_b) + 4 * e, x + (pixel.x + offset[e]),
                          in_image((u32)pixel.y, displaced[e], sides));
#else
#pragma unroll
            for (int e = 0; e < 8; ++e) values[i].of[e] = load_element(x + (pixel.x + offset[e]), in_image((u32)pixel.y, displaced[e], sides));
#endif
        }
        if (t + 1 >= STAGES) locate(t + 1);  // in the place of the tile before, whose copies have started before the barrier
    };
    auto settle = [&](u32 stage) {
#if ROUTED || VEC_A == 1
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            int row = first_a + i * STEP_A;
            if (ROWS_A % STEP_A != 0 && row >= ROWS_A) continue;
#if ROUTED
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position) {
                Chunk v = route(errors[i], winners[i], position, g.pool);
                store_chunk(stage + chunk_offset<CHUNKS_A>(row * POSITIONS + position, chunk_a), v.vector());
            }
#else
            store_chunk(stage + chunk_offset<CHUNKS_A>(row, chunk_a), errors[i].vector());
#endif
        }
#endif
#if VEC_B == 1
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i)
            if (BK % STEP_B == 0 || first_b + i * STEP_B < BK) store_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS_B, STEP_B>(first_b, i, chunk_b), values[i].vector());
#endif
    };

#pragma unroll
    for (int t = 0; t < STAGES; ++t) locate(t);
    __syncthreads();
    const bool sums_bias = db && n0 == 0;
    const int bias_tile0 = min(tile.warp_n * BIAS_TILES, Tile::TilesM - BIAS_TILES);
    Tile::Sums sums = {};
    float bias[BIAS_TILES][4] = {};
    await_predecessors();
    reduce<STAGES>(tile, sums, ring, tiles, copy, settle, [&](u32 stage) {
        if (!sums_bias) return;
#pragma unroll
        for (int step = 0; step < Tile::Steps; ++step)
#pragma unroll
            for (int i = 0; i < BIAS_TILES; ++i) {
                u32 a[4];
                tile.load_a(a, stage, step, bias_tile0 + i);
                multiply_add(bias[i], a, 0x3f803f80u, 0x3f803f80u);  // by ones
            }
    });

    const int filter0 = group * g.group_k + m0, row_size = g.k * (g.depth + (db ? 1 : 0));
    float *dw_out = partial ? partial + (u64)blockIdx.y * row_size : dw;
    float *db_out = partial ? dw_out + g.k * g.depth : db;
    if (sums_bias && threadIdx.x % 4 == 0 && tile.warp_n * BIAS_TILES < Tile::TilesM) {
#pragma unroll
        for (int i = 0; i < BIAS_TILES; ++i)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                if (tile.row(bias_tile0 + i, e) < rows_m) db_out[filter0 + tile.row(bias_tile0 + i, e)] = bias[i][e];
    }
    const bool pairs = g.depth % 2 == 0 && row_size % 2 == 0;
#pragma unroll
    for (int i = 0; i < Tile::TilesM; ++i)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            if (tile.row(i, e) >= rows_m) continue;
            float *out = dw_out + (filter0 + tile.row(i, e)) * g.depth + n0;
#pragma unroll
            for (int j = 0; j < Tile::TilesN; ++j) {
                int column = tile.column(j);
                float2 v = make_float2(Tile::sum(sums, i, j, e), Tile::sum(sums, i, j, e + 1));
                if (pairs && n0 + column < g.depth) {
                    *reinterpret_cast<float2 *>(out + column) = v;
                } else {
                    if (n0 + column < g.depth) out[column] = v.x;
                    if (n0 + column + 1 < g.depth) out[column + 1] = v.y;
                }
            }
        }
}
