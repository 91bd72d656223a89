// Convolution on Hopper's tensor cores; x (N,H,W,C), w (K,R,S,C), y (N,P,Q,K) bf16, sums in fp32.
//
//     y[n,p,q,k] = pool(act(bias[k] + sum_{r,s,c} x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c] * w[k,r,s,c]))
//
// pool is none, the 2x2 maximum with 2-bit indices, (no idx, tile_w = 8) the 2x2 mean, or of any windows the maximum, with
// indices of 2 bits (up to four elements) or 4, or (no idx) the mean, of rounded values: tiles are then of whole windows, and
// compute their halos where windows overlap. ReLU is applied to rounded values, other activations go before the rounding.
// SECOND 1: there is a second tensor (N,P,Q,K), an addend, which is added before the activation, or (add = 0) `kept`, where what the
// activation is taken of is stored.
// FLIPPED 1 computes the input gradient: then x is dy, y is dx, and w is read with its taps in reverse and its two channels
// exchanged. With a stride, dx falls into classes of pixels that the same taps reach, every stride-th in each direction: each
// class is a convolution of dy with stride 1 and some of the taps, and tiles are of one class. Then
//
//     y = act'(saved) * (addend + the sum above), act' from its output, of gelu and silu from its input.
//
// The product is computed transposed, D[channel][pixel] = W[channel][r,s,c] * X[pixel][r,s,c]: a warpgroup owns 64 output
// channels (the M of wgmma) and a patch of tile_w x tile_h x tile_n pixels (its N, PIXELS: the patch rounded up), because
// N may be any multiple of 8, so that odd images waste little. Both operands come from shared memory, where TMA writes
// them as rows of CB channels; what lies outside of the image arrives as zeros, which is the padding.
//
// Roles of a block: two warpgroups consume, one produces. Thread 0 of the latter keeps a ring of X stages full, and a
// ring of weights, or all taps' weights once (`resident`). Its warps 1 and 2 write finished tiles out by TMA.
//   CHANNELS  64: the two consumers take alternate tiles, so that one's epilogue hides behind the other's product;
//             32: likewise, and the M of a product is 32 channels by two rows of taps (`pack_weights`);
//             128: they share a tile's pixels and have 64 channels each; with staging of their own, one behind the other, so that
//             their epilogues hide behind each other's products.
// An X stage serves one tap, or a tile with its halo serves a column of taps (tile_w any), or all of them (tile_w = 8):
// taps are then other first rows of the same stage, and the groups of eight rows lie `tile_w + s - 1` rows apart (or, of a
// column, anything: of a tile of several images, the images are innermost in a stage). That
// cuts the traffic from L2, which else limits layers with few channels.
// Or a stage serves all groups of channels one after the other (`k_rounds`), where a tile has but one: else a layer with
// few taps and channels but many outputs reads x from L2 again for each group.
// Where there are few tiles, blocks share the reduction: each split, a row of blocks, has c_blocks steps of channels (zeros beyond
// the last) and writes its sums to `partial`; conv_sm90_sum adds them and has the epilogue.
// The epilogue's staging is the tile's own last X stage, given back when it has drained, or memory of its own. Addend and
// saved outputs come into it by TMA, and are read as the product's fragments.
//
// grid: slots * k_groups x splits blocks of 384 threads, persistent. Bytes: x is read from L2 once for each tap (stage) and group
// of channels, w once for each tile (or block); y and idx are written once.
// Preconditions: C and K are multiples of 8; tensors have less than 2^31 pixels and tiles.
// Macros: PIXELS, CB (32 or 64), CHANNELS (32: of windows alone, without a pool or moments), POOL (0; 1 through shared memory;
// 2 in registers, tile_w = 8; 3 other windows; 4 in registers, of 128 CHANNELS and tiles WIDTH wide of IMAGES images, which are
// innermost), FLIPPED, and where constants pay: FILTER, of its side (1; 3, whose taps share stages; 0 any), and COLUMNS that a
// stage serves (of FILTER 3, 1 or 3; else 1 where it serves one tap, 0 any). MOMENTS: of y for a batch norm, where there is no
// pool (conv_sm90_moments.cuh); FLIPPED, the sums that a batch norm below needs (conv_sm90_norm.cuh): its x then stands in place
// of `saved`, and there are no strides. SECOND: of POOL 0, not FLIPPED, without MOMENTS.

#ifndef SECOND
#define SECOND 0
#endif

#include "conv_sm90_epilogue.cuh"
#include "conv_sm90_moments.cuh"
#include "conv_sm90_norm.cuh"
#include "sm90_wgmma.cuh"

DEFINE_WGMMA(multiply, PIXELS, FLIPPED, 0)

