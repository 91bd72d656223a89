// Gradient of a bf16 convolution with respect to its input on the tensor cores of sm_80 and later; dy (N,P,Q,K),
// w (K,R,S,C/groups), dx (N,H,W,C), all bf16.
//
//     dx[n,h,w,c] = act'(saved) * (addend[n,h,w,c] + sum_{r,s,k} dy[n,p,q,k] * w[k,r,s,c])
//         over the taps with h + top = p*stride + r*dilation and w + left = q*stride + s*dilation
//
// Implicit GEMM. M = input pixels, N = channels of a group. grid (N tiles fastest, then classes, then M tiles; groups): pixels
//   whose h modulo the stride (and w likewise) are equal form a class; they meet the same taps, every (stride / gcd(stride,
//   dilation))-th, and a class is a convolution of stride 1: taps that meet no output cost nothing. Block and warps as in
//   conv_mma.cuh; dy is row-wise, the filters column-wise.
// FLAT = 0: a stage is BK filters of one tap, the last of them padded. FLAT = 1: the reduction is (r,s,k) in one run, which
//   wastes nothing where filters are few.
// ROUTED = 1: dy is the error of the 2x2-pooled output. For max-pooling a pixel before the pool has it where idx names it
//   the winner, else 0; for average-pooling it has a quarter. Routing happens between the load and shared memory: the
//   error before the pool is never written.
// VEC_A (of filters), VEC_B (of channels) = 8: they are copied by 16 bytes; 2: by 4 bytes; 1: elements are gathered through
//   registers.
//
// Bytes: dy, w (and idx, saved, addend) are read once from memory, their overlap comes from L1 and L2; dx is written once.
// Preconditions: pointers aligned to 16 bytes; K/groups % VEC_A == C/groups % VEC_B == 0; every tensor has less than
// 2^31 elements; image sides and filter spans are below 2^14. dx may be the memory of saved or addend.
//
// Macros: BM, BN, BK, WARPS_M, WARPS_N, STAGES, FLAT, ROUTED, VEC_A, VEC_B. VEC_A < 8 needs FLAT = 1.

#include "conv_mma_read.cuh"

// Twin of the struct that conv_mma_dgrad.py builds.
struct Problem {
    int rows;              // pixels of a class, those beyond the image too
    int h, w, c, p, q, k;  // image, outputs before the pool, channels of a pixel of dx and of dy
    int group_c, group_k;  // channels, filters of a group
    int r, s;
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int turn_h, turn_w;    // -dilation modulo stride
    int step_h, step_w;    // every so many-th tap is live
    int back_h, back_w;    // outputs from one live tap to the next
    int most_r;            // live taps along r, the most that a class has
    int pool, act;
    // By a class's sides, by group_k, and by the number of live taps along s: the most that a class has, and one fewer.
    FastDiv by_class_h, by_class_w, by_group_k, by_taps_s, by_fewer_s;
    FastDiv by_n_tiles, by_classes, by_stride_h, by_stride_w;
};

// First tap that meets a class's pixels: `place`, its phase + pad, = tap * dilation modulo stride; `taps` where there is none.
__device__ __forceinline__ int first_tap(int place, int turn, FastDiv by_stride, int taps) {
    for (int tap = 0, rest; tap < min(taps, (int)by_stride.d); ++tap, place += turn) {
        divide(place, by_stride, rest);
        if (rest == 0) return tap;
    }
    return taps;
}

// Live taps of `taps` from `first` on.
__device__ __forceinline__ int live_taps(int first, int taps, int step, int most) {
    return first >= taps ? 0 : first + (most - 1) * step < taps ? most : most - 1;
}

// The output that tap `first` leads to from a class's first pixel; below zero where it lies in the padding.
__device__ __forceinline__ int first_output(int place, int first, int dilation, FastDiv by_stride) {
    const int back = first * dilation;  // place - back is a multiple of the stride
    return quotient(place + back * ((int)by_stride.d - 1), by_stride) - back;
}

