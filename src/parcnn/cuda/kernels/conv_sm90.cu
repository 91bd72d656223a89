// Convolution on Hopper's tensor cores; x (N,H,W,C), w (K,R,S,C), y (N,P,Q,K) bf16, sums in fp32.
//
//     y[n,p,q,k] = pool(act(bias[k] + sum_{r,s,c} x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c] * w[k,r,s,c]))
//
// act is ReLU or none, pool is none or the 2x2 maximum with 2-bit indices. FLIPPED 1 computes the input gradient of a
// convolution with stride 1: then x is dy, y is dx, and w is read with its taps in reverse and its two channels exchanged.
//
// The product is computed transposed, D[channel][pixel] = W[channel][r,s,c] * X[pixel][r,s,c]: a warpgroup owns 64 output
// channels (the M of wgmma) and a patch of tile_w x tile_h x tile_n pixels (its N, PIXELS: the patch rounded up), because
// N may be any multiple of 8, so that odd images waste little. Both operands come from shared memory, where TMA writes
// them as rows of CB channels; what lies outside of the image arrives as zeros, which is the padding.
//
// Roles of a block: two warpgroups consume, one produces. Thread 0 of the latter keeps a ring of X stages full, and a
// ring of weights, or all taps' weights once (`resident`). Its warps 1 and 2 write finished tiles out by TMA.
//   CHANNELS  64: the two consumers take alternate tiles, so that one's epilogue hides behind the other's product;
//             128: they share a tile's pixels and have 64 channels each.
// An X stage serves one tap, or a tile with its halo serves a column of taps (tile_w any), or all of them (tile_w = 8):
// taps are then other first rows of the same stage, and the groups of eight rows lie `tile_w + s - 1` rows apart. That
// cuts the traffic from L2, which else limits layers with few channels.
// The epilogue's staging is the tile's own last X stage, given back when it has drained, or memory of its own.
//
// grid: slots * k_groups blocks of 384 threads, persistent. Bytes: x is read from L2 once for each tap (stage) and group
// of channels, w once for each tile (or block); y and idx are written once.
// Preconditions: C and K are multiples of 8; tensors have less than 2^31 pixels and tiles.
// Macros: PIXELS, CB (32 or 64), CHANNELS, POOL (0; 1 through shared memory; 2 in registers, tile_w = 8), FLIPPED.

#include "conv_sm90_epilogue.cuh"
#include "sm90_wgmma.cuh"

DEFINE_WGMMA(multiply, PIXELS, FLIPPED, 0)

constexpr bool ALTERNATE = CHANNELS == 64;
constexpr int CONSUMER_WARPS = ALTERNATE ? 4 : 8;  // that must give a stage back
constexpr int ROW_BYTES = CB * 2;
constexpr int W_GROUP_BYTES = 64 * ROW_BYTES, W_STAGE_BYTES = CHANNELS / 64 * W_GROUP_BYTES;  // weights of 64 channels; of a tap
constexpr int STAGING_BYTES = (PIXELS * 128 + 1023) / 1024 * 1024;
constexpr int NONE = -1;

// Weights: rows of CB reduction channels for each output channel, or (FLIPPED) rows of 64 output channels.
constexpr int W_STEP = FLIPPED ? 16 * 128 >> 4 : 32 >> 4;  // 16 reduction channels further, as a descriptor counts
constexpr u32 W_SWIZZLE = FLIPPED || CB == 64 ? SWIZZLE_128B : SWIZZLE_64B;
constexpr int W_ROW_BYTES = FLIPPED ? 128 : ROW_BYTES;

// Addresses of the barriers. `turn`, `staged`, `drained` have one for each consumer.
struct Barriers {
    u32 x_full, x_empty, w_full, w_empty, turn, staged, drained;

    __device__ __forceinline__ Barriers(const Problem &g, u32 at) {
        x_full = at, x_empty = x_full + 8 * g.x_stages;
        w_full = x_empty + 8 * g.x_stages, w_empty = w_full + 8 * g.w_stages;
        turn = w_empty + 8 * g.w_stages, staged = turn + 16, drained = staged + 16;
    }
    __device__ __forceinline__ void init(const Problem &g) const {
        for (int i = 0; i < g.x_stages; ++i) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, CONSUMER_WARPS);
        for (int i = 0; i < g.w_stages; ++i) barrier_init(w_full + 8 * i, 1), barrier_init(w_empty + 8 * i, CONSUMER_WARPS);
        for (int i = 0; i < 2; ++i) barrier_init(turn + 8 * i, 4), barrier_init(staged + 8 * i, 4), barrier_init(drained + 8 * i, 1);
        barrier_init_fence();
    }
};

// One tap's weights of CHANNELS output channels from k on, reduction channels from c on.
__device__ __forceinline__ void load_weights(const Problem &g, const TensorMap &w, u32 to, u32 barrier, int c, int tap, int k) {
    if (FLIPPED) {
        for (int group = 0; group < CHANNELS / 64; ++group)
            load_tile(to + group * W_GROUP_BYTES, w, barrier, k + group * 64, g.r * g.s - 1 - tap, c);
    } else {
        load_tile(to, w, barrier, c, tap, k);
    }
}