constexpr bool ALTERNATE = CHANNELS <= 64;
constexpr int CONSUMER_WARPS = ALTERNATE ? 4 : 8;  // that must give a stage back
constexpr int ROW_BYTES = CB * 2;
constexpr int W_GROUP_BYTES = 64 * ROW_BYTES, W_STAGE_BYTES = (CHANNELS + 63) / 64 * W_GROUP_BYTES;  // weights of 64 channels; of a tap
constexpr int BARRIER_BYTES = 512;  // twin of conv_sm90_tiles.py's
constexpr int NONE = -1;
#define POOLS_IN_REGISTERS (POOL == 2 || POOL == 4)
#define READS_OPERANDS (FLIPPED || SECOND)

// Weights: rows of CB reduction channels for each output channel, or (FLIPPED) rows of 64 output channels.
constexpr int W_STEP = FLIPPED ? 16 * 128 >> 4 : 32 >> 4;  // 16 reduction channels further, as a descriptor counts
constexpr u32 W_SWIZZLE = FLIPPED || CB == 64 ? SWIZZLE_128B : SWIZZLE_64B;
constexpr int W_ROW_BYTES = FLIPPED ? 128 : ROW_BYTES;

// Addresses of the barriers. `turn`, `staged`, `drained`, `operand` have one for each consumer.
struct Barriers {
    u32 x_full, x_empty, w_full, w_empty, turn, staged, drained, operand;

    __device__ __forceinline__ Barriers(const Problem &g, u32 at) {
        x_full = at, x_empty = x_full + 8 * g.x_stages;
        w_full = x_empty + 8 * g.x_stages, w_empty = w_full + 8 * g.w_stages;
        turn = w_empty + 8 * g.w_stages, staged = turn + 16, drained = staged + 16, operand = drained + 16;
    }
    __device__ __forceinline__ void init(const Problem &g) const {
        const int releases = k_rounds(g) > 1 ? 8 : CONSUMER_WARPS;
        for (int i = 0; i < g.x_stages; ++i) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, releases);
        for (int i = 0; i < g.w_stages; ++i) barrier_init(w_full + 8 * i, 1), barrier_init(w_empty + 8 * i, CONSUMER_WARPS);
        for (int i = 0; i < 2; ++i) barrier_init(turn + 8 * i, 4), barrier_init(staged + 8 * i, 4);
        for (int i = 0; i < 2; ++i) barrier_init(drained + 8 * i, 1), barrier_init(operand + 8 * i, 1);
        barrier_init_fence();
    }
};

// One tap's weights of CHANNELS output channels from k on, reduction channels from c on.
__device__ __forceinline__ void load_weights(const TensorMap &w, u32 to, u32 barrier, int c, int tap, int k) {
    if (FLIPPED) {
        for (int group = 0; group < CHANNELS / 64; ++group) load_tile(to + group * W_GROUP_BYTES, w, barrier, k + group * 64, tap, c);
    } else {
        load_tile(to, w, barrier, c, tap, k);
    }
}

// PAIRED: six products do a 3x3 filter, the M of each is twice 32 channels. Let the tile's rows be 0 to H - 1, and a product's
// groups of eight pixels the rows 0 to H. Its `upper` channels belong to the row of outputs above, its `lower` to that row, and
//
//     y[row] = upper[row + 1] + lower[row].
//
// With one and the same row of x, upper's tap is the one below lower's: of rows that start where lower's first tap reads, taps 1 and
// 0; one further down, 2 and 1. So tap 1 comes twice, by halves. (A product by zero weights instead would make NaN of infinities.
// Halves are exact but for the last bit of what is subnormal.) A warp has 8 upper channels and then the same 8 lower ones, so that a thread
// has both. Stored as what TMA writes: [64 of M][64 reduced], or (FLIPPED) [64 reduced][64 of M].
__device__ __forceinline__ u32 half_of(u32 pair) { return round_bf16x2(0.5f * low_bf16(pair), 0.5f * high_bf16(pair)); }