// Position in the reduction: the live tap along each side, and the filter of the group.
struct Tap {
    int r, s, k;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, 1)
    conv_mma_dgrad(const u16 *__restrict__ dy, const u16 *__restrict__ w, const u8 *__restrict__ idx, const u16 *saved,
                   const u16 *addend, u16 *dx, Problem g) {
    typedef Product<BM, BN, BK, WARPS_M, WARPS_N, false, true> Tile;
    constexpr int CHUNKS_A = BK / 8, STEP_A = Tile::Threads / CHUNKS_A, LOADS_A = (BM + STEP_A - 1) / STEP_A;
    constexpr int CHUNKS_B = BN / 8, STEP_B = Tile::Threads / CHUNKS_B, LOADS_B = (BK + STEP_B - 1) / STEP_B;
    DYNAMIC_SHARED(char, shared);
    const u32 ring = shared_address(shared);

    const Tile tile;
    int n_tile, phase, phase_w;
    const int block = divide((int)blockIdx.x, g.by_n_tiles, n_tile), m0 = divide(block, g.by_classes, phase) * BM;
    const int phase_h = divide(phase, g.by_stride_w, phase_w), n0 = n_tile * BN, group = blockIdx.y;
    const int columns = g.group_c - n0;  // that exist
    const int r0 = first_tap(phase_h + g.pad_h, g.turn_h, g.by_stride_h, g.r);
    const int s0 = first_tap(phase_w + g.pad_w, g.turn_w, g.by_stride_w, g.s);
    const int p0 = first_output(phase_h + g.pad_h, r0, g.dilation_h, g.by_stride_h);
    const int q0 = first_output(phase_w + g.pad_w, s0, g.dilation_w, g.by_stride_w);
    const int taps_r = live_taps(r0, g.r, g.step_h, g.most_r), taps_s = live_taps(s0, g.s, g.step_w, (int)g.by_taps_s.d);
    const FastDiv by_taps_s = taps_s == (int)g.by_taps_s.d ? g.by_taps_s : g.by_fewer_s;
    const int filter_size = g.r * g.s * g.group_c;
    const u32 sides = displacement(g.p, g.q);

    // Where row m of the class lies in dx; negative beyond the image.
    const int c0 = group * g.group_c + n0;
    auto place = [&](int m) {
        if (g.by_classes.d == 1) return m < g.rows ? m * g.c + c0 : -1;
        int h, left;
        int n = divide(divide(m < g.rows ? m : 0, g.by_class_w, left), g.by_class_h, h);
        h = h * g.stride_h + phase_h, left = left * g.stride_w + phase_w;
        return m < g.rows && h < g.h && left < g.w ? ((n * g.h + h) * g.w + left) * g.c + c0 : -1;
    };
    const int chunk_b = threadIdx.x % CHUNKS_B, first_b = threadIdx.x / CHUNKS_B;
#if VEC_B == 8
    if (taps_r * taps_s == 0 && !saved && !addend) {  // no output meets the class: of a stride beyond the filter it is zeros
        await_predecessors();
#pragma unroll 4
        for (int row = first_b; row < BM; row += STEP_B) {
            const int to = place(m0 + row);
            if (to >= 0 && chunk_b * 8 < columns) *reinterpret_cast<uint4 *>(dx + to + chunk_b * 8) = make_uint4(0, 0, 0, 0);
        }
        return;
    }
#endif

    // The rows that this thread copies: the output that their first live tap meets.
    const int chunk_a = threadIdx.x % CHUNKS_A, first_a = threadIdx.x / CHUNKS_A;
    int row_offset[LOADS_A];  // with routing, of the image's outputs
    u32 row_place[LOADS_A];
#pragma unroll
    for (int i = 0; i < LOADS_A; ++i) {
        int m = m0 + first_a + i * STEP_A, h, left;
        int n = divide(divide(m < g.rows ? m : 0, g.by_class_w, left), g.by_class_h, h);
        int p = h + p0, q = left + q0;
        row_offset[i] = ROUTED ? n * (g.p / 2) : ((n * g.p + p) * g.q + q) * g.k + group * g.group_k;
        row_place[i] = m < g.rows ? place_of(p, q) : no_place();
    }
    const int filter0 = group * g.group_k * filter_size + n0 + chunk_b * 8;

    auto weights_of = [&](const Tap &t) {
        return filter0 + t.k * filter_size + ((r0 + t.r * g.step_h) * g.s + s0 + t.s * g.step_w) * g.group_c;
    };
#if FLAT
    const int depth = taps_r * taps_s * g.group_k, stages = (depth + BK - 1) / BK;
    auto tap_of = [&](int j) {
        Tap t;
        t.r = divide(divide(j, g.by_group_k, t.k), by_taps_s, t.s);
        return t;
    };
#else
    const int stages = taps_r * taps_s * ((g.group_k + BK - 1) / BK);
    Tap stage_tap = {0, 0, 0};  // of the stage that is copied next
#endif

#if ROUTED
    Chunk errors[LOADS_A];
#elif VEC_A == 1
    Elements errors[LOADS_A];
#endif
#if ROUTED && VEC_A == 8
    u32 winners[LOADS_A];
#endif
    auto copy_errors = [&](int t, u32 stage) {
#if VEC_A == 8
#if FLAT
        const Tap tap = tap_of(t * BK + chunk_a * 8);
        const bool live = t * BK + chunk_a * 8 < depth;
#else
        Tap tap = stage_tap;
        tap.k += chunk_a * 8;
        const bool live = tap.k < g.group_k;
#endif
        const int dp = -tap.r * g.back_h, dq = -tap.s * g.back_w;
        const u32 displaced = displacement(dp, dq);
#if !ROUTED
        const int offset = (dp * g.q + dq) * g.k + tap.k;
#endif
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            if (BM % STEP_A != 0 && first_a + i * STEP_A >= BM) continue;
            bool here = live && in_image(row_place[i], displaced, sides);
#if ROUTED
            errors[i] = Chunk{};
            winners[i] = 0;
            if (here) {
                u32 at = row_place[i] + displaced - PLACE_BIAS;
                int p = at >> 16, q = at & 0xffffu, k = group * g.group_k + tap.k;
                int pixel = (row_offset[i] + (p >> 1)) * (g.q / 2) + (q >> 1);
                errors[i] = chunk_of(*reinterpret_cast<const uint4 *>(dy + pixel * g.k + k));
                if (g.pool == POOL_MAX) winners[i] = *reinterpret_cast<const u16 *>(idx + pixel * (g.k / 4) + k / 4);
                winners[i] |= (u32)(2 * (p & 1) + (q & 1)) << 16;
            }
#else
            copy_cached_chunk(stage + chunk_offset<CHUNKS_A, STEP_A>(first_a, i, chunk_a), dy + (row_offset[i] + offset), here);
#endif
        }
#elif VEC_A == 2
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int j = t * BK + chunk_a * 8 + e;
            const Tap tap = tap_of(j);
            const int dp = -tap.r * g.back_h, dq = -tap.s * g.back_w, offset = (dp * g.q + dq) * g.k + tap.k;
            const u32 displaced = displacement(dp, dq);
#pragma unroll
            for (int i = 0; i < LOADS_A; ++i) {
                if (BM % STEP_A != 0 && first_a + i * STEP_A >= BM) continue;
                copy_pair(stage + chunk_offset<CHUNKS_A, STEP_A>(first_a, i, chunk_a) + 2 * e, dy + (row_offset[i] + offset),
                          j < depth && in_image(row_place[i], displaced, sides));
            }
        }
