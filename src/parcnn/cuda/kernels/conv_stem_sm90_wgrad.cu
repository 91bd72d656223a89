// Gradient of the filters and the bias of a bf16 convolution of few channels on Hopper (sm_90a); x (N,H,W,C), dy (N,P,Q,K) bf16,
// dw (K,R,S,C), db (K) fp32.
//
//     dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*stride+r-top, q*stride+s-left, c]        db[k] = sum dy[n,p,q,k]
//
// GEMM by wgmma: M = 64 filters, N = ROWS filter rows' runs of S * C elements, padded to 8 * RUNS, reduction = pixels. The rows of
//   conv_stem_sm90.cuh are the second operand as they lie, 16 columns an instruction: the eights of R rows of the ring follow each
//   other at equal distances, as the ring's first R - 1 are there once more behind its last. The element behind each run is 1:
//   what it sums up is db.
// One or two warpgroups make rows; one brings errors to a ring of stages, [row][column][filter], 16-byte chunks swizzled by the pixel as
//   the tensor cores read them; one multiplies. Its sums are a row [dw, then db] of `partial`, which conv_wgrad_sum of
//   conv_wgrad.cu adds in a fixed order.
// grid (blocks that share the items; groups of 64 filters), 128 (PRODUCERS + 2) threads.
//
// POOL = 1: dy is a pooled error; its share goes to the pixel of the window that `idx` names.
//
// Bytes: x read once for each group of filters (and the strips' common edges), dy once, partial sums written once a block.
// Preconditions: S * C <= 32, R <= ROWS, K a multiple of 8, no dilation; x begins at a multiple of 16 bytes; every tensor has less
//   than 2^31 elements.
//
// Macros: RUNS, ROWS, PIXELS, POOL.
#if RUNS * ROWS == 28  // whose sums leave no registers for another
#define PRODUCERS 1
#endif
#include "conv_stem_sm90.cuh"
#include "sm90_wgmma.cuh"

#define FILTERS 64
#define ELEMENTS (8 * RUNS * ROWS)
#define ERROR_BYTES (PIXELS * 128)  // of a row
#define MOST_STAGES 3
#define PIXELS_AT_ONCE 16           // by a warpgroup whose threads have eight filters each

#if RUNS * ROWS == 3
DEFINE_WGMMA(multiply, 24, 1, 1)
#elif RUNS * ROWS == 6
DEFINE_WGMMA(multiply, 48, 1, 1)
#elif RUNS * ROWS == 7
DEFINE_WGMMA(multiply, 56, 1, 1)
#elif RUNS * ROWS == 9
DEFINE_WGMMA(multiply, 72, 1, 1)
#elif RUNS * ROWS == 12
DEFINE_WGMMA(multiply, 96, 1, 1)
#elif RUNS * ROWS == 14
DEFINE_WGMMA(multiply, 112, 1, 1)
#elif RUNS * ROWS == 21
DEFINE_WGMMA(multiply, 168, 1, 1)
#elif RUNS * ROWS == 28
DEFINE_WGMMA(multiply, 224, 1, 1)
#endif

struct Errors {
    u32 stages, full, empty;
    int count;
};

#ifndef HOST_EMULATION
// Copy 16 bytes beside the arithmetic, or write zeros where `live` is false (`source` is then not read).
__device__ __forceinline__ void copy_chunk(u32 to, const u16 *source, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(live ? 16 : 0) : "memory");
}

