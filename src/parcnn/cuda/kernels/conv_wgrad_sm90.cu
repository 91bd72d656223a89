// Gradient of a convolution with respect to its filters and bias on Hopper's tensor cores; x (N,H,W,C), dy (N,P,Q,K)
// bf16; dw (K,R,S,C), db (K) fp32.
//
//     dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c]
//     db[k]       = sum_{n,p,q} dy[n,p,q,k]
//
// conv_wgrad_sm90: D[filter][tap, channel] += dY[pixel][filter] * X[pixel + tap][channel]. Both operands are read from
//   shared memory as TMA writes them, a row of channels for a pixel: M and N run along the rows (the transposed operands
//   of wgmma) and the reduction goes from row to row, 16 pixels an instruction. The last warpgroup keeps a ring of stages
//   full, the others multiply.
//   WINDOW 1: stride 1 or 2, dilation 1. Three warpgroups take three filter rows of the same 64 filters, and the COLUMNS of
//      one wgmma are three filter columns of CB channels each: windows of one tile of x with its halo that overlap, a
//      pixel (the operand's leading stride) apart. So one stage serves nine taps. Tiles are eight pixels wide; of an image
//      the 16 pixels of an instruction are two neighbouring rows, of two images the same row of both. Or they are as wide as
//      the image: their rows, with the halo, follow each other as one line of pixels, where dy has zeros in the halo's place.
//      Where the halo is padding on both sides, one zero pixel stands between two rows.
//      Larger filters are covered by several such groups of taps, what hangs over is not stored.
//      Of stride 2, the even and the odd rows of x, and its columns, are images of their own, and every other tap of the filter
//      has stride 1 in one of them: those are the taps of a window.
//   WINDOW 0: one tap an item, its stride and dilation in the copies; CONSUMERS * 64 filters, COLUMNS channels. A 1x1
//      convolution is a matrix product in this form. Any tile of a multiple of 16 pixels. Outputs whose tap lies in the
//      padding are left out: of 3x3 on 7x7 images that is 18 % of the work.
//   Pixels of a tile beyond the outputs are zeros of dy (TMA's), which meet whatever of x lies there: an infinity in x can
//   make NaN of a tap that does not reach it.
//   SHARERS 2: two blocks take neighbouring filters of an item and share its x; each copies half of it for both.
//   ADDERS 2: two blocks take an item, half of its tiles each, and add up: each gets half of the columns from the other, which
//   pushes them to its shared memory once its ring is read, where a barrier counts their bytes. Nothing is left to be added.
//   Such blocks are a cluster.
//   db: warps of the last warpgroup, one for 64 filters, add up the stages' dy beside the tensor cores.
//
//   Work is a line: item after item (filters, channels, tap), of each the tiles of its pixels; a block takes `share` tiles
//   of it. So all blocks have as much to do, and an item's sums lie in one block or a few that follow each other ("stream-K",
//   Osama et al., PPoPP '23). The block that begins an item writes to dw and db, one that goes on with it to its own place in
//   `partial`, [eight columns][consumer thread] of four, then the sums of dy.
//   Blocks of an item take its tiles in turns, each its own in the images' order: all blocks read the same images at a time,
//   which come from memory once. Or each item begins with a block; then a block's tiles are neighbours, and so are the
//   blocks that have the same tiles of different items.
// conv_wgrad_sm90_sum: adds to dw and db what lies in `partial`, in the blocks' order. A thread has EIGHTS fours, or blockDim.y
//   threads share one.
//
// grid: blocks of 128 (CONSUMERS + 1) threads, one for each share, for each sharer. Bytes: an item reads its channels of x and dy
// once from L2 (x with its halo); partial sums are written and read once.
// Preconditions: C and K are multiples of 8; tensors have less than 2^31 elements, the line less than 2^30 tiles.
// Macros: WINDOW, CONSUMERS, COLUMNS, CB (32 or 64), SHARERS, ADDERS (one of them 2, or none) for the first; EIGHTS (1, 4) for the sum.

#include "conv_wgrad_sm90.cuh"
#include "sm90_wgmma.cuh"

constexpr int WINDOW_TAPS = 3;  // filter rows, and columns, of a window

// ---- Items ----------------------------------------------------------------------------------------------------------
// Twins of the structs that conv_wgrad_sm90_tiles.py builds.