#else
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            int j = t * BK + chunk_a * 8 + e;
            const bool live = j < depth;
            const Tap tap = tap_of(j);
            const int dp = -tap.r * g.back_h, dq = -tap.s * g.back_w;
            const u32 displaced = displacement(dp, dq);
#pragma unroll
            for (int i = 0; i < LOADS_A; ++i) {
                bool here = live && in_image(row_place[i], displaced, sides);
#if ROUTED
                u32 at = row_place[i] + displaced - PLACE_BIAS;
                int p = at >> 16, q = at & 0xffffu, k = group * g.group_k + tap.k;
                int pixel = (row_offset[i] + (p >> 1)) * (g.q / 2) + (q >> 1), position = 2 * (p & 1) + (q & 1);
                u32 error = here ? dy[pixel * g.k + k] : 0;
                if (g.pool == POOL_AVG)
                    error = round_pair(0.25f * low_of(error), 0.0f) & 0xffffu;
                else if (here && (idx[pixel * ((g.k + 3) / 4) + k / 4] >> 2 * (k % 4) & 3) != position)
                    error = 0;
                errors[i].put(e, error);
#else
                errors[i].of[e] = load_element(dy + (row_offset[i] + (dp * g.q + dq) * g.k + tap.k), here);
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
            store_chunk(stage + chunk_offset<CHUNKS_A, STEP_A>(first_a, i, chunk_a), errors[i].vector());
        }
