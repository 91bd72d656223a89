// Gradient of a bf16 convolution with respect to its input on the tensor cores of sm_80 and later; dy (N,P,Q,K),
// w (K,R,S,C/groups), dx (N,H,W,C), all bf16.
//
//     dx[n,h,w,c] = act'(saved) * (addend[n,h,w,c] + sum_{r,s,k} dy[n,p,q,k] * w[k,r,s,c])
//         over the taps with h + top = p*stride + r*dilation and w + left = q*stride + s*dilation
//
// Implicit GEMM. M = input pixels, N = channels of a group, reduction (block of filters, r, s, filter of the block). grid (N
//   tiles fastest, then classes, then M tiles; groups): pixels whose h modulo the stride (and w likewise) are equal form a
//   class; they meet the same taps, every (stride / gcd(stride, dilation))-th, and a class is a convolution of stride 1: taps
//   that meet no output cost nothing. Block and warps as in conv_mma.cuh; dy is row-wise, the filters column-wise.
// ROUTED = 1: dy is the error of the 2x2-pooled output. For max-pooling a pixel before the pool has it where idx names it
//   the winner, else 0; for average-pooling it has a quarter. Routing happens between the load and shared memory: the
//   error before the pool is never written.
// VEC_A (of filters), VEC_B (of channels) = 8: they are copied by 16 bytes; 1: elements are gathered through registers.
//
// Bytes: dy, w (and idx, saved, addend) are read once from memory, their overlap comes from L1 and L2; dx is written once.
// Preconditions: pointers aligned to 16 bytes; VEC_A = 8 needs K/groups % 8 == 0, VEC_B = 8 needs C/groups % 8 == 0; every
// tensor has less than 2^31 elements; image sides and filter spans are below 2^14. dx may be the memory of saved or addend.
//
// Macros: BM, BN, BK, WARPS_M, WARPS_N, STAGES, ROUTED, VEC_A, VEC_B.

#include "conv_mma.cuh"

// Twin of the struct that conv_mma_dgrad.py builds.
struct Problem {
    int rows;              // pixels of a class, those beyond the image too
    int h, w, c, p, q, k;  // image, outputs before the pool, channels of a pixel of dx and of dy
    int group_c, group_k;  // channels, filters of a group
    int block_k;           // filters that the taps are walked for at a time
    int r, s;
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int step_h, step_w;    // every so many-th tap is live
    int back_h, back_w;    // outputs from one live tap to the next
    int pool, act, n_tiles, classes;
    // By a class's sides, by block_k, and by the number of live taps: the most that a class has, and one fewer.
    FastDiv by_class_h, by_class_w, by_block_k, by_taps_s, by_fewer_s, by_taps_r, by_fewer_r;
};

// First tap that meets pixels of class `phase`: phase + pad = tap * dilation modulo stride; `taps` where there is none.
__device__ __forceinline__ int first_tap(int phase, int pad, int dilation, int stride, int taps) {
    for (int tap = 0; tap < min(taps, stride); ++tap)
        if ((phase + pad - tap * dilation) % stride == 0) return tap;
    return taps;
}