// Filter rows and the image's, or columns.
struct Axis {
    int in, out, tile;                               // the image's, the outputs', a tile's
    int pad, stride, dilation;
    int taps, taps_per_item, halves;                 // halves 2: the even and the odd are images of their own, each with its taps
    int whole;                                       // the tap that takes all outputs, also those whose x is padding; TAPS_WHOLE: each
    int tiles, all_tiles;                            // of all outputs; of all taps together
    FastDiv by_stride, by_tile;
};
#define TAPS_WHOLE (-2)

struct Items {
    Axis rows, columns;
    int c, k, filters, channels;                     // of the tensors; of an item
    int image_tiles, share, tiles;                   // along the images; of a block; of the line
    int most;                                        // of an item's filters and channels, where each begins with a block
    FastDiv by_place, by_filters_channels, by_c_blocks;  // tiles with a place in `partial`; of all taps of filters and channels
};

// Outputs that a tap reaches: the first, and how many tiles.
struct Span {
    int first, tiles;
};

// What a block works on: first filter, channel and tap, its outputs, and its tiles of the line.
struct Item {
    int k, c, r, s;
    Span rows, columns;
    int begin, tiles;
};

// The first tap of the next item, after that of the first tap `tap`.
__device__ __forceinline__ int next_tap(const Axis &a, int tap) {
    if (a.halves == 1) return tap + a.taps_per_item;
    return tap & 1 ? tap + 2 * a.taps_per_item - 1 : tap + 1;
}

__device__ __forceinline__ Span span_of(const Axis &a, int tap) {
    if (a.whole == TAPS_WHOLE || a.whole == tap) return {0, a.tiles};
    const int shift = a.pad - tap * a.dilation;
    const int first = min(quotient(max(shift, 0) + a.stride - 1, a.by_stride), a.out - 1);
    const int end = min(quotient(max(shift + a.in - 1, 0), a.by_stride) + 1, a.out);
    return {first, quotient(max(end - first, 1) + a.tile - 1, a.by_tile)};
}

// The item with the tile `at` of the line.
__device__ __forceinline__ Item item_of(const Items &g, int at) {
    Item o;
    int rest, c_block;
    o.k = divide(divide(at, g.by_filters_channels, rest), g.by_c_blocks, c_block) * g.filters, o.c = c_block * g.channels;
    o.begin = at - rest, o.r = 0, o.s = 0;
    for (const int tiles = g.columns.all_tiles * g.image_tiles;; o.r = next_tap(g.rows, o.r)) {
        o.rows = span_of(g.rows, o.r);
        if (rest < o.rows.tiles * tiles) break;
        rest -= o.rows.tiles * tiles, o.begin += o.rows.tiles * tiles;
    }
    for (const int tiles = o.rows.tiles * g.image_tiles;; o.s = next_tap(g.columns, o.s)) {
        o.columns = span_of(g.columns, o.s);
        o.tiles = o.columns.tiles * tiles;
        if (rest < o.tiles) break;
        rest -= o.tiles, o.begin += o.tiles;
    }
    return o;
}

// Whether the sums of dy over all outputs come with the item's.
__device__ __forceinline__ bool sums_bias(const Items &g, const Item &item) {
    return item.c == 0 && item.r == max(g.rows.whole, 0) && item.s == max(g.columns.whole, 0);
}

// Where the sums go that a consumer thread has of an item's columns: of eight at a time, two channels of the filters k and k + 8.
struct Place {
    float *low, *high;                               // of the filter k, of k + 8; null: it hangs over
    int channels;                                    // of the tensor, from this one on