#endif
    };

#if VEC_B == 1
    Elements filters[LOADS_B];
#endif
    auto copy_filters = [&](int t, u32 stage) {
#if !FLAT
        const int offset = weights_of(stage_tap) + first_b * filter_size;
#endif
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) {
            int row = first_b + i * STEP_B;
            if (BK % STEP_B != 0 && row >= BK) continue;
#if FLAT
            const int at = weights_of(tap_of(t * BK + row));
            const bool live = t * BK + row < depth;
#else
            const int at = offset + i * STEP_B * filter_size;
            const bool live = stage_tap.k + row < g.group_k;
#endif
#if VEC_B == 8
            copy_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS_B, STEP_B>(first_b, i, chunk_b), w + at, live && chunk_b * 8 < columns);
#elif VEC_B == 2
#pragma unroll
            for (int e = 0; e < 8; e += 2)
                copy_pair(stage + Tile::BytesA + chunk_offset<CHUNKS_B, STEP_B>(first_b, i, chunk_b) + 2 * e, w + at + e,
                          live && chunk_b * 8 + e < columns);
#else
#pragma unroll
            for (int e = 0; e < 8; ++e) filters[i].of[e] = load_element(w + at + e, live && chunk_b * 8 + e < columns);
#endif
        }
    };
    auto settle_filters = [&](u32 stage) {
#if VEC_B == 1
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i)
            if (BK % STEP_B == 0 || first_b + i * STEP_B < BK)
                store_chunk(stage + Tile::BytesA + chunk_offset<CHUNKS_B, STEP_B>(first_b, i, chunk_b), filters[i].vector());
#endif
    };

    Tile::Sums sums = {};
    await_predecessors();
    reduce<STAGES>(
        tile, sums, ring, stages,
        [&](int t, u32 stage) {
            copy_errors(t, stage);
            copy_filters(t, stage);
#if !FLAT
            if (++stage_tap.s == taps_s) {
                stage_tap.s = 0;
                if (++stage_tap.r == taps_r) stage_tap.r = 0, stage_tap.k += BK;
            }
#endif
        },
        [&](u32 stage) {
            settle_errors(stage);
            settle_filters(stage);
        },
        [](u32) {});

    // The ring becomes what the epilogue reads, then the tile that is written.
    auto row_place_of = [&](int row) { return place(m0 + row); };
    derive_tile<BM, BN>(tile, sums, shared, saved, addend, g.act, columns, g.c, g.group_c, row_place_of);
    put_tile<BN>(tile, sums, shared);
    __syncthreads();
    write_rows<BM, BN, Tile::Threads>(shared, dx, columns, g.c, g.group_c, row_place_of);
}