// Position in the reduction: how many live taps along each side, and the filter of the group.
struct Tap {
    int r, s, k;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N)
    conv_mma_dgrad(const u16 *__restrict__ dy, const u16 *__restrict__ w, const u8 *__restrict__ idx, const u16 *saved,
                   const u16 *addend, u16 *dx, Problem g) {
    typedef Product<BM, BN, BK, WARPS_M, WARPS_N, false, true> Tile;
    constexpr int CHUNKS_A = BK / 8, STEP_A = Tile::Threads / CHUNKS_A, LOADS_A = (BM + STEP_A - 1) / STEP_A;
    constexpr int CHUNKS_B = BN / 8, STEP_B = Tile::Threads / CHUNKS_B, LOADS_B = (BK + STEP_B - 1) / STEP_B;
    DYNAMIC_SHARED(char, shared);
    const u32 ring = shared_address(shared);

    const Tile tile;
    const int n0 = (int)(blockIdx.x % g.n_tiles) * BN, block = blockIdx.x / g.n_tiles, group = blockIdx.y;
    const int m0 = block / g.classes * BM, phase = block % g.classes;
    const int phase_h = phase / g.stride_w, phase_w = phase % g.stride_w;
    const int columns = g.group_c - n0;  // that exist
    const int r0 = first_tap(phase_h, g.pad_h, g.dilation_h, g.stride_h, g.r);
    const int s0 = first_tap(phase_w, g.pad_w, g.dilation_w, g.stride_w, g.s);
    const int taps_r = (g.r - r0 + g.step_h - 1) / g.step_h, taps_s = (g.s - s0 + g.step_w - 1) / g.step_w;
    const FastDiv by_taps_r = taps_r == (int)g.by_taps_r.d ? g.by_taps_r : g.by_fewer_r;
    const FastDiv by_taps_s = taps_s == (int)g.by_taps_s.d ? g.by_taps_s : g.by_fewer_s;
    const int depth = taps_r * taps_s * g.group_k, filter_size = g.r * g.s * g.group_c;

    // The rows that this thread copies: the output that their first live tap meets.
    const int chunk_a = threadIdx.x % CHUNKS_A, first_a = threadIdx.x / CHUNKS_A;
    int row_base[LOADS_A], row_pq[LOADS_A];
#pragma unroll
    for (int i = 0; i < LOADS_A; ++i) {
        int m = m0 + first_a + i * STEP_A, h, left;
        int n = divide(divide(m < g.rows ? m : 0, g.by_class_w, left), g.by_class_h, h);
        int p = h + (phase_h + g.pad_h - r0 * g.dilation_h) / g.stride_h;
        int q = left + (phase_w + g.pad_w - s0 * g.dilation_w) / g.stride_w;
        row_base[i] = ROUTED ? n * (g.p / 2) : ((n * g.p + p) * g.q + q) * g.k + group * g.group_k;
        row_pq[i] = m < g.rows ? pack_hw(p, q) : ROW_DEAD;
    }
    const int chunk_b = threadIdx.x % CHUNKS_B, first_b = threadIdx.x / CHUNKS_B;
    const u16 *weights = w + group * g.group_k * filter_size + n0 + chunk_b * 8;

    auto tap_of = [&](int j) {
        Tap t;
        int outer = divide(divide(divide(j, g.by_block_k, t.k), by_taps_s, t.s), by_taps_r, t.r);
        t.k += outer * g.block_k;
        return t;
    };
    auto weights_at = [&](const Tap &t) { return t.k * filter_size + ((r0 + t.r * g.step_h) * g.s + s0 + t.s * g.step_w) * g.group_c; };
    const bool one_tap = g.block_k % BK == 0;  // in a stage

#if ROUTED || VEC_A == 1
    Chunk errors[LOADS_A];
#endif
#if ROUTED && VEC_A == 8
    u32 winners[LOADS_A];
#endif
    auto copy_errors = [&](int t, u32 stage) {
#if VEC_A == 8
        int j = t * BK + chunk_a * 8;
        const bool live = j < depth;
        const Tap tap = tap_of(j);
        const int dp = -tap.r * g.back_h, dq = -tap.s * g.back_w;
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            if (BM % STEP_A != 0 && first_a + i * STEP_A >= BM) continue;
            bool here = live && inside(row_pq[i], dp, dq, g.p, g.q);
#if ROUTED
            errors[i] = Chunk{};
            winners[i] = 0;
            if (here) {
                int p = unpack_h(row_pq[i]) + dp, q = unpack_w(row_pq[i]) + dq, k = group * g.group_k + tap.k;
                int pixel = (row_base[i] + (p >> 1)) * (g.q / 2) + (q >> 1);
                errors[i] = chunk_of(*reinterpret_cast<const uint4 *>(dy + pixel * g.k + k));
                if (g.pool == POOL_MAX) winners[i] = *reinterpret_cast<const u16 *>(idx + pixel * (g.k / 4) + k / 4);
                winners[i] |= (u32)(2 * (p & 1) + (q & 1)) << 16;
            }
#else
            copy_cached_chunk(stage + chunk_offset<CHUNKS_A>(first_a + i * STEP_A, chunk_a), dy + row_base[i] + (dp * g.q + dq) * g.k + tap.k, here);
#endif
        }
#else
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            int j = t * BK + chunk_a * 8 + e;
            const bool live = j < depth;
            const Tap tap = tap_of(j);
            const int dp = -tap.r * g.back_h, dq = -tap.s * g.back_w;
#pragma unroll
            for (int i = 0; i < LOADS_A; ++i) {
                bool here = live && inside(row_pq[i], dp, dq, g.p, g.q);
#if ROUTED
                int p = unpack_h(row_pq[i]) + dp, q = unpack_w(row_pq[i]) + dq, k = group * g.group_k + tap.k;
                int pixel = (row_base[i] + (p >> 1)) * (g.q / 2) + (q >> 1), position = 2 * (p & 1) + (q & 1);
                u32 error = here ? dy[pixel * g.k + k] : 0;
                if (g.pool == POOL_AVG)
                    error = round_pair(0.25f * low_of(error), 0.0f) & 0xffffu;
                else if (here && (idx[pixel * ((g.k + 3) / 4) + k / 4] >> 2 * (k % 4) & 3) != position)
                    error = 0;
                errors[i].put(e, error);
#else
                errors[i].put(e, here ? dy[row_base[i] + (dp * g.q + dq) * g.k + tap.k] : 0);
#endif
            }
        }