    // `own_k`: the block's first filter, of the item's; `chunk`: of a window, its column of taps.
    __device__ __forceinline__ Place(const Items &g, const Item &item, float *dw, int own_k, bool window, int chunk, int thread) {
        const int group = thread >> 7, warp = thread >> 5 & 3, lane = thread & 31, taps_r = g.rows.taps, taps_s = g.columns.taps;
        const int k = item.k + own_k + (window ? 0 : group * 64) + warp * 16 + (lane >> 2), c = item.c + (lane & 3) * 2;
        const int r = item.r + (window ? group * g.rows.halves : 0), s = item.s + chunk * g.columns.halves;
        const bool is_tap = r < taps_r && s < taps_s;
        float *to = dw + ((u32)(k * taps_r + r) * taps_s + s) * g.c + c;
        low = is_tap && k < g.k ? to : nullptr, high = is_tap && k + 8 < g.k ? to + 8 * taps_r * taps_s * g.c : nullptr;
        channels = g.c - c;
    }
    __device__ __forceinline__ float2 *of_low(int eight) const { return pair(low, eight); }
    __device__ __forceinline__ float2 *of_high(int eight) const { return pair(high, eight); }
    __device__ __forceinline__ float2 *pair(float *first, int eight) const {
        return first && 8 * eight < channels ? reinterpret_cast<float2 *>(first + 8 * eight) : nullptr;
    }
};

#ifdef COLUMNS

DEFINE_WGMMA(multiply, COLUMNS, 1, 1)

constexpr int X_CHUNKS = WINDOW ? 1 : COLUMNS / CB;  // loads of x, CB channels each, of a stage
constexpr int DY_CHUNKS = WINDOW ? 1 : CONSUMERS;    // loads of dy, 64 filters each
constexpr int CLUSTER = SHARERS * ADDERS;
constexpr int OWN_X_CHUNKS = X_CHUNKS / SHARERS;      // that a block copies for all of them
static_assert(X_CHUNKS % SHARERS == 0, "both blocks of a pair copy as much");
constexpr int CHUNKS = WINDOW ? WINDOW_TAPS : 1, CHUNK_EIGHTS = COLUMNS / 8 / CHUNKS;  // columns of a tap
constexpr int OWN_EIGHTS = COLUMNS / 8 / ADDERS;      // of columns, that a block adds up: the even ones, or the odd
constexpr u32 EIGHT_BYTES = 16 * 128 * CONSUMERS, SUMS_BYTES = OWN_EIGHTS * EIGHT_BYTES;  // that a block gets of one; of all
constexpr u32 BIAS_BYTES = 256 * DY_CHUNKS;
static_assert(SHARERS == 1 || ADDERS == 1, "clusters of four do not all fit on the device at once");
static_assert(ADDERS == 1 || !WINDOW, "windows have too many sums for it to pay");
static_assert(!WINDOW || (CONSUMERS == WINDOW_TAPS && COLUMNS == WINDOW_TAPS * CB), "a window is three rows of three taps");

// Twin of the struct that conv_wgrad_sm90.py builds.
struct Problem {
    Items items;
    int tile_n;                                      // images of a tile
    int places;                                      // of an item in `partial`, where each begins with a block; else 0
    int slot_size;                                   // elements of a block's place in `partial`
    int steps;                                       // of 16 pixels in a tile
    u32 x_descriptor, x_leading_bytes, x_step;       // upper half; between chunks of columns; to the next step (16-byte units)
    u32 dy_descriptor, dy_step;
    int x_row_bytes;                                 // of the window's tile
    int x_box_bytes, dy_box_bytes;                   // of a stage: what arrives of a chunk of x, of dy
    int x_chunk_bytes, dy_chunk_bytes, load_bytes;   // its place; all that arrives
    int stage_bytes, stages, ring_bytes;             // of all stages, or of the sums that come after them
    FastDiv by_items;
};

// Division by a number of one item, n >= 0: the quotient is at most one too small before it is corrected.
struct Divisor {
    int d;
    u32 inverse;

    __device__ __forceinline__ explicit Divisor(int d) : d(d), inverse(0xffffffffu / (u32)d) {}
    __device__ __forceinline__ int divide(int n, int &rest) const {
        const int q = (int)__umulhi((u32)n, inverse);
        rest = n - q * d;
        if (rest < d) return q;
        rest -= d;
        return q + 1;
    }
};

// Which of an item's tiles a block takes at the i-th step of its share. The shares are the columns of a matrix of which the
// item has what lies between its begin and its end; its tiles are dealt row by row.
struct Walk {
    int columns, own, first_row, last_row;

    __device__ __forceinline__ Walk(const Items &g, const Item &item, int share) {
        const int first = divide(item.begin, g.by_place, first_row);
        columns = divide(item.begin + item.tiles - 1, g.by_place, last_row) - first + 1, own = share - first;
    }
    __device__ __forceinline__ int tile(int i) const {
        return i * columns - min(i, first_row) - max(i - last_row - 1, 0) + own - (i < first_row);
    }
};