__device__ __forceinline__ void pack_weights(const Problem &g, const u16 *__restrict__ w, u8 *to) {
    for (int i = threadIdx.x; i < g.c_blocks * taps_of(g) * 512; i += blockDim.x) {
        const int chunk = i & 7, row = i >> 3 & 63, unit = i >> 9;  // 16 bytes each; of a product's 64 x 64
        const int product = unit & 1, s = (unit >> 1) % FILTER, c0 = (unit >> 1) / FILTER * 64;
        const int m = FLIPPED ? chunk * 8 : row, c = c0 + (FLIPPED ? row : chunk * 8);
        const int k = (m >> 4) * 8 + (m & 7), r = product + 1 - (m >> 3 & 1);
        uint4 v = {};
        if (k < g.k && c < g.c) {
            const int tap = FLIPPED ? FILTER * FILTER - 1 - r * FILTER - s : r * FILTER + s;
            const int at = FLIPPED ? (c * FILTER * FILTER + tap) * g.k + k : (k * FILTER * FILTER + tap) * g.c + c;
            v = *reinterpret_cast<const uint4 *>(w + at);
            if (r == 1) v = {half_of(v.x), half_of(v.y), half_of(v.z), half_of(v.w)};
        }
        *reinterpret_cast<uint4 *>(to + (i >> 3) * 128 + ((chunk ^ (row & 7)) << 4)) = v;
    }
    fence_async();
}

#if OF_PIXELS
// x's classes of pixels.
struct PixelMaps {
    const TensorMap *of[CLASSES];

    __device__ __forceinline__ const TensorMap &operator[](int kind) const {
        return *(kind == 0 ? of[0] : kind == 1 ? of[1] : kind == 2 ? of[2] : of[3]);
    }
};
#else
#define PixelMaps TensorMap
#endif

__device__ __forceinline__ void produce(const Problem &g, const Order &order, const PixelMaps &x, const TensorMap &w, const Barriers &bar,
                                        u32 x_base, u32 w_base, int slot, int k_group) {
    const int c0 = blockIdx.y * g.c_blocks * CB;  // the split's first reduction channel
    Ring x_ring, w_ring;
    if (!PAIRED && g.resident) {
        const int taps = g.r * g.s;
        barrier_expect(bar.w_full, k_rounds(g) * g.c_blocks * taps * W_STAGE_BYTES);
        u32 to = w_base;
        for (int group = k_group; group < k_group + k_rounds(g); ++group)
            for (int block = 0; block < g.c_blocks; ++block)
#pragma unroll 1
                for (int tap = 0; tap < taps; ++tap, to += W_STAGE_BYTES)
                    load_weights(w, to, bar.w_full, c0 + block * CB, tap, group * CHANNELS);
    }
    for (int round = 0, item, k_round; (item = item_at(g, order, slot, round, k_round)) >= 0; ++round) {
        if (k_round > 0) continue;
        const Tile t = tile_of(g, item, k_group);
        for (int block = 0; block < g.c_blocks; ++block)
#if OF_PIXELS
#pragma unroll 1
            for (int kind = 0; kind < CLASSES; ++kind) {
                const Loads l = loads_of(g, t, kind);
#endif
#pragma unroll 1
            for (int s = FIRST_COLUMN; s < END_COLUMN; s += load_columns(g))
#pragma unroll 1
                for (int r = FIRST_ROW; r < END_ROW; r += load_rows(g)) {
                    const u32 full = bar.x_full + 8 * x_ring.stage;
                    barrier_wait(bar.x_empty + 8 * x_ring.stage, x_ring.parity ^ 1);
                    barrier_expect(full, g.x_box_bytes);
                    load_pixels(g, x_base + x_ring.stage * g.x_stage_bytes, MAP, full, c0 + block * CB, LOADS.left + s * g.dilation_w, LOADS.top + r * g.dilation_h, t.n);
                    x_ring.next(g.x_stages);
                    if (g.resident) continue;
#pragma unroll 1
                    for (int i = s; i < s + COLUMNS_OF_TAPS; ++i)
#pragma unroll 1
                        for (int j = r; j < r + ROWS_OF_TAPS; ++j) {
                            const u32 w_full = bar.w_full + 8 * w_ring.stage;
                            barrier_wait(bar.w_empty + 8 * w_ring.stage, w_ring.parity ^ 1);
                            barrier_expect(w_full, W_STAGE_BYTES);
                            load_weights(w, w_base + w_ring.stage * W_STAGE_BYTES, w_full, c0 + block * CB, LOADS.tap + j * tap_row(g) + i * tap_column(g), t.k);
                            w_ring.next(g.w_stages);
                        }
                }
#if OF_PIXELS
            }
#endif
    }
}

// Which load of a tile becomes a consumer's staging, counted from the last: they share the loads where they share tiles.
__device__ __forceinline__ int kept_from_last(int consumer) { return ALTERNATE ? 0 : consumer; }

#if !POOL || POOLS_IN_REGISTERS
// y of each class.
struct OutputMaps {
    const TensorMap *of[CLASSES];

    __device__ __forceinline__ const TensorMap &operator[](int kind) const {
        return *(!FLIPPED || kind == 0 ? of[0] : kind == 1 ? of[1] : kind == 2 ? of[2] : of[3]);
    }
};