#endif
    };
    auto settle_errors = [&](u32 stage) {
#if ROUTED || VEC_A == 1
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            if (BM % STEP_A != 0 && first_a + i * STEP_A >= BM) continue;
#if ROUTED && VEC_A == 8
            errors[i] = route(errors[i], winners[i], winners[i] >> 16, g.pool);
#endif
            store_chunk(stage + chunk_offset<CHUNKS_A>(first_a + i * STEP_A, chunk_a), errors[i].vector());
        }
#endif
    };

#if VEC_B == 1
    Chunk filters[LOADS_B];
#endif
    auto copy_filters = [&](int t, u32 stage) {
        Tap tap = tap_of(t * BK);
        int at = weights_at(tap) + first_b * filter_size;
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) {
            int row = first_b + i * STEP_B, j = t * BK + row;
            if (BK % STEP_B != 0 && row >= BK) continue;
            const u16 *from = weights + (one_tap ? at + i * STEP_B * filter_size : weights_at(tap_of(j)));
#if VEC_B == 8
            copy_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS_B>(first_b + i * STEP_B, chunk_b), from, j < depth && chunk_b * 8 < columns);
#else
#pragma unroll
            for (int e = 0; e < 8; ++e) filters[i].put(e, j < depth && chunk_b * 8 + e < columns ? from[e] : 0);
#endif
        }
    };
    auto settle_filters = [&](u32 stage) {
#if VEC_B == 1
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i)
            if (BK % STEP_B == 0 || first_b + i * STEP_B < BK) store_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS_B>(first_b + i * STEP_B, chunk_b), filters[i].vector());
#endif
    };

    Tile::Sums sums = {};
    reduce<STAGES>(
        tile, ring, (depth + BK - 1) / BK,
        [&](int t, u32 stage) {
            copy_errors(t, stage);
            copy_filters(t, stage);
        },
        [&](int, u32 stage) {
            settle_errors(stage);
            settle_filters(stage);
        },
        [&](const Tile::Fragments &f) { Tile::multiply(sums, f); });

    // Where row m of the class lies in dx; negative beyond the image.
    const int c0 = group * g.group_c + n0;
    auto place = [&](int m) {
        int h, left;
        int n = divide(divide(m < g.rows ? m : 0, g.by_class_w, left), g.by_class_h, h);
        h = h * g.stride_h + phase_h, left = left * g.stride_w + phase_w;
        return m < g.rows && h < g.h && left < g.w ? ((n * g.h + h) * g.w + left) * g.c + c0 : -1;
    };
    if (saved || addend) {
#pragma unroll
        for (int i = 0; i < Tile::TilesM; ++i)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                int at = place(m0 + tile.row(i, e));
                if (at < 0) continue;
#pragma unroll
                for (int j = 0; j < Tile::TilesN; ++j)
#pragma unroll
                    for (int u = 0; u < 2; ++u) {
                        int column = tile.column(j) + u;
                        if (column >= columns) continue;
                        float &v = Tile::sum(sums, i, j, e + u);
                        if (addend) v += low_of(addend[at + column]);
                        if (saved) v = activation_dgrad_of(v, low_of(saved[at + column]), g.act);
                    }
            }
    }

    __syncthreads();  // all have read their last fragments: the ring becomes the tile that is written
#pragma unroll
    for (int i = 0; i < Tile::TilesM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::TilesN; ++j)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                *reinterpret_cast<u32 *>(shared + chunk_offset<CHUNKS_B>(tile.row(i, e), tile.column(j) / 8) + tile.column(j) % 8 * 2) =
                    round_pair(Tile::sum(sums, i, j, e), Tile::sum(sums, i, j, e + 1));
    __syncthreads();
    const bool whole = g.c % 8 == 0 && g.group_c % 8 == 0;
    write_rows<BM, BN, Tile::Threads>(shared, dx, columns, whole, [&](int row) { return place(m0 + row); });
}
