// 1x1 convolution with bias, ReLU and the 2x2 maximum behind it on Hopper's tensor cores; x (N,H,W,C), w (K,1,1,C), y (N,P,Q,K)
// bf16, sums in fp32.
//
//     y[n,p,q,k] = max over the window of act(bias[k] + sum_c x[n,h,w,c] * w[k,c]), act ReLU, or another before the rounding
//
// What conv_sm90.cu does of such layers, where weights stay in shared memory, in a shorter loop: with few channels a tile's product
// takes hardly longer than what a consumer's warp does beside it, one instruction after the other. Tiles, products and staged
// windows are the same (conv_sm90_epilogue.cuh, POOL 4). What is not there, or not waited for:
//   coordinates of tiles: consumers need none. Biases: in shared memory, of all of the block's channels.
//   Barriers: whether the next stage is full, and whether staging is free, is asked while a product runs.
//   Consumers of one tile do not meet: each has staging for two tiles, with barriers for each.
// A block has 128 channels, or several times as many, one after the other, on the same stages (`k_rounds`), which reads x from L2
// as much less often. The first tile's stages bring the weights, too: its first product needs but its own.
//
// grid: slots * k_groups blocks of 384 threads, persistent: two warpgroups of 64 channels each consume, a warp copies, and one for
// each consumer writes its tiles out.
// Bytes: x is read from L2 once for each group of k_rounds * 128 channels, w once for each block; y is written once.
// Preconditions: C and K are multiples of 8; tensors have less than 2^31 pixels and tiles; a tile's steps of channels are as many as
// stages where k_rounds > 1, or fewer.
// Macros: PIXELS, WIDTH, IMAGES (conv_sm90.cu), STEPS of 64 reduction channels (0: any).

#define CB 64
#define CHANNELS 128
#define POOL 4
#define FLIPPED 0
#define FILTER 1
#define COLUMNS 1
#define MOMENTS 0

#include "conv_sm90_epilogue.cuh"
#include "sm90_lanes.cuh"
#include "sm90_wgmma.cuh"

DEFINE_WGMMA(multiply, PIXELS, 0, 0)

constexpr int CONSUMER_WARPS = 8, COPIER = 8, WRITERS = 9;  // warps
constexpr u32 W_GROUP_BYTES = 64 * 128, W_STAGE_BYTES = 2 * W_GROUP_BYTES;
constexpr int BARRIER_BYTES = 512;  // twin of conv_sm90_tiles.py's; behind them, the biases

#ifndef HOST_EMULATION
// Whether the phase of that parity is over; if so, what came before its end is seen.
__device__ __forceinline__ u32 barrier_test(u32 barrier, u32 parity) {
    u32 is;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" : "=r"(is) : "r"(barrier), "r"(parity) : "memory");
    return is;
}

// Arrive where `does` is not 0, without a branch.
__device__ __forceinline__ void barrier_arrive_if(u32 does, u32 barrier) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(barrier), "r"(does) : "memory");
}

