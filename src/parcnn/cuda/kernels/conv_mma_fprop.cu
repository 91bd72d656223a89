// bf16 convolution forward with bias, activation and 2x2 pooling on the tensor cores of sm_80 and later; x (N,H,W,C),
// w (K,R,S,C/groups), y (N,P,Q,K) bf16, bias fp32.
//
//     y[n,p,q,k] = pool(act(bias[k] + sum_{r,s,c} x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c] * w[k,r,s,c]))
//
// Implicit GEMM. M = output pixels, N = filters of a group. grid (N tiles fastest, then M tiles; groups); block and warps as in
//   conv_mma.cuh, both operands row-wise.
// FLAT = 0: a stage is BK channels of one tap, the last of them padded. FLAT = 1: the reduction is (r,s,c) in one run, which
//   wastes nothing where channels are few.
// POOL = 1: a group of 32 rows is eight windows: rows i, i + 8, i + 16 and i + 24 are a window's pixels, which one thread
//   holds in its sums. Values are rounded before they are compared.
// VEC = 8: channels are copied by 16 bytes; 2: by 4 bytes; 1: elements are gathered through registers, whatever their number.
//
// Bytes: x is read once from memory (its overlap and its repetition over N tiles comes from L1 and L2), w once, y and the 2-bit
// indices are written once.
// Preconditions: pointers aligned to 16 bytes; VEC needs C/groups % VEC == 0; every tensor has less than 2^31 elements; image
// sides and filter spans are below 2^14; with a maximum and groups, K/groups % 4 == 0.
//
// Macros: BM, BN, BK, WARPS_M, WARPS_N, STAGES, FLAT, VEC, POOL. VEC < 8 needs FLAT = 1.

#include "conv_mma.cuh"

// Twin of the struct that conv_mma_fprop.py builds.
struct Problem {
    int rows;              // output pixels, of which windows after the pool count four
    int h, w, c, k;        // image; channels of a pixel of x and of y
    int group_c, group_k;  // channels, filters of a group
    int r, depth, stages;  // depth: r * s * group_c; stages: of the reduction
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int pool, act;
    FastDiv by_p, by_q, by_group_c, by_s, by_n_tiles;
    Gate gate;  // of `act`
};

// Where an element of the reduction lies, relative to a pixel's receptive field and to a filter.
struct Tap {
    u32 displaced;
    int x, w;
};

__device__ __forceinline__ Tap tap_at(const Problem &g, int r, int s, int c) {
    int dh = r * g.dilation_h, dw = s * g.dilation_w;
    return Tap{displacement(dh, dw), (dh * g.w + dw) * g.c + c, (r * (int)g.by_s.d + s) * g.group_c + c};
}