__device__ __forceinline__ void store_shared4(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
#endif

// The words of a pooled error's eight filters that belong to a pixel of the window, of which `winners` has two bits for each.
__device__ __forceinline__ u32 route(u32 pair, u32 winners, int position) {
    return pair & (((winners & 3) == position ? 0x0000ffffu : 0u) | ((winners >> 2 & 3) == position ? 0xffff0000u : 0u));
}

// Bring the errors of the block's items, by a warpgroup: a thread has eight filters of every sixteenth pixel.
__device__ __forceinline__ void bring_errors(const Problem &g, const u16 *dy, const u8 *idx, const Place *places, const Errors &memory) {
    const int thread = threadIdx.x % 128, lane = thread % 32, chunk = thread % 8, first = thread / 8, channel = blockIdx.y * FILTERS + 8 * chunk;
    const int out_p = POOL ? g.p / 2 : g.p, out_q = POOL ? g.q / 2 : g.q;
    const Share share(g);
    Ring fill;
    auto arrive = [&](int stage) {
        fence_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(memory.full + 8 * stage);
    };
#if POOL
    constexpr int Count = (PIXELS / 2 + PIXELS_AT_ONCE - 1) / PIXELS_AT_ONCE;
    uint4 error[Count];
    u32 winners[Count];
    auto load = [&](int item) {
        int pair, across;
        const int n = divide(divide(item, g.by_rows, pair), g.by_across, across) * g.images, q = across * g.columns / 2;
        const u32 pixel0 = ((u32)n * out_p + pair) * out_q + q;
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            error[i] = make_uint4(0, 0, 0, 0), winners[i] = 0;
            const int pixel = first + PIXELS_AT_ONCE * i;
            if (pixel >= PIXELS / 2 || item >= share.end || channel >= g.k) continue;
            const Place place = places[pixel];
            if (!is_there(place, q, out_q, n, g.n)) continue;
            const u64 at = (u64)pixel0 * g.k + place.to + channel;
            error[i] = __ldg(reinterpret_cast<const uint4 *>(dy + at)), winners[i] = __ldg(reinterpret_cast<const u16 *>(idx + at / 4));
        }
    };
    load(share.begin);
    for (int item = share.begin; item < share.end; ++item) {
        barrier_wait(memory.empty + 8 * fill.stage, fill.parity ^ 1);
        const u32 stage = memory.stages + fill.stage * 2 * ERROR_BYTES;
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const int pixel = 2 * (first + PIXELS_AT_ONCE * i);
            if (pixel >= PIXELS) continue;
#pragma unroll
            for (int position = 0; position < 4; ++position) {
                const int to = pixel + position % 2;
                store_shared_words(stage + position / 2 * ERROR_BYTES + to * 128 + ((chunk ^ (to & 7)) << 4), route(error[i].x, winners[i], position),
                                   route(error[i].y, winners[i] >> 4, position), route(error[i].z, winners[i] >> 8, position),
                                   route(error[i].w, winners[i] >> 12, position));
            }
        }
        load(item + 1);
        arrive(fill.stage);
        fill.next(memory.count);
    }
#else
    const u32 to = memory.stages + first * 128 + ((chunk ^ (first & 7)) << 4);
    int filled = 0;  // of the stages' ring, those of which threads must still say so
    for (int item = share.begin; item < share.end; ++item) {
        int pair, across;
        const int n = divide(divide(item, g.by_rows, pair), g.by_across, across) * g.images, q = across * g.columns, p = 2 * pair;
        const u16 *from = dy + ((u64)((u32)n * out_p + p) * out_q + q) * g.k + channel;
        barrier_wait(memory.empty + 8 * fill.stage, fill.parity ^ 1);
#pragma unroll 4
        for (int i = 0; i < PIXELS / PIXELS_AT_ONCE; ++i) {
            const Place place = places[first + PIXELS_AT_ONCE * i];
            const bool is_live = is_there(place, q, out_q, n, g.n) && channel < g.k;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool is_row = is_live && p + e < g.p;
                copy_chunk(to + fill.stage * 2 * ERROR_BYTES + e * ERROR_BYTES + i * PIXELS_AT_ONCE * 128, is_row ? from + place.to + e * out_q * g.k : dy, is_row);
            }
        }
        copy_async_commit();
        if (item > share.begin) {
            copy_async_wait<1>();
            arrive(filled);
            filled = fill.stage;
        }
        fill.next(memory.count);
    }
    copy_async_wait<0>();
    if (share.begin < share.end) arrive(filled);
#endif
}