// Write one consumer's staged tiles out.
__device__ __forceinline__ void write_tiles(const Problem &g, const Order &order, const OutputMaps &y, const Barriers &bar, u32 x_base,
                                            u32 staging, int slot, int k_group, int consumer) {
    Ring x_ring;
    int tile = 0;
    for (int round = 0, item, k_round; (item = item_at(g, order, slot, round, k_round)) >= 0; ++round) {
        const Tile t = tile_of(g, item, k_group + k_round);
        Ring kept = x_ring;
        x_ring.skip(t.loads, g.by_x_stages);
        if (ALTERNATE && (round & 1) != consumer) continue;
        u32 from = g.own_staging == 2 ? staging + (tile & 1) * g.staging_bytes : staging;
        if (!g.own_staging) {
            kept.skip(t.loads - 1 - kept_from_last(consumer), g.by_x_stages);
            from = x_base + kept.stage * g.x_stage_bytes;
        }
        barrier_wait(bar.staged + 8 * consumer, tile & 1);
        store_pixels(g, y[t.kind], from, t.k + (ALTERNATE ? 0 : consumer * 64), POOL ? t.w / 2 : t.w, POOL ? t.h / 2 : t.h, t.n);
        if (g.own_staging == 2) {
            store_wait<1>();  // the tile before this one
            if (tile > 0) barrier_arrive(bar.drained + 8 * consumer);
        } else {
            store_wait<0>();
            barrier_arrive(bar.drained + 8 * consumer);
            if (!g.own_staging) barrier_arrive(bar.x_empty + 8 * kept.stage, 4);
        }
        ++tile;
    }
    store_wait<0>();
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1)
    conv_sm90(const __grid_constant__ TensorMap x,
#if OF_PIXELS
              const __grid_constant__ TensorMap x1, const __grid_constant__ TensorMap x2, const __grid_constant__ TensorMap x3,
#endif
#if CHANNELS == 32
              const u16 *__restrict__ filters,
#else
              const __grid_constant__ TensorMap w,
#endif
#if POOL
              u16 *__restrict__ y, u8 *__restrict__ idx,
#if POOLS_IN_REGISTERS
              const __grid_constant__ TensorMap pooled_y,
#endif
#elif FLIPPED
              const __grid_constant__ TensorMap y0, const __grid_constant__ TensorMap y1, const __grid_constant__ TensorMap y2,
              const __grid_constant__ TensorMap y3, const __grid_constant__ TensorMap addend, const __grid_constant__ TensorMap saved,
#else
              const __grid_constant__ TensorMap y,
#if SECOND
              const __grid_constant__ TensorMap second,
#endif
#endif
#if MOMENTS
              float *partial_rows, int row_count, const __grid_constant__ Inside inside,
#if FLIPPED
              Norm norm,
#endif
#endif
#if !POOL && !MOMENTS && !SECOND
              float *__restrict__ partial,
#endif
              const float *__restrict__ bias, const __grid_constant__ Problem g, const __grid_constant__ Order order) {
#if MOMENTS || SECOND
    constexpr float *partial = nullptr;  // splits have neither these nor a second tensor
#endif
    ALIGNED_SHARED(u8, shared);
    const u32 x_base = shared_address(shared), w_base = x_base + g.x_stages * g.x_stage_bytes;
    const Barriers bar(g, x_base + g.barrier_offset);
    const int consumer = threadIdx.x >> 7, thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31;
    const int k_group = blockIdx.x % g.k_groups, slot = blockIdx.x / g.k_groups;
    if (threadIdx.x == 0) {
        bar.init(g);
        prefetch(x);
#if CHANNELS != 32
        prefetch(w);
#endif
    }
#if POOL && POOL != 3
    Pooled *const pooled = reinterpret_cast<Pooled *>(shared + g.barrier_offset + BARRIER_BYTES);
    list_pooled<PIXELS>(g, pooled);
#endif
    await_predecessors();
#if CHANNELS == 32
    const TensorMap &w = x;  // not read
    pack_weights(g, filters, shared + g.x_stages * g.x_stage_bytes);
#endif
    __syncthreads();

    if (consumer == 2) {
        give_registers<56>();
#if OF_PIXELS
        const PixelMaps pixels = {{&x, &x1, &x2, &x3}};
        if (thread == 0) produce(g, order, pixels, w, bar, x_base, w_base, slot, k_group);
#else
        if (thread == 0) produce(g, order, x, w, bar, x_base, w_base, slot, k_group);
#endif
#if !POOL || POOLS_IN_REGISTERS
#if FLIPPED
        const OutputMaps outputs = {{&y0, &y1, &y2, &y3}};
        const bool copies = !partial;
#elif POOL
        const OutputMaps outputs = {{&pooled_y}};
        const bool copies = !idx && g.own_staging;
#else
        const OutputMaps outputs = {{&y}};
        const bool copies = !partial;
#endif
        if (copies && lane == 0 && (warp == 1 || warp == 2))
            write_tiles(g, order, outputs, bar, x_base, x_base + g.staging_offset + (warp - 1) * g.own_staging * g.staging_bytes, slot, k_group, warp - 1);
#endif
    } else {
        take_registers<224>();
        constexpr u32 w_descriptor = 8 * W_ROW_BYTES >> 4 | W_SWIZZLE << 30;
        const u32 w_own = descriptor_low(w_base + (ALTERNATE ? 0 : consumer * W_GROUP_BYTES));
        Ring x_ring, w_ring;
#if READS_OPERANDS
        u32 operand_parity = 0;
#endif
        float sums[PIXELS / 2];
        // Of each step: in registers, for constant memory is far.
        const int x_stages = in_register(g.x_stages), x_stage_bytes = in_register(g.x_stage_bytes), c_blocks = in_register(g.c_blocks);
        const int row_step = in_register(x_row_step(g));
        const u32 x_descriptor = in_register(g.x_descriptor);
        const bool resident = in_register(g.resident), borrows = POOL != 4 && in_register(g.own_staging) == 0;
#if MOMENTS
        const auto first_channel = [&] { return (ALTERNATE ? 0 : consumer * 64) + warp * 16 + (lane >> 2); };
#if !FLIPPED
        // A row for each consumer that has tiles of its own, or for each patch of pixels.
        constexpr int Rows = ALTERNATE ? 2 : 1;
        const bool by_patch = !keeps_sums(g);
        const PartialRows rows = {partial_rows, row_count, g.k};
        Moments moments;
#endif
#endif
        if (!PAIRED && g.resident) barrier_wait(bar.w_full, 0);
        Walk walk = {slot, 0};
        Ring x_tile, w_tile;  // stages of a tile, where all have as many
#if OF_PIXELS
        x_tile.skip(g.loads, g.by_x_stages), w_tile.skip(c_blocks * taps_of(g), g.by_w_stages);
#else
        x_tile.skip(g.loads, g.by_x_stages), w_tile.skip(g.loads * load_rows(g) * load_columns(g), g.by_w_stages);
#endif
        int round = ALTERNATE ? consumer : 0, tile = 0;
        Tile next = {};
        float next_bias[2];  // of its two channels
        const auto read_bias = [&] {
            const int own_k = next.k + (ALTERNATE ? 0 : consumer * 64) + warp * (PAIRED ? 8 : 16) + (lane >> 2);
            next_bias[0] = bias && own_k < g.k ? bias[own_k] : 0.0f;
            next_bias[1] = PAIRED ? next_bias[0] : bias && own_k + 8 < g.k ? bias[own_k + 8] : 0.0f;
        };
        const auto find_next = [&] {
            const int item = walk.item(g, order);
            if (item < 0) return false;
            constexpr int Rounds = ALTERNATE ? 2 : 1;  // from a tile to the consumer's next
            if (FILTER == 1 && walk.k_round >= Rounds)
                next.k += Rounds * CHANNELS;  // of the same item
            else
                next = tile_of(g, item, k_group + walk.k_round);
            if (!MOMENTS) read_bias();
            return true;
        };
        // Stages of the other consumer's tile.
        const auto skip_tile = [&] {
            const int item = walk.item(g, order);
            if (item < 0) {
            } else if (are_alike(g)) {
                if (walk.k_round == k_rounds(g) - 1) skip(x_ring, x_tile, x_stages);
                if (!resident) skip(w_ring, w_tile, g.w_stages);
            } else {
                const Tile t = tile_of(g, item, k_group);
                x_ring.skip(t.loads, g.by_x_stages);
                if (!resident) w_ring.skip(t.taps, g.by_w_stages);
            }
            walk.next(g);
        };
        if (ALTERNATE && consumer == 1) skip_tile();
        // Where they share tiles but no staging, the second begins two taps after the first, and stays behind.
        int lead = ALTERNATE || borrows ? 0 : 2;
        if (!ALTERNATE && consumer == 1 && lead > 0) barrier_wait(bar.turn, 0), lead = 0;
#if POOL && POOL != 3
        PooledPixels<PIXELS, POOLS_IN_REGISTERS> pixels(g, pooled, thread);
#endif
        for (bool lives = find_next(); lives; ++tile) {
            const Tile t = next;
            const int k_round = walk.k_round;
            const int k = t.k + (ALTERNATE ? 0 : consumer * 64);
            if (MOMENTS) read_bias();  // no earlier: there are no registers for two tiles' biases
            // (The sums with zeros are taken here, when the biases have come, not where they are asked for.)
            Outputs out = {in_register(next_bias[0]) + 0.0f, in_register(next_bias[1]) + 0.0f, g.floor};
#if READS_OPERANDS
            // Where addend and saved output lie: pixels of all classes.
            const int operand_w = MOMENTS || SECOND ? t.w : t.w * g.spread_w + g.classes[t.kind].first_w;
            const int operand_h = MOMENTS || SECOND ? t.h : t.h * g.spread_h + g.classes[t.kind].first_h;
#if SECOND
            if (thread == 0 && g.add) prefetch_pixels(g, second, k, operand_w, operand_h, t.n);
#else
            if (thread == 0) {
                if (g.add) prefetch_pixels(g, addend, k, operand_w, operand_h, t.n);
                if (MOMENTS || g.act) prefetch_pixels(g, saved, k, operand_w, operand_h, t.n);
            }
#endif
#endif

            // Products take turns: who looked ahead on a shared ring would find the parity of two phases back.
            if (ALTERNATE && round > 0) barrier_wait(bar.turn + 8 * consumer, (round - 1) / 2 & 1);
            Ring loaded = x_ring;
            int kept = 0, loads_left = t.loads;
            int release_x = NONE, release_w = NONE;  // stages of the latest group of wgmma
            u32 add = 0;
            // Give back what groups before the latest one have read; then, in turn, what the latest reads.
            const auto give_back = [&](int x_stage, int w_stage) {
                if (release_x != NONE || release_w != NONE) {
                    wgmma_wait<1>();
                    if (lane == 0) {
                        if (release_x != NONE) barrier_arrive(bar.x_empty + 8 * release_x);
                        if (release_w != NONE) barrier_arrive(bar.w_empty + 8 * release_w);
                    }
                }
                release_x = x_stage, release_w = w_stage;
            };
            const auto multiply_tap = [&](u32 a, u32 b) {
#pragma unroll
                for (int step = 0; step < CB / 16; ++step) {
                    multiply(sums, descriptor_of(w_descriptor, a + step * W_STEP), descriptor_of(x_descriptor, b + step * 2), add);
                    add = 1;
                }
            };
            // The other may begin when no wait of this product is left: its first steps then hide behind the last of these.
            const auto pass_turn = [&](bool is_last) {
                if (ALTERNATE && is_last && lane == 0) barrier_arrive(bar.turn + 8 * (consumer ^ 1));
            };
#if OF_PIXELS
            int taps_before = k_round * c_blocks * taps_of(g);  // in resident weights
#else
            int taps_before = k_round * c_blocks * taps_of(g) + t.tap;  // in resident weights
#endif
#pragma unroll 1
            for (int block = c_blocks; block > 0; --block, taps_before += taps_of(g))
#if OF_PIXELS
#pragma unroll 1
                for (int kind = 0; kind < CLASSES; ++kind) {
                    const Loads l = loads_of(g, t, kind);
#endif
#pragma unroll 1
                for (int s = FIRST_COLUMN; s < END_COLUMN; s += load_columns(g))
#pragma unroll 1
                    for (int r = FIRST_ROW; r < END_ROW; r += load_rows(g)) {
                        const int x_stage = loaded.stage;
                        const u32 parity = loaded.parity;
                        loaded.next(x_stages);
                        --loads_left;
                        const bool keeps = borrows && loads_left == kept_from_last(consumer);
                        const bool is_last_use = k_round + (ALTERNATE ? 2 : 1) >= k_rounds(g);
                        const int given_back = keeps || !is_last_use ? NONE : x_stage;
                        if (keeps) kept = x_stage;
                        u32 b_column = descriptor_low(x_base + x_stage * x_stage_bytes);
                        u32 a_column = w_own + (FIRST_TAP + r * tap_row(g) + s * tap_column(g)) * (W_STAGE_BYTES >> 4);
                        barrier_wait(bar.x_full + 8 * x_stage, parity);
                        FIND_TAPS
#pragma unroll 1
                        for (int i = COLUMNS_OF_LOAD; i > 0; --i) {
                            const bool is_last = loads_left == 0 && i == 1;
                            const int last_x = i == 1 ? given_back : NONE;
                            u32 a = a_column, b = b_column;
                            a_column += tap_column(g) * (W_STAGE_BYTES >> 4), b_column += x_column_step(g);
                            if (resident) {
                                const int a_step = tap_row(g) * (W_STAGE_BYTES >> 4);
                                pass_turn(is_last);
                                wgmma_fence();
                                if (ROWS_OF_LOAD == 3) {  // without a loop's delays, which small tiles would show
                                    multiply_tap(a, b);
                                    multiply_tap(a + a_step, b + row_step);
                                    multiply_tap(a + 2 * a_step, b + 2 * row_step);
                                    wgmma_commit();
                                } else if (PAIRED) {
                                    multiply_tap(a, b);
                                    multiply_tap(a + a_step, b + row_step);
                                    wgmma_commit();
                                } else {
                                    for (int j = ROWS_OF_LOAD; j > 0; --j, a += a_step, b += row_step) multiply_tap(a, b), wgmma_commit();
                                }
                                give_back(last_x, NONE);
                                if (!ALTERNATE && lead > 0 && --lead == 0 && lane == 0) barrier_arrive(bar.turn);
                            } else {
#pragma unroll 1
                                for (int j = ROWS_OF_LOAD; j > 0; --j, b += row_step) {
                                    const int w_stage = w_ring.stage;
                                    barrier_wait(bar.w_full + 8 * w_stage, w_ring.parity);
                                    w_ring.next(g.w_stages);
                                    pass_turn(is_last && j == 1);
                                    wgmma_fence();
                                    multiply_tap(w_own + w_stage * (W_STAGE_BYTES >> 4), b);
                                    wgmma_commit();
                                    give_back(j == 1 ? last_x : NONE, w_stage);
                                    if (!ALTERNATE && lead > 0 && --lead == 0 && lane == 0) barrier_arrive(bar.turn);
                                }
                            }
                        }
                    }
#if OF_PIXELS
                }
#endif
            if (k_round == k_rounds(g) - 1) x_ring = loaded;

            // The next tile, while the product runs.
            walk.next(g);
            if (ALTERNATE) skip_tile();
            round += ALTERNATE ? 2 : 1;
            lives = find_next();
            wgmma_wait<0>();
            if (lane == 0) {
                if (release_x != NONE) barrier_arrive(bar.x_empty + 8 * release_x);
                if (release_w != NONE) barrier_arrive(bar.w_empty + 8 * release_w);
            }

#if !POOL
            if (!PAIRED && partial) {
                const int unit = (t.item * g.k_groups + k_group) * (CHANNELS / 64) + (ALTERNATE ? 0 : consumer);
                store_partial<PIXELS>(sums, partial + ((u64)blockIdx.y * g.units + unit) * (PIXELS * 64), warp, lane);
                continue;
            }
#endif
            if (PAIRED) add_pairs(sums);
            float (&results)[OUT_PIXELS / 2] = reinterpret_cast<float (&)[OUT_PIXELS / 2]>(sums);
#if !FLIPPED
            bool adds_bias = g.act && !SECOND;  // else behind the addend, or when what it is taken of is stored
#if POOL
            adds_bias = adds_bias || (!idx && out.bias_is_infinite());  // with it, the maximum of sums says not yet which are NaN
#endif
            if (adds_bias) {
                activate_sums(results, out.bias0, out.bias1, g.act, g.gate);
                out.bias0 = out.bias1 = 0.0f;
            }
#endif
            // Staging may be written when no product of a warp that shares it reads it, and its last tile has left it.
            const int depth = !POOL && g.own_staging == 2 ? 2 : 1;  // tiles that it holds
            const int buffer = consumer * depth + (depth == 2 ? tile & 1 : 0);
            const u32 staging = x_base + (borrows ? kept * g.x_stage_bytes : g.staging_offset + buffer * g.staging_bytes);
#if POOL
            const bool copies = POOLS_IN_REGISTERS && !borrows && !idx;  // what is staged, by the copy engine
#else
            constexpr bool copies = true;
#endif
            if (copies && tile >= depth) barrier_wait(bar.drained + 8 * consumer, (tile - depth) & 1);
            // (The barrier also keeps a warp from arriving twice at `staged` before another has once; where there is staging of one
            // tile, `drained` does. Of POOL 2, registers spill without it.)
            if (!ALTERNATE && borrows)
                named_barrier(3, 256);
            else if (POOL == 2 || borrows || !copies || depth == 2)
                named_barrier(1 + consumer, 128);
#if POOL
#if POOL == 3
            u32 words[PIXELS / 4];
            stage_tile<PIXELS>(words, sums, out, staging, warp, lane);
            named_barrier(1 + consumer, 128);
            if (g.mean)
                write_windows<RunningSum>(g, t, k, staging, thread, y, idx);
            else
                write_windows<RunningBest>(g, t, k, staging, thread, y, idx);
#else
            if (idx && !g.act && !g.floor) {
                write_pooled<PIXELS, POOLS_IN_REGISTERS, POSITIVE_WINNERS>(g, t, k, sums, out, staging, pooled, pixels, thread, 1 + consumer, y, idx);
            } else if (idx) {
                write_pooled<PIXELS, POOLS_IN_REGISTERS, WINNERS>(g, t, k, sums, out, staging, pooled, pixels, thread, 1 + consumer, y, idx);
#if POOLS_IN_REGISTERS
            } else if (POOL == 4 || copies) {
                if (POOL == 2 && g.mean)
                    stage_windows<PIXELS, true, MEANS>(sums, out, staging, warp, lane);
                else
                    stage_windows<PIXELS, true, MAXIMA>(sums, out, staging, warp, lane);
                fence_async();
                __syncwarp();
                if (lane == 0) barrier_arrive(bar.staged + 8 * consumer);
                continue;
#endif
            } else if (POOL == 2 && g.mean) {
                write_pooled<PIXELS, POOLS_IN_REGISTERS, MEANS>(g, t, k, sums, out, staging, pooled, pixels, thread, 1 + consumer, y, idx);
            } else {
                write_pooled<PIXELS, POOLS_IN_REGISTERS, MAXIMA>(g, t, k, sums, out, staging, pooled, pixels, thread, 1 + consumer, y, idx);
            }
#endif
            if (borrows) {
                fence_async();
                __syncwarp();
                if (lane == 0) barrier_arrive(bar.x_empty + 8 * kept);
            }
#else
#if READS_OPERANDS
            const auto bring = [&](const TensorMap &operand) {
                if (thread == 0) {
                    barrier_expect(bar.operand + 8 * consumer, g.operand_bytes);
                    load_pixels(g, staging, operand, bar.operand + 8 * consumer, k, operand_w, operand_h, t.n);
                }
                barrier_wait(bar.operand + 8 * consumer, operand_parity);
                operand_parity ^= 1;
            };
#endif
#if FLIPPED
            if (!MOMENTS && g.add) {
                bring(addend);
                add_staged<OUT_PIXELS>(results, staging, warp, lane);
                if (g.act) {
                    fence_async();
                    named_barrier(1 + consumer, 128);
                }
            }
            if (!MOMENTS && g.act) {
                bring(saved);
                multiply_by_derivative<OUT_PIXELS>(results, g.act, g.gate, staging, warp, lane);
            }
#elif SECOND
            if (g.add) {
                bring(second);
                add_staged<OUT_PIXELS>(results, staging, warp, lane);
            } else {
                const Outputs before = {out.bias0, out.bias1, 0xff80ff80u};  // without the floor that ReLU is
                u32 kept_words[OUT_PIXELS / 4];
                stage_tile<OUT_PIXELS>(kept_words, results, before, staging, warp, lane);
                fence_async();
                named_barrier(1 + consumer, 128);
                if (thread == 0) {
                    store_pixels(g, second, staging, k, t.w, t.h, t.n);
                    store_wait<0>();
                }
                named_barrier(1 + consumer, 128);
            }
            if (g.act) {
                activate_sums(results, out.bias0, out.bias1, g.act, g.gate);
                out.bias0 = out.bias1 = 0.0f;
            }
#endif
#if FLIPPED && MOMENTS
            const int own_k = t.k + first_channel();
            const NormChannels channels(norm, own_k, g.k);
            bring(saved);
            NormSums norm_sums;
            norm_sums.stage_tile<PIXELS>(sums, channels, g.act, inside, ends_within(g, t), staging, warp, lane);
            norm_sums.write({partial_rows, row_count, g.k}, norm, quotient(t.item, g.by_k_inner), own_k, lane);
#else
            u32 words[OUT_PIXELS / 4];
            stage_tile<OUT_PIXELS>(words, results, out, staging, warp, lane);
#endif
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(bar.staged + 8 * consumer);
#if MOMENTS && !FLIPPED
            // The tile once more: there are no registers to keep its place in beside a product.
            int k_round_before;
            const int item = item_at(g, order, slot, round - (ALTERNATE ? 2 : 1), k_round_before);
            const Tile done = tile_of(g, item, k_group + k_round_before);
            if (by_patch) moments.count = 0.0f;
            moments.add_tile<PIXELS>(words, inside, ends_within(g, done), lane);
            if (by_patch) moments.write(rows, quotient(item, g.by_k_inner), done.k + first_channel(), lane);
#endif
#endif
        }
        if (!ALTERNATE && lead > 0 && lane == 0) barrier_arrive(bar.turn);
#if MOMENTS && !FLIPPED
        if (!by_patch) moments.write(rows, slot * Rows + (ALTERNATE ? consumer : 0), k_group * CHANNELS + first_channel(), lane);
#endif
    }
}