__device__ __forceinline__ u32 load_shared4(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared4(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
#endif

// The ring of X stages as products see it: descriptors and barriers, from its first stage on and to its end.
struct Stages {
    u32 b, full, end, step;
};

// A stage of it, and the parity of the phase that fills it.
struct Stage {
    u32 b, full, parity;

    __device__ __forceinline__ void next(const Stages &ring) {
        b += ring.step, full += 8;
        if (full == ring.end) b = ring.b, full = ring.full, parity ^= 1;
    }
};

extern "C" __global__ void __launch_bounds__(384, 1)
    conv_sm90_pointwise(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap y,
                        const float *__restrict__ bias, const __grid_constant__ Problem g) {
    ALIGNED_SHARED(u8, shared);
    const u32 x_base = shared_address(shared), w_base = x_base + g.x_stages * g.x_stage_bytes, staging = x_base + g.staging_offset;
    // Barriers: of stages; of each consumer's two places for staged tiles.
    const u32 full = x_base + g.barrier_offset, empty = full + 8 * g.x_stages, staged = empty + 8 * g.x_stages, drained = staged + 32;
    const u32 biases = full + BARRIER_BYTES;
    const int warp = same_in_all(threadIdx.x >> 5), lane = threadIdx.x & 31;
    const int k_group = blockIdx.x % g.k_groups, slot = blockIdx.x / g.k_groups;
    const int rounds = g.k_rounds, steps = STEPS ? STEPS : g.c_blocks, stages = g.x_stages;
    const int k0 = k_group * rounds * CHANNELS, own_tiles = slot < g.items ? (g.items - slot - 1) / g.slots + 1 : 0;

    // The copying warp: tiles' steps, each a stage.
    Ring ring;
    int item = slot, block = 0;
    Tile tile;
    const auto place = [&](int of_item) {
        int column, row;
        const int images = divide(divide(of_item, g.by_tiles_w, column), g.by_tiles_h, row);
        tile.w = column * WIDTH, tile.h = row * g.tile_h, tile.n = images * IMAGES;
    };
    const auto copy = [&](bool leader) {
        if (leader) {
            const u32 barrier = full + 8 * ring.stage;
            const bool brings_weights = item == slot;
            barrier_expect(barrier, g.x_box_bytes + (brings_weights ? rounds * W_STAGE_BYTES : 0));
            load_tile(x_base + ring.stage * g.x_stage_bytes, x, barrier, block * CB, tile.n, tile.w, tile.h);
            for (int round = 0; brings_weights && round < rounds; ++round)
                load_tile(w_base + (round * steps + block) * W_STAGE_BYTES, w, barrier, block * CB, 0, k0 + round * CHANNELS);
        }
        ring.next(stages);
        if (++block == steps) block = 0, item += g.slots, place(item);
    };
    const int copies = own_tiles * steps, at_once = min(copies, stages);
    if (warp == COPIER) {
        const bool leader = elect();
        if (leader) {
            prefetch(x), prefetch(w), prefetch(y);
            for (int i = 0; i < stages; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, CONSUMER_WARPS);
            for (int i = 0; i < 4; ++i) barrier_init(staged + 8 * i, 4), barrier_init(drained + 8 * i, 1);
            barrier_init_fence();
        }
        __syncwarp();
        await_predecessors();
        place(item);
#pragma unroll 1
        for (int i = 0; i < at_once; ++i) copy(leader);
    } else {
        await_predecessors();
    }
    bool is_infinite = false;
    for (int i = threadIdx.x; i < rounds * CHANNELS; i += blockDim.x) {
        const float v = bias && k0 + i < g.k ? bias[k0 + i] + 0.0f : 0.0f;  // not -0, so that no sum with it is
        is_infinite = is_infinite || v == __int_as_float(0x7f800000);
        store_shared4(biases + 4 * i, __float_as_uint(v));
    }
    // With an infinite bias, the maximum of sums says not yet which are NaN.
    const bool activates = __syncthreads_or(is_infinite) || g.act;

    if (warp >= COPIER) {
        give_registers<56>();
        if (warp == COPIER) {
            const bool leader = elect();
#pragma unroll 1
            for (int i = at_once; i < copies; ++i) {
                barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
                copy(leader);
            }
        } else if (warp < WRITERS + 2 && elect()) {
            const int consumer = warp - WRITERS;
            const u32 own_staged = staged + 16 * consumer, own_drained = drained + 16 * consumer;
            const u32 from = staging + consumer * 2 * g.staging_bytes;
            int turn = 0;
#pragma unroll 1
            for (int i = 0; i < own_tiles; ++i, item += g.slots) {
                place(item);
#pragma unroll 1
                for (int round = 0; round < rounds; ++round, ++turn) {
                    const int buffer = turn & 1;
                    barrier_wait(own_staged + 8 * buffer, turn >> 1 & 1);
                    store_tile(y, from + buffer * g.staging_bytes, k0 + round * CHANNELS + consumer * 64, tile.n, tile.w / 2, tile.h / 2);
                    store_wait<0>();
                    barrier_arrive(own_drained + 8 * buffer);
                }
            }
        }
        return;
    }

    take_registers<224>();
    const int consumer = warp >> 2;
    constexpr u32 w_descriptor = 8 * 128 >> 4 | SWIZZLE_128B << 30;
    const u32 x_descriptor = g.x_descriptor;
    const u32 first_a = held(descriptor_low(w_base + consumer * W_GROUP_BYTES), lane), w_step = W_STAGE_BYTES >> 4;
    const Stages ring_of = {held(descriptor_low(x_base), lane), held(full, lane), held(full + 8 * stages, lane), (u32)g.x_stage_bytes >> 4};
    const u32 arrives = held(lane == 0, lane), floor = held(g.floor, lane), own_biases = held(biases + 4 * (warp * 16 + (lane >> 2)), lane);
    const u32 own_drained = held(drained + 16 * consumer, lane), to_staged = staged - drained;
    const u32 own_staging = staging + consumer * 2 * g.staging_bytes, both_places = held(2 * own_staging + g.staging_bytes, lane);
    float sums[PIXELS / 2];
    const int turns = own_tiles * rounds;
    int round = 0;
    Stage stage = {ring_of.b, ring_of.full, 0}, first_stage = stage;  // of the next step; of its tile's first
    u32 a = first_a, bias_at = own_biases, is_full = 0;
    u32 to = held(own_staging, lane), drained_at = own_drained, drained_parity = 1, staged_before = 0;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const bool is_last = round == rounds - 1;  // on these stages
        const u32 releases = is_last ? arrives : 0;
        u32 read = 0;  // by the step before this one: its barrier
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            if (!is_full) barrier_wait(stage.full, stage.parity);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < CB / 16; ++i)
                multiply(sums, descriptor_of(w_descriptor, a + 2 * i), descriptor_of(x_descriptor, stage.b + 2 * i), STEPS == 1 ? i > 0 : i > 0 || step > 0);
            wgmma_commit();
            const u32 reads = stage.full + (ring_of.end - ring_of.full);
            stage.next(ring_of), a += w_step;
            if (STEPS != 1 && step + 1 < steps) is_full = barrier_test(stage.full, stage.parity);
            if (step == 0) {  // what was staged of the tile before this one: the fence takes a while
                fence_async();
                __syncwarp();
                barrier_arrive_if(turn > 0 ? arrives : 0, staged_before);
            }
            if (STEPS != 1 && step > 0) {
                wgmma_wait<1>();
                barrier_arrive_if(releases, read);
            }
            read = reads;
        }
        const float bias0 = __uint_as_float(load_shared4(bias_at)), bias1 = __uint_as_float(load_shared4(bias_at + 32));
        bias_at += CHANNELS * 4, ++round;
        if (is_last)
            first_stage = stage, a = first_a, bias_at = own_biases, round = 0;
        else
            stage = first_stage;
        is_full = barrier_test(stage.full, stage.parity);
        const u32 is_free = barrier_test(drained_at, drained_parity);  // of the tile before the last one
        wgmma_wait<0>();
        barrier_arrive_if(releases, read);
        Outputs out = {bias0, bias1, floor};
        if (activates) {
            activate_sums(sums, bias0, bias1, g.act, g.gate);
            out.bias0 = out.bias1 = 0.0f;
        }
        if (!is_free) barrier_wait(drained_at, drained_parity);
        stage_windows<PIXELS, true, MAXIMA>(sums, out, to, warp & 3, lane);
        staged_before = drained_at + to_staged;
        to = both_places - to, drained_parity ^= drained_at != own_drained, drained_at ^= 8;
    }
    fence_async();
    __syncwarp();
    barrier_arrive_if(turns > 0 ? arrives : 0, staged_before);
}
