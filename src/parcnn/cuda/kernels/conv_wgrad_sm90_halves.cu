// Gradient of a 1x1 convolution with respect to its filters and bias on Hopper's tensor cores; x (pixels,C), dy (pixels,K) bf16;
// dw (K,C), db (K) fp32.
//
//     dw[k,c] = sum_pixel dy[pixel,k] * x[pixel,c]
//     db[k]   = sum_pixel dy[pixel,k]
//
// conv_wgrad_sm90_halves: two blocks, a cluster, take 128 filters by 128 channels and half of the pixels each, and add up: for
//   layers that have about half as many of these tiles as the GPU has multiprocessors, so that nothing is left to a second
//   kernel. Both operands are read from shared memory as TMA writes them, a row of 64 channels for a pixel (the transposed
//   operands of wgmma); two warpgroups multiply 64 filters each, one warp copies.
//   Each block ends with half of the channels: the sums of the other half go to the other block's shared memory by asynchronous
//   stores, whose bytes a barrier there counts, of each warp. What arrives is added, and goes through shared memory so that whole
//   lines are stored.
//   db: the blocks of the first channels add up dy from the stages, by a warp for 64 filters, beside the tensor cores.
//   A block's start is short, as there is little else: barriers are set up by the thread that copies, whose first copies are
//   under way before the others come to know of them.
//
//   Reads of the same lines at the same time are merged on their way to L2 where the multiprocessors are of one GPC, of eight. Pairs
//   of blocks are dealt out to the GPCs in turns, so each gets a run of items; runs are about as wide as high (two filter blocks by
//   four channel blocks), so that they share as much as they can.
//
// grid: pairs of blocks. 288 threads, 352 with db.
// Bytes: a block reads its filters and channels of half of the pixels from L2; dw is written once.
// Preconditions: C and K are multiples of 8; less than 2^31 pixels, elements of dw.

#include "conv_wgrad_sm90.cuh"
#include "sm90_lanes.cuh"
#include "sm90_wgmma.cuh"

constexpr int FILTERS = 128, CHANNELS = 128, SPAN = 64;   // of a block; of a row in shared memory
constexpr int PIXELS = 64, STAGES = 6;                    // of a stage
constexpr int STEPS = PIXELS / 16, EIGHTS = SPAN / 8;
constexpr int CONSUMERS = 8, PRODUCER = CONSUMERS, WARPS = CONSUMERS + 1 + FILTERS / SPAN;  // warps
constexpr u32 CHUNK_BYTES = 2 * SPAN * PIXELS, X_BYTES = 2 * CHUNK_BYTES, STAGE_BYTES = 4 * CHUNK_BYTES;
constexpr u32 STEP = 16 * 2 * SPAN >> 4;                  // of a descriptor
constexpr u32 SUMS_BYTES = 4 * 16 * SPAN, BIAS_BYTES = 4 * SPAN;  // that a warp gets
constexpr int GPCS = 8;

DEFINE_WGMMA(multiply, 128, 1, 1)  // CHANNELS: the macro takes a number

// Twin of the struct that conv_wgrad_sm90_halves.py builds.
struct Problem {
    int c, k;
    int tiles, share;          // of PIXELS; of a pair's first block
    int items_each, more;      // of a GPC; GPCs that have one more
    FastDiv by_panel, by_row;  // items of a panel, of one of its rows: channels of some filters follow each other
};

#ifndef HOST_EMULATION
// A chunk of SPAN channels of PIXELS pixels.
__device__ __forceinline__ void load_chunk(u32 to, const TensorMap &map, u32 barrier, int channel, int pixel) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(channel), "r"(pixel)
                 : "memory");
}