__device__ __forceinline__ void produce(const Problem &g, const Order &order, const TensorMap &x, const TensorMap &w, const Barriers &bar,
                                        u32 x_base, u32 w_base, int slot, int k_group) {
    Ring x_ring, w_ring;
    if (g.resident) {
        const int taps = g.r * g.s;
        barrier_expect(bar.w_full, g.c_blocks * taps * W_STAGE_BYTES);
        for (int block = 0, to = w_base; block < g.c_blocks; ++block)
            for (int tap = 0; tap < taps; ++tap, to += W_STAGE_BYTES)
                load_weights(g, w, to, bar.w_full, block * CB, tap, k_group * CHANNELS);
    }
    for (int round = 0, item; (item = item_at(g, order, slot, round)) >= 0; ++round) {
        const Tile t = tile_of(g, item, k_group);
        const int h = t.h * g.stride_h - g.pad_h, left = t.w * g.stride_w - g.pad_w;
        for (int block = 0, served = 0; block < g.c_blocks; ++block)
            for (int s = t.s0; s < t.s1; ++s)
                for (int r = t.r0; r < t.r1; ++r) {
                    if (served == 0) {
                        const u32 full = bar.x_full + 8 * x_ring.stage;
                        barrier_wait(bar.x_empty + 8 * x_ring.stage, x_ring.parity ^ 1);
                        barrier_expect(full, g.x_box_bytes);
                        load_tile(x_base + x_ring.stage * g.x_stage_bytes, x, full, block * CB, left + s * g.dilation_w, h + r * g.dilation_h, t.n);
                        x_ring.next(g.x_stages);
                    }
                    if (++served == g.taps_per_load) served = 0;
                    if (!g.resident) {
                        const u32 full = bar.w_full + 8 * w_ring.stage;
                        barrier_wait(bar.w_empty + 8 * w_ring.stage, w_ring.parity ^ 1);
                        barrier_expect(full, W_STAGE_BYTES);
                        load_weights(g, w, w_base + w_ring.stage * W_STAGE_BYTES, full, block * CB, r * g.s + s, t.k);
                        w_ring.next(g.w_stages);
                    }
                }
    }
}

// Which load of a tile becomes a consumer's staging, counted from the last: they share the loads where they share tiles.
__device__ __forceinline__ int kept_from_last(int consumer) { return ALTERNATE ? 0 : consumer; }