// The output of row m, before the pool; false where there is none.
__device__ __forceinline__ bool output_of(const Problem &g, int m, int &n, int &p, int &q) {
    int pixel = POOL ? (m >> 5) * 8 + (m & 7) : m;
    bool live = (POOL ? 4 * pixel : pixel) < g.rows;
    n = divide(divide(live ? pixel : 0, g.by_q, q), g.by_p, p);
    if (POOL) p = 2 * p + (m >> 4 & 1), q = 2 * q + (m >> 3 & 1);
    return live;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, 1)
    conv_mma_fprop(const u16 *__restrict__ x, const u16 *__restrict__ w, const float *__restrict__ bias, u16 *__restrict__ y,
                   u8 *__restrict__ idx, Problem g) {
    typedef Product<BM, BN, BK, WARPS_M, WARPS_N, false, false> Tile;
    constexpr int CHUNKS = BK / 8, STEP = Tile::Threads / CHUNKS;
    constexpr int LOADS_A = (BM + STEP - 1) / STEP, LOADS_B = (BN + STEP - 1) / STEP;
    static_assert(!POOL || Tile::TilesM % 2 == 0, "a window lies in two tiles of mma.sync");
    DYNAMIC_SHARED(char, shared);
    const u32 ring = shared_address(shared);

    const Tile tile;
    int n_tile;
    const int m0 = divide((int)blockIdx.x, g.by_n_tiles, n_tile) * BM, n0 = n_tile * BN, group = blockIdx.y;
    const int columns = g.group_k - n0;  // that exist
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const int filter0 = (group * g.group_k + n0 + first) * g.depth;  // that this thread copies

    // The rows that this thread copies: where their receptive field starts.
    int row_offset[LOADS_A];
    u32 row_place[LOADS_A];
#pragma unroll
    for (int i = 0; i < LOADS_A; ++i) {
        int n, p, q;
        bool live = output_of(g, m0 + first + i * STEP, n, p, q);
        int h = p * g.stride_h - g.pad_h, left = q * g.stride_w - g.pad_w;
        row_offset[i] = ((n * g.h + h) * g.w + left) * g.c + group * g.group_c;
        row_place[i] = live ? place_of(h, left) : no_place();
    }
    const u32 sides = displacement(g.h, g.w);

#if FLAT
    // The element of the reduction that is the j-th: channels innermost, then s, then r.
    auto tap_of = [&](int j) {
        int c, s, r = divide(divide(j, g.by_group_c, c), g.by_s, s);
        return tap_at(g, r, s, c);
    };
#else
    int r = 0, s = 0, c = 0;  // of the stage that is copied next
#endif

#if VEC == 8
    auto copy = [&](int t, u32 stage) {
#if FLAT
        const int j = t * BK + chunk * 8;
        const bool live = j < g.depth;
        const Tap tap = tap_of(j);
#else
        const bool live = c + chunk * 8 < g.group_c;
        const Tap tap = tap_at(g, r, s, c + chunk * 8);
        if (++s == (int)g.by_s.d) {
            s = 0;
            if (++r == g.r) r = 0, c += BK;
        }
#endif
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            if (BM % STEP != 0 && first + i * STEP >= BM) continue;
            copy_cached_chunk(stage + chunk_offset<CHUNKS, STEP>(first, i, chunk), x + (row_offset[i] + tap.x),
                              live && in_image(row_place[i], tap.displaced, sides));
        }
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) {
            if (BN % STEP != 0 && first + i * STEP >= BN) continue;
            copy_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS, STEP>(first, i, chunk), w + (filter0 + i * STEP * g.depth + tap.w),
                       live && first + i * STEP < columns);
        }
    };
    auto settle = [](u32) {};
#elif VEC == 2
    auto copy = [&](int t, u32 stage) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int j = t * BK + chunk * 8 + e;
            const bool live = j < g.depth;
            const Tap tap = tap_of(j);
#pragma unroll
            for (int i = 0; i < LOADS_A; ++i) {
                if (BM % STEP != 0 && first + i * STEP >= BM) continue;
                copy_pair(stage + chunk_offset<CHUNKS, STEP>(first, i, chunk) + 2 * e, x + (row_offset[i] + tap.x),
                          live && in_image(row_place[i], tap.displaced, sides));
            }
#pragma unroll
            for (int i = 0; i < LOADS_B; ++i) {
                if (BN % STEP != 0 && first + i * STEP >= BN) continue;
                copy_pair(stage + Tile::BytesA + chunk_offset<CHUNKS, STEP>(first, i, chunk) + 2 * e,
                          w + (filter0 + i * STEP * g.depth + tap.w), live && first + i * STEP < columns);
            }
        }
    };
    auto settle = [](u32) {};
#else
    Elements pixels[LOADS_A], weights[LOADS_B];
    auto copy = [&](int t, u32) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            int j = t * BK + chunk * 8 + e;
            const bool live = j < g.depth;
            const Tap tap = tap_of(j);
#pragma unroll
            for (int i = 0; i < LOADS_A; ++i)
                pixels[i].of[e] = load_element(x + (row_offset[i] + tap.x), live && in_image(row_place[i], tap.displaced, sides));