// From outputs to the pixels that a tap multiplies them with: of which half, the first output's, from output to output.
struct Way {
    int half, first, step;

    __device__ __forceinline__ Way(const Axis &a, int tap) {
        const int pixel = tap * a.dilation - a.pad, shift = a.halves >> 1;
        half = pixel & shift, first = pixel >> shift, step = a.stride >> shift;
    }
};

// Zeros in shared memory, by all threads.
__device__ __forceinline__ void clear(u32 at, int nbytes) {
    for (int i = threadIdx.x * 16; i < nbytes; i += blockDim.x * 16) store_shared16(at + i, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
}

// ---- Blocks that share ------------------------------------------------------------------------------------------------

#ifndef HOST_EMULATION
// Arrive at the barrier at the same place of the cluster's `block`. It orders nothing beyond the own block: a release for the
// cluster is a fence of the whole GPU, a microsecond.
__device__ __forceinline__ void barrier_arrive_at(int block, u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at(block, barrier)) : "memory");
}

// `load_tile` for each block of the cluster whose bit is set in `blocks`, to the same place of its shared memory; it counts at
// the barrier of that place too.
__device__ __forceinline__ void load_tile_to(u16 blocks, u32 to, const TensorMap &map, u32 barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3,%4,%5,%6}], [%2], %7;" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks)
                 : "memory");
}
#endif