#if !POOL
// Write one consumer's staged tiles out.
__device__ __forceinline__ void write_tiles(const Problem &g, const Order &order, const TensorMap &y, const Barriers &bar, u32 x_base,
                                            u32 staging, int slot, int k_group, int consumer) {
    Ring x_ring;
    u32 parity = 0;
    for (int round = 0, item; (item = item_at(g, order, slot, round)) >= 0; ++round) {
        const Tile t = tile_of(g, item, k_group);
        Ring kept = x_ring;
        x_ring.skip(t.loads, g.x_stages);
        if (ALTERNATE && (round & 1) != consumer) continue;
        if (!g.own_staging) {
            kept.skip(t.loads - 1 - kept_from_last(consumer), g.x_stages);
            staging = x_base + kept.stage * g.x_stage_bytes;
        }
        barrier_wait(bar.staged + 8 * consumer, parity);
        parity ^= 1;
        store_tile(y, staging, t.k + (ALTERNATE ? 0 : consumer * 64), t.w, t.h, t.n);
        barrier_arrive(bar.drained + 8 * consumer);
        if (!g.own_staging) barrier_arrive(bar.x_empty + 8 * kept.stage, 4);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1)
    conv_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
#if POOL
              u16 *__restrict__ y, u8 *__restrict__ idx,
#else
              const __grid_constant__ TensorMap y,
#endif
              const float *__restrict__ bias, const __grid_constant__ Problem g, const __grid_constant__ Order order) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 x_base = shared_address(shared), w_base = x_base + g.x_stages * g.x_stage_bytes;
    const Barriers bar(g, x_base + g.barrier_offset);
    const int consumer = threadIdx.x >> 7, thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31;
    const int k_group = blockIdx.x % g.k_groups, slot = blockIdx.x / g.k_groups;
    if (threadIdx.x == 0) {
        bar.init(g);
        prefetch(x), prefetch(w);
#if !POOL
        prefetch(y);
#endif
    }
    __syncthreads();

    if (consumer == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (thread == 0) produce(g, order, x, w, bar, x_base, w_base, slot, k_group);
#if !POOL
        if (lane == 0 && (warp == 1 || warp == 2))
            write_tiles(g, order, y, bar, x_base, x_base + g.staging_offset + (warp - 1) * STAGING_BYTES, slot, k_group, warp - 1);
#endif
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        constexpr u32 w_descriptor = 8 * W_ROW_BYTES >> 4 | W_SWIZZLE << 30;
        const u32 w_own = w_base + (ALTERNATE ? 0 : consumer * W_GROUP_BYTES);
        Ring x_ring, w_ring;
#if !POOL
        u32 drained_parity = 1;
#endif
        float sums[PIXELS / 2];
        if (g.resident) barrier_wait(bar.w_full, 0);
        for (int round = 0, item; (item = item_at(g, order, slot, round)) >= 0; ++round) {
            const Tile t = tile_of(g, item, k_group);
            if (ALTERNATE && (round & 1) != consumer) {
                x_ring.skip(t.loads, g.x_stages);
                if (!g.resident) w_ring.skip(t.taps, g.w_stages);
                continue;
            }
            const int k = t.k + (ALTERNATE ? 0 : consumer * 64), own_k = k + warp * 16 + (lane >> 2);
            Outputs out = {0.0f, 0.0f, g.floor};
            if (bias) {
                if (own_k < g.k) out.bias0 = bias[own_k];
                if (own_k + 8 < g.k) out.bias1 = bias[own_k + 8];
            }

            // Products take turns: who looked ahead on a shared ring would find the parity of two phases back.
            if (ALTERNATE && round > 0) barrier_wait(bar.turn + 8 * consumer, (round - 1) / 2 & 1);
            int x_stage = 0, kept = 0, loads_left = t.loads, taps_left = 0;
            int release_x = NONE, release_w = NONE;  // stages of the latest group of wgmma
            u32 add = 0;
            for (int block = 0; block < g.c_blocks; ++block)
                for (int s = t.s0; s < t.s1; ++s)
                    for (int r = t.r0; r < t.r1; ++r) {
                        if (taps_left == 0) {
                            taps_left = g.taps_per_load, --loads_left;
                            x_stage = x_ring.stage;
                            barrier_wait(bar.x_full + 8 * x_stage, x_ring.parity);
                            x_ring.next(g.x_stages);
                        }
                        --taps_left;
                        int w_stage = NONE, w_tile = (block * g.r + r) * g.s + s;
                        if (!g.resident) {
                            w_tile = w_stage = w_ring.stage;
                            barrier_wait(bar.w_full + 8 * w_stage, w_ring.parity);
                            w_ring.next(g.w_stages);
                        }
                        const u32 x_at = x_base + x_stage * g.x_stage_bytes + r * g.tap_row_bytes + s * g.tap_column_bytes;
                        const u64 a = descriptor(w_descriptor, w_own + w_tile * W_STAGE_BYTES), b = descriptor(g.x_descriptor, x_at);
                        wgmma_fence();
#pragma unroll
                        for (int step = 0; step < CB / 16; ++step) {
                            multiply(sums, a + step * W_STEP, b + step * 2, add);
                            add = 1;
                        }
                        wgmma_commit();
                        if (release_x != NONE || release_w != NONE) {
                            wgmma_wait<1>();  // the group before this one is done
                            if (lane == 0) {
                                if (release_x != NONE) barrier_arrive(bar.x_empty + 8 * release_x);
                                if (release_w != NONE) barrier_arrive(bar.w_empty + 8 * release_w);
                            }
                        }
                        release_x = NONE, release_w = w_stage;
                        if (taps_left == 0) {
                            if (g.own_staging || loads_left != kept_from_last(consumer))
                                release_x = x_stage;
                            else
                                kept = x_stage;
                        }
                    }
            if (ALTERNATE && lane == 0) barrier_arrive(bar.turn + 8 * (consumer ^ 1));
            wgmma_wait<0>();
            if (lane == 0) {
                if (release_x != NONE) barrier_arrive(bar.x_empty + 8 * release_x);
                if (release_w != NONE) barrier_arrive(bar.w_empty + 8 * release_w);
            }

            // Staging may be written when no product of a warp that shares it reads it, and its last tile has left it.
            const u32 staging = g.own_staging ? x_base + g.staging_offset + consumer * STAGING_BYTES : x_base + kept * g.x_stage_bytes;
#if POOL
            if (ALTERNATE || g.own_staging)
                named_barrier(1 + consumer, 128);
            else
                named_barrier(3, 256);
#if POOL == 2
            stage_pooled<PIXELS>(sums, out, staging, warp, lane);
#else
            stage_tile<PIXELS>(sums, out, staging, warp, lane);
#endif
            named_barrier(1 + consumer, 128);
            write_pooled<PIXELS, POOL == 2>(g, t, k, staging, thread, y, idx);
            if (!g.own_staging) {
                fence_async();
                __syncwarp();
                if (lane == 0) barrier_arrive(bar.x_empty + 8 * kept);
            }
#else
            barrier_wait(bar.drained + 8 * consumer, drained_parity);
            drained_parity ^= 1;
            if (!g.own_staging) {
                if (ALTERNATE)
                    named_barrier(1 + consumer, 128);
                else
                    named_barrier(3, 256);
            }
            stage_tile<PIXELS>(sums, out, staging, warp, lane);
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(bar.staged + 8 * consumer);
#endif
        }
    }
}