#pragma unroll
            for (int i = 0; i < LOADS_B; ++i)
                weights[i].of[e] = load_element(w + (filter0 + i * STEP * g.depth + tap.w), live && first + i * STEP < columns);
        }
    };
    auto settle = [&](u32 stage) {
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i)
            if (BM % STEP == 0 || first + i * STEP < BM) store_chunk(stage + chunk_offset<CHUNKS, STEP>(first, i, chunk), pixels[i].vector());
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i)
            if (BN % STEP == 0 || first + i * STEP < BN)
                store_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS, STEP>(first, i, chunk), weights[i].vector());
    };
#endif

    Tile::Sums sums = {};
    await_predecessors();
    reduce<STAGES>(tile, sums, ring, g.stages, copy, settle, [](u32) {});

    add_bias(tile, sums, bias ? bias + group * g.group_k + n0 : nullptr, columns);
    activate_sums(sums, g.act, g.gate);

    // The ring becomes the tile that is written.
    constexpr int OUT_CHUNKS = BN / 8;
    const int k0 = group * g.group_k + n0;
#if POOL
    constexpr int WINDOWS = BM / 4;
    char *indices = shared + 2 * WINDOWS * BN;  // [window][four columns]
#pragma unroll
    for (int i = 0; i < Tile::TilesM; i += 2) {
        int window = tile.row(i, 0) / 32 * 8 + tile.row(i, 0) % 8;
#pragma unroll
        for (int j = 0; j < Tile::TilesN; ++j) {
            u32 pair, bits = 0;
            if (g.pool == POOL_AVG) {
                float mean[2];
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    mean[e] = 0.25f * ((Tile::sum(sums, i, j, e) + Tile::sum(sums, i, j, e + 2)) +
                                       (Tile::sum(sums, i + 1, j, e) + Tile::sum(sums, i + 1, j, e + 2)));
                pair = round_pair(mean[0], mean[1]);
            } else {
                pair = round_pair(Tile::sum(sums, i, j, 0), Tile::sum(sums, i, j, 1));
                float best[2] = {low_of(pair), high_of(pair)};
#pragma unroll
                for (u32 position = 1; position < 4; ++position) {
                    u32 other = round_pair(Tile::sum(sums, i + position / 2, j, position % 2 * 2),
                                           Tile::sum(sums, i + position / 2, j, position % 2 * 2 + 1));
                    if (beats(low_of(other), best[0])) best[0] = low_of(other), bits = (bits & ~3u) | position;
                    if (beats(high_of(other), best[1])) best[1] = high_of(other), bits = (bits & 3u) | position << 2;
                }
                pair = round_pair(best[0], best[1]);
            }
            int column = tile.column(j);
            *reinterpret_cast<u32 *>(shared + chunk_offset<OUT_CHUNKS>(window, column / 8) + column % 8 * 2) = pair;
            if (column >= columns) bits = 0;
            if (column + 1 >= columns) bits &= 3u;
            bits |= __shfl_xor_sync(0xffffffffu, bits, 1) << 4;
            if (column % 4 == 0) indices[window * (BN / 4) + column / 4] = (char)bits;
        }
    }
    __syncthreads();
    const int window0 = m0 / 4, windows = g.rows / 4 - window0;
    write_rows<WINDOWS, BN, Tile::Threads>(shared, y, columns, g.k, g.group_k,
                                           [&](int row) { return row < windows ? (window0 + row) * g.k + k0 : -1; });
    if (idx) {
        const int bytes = (g.k + 3) / 4;
        for (int item = threadIdx.x; item < WINDOWS * (BN / 4); item += Tile::Threads) {
            int row = item / (BN / 4), byte = item % (BN / 4);
            if (row < windows && byte * 4 < columns) idx[(window0 + row) * bytes + k0 / 4 + byte] = (u8)indices[item];
        }
    }
#else
    put_tile<BN>(tile, sums, shared);
    __syncthreads();
    write_rows<BM, BN, Tile::Threads>(shared, y, columns, g.k, g.group_k,
                                      [&](int row) { return m0 + row < g.rows ? (m0 + row) * g.k + k0 : -1; });
#endif
}