__device__ __forceinline__ void store_shared8(u32 at, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}
#endif

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32 * WARPS, 1)
    conv_wgrad_sm90_halves(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap dy, float *__restrict__ dw,
                           float *__restrict__ db, const __grid_constant__ Problem g) {
    ALIGNED_SHARED(u8, shared);
    const u32 base = shared_address(shared), sums_at = base + STAGES * STAGE_BYTES, bias_at = sums_at + CONSUMERS * SUMS_BYTES;
    // Barriers: of stages; of what each warp gets, the consumers' and those of db.
    const u32 full = bias_at + FILTERS / SPAN * BIAS_BYTES, empty = full + 8 * STAGES, sums_here = empty + 8 * STAGES;
    const int warp = same_in_all(threadIdx.x >> 5), lane = threadIdx.x & 31, block = blockIdx.x & 1;
    const int pair = blockIdx.x >> 1, gpc = pair % GPCS, item = gpc * g.items_each + min(gpc, g.more) + pair / GPCS;
    int in_panel, in_row;
    const int panel = divide(item, g.by_panel, in_panel), filter_block = divide(in_panel, g.by_row, in_row);
    const int channel_block = panel * (int)g.by_row.d + in_row;
    const int k = filter_block * FILTERS, c = channel_block * CHANNELS;
    const int first = block * g.share, count = block ? g.tiles - g.share : g.share;
    const bool adds_bias = db && channel_block == 0;

    Ring ring;
    auto copy = [&](int tile, bool leader) {
        const u32 to = base + ring.stage * STAGE_BYTES, barrier = full + 8 * ring.stage;
        const int pixel = (first + tile) * PIXELS;
        if (leader) {
            barrier_expect(barrier, STAGE_BYTES);
            load_chunk(to + X_BYTES, dy, barrier, k, pixel);
            load_chunk(to, x, barrier, c + (block ^ 1) * SPAN, pixel);
            load_chunk(to + CHUNK_BYTES, x, barrier, c + block * SPAN, pixel);
            load_chunk(to + X_BYTES + CHUNK_BYTES, dy, barrier, k + SPAN, pixel);
        }
        ring.next(STAGES);
    };
    const int at_once = min(count, STAGES);
    if (warp == PRODUCER) {
        const bool leader = elect();
        if (leader) {
            prefetch(x), prefetch(dy);
            for (int i = 0; i < STAGES; ++i)
                barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, CONSUMERS + (adds_bias ? FILTERS / SPAN : 0));
            for (int i = 0; i < WARPS; ++i) {
                barrier_init(sums_here + 8 * i, 1);
                barrier_expect(sums_here + 8 * i, i < CONSUMERS ? SUMS_BYTES : BIAS_BYTES);
            }
            barrier_init_fence();
        }
        __syncwarp();
        await_predecessors();
        for (int tile = 0; tile < at_once; ++tile) copy(tile, leader);
    } else {
        await_predecessors();
    }
    __syncthreads();
    cluster_meet();

    if (warp == PRODUCER) {
        const bool leader = elect();
        for (int tile = at_once; tile < count; ++tile) {
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            copy(tile, leader);
        }
        return;
    }
    const u32 sums_there = address_at(block ^ 1, sums_here + 8 * warp);

    if (warp > PRODUCER) {
        // Lanes 0 to 7 store the first four of eight filters, 8 to 15 the others.
        const int chunk = warp - PRODUCER - 1, half = lane >> 3 & 1, filter = chunk * SPAN + (lane & 7) * 8 + half * 4;
        float sums[8] = {};
        for (int i = 0; adds_bias && i < count; ++i, ring.next(STAGES)) {
            barrier_wait(full + 8 * ring.stage, ring.parity);
            add_pixels(sums, base + ring.stage * STAGE_BYTES + X_BYTES + chunk * CHUNK_BYTES, PIXELS, lane);
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * ring.stage);
        }
        if (!adds_bias) return;
        add_lanes(sums);
        float4 v = half ? make_float4(sums[4], sums[5], sums[6], sums[7]) : make_float4(sums[0], sums[1], sums[2], sums[3]);
        if (block) {
            if (lane < 16) push16(address_at(0, bias_at + 4 * filter), v, sums_there);
        } else {
            barrier_wait(sums_here + 8 * warp, 0);
            add_shared(v, bias_at + 4 * filter);
            if (lane < 16 && k + filter < g.k) store4(db + k + filter, v);
        }
        return;
    }

    const int group = warp >> 2;
    const u32 high = descriptor_high(8 * 2 * SPAN, SWIZZLE_128B);
    const u32 first_a = descriptor_low(base + X_BYTES + group * CHUNK_BYTES), first_b = CHUNK_BYTES >> 4 << 16 | (base & 0x3FFFF) >> 4;
    float sums[CHANNELS / 2] = {};  // of the channels that the other block ends with, then of the own
    int read = -1;                  // the stage before this one
    for (int i = 0; i < count; ++i, ring.next(STAGES)) {
        const u32 a = first_a + ring.stage * (STAGE_BYTES >> 4), b = first_b + ring.stage * (STAGE_BYTES >> 4);
        barrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; ++step) multiply(sums, descriptor_of(high, a + step * STEP), descriptor_of(high, b + step * STEP), 1);
        wgmma_commit();
        wgmma_wait<1>();  // these products keep the tensor cores busy meanwhile
        if (read >= 0 && lane == 0) barrier_arrive(empty + 8 * read);
        read = ring.stage;
    }
    wgmma_wait<0>();
    auto sums_of = [&](int j) { return make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]); };
    const u32 own_sums = sums_at + warp * SUMS_BYTES, here = own_sums + lane * 16, there = address_at(block ^ 1, here);
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) push16(there + j * 512, sums_of(j), sums_there);
    barrier_wait(sums_here + 8 * warp, 0);
    float4 own[EIGHTS];
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) own[j] = sums_of(EIGHTS + j), add_shared(own[j], here + j * 512);
    // Then the warp's rows lie there, 16 filters of 256 bytes whose chunks of 16 are swizzled by the row.
    const u32 row_sums = own_sums + (lane >> 2) * 256 + (lane & 1) * 8, turn = (lane >> 2 & 3) * 2;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
        const u32 at = row_sums + (((2 * j + (lane >> 1 & 1)) ^ turn) << 4);
        store_shared8(at, own[j].x, own[j].y);
        store_shared8(at + 8 * 256, own[j].z, own[j].w);
    }
    __syncwarp();
    const int half = lane >> 4, own_k = k + warp * 16, own_c = c + block * SPAN + (lane & 15) * 4;
    float *to = dw + (u32)(own_k + half) * g.c + own_c;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 row = 2 * i + half;
        const uint4 v = load_shared16(own_sums + row * 256 + (((lane & 15) ^ ((row & 3) * 2)) << 4));
        if (own_c < g.c && own_k + row < g.k) store_global16(to + (u32)(2 * i) * g.c, v);
    }
}