// A warp has read a stage: of all blocks whose copies it comes from.
__device__ __forceinline__ void release(u32 empty, int lane) {
    if (SHARERS == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else if (lane < SHARERS) {
        barrier_arrive_at(lane, empty);
    }
}

extern "C" __global__ void
#if SHARERS * ADDERS > 1
__cluster_dims__(SHARERS * ADDERS, 1, 1)
#endif
__launch_bounds__(128 * (CONSUMERS + 1), 1)
    conv_wgrad_sm90(const __grid_constant__ TensorMap x00, const __grid_constant__ TensorMap x01, const __grid_constant__ TensorMap x10,
                    const __grid_constant__ TensorMap x11, const __grid_constant__ TensorMap dy, float *__restrict__ dw,
                    float *__restrict__ db, float *__restrict__ partial, const __grid_constant__ Problem g) {
    ALIGNED_SHARED(u8, shared);
    const u32 base = shared_address(shared), full = base + g.ring_bytes, empty = full + 8 * g.stages;
    const u32 ring_read = empty + 8 * g.stages, sums_here = ring_read + 8;  // the other's ring; its sums
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const int block = blockIdx.x % CLUSTER, sharer = SHARERS > 1 ? block : 0, adder = ADDERS > 1 ? block : 0;
    const int own_k = sharer * (DY_CHUNKS * 64);
    int place = blockIdx.x / CLUSTER, place_item;
    if (g.places) place = divide(place, g.by_items, place_item), place += place_item * g.places;
    const int share = ADDERS * place + adder;
    const int begin = share * g.items.share;
    const FastDiv &by_item = g.items.by_filters_channels;
    const int end = min(min(begin + g.items.share, g.items.tiles), quotient(begin, by_item) * (int)by_item.d + g.items.most);
    const int readers = 4 * CONSUMERS + (db ? DY_CHUNKS : 0);  // warps, of a stage
    if (threadIdx.x == 0) {
        for (int i = 0; i < g.stages; ++i)
            barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, SHARERS * readers);
        if (ADDERS > 1) {
            barrier_init(ring_read, readers), barrier_init(sums_here, 1);
            barrier_expect(sums_here, SUMS_BYTES + (db && adder == 0 ? BIAS_BYTES : 0));
        }
        barrier_init_fence();
        prefetch(x00), prefetch(dy);
    }
    if (WINDOW) {  // zeros behind a line of pixels
        for (int i = 0; i < g.stages; ++i) {
            const u32 at = base + i * g.stage_bytes;
            clear(at + g.x_box_bytes, g.x_chunk_bytes - g.x_box_bytes);
            clear(at + g.x_chunk_bytes + g.dy_box_bytes, g.dy_chunk_bytes - g.dy_box_bytes);
        }
        fence_async();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_meet();
    await_predecessors();
    float *own = partial + (u64)(place * SHARERS + sharer) * g.slot_size;
    const u32 dy_offset = X_CHUNKS * g.x_chunk_bytes;
    Ring ring;

    if (group == CONSUMERS) {
        if (CONSUMERS == 2) give_registers<64>();
        if (CONSUMERS == 3) give_registers<56>();
        if (warp == 0 && lane == 0) {
            const Axis &rows = g.items.rows, &columns = g.items.columns;
            for (int at = begin; at < end;) {
                const Item item = item_of(g.items, at);
                const Walk walk(g.items, item, share);
                const Divisor by_rows(item.rows.tiles), by_columns(item.columns.tiles);
                const Way down(rows, item.r), right(columns, item.s);
                const TensorMap &x = down.half ? right.half ? x11 : x10 : right.half ? x01 : x00;
                for (const int last = min(item.begin + item.tiles, end); at < last; ++at, ring.next(g.stages)) {
                    int column, row;
                    const int tile = ADDERS > 1 || g.places ? at - item.begin : walk.tile(at - begin);
                    const int n = by_rows.divide(by_columns.divide(tile, column), row) * g.tile_n;
                    const int q = item.columns.first + column * columns.tile, p = item.rows.first + row * rows.tile;
                    const int w = q * right.step + right.first, h = p * down.step + down.first;
                    const u32 to = base + ring.stage * g.stage_bytes, barrier = full + 8 * ring.stage;
                    barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
                    barrier_expect(barrier, g.load_bytes);
                    for (int i = 0; i < OWN_X_CHUNKS; ++i) {
                        const int j = sharer * OWN_X_CHUNKS + i;
                        if (SHARERS > 1) load_tile_to((1 << SHARERS) - 1, to + j * g.x_chunk_bytes, x, barrier, item.c + j * CB, w, h, n);
                        else load_tile(to + j * g.x_chunk_bytes, x, barrier, item.c + j * CB, w, h, n);
                    }
                    for (int j = 0; j < DY_CHUNKS; ++j)
                        load_tile(to + dy_offset + j * g.dy_chunk_bytes, dy, barrier, item.k + own_k + j * 64, q, p, n);
                }
            }
            if (SHARERS > 1)  // a block's memory lives until the other has arrived at its barriers for the last time
                for (int i = 0; i < g.stages; ++i, ring.next(g.stages)) barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        }
        const bool has_bias = db && warp >= 1 && warp <= DY_CHUNKS;
        // Lanes 0 to 7 have the first four of eight filters, 8 to 15 the others.
        const int half = lane >> 3 & 1, filter = (warp - 1) * 64 + (lane & 7) * 8 + half * 4;
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        auto store_bias = [&](const Item &item, int from) {
            float *to = from == item.begin ? db + item.k + own_k : own + 64 * CONSUMERS * COLUMNS;
            if (sums_bias(g.items, item) && lane < 16 && item.k + own_k + filter < g.items.k) store4(to + filter, v);
        };
        if (has_bias) {
            for (int at = begin, count; at < end; at += count) {
                const Item item = item_of(g.items, at);
                count = min(item.begin + item.tiles, end) - at;
                const bool adds = sums_bias(g.items, item);
                float bias[8] = {};
                for (int i = 0; i < count; ++i, ring.next(g.stages)) {
                    barrier_wait(full + 8 * ring.stage, ring.parity);
                    if (adds) add_pixels(bias, base + ring.stage * g.stage_bytes + dy_offset + (warp - 1) * g.dy_chunk_bytes, 16 * g.steps, lane);
                    __syncwarp();
                    release(empty + 8 * ring.stage, lane);
                }
                add_lanes(bias);
                v = half ? make_float4(bias[4], bias[5], bias[6], bias[7]) : make_float4(bias[0], bias[1], bias[2], bias[3]);
                if (ADDERS == 1) store_bias(item, at);
            }
            if (ADDERS > 1) {
                const u32 at = base + SUMS_BYTES + 4 * filter;
                if (lane == 0) barrier_arrive_at(block ^ 1, ring_read);
                if (block == 0) {
                    barrier_wait(sums_here, 0);
                    add_shared(v, at);
                    store_bias(item_of(g.items, begin), begin);
                } else {
                    barrier_wait(ring_read, 0);
                    if (lane < 16) push16(address_at(0, at), v, address_at(0, sums_here));
                }
            }
        }
    } else {
        if (CONSUMERS == 2) take_registers<216>();
        if (CONSUMERS == 3) take_registers<152>();
        const u32 own_x = base + (WINDOW ? group * g.x_row_bytes : 0);
        const u32 own_dy = base + dy_offset + (WINDOW ? 0 : group * g.dy_chunk_bytes);
        float sums[COLUMNS / 2];
        if (ADDERS > 1) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) sums[i] = 0.0f;  // of a block without tiles
        }
        auto sums_of = [&](int j) { return make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]); };
        auto store_partial = [&](int j, float4 v) { store4(own + 4 * (j * 128 * CONSUMERS + threadIdx.x), v); };
        auto store_result = [&](const Place &place, int eight, float4 v) {
            if (float2 *to = place.of_low(eight)) *to = make_float2(v.x, v.y);
            if (float2 *to = place.of_high(eight)) *to = make_float2(v.z, v.w);
        };
        for (int at = begin, count; at < end; at += count) {
            const Item item = item_of(g.items, at);
            count = min(item.begin + item.tiles, end) - at;
            u32 add = 0;
            int read = -1;  // the stage before this one
            for (int i = 0; i < count; ++i, ring.next(g.stages)) {
                const u32 offset = ring.stage * g.stage_bytes;
                barrier_wait(full + 8 * ring.stage, ring.parity);
                u64 a = descriptor_of(g.dy_descriptor, descriptor_low(own_dy + offset));
                u64 b = descriptor(g.x_descriptor, g.x_leading_bytes, own_x + offset);
                wgmma_fence();
                multiply(sums, a, b, add);
                wgmma_commit();
                wgmma_wait<1>();  // all but this product are done; it keeps the tensor cores busy meanwhile
                if (read >= 0) release(empty + 8 * read, lane);
                read = ring.stage, add = 1;
#pragma unroll 1
                for (int step = 1; step < g.steps; ++step) {
                    a += g.dy_step, b += g.x_step;
                    wgmma_fence();
                    multiply(sums, a, b, 1);
                    wgmma_commit();
                }
            }
            wgmma_wait<0>();
            release(empty + 8 * read, lane);
            if (partial && at + count == end) let_successors_start();  // the closing sum

            if (ADDERS > 1) continue;
            if (at > item.begin) {
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j) store_partial(j, sums_of(j));
            } else {
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                    const Place place(g.items, item, dw, own_k, WINDOW, chunk, threadIdx.x);
#pragma unroll
                    for (int j = 0; j < CHUNK_EIGHTS; ++j) store_result(place, j, sums_of(chunk * CHUNK_EIGHTS + j));
                }
            }
        }
        if (ADDERS > 1) {
            const u32 here = base + threadIdx.x * 16, there = address_at(block ^ 1, here), sums_there = address_at(block ^ 1, sums_here);
            if (lane == 0) barrier_arrive_at(block ^ 1, ring_read);
            barrier_wait(ring_read, 0);
            const Item item = item_of(g.items, ADDERS * place * g.items.share);
            const Place to(g.items, item, dw, own_k, WINDOW, 0, threadIdx.x);
#pragma unroll
            for (int j = 0; j < OWN_EIGHTS; ++j) push16(there + j * EIGHT_BYTES, block ? sums_of(2 * j) : sums_of(2 * j + 1), sums_there);
            barrier_wait(sums_here, 0);
#pragma unroll
            for (int j = 0; j < OWN_EIGHTS; ++j) {
                float4 v = block ? sums_of(2 * j + 1) : sums_of(2 * j);
                add_shared(v, here + j * EIGHT_BYTES);
                store_result(to, 2 * j + block, v);
            }
        }
    }
    if (SHARERS > 1) cluster_meet();  // the other block's warps arrive at this one's barriers up to their last tile
}