extern "C" __global__ void __launch_bounds__(128 * (PRODUCERS + 2), 1)
    conv_stem_sm90_wgrad(const u16 *__restrict__ x, const u16 *__restrict__ dy, const u8 *__restrict__ idx, float *__restrict__ partial,
                         const Problem g, int stages, int row_size) {
    ALIGNED_SHARED(char, shared);
    __shared__ u64 barriers[ROW_BARRIERS + 2 * MOST_STAGES];
    __shared__ Place places[PIXELS];
    const u32 errors_at = shared_address(shared), ring = errors_at + stages * 2 * ERROR_BYTES, raw = ring + (2 * g.pairs + g.twice) * ROW_BYTES;
    const u32 zeros = raw + RAW_STAGES * 2 * g.images * g.raw_bytes;
    const Rows rows = rows_of(ring, raw, zeros, shared_address(barriers));
    const u32 error_barriers = shared_address(barriers + ROW_BARRIERS);
    const Errors errors = {errors_at, error_barriers, error_barriers + 8 * MOST_STAGES, stages};
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) barrier_init(errors.full + 8 * i, 4), barrier_init(errors.empty + 8 * i, 4);
        rows.init(g, 4);
    }
    list_places<POOL>(g, places);
    if (threadIdx.x <= 4 * RUNS) store_shared4(zeros + 4 * threadIdx.x, 0);
    await_predecessors();
    __syncthreads();
    if (group < PRODUCERS) {
        if (PRODUCERS == 2) give_registers<88>();
        make_rows<true>(g, x, rows);
        return;
    }
    if (group == PRODUCERS) {
        bring_errors(g, dy, idx, places, errors);
        return;
    }

    if (PRODUCERS == 2) take_registers<208>();
    const Share share(g);
    const int rows_of_strip = g.by_rows.d, advance = 2 * g.stride_h, ring_rows = 2 * g.pairs;
    const u32 a_high = descriptor_high(1024, SWIZZLE_128B), b_high = descriptor_high(PLANE, 0);
    int slot = 0, given = 0, stage = 0;  // the item's first row in the ring; the first two that are not given back; of errors
    u32 parity = 0, error_parity = 0;
    int last_rows = 0, last_stage = 0;   // that the item before this one does not share with it
    int pair;
    divide(share.begin, g.by_rows, pair);
    float sums[ELEMENTS / 2];
#pragma unroll
    for (int i = 0; i < ELEMENTS / 2; ++i) sums[i] = 0.0f;
    auto give_back = [&] {
        __syncwarp();
        if (lane == 0) barrier_arrive(errors.empty + 8 * last_stage);
        for (int i = 0; i < last_rows; i += 2) {
            if (lane == 0) barrier_arrive(rows.empty + 8 * given);
            given = given + 1 == g.pairs ? 0 : given + 1;
        }
        last_rows = 0;
    };
#pragma unroll 1
    for (int item = share.begin; item < share.end; ++item) {
        const bool is_last_of_strip = pair + 1 == rows_of_strip;
        if (last_rows && pair == 0) {  // the ring may be too short for two strips
            wgmma_wait<0>();
            give_back();
        }
        await_rows(g, rows.full, slot, parity);
        barrier_wait(errors.full + 8 * stage, error_parity);
        wgmma_fence();
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int row = slot + (2 * pair + e < g.p ? e * g.stride_h : 0);  // errors of a row that is not there are zeros
            row -= row >= ring_rows ? ring_rows : 0;
            const u32 a = errors.stages + (stage * 2 + e) * ERROR_BYTES, b = ring + row * ROW_BYTES;
#pragma unroll
            for (int step = 0; step < PIXELS / 16; ++step)
                multiply(sums, descriptor(a_high, 16, a + step * 16 * 128), descriptor(b_high, 128, b + step * 16 * 16), 1);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (last_rows) give_back();
        last_rows = is_last_of_strip ? g.span : advance, last_stage = stage;
        slot += last_rows;
        while (slot >= ring_rows) slot -= ring_rows, parity ^= 1;
        if (++stage == stages) stage = 0, error_parity ^= 1;
        pair = is_last_of_strip ? 0 : pair + 1;
    }
    wgmma_wait<0>();

    float *own = partial + (u64)blockIdx.x * row_size;
#pragma unroll
    for (int j = 0; j < ELEMENTS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int k = blockIdx.y * FILTERS + 16 * warp + lane / 4 + e / 2 * 8, r = j / RUNS, in = j % RUNS * 8 + lane % 4 * 2 + e % 2;
            if (k >= g.k || r >= g.r) continue;
            if (in < g.run) own[(k * g.r + r) * g.run + in] = sums[4 * j + e];
            if (in == g.run && r == 0 && row_size > g.k * g.r * g.run) own[g.k * g.r * g.run + k] = sums[4 * j + e];
        }
}