#else

// Twin of the struct that conv_wgrad_sm90.py builds.
struct Parts {
    Items items;
    int window, chunk_channels;                      // WINDOW and CB of what made the parts
    int slot_size, sums;                             // elements of a block's place; threads for those of products
    int sharers;                                     // SHARERS of it
    FastDiv by_threads, by_chunks, by_tap_rows, by_tap_columns;  // consumer threads; blocks an item; items of a filter's taps
};

extern "C" __global__ void __launch_bounds__(256)
    conv_wgrad_sm90_sum(const float *__restrict__ partial, float *__restrict__ dw, float *__restrict__ db, const __grid_constant__ Parts g) {
    __shared__ Item shared_item;
    __shared__ float4 shared_sums[EIGHTS > 1 ? 1 : 256];
    int chunk;
    const int part = divide(blockIdx.x, g.by_chunks, chunk), number = part / g.sharers, block = part - number * g.sharers;
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        int row, column, c_block;
        const Items &items = g.items;
        const int both = divide(divide(number, g.by_tap_columns, column), g.by_tap_rows, row);
        Item o;
        o.k = divide(both, items.by_c_blocks, c_block) * items.filters, o.c = c_block * items.channels;
        o.begin = both * (int)items.by_filters_channels.d, o.r = 0, o.s = 0;
        for (;; o.r = next_tap(items.rows, o.r)) {
            o.rows = span_of(items.rows, o.r);
            if (row-- == 0) break;
            o.begin += o.rows.tiles * items.columns.all_tiles * items.image_tiles;
        }
        for (;; o.s = next_tap(items.columns, o.s)) {
            o.columns = span_of(items.columns, o.s);
            o.tiles = o.rows.tiles * o.columns.tiles * items.image_tiles;
            if (column-- == 0) break;
            o.begin += o.tiles;
        }
        shared_item = o;
    }
    __syncthreads();
    await_predecessors();
    const Item item = shared_item;
    const int filters = g.items.filters / g.sharers, own_k = block * filters;
    // Shares after the first that has of the item.
    const int first = quotient(item.begin, g.items.by_place) + 1, end = quotient(item.begin + item.tiles - 1, g.items.by_place) + 1;
    if (first >= end) return;
    const int at = chunk * blockDim.x + threadIdx.x, each = (end - first + blockDim.y - 1) / blockDim.y;
    const int own_first = first + threadIdx.y * each, own_end = min(end, own_first + each);
    // Four sums of dy have one place, those of products two.
    float2 *places[EIGHTS][2] = {};
    int from = 0, step = 0;
    if (at < g.sums) {
        int thread;
        const int j = divide(at, g.by_threads, thread) * EIGHTS, chunk = g.window ? j / (g.chunk_channels / 8) : 0;
        const Place place(g.items, item, dw, own_k, g.window, chunk, thread);
        step = 4 * g.by_threads.d, from = j * step + 4 * thread;
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) {
            const int eight = j - chunk * (g.chunk_channels / 8) + e;
            places[e][0] = place.of_low(eight), places[e][1] = place.of_high(eight);
        }
    } else if (db && sums_bias(g.items, item)) {
        const int filter = own_k + (at - g.sums) * 4;
        if (filter < own_k + filters && item.k + filter < g.items.k)
            places[0][0] = reinterpret_cast<float2 *>(db + item.k + filter), places[0][1] = places[0][0] + 1;
        from = 4 * (g.sums * EIGHTS + at - g.sums);
    }
    float4 sums[EIGHTS];
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
        sums[e] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (threadIdx.y == 0 && places[e][0]) sums[e].x = places[e][0]->x, sums[e].y = places[e][0]->y;
        if (threadIdx.y == 0 && places[e][1]) sums[e].z = places[e][1]->x, sums[e].w = places[e][1]->y;
    }
#pragma unroll(8 / EIGHTS)
    for (int share = own_first; share < own_end; ++share) {
        const float *part = partial + (u64)(share * g.sharers + block) * g.slot_size + from;
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e)
            if (places[e][0]) add(sums[e], load4(part + e * step));
    }
    if (blockDim.y > 1) {
        shared_sums[threadIdx.y * blockDim.x + threadIdx.x] = sums[0];
        __syncthreads();
        if (threadIdx.y != 0) return;
        for (int part = 1; part < blockDim.y; ++part) add(sums[0], shared_sums[part * blockDim.x + threadIdx.x]);
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
        if (places[e][0]) *places[e][0] = make_float2(sums[e].x, sums[e].y);
        if (places[e][1]) *places[e][1] = make_float2(sums[e].z, sums[e].w);
    }
}

#endif
