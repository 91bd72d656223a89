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
//   WINDOW 1: stride and dilation 1. Three warpgroups take three filter rows of the same 64 filters, and the COLUMNS of
//      one wgmma are three filter columns of CB channels each: windows of one tile of x with its halo that overlap, a
//      pixel (the operand's leading stride) apart. So one stage serves nine taps. Tiles are eight pixels wide; of an image
//      the 16 pixels of an instruction are two neighbouring rows, of two images the same row of both. Or they are as wide as
//      the image: their rows, with the halo, follow each other as one line of pixels, where dy has zeros in the halo's place.
//      Where the halo is padding on both sides, one zero pixel stands between two rows.
//      Larger filters are covered by several such groups of taps, what hangs over is not stored.
//   WINDOW 0: one tap an item, its stride and dilation in the copies; CONSUMERS * 64 filters, COLUMNS channels. A 1x1
//      convolution is a matrix product in this form. Any tile of a multiple of 16 pixels. Outputs whose tap lies in the
//      padding are left out: of 3x3 on 7x7 images that is 18 % of the work.
//   Pixels of a tile beyond the outputs are zeros of dy (TMA's), which meet whatever of x lies there: an infinity in x can
//   make NaN of a tap that does not reach it.
//   PAIR_X: two blocks take neighbouring filters of an item and share its x; each copies half of it for both.
//   PAIR_SUMS: two blocks take one item, and each adds half of the other's sums to its own before they are written.
//   db: warps of the last warpgroup, one for 64 filters, add up the stages' dy beside the tensor cores.
//
//   Work is a line: item after item (filters, channels, tap), of each the tiles of its pixels; a block takes `share` tiles
//   of it. So all blocks have as much to do, and an item's sums lie in one block or a few that follow each other ("stream-K",
//   Osama et al., PPoPP '23). The block that begins an item writes to dw and db, one that goes on with it to its own place in
//   `partial`, [eight columns][consumer thread] of four, then the sums of dy.
//   Blocks of an item take its tiles in turns, each its own in the images' order: all blocks read the same images at a time,
//   which come from memory once. Or each item begins with a block; then a block's tiles are neighbours, and so are the
//   blocks that have the same tiles of different items.
// conv_wgrad_sm90_sum: adds to dw and db what lies in `partial`, in the blocks' order; blockDim.y threads share an element.
//
// grid: blocks of 128 (CONSUMERS + 1) threads, one for each share, of PAIR_X two. Bytes: an item reads its channels of x and dy
// once from L2 (x with its halo); partial sums are written and read once.
// Preconditions: C and K are multiples of 8; tensors have less than 2^31 elements, the line less than 2^30 tiles.
// Macros: WINDOW, CONSUMERS, COLUMNS, CB (32 or 64), PAIR for the first; none for the sum.

#include "sm90.cuh"
#include "sm90_wgmma.cuh"

constexpr int WINDOW_TAPS = 3;  // filter rows, and columns, of a window

// ---- Items ----------------------------------------------------------------------------------------------------------
// Twins of the structs that conv_wgrad_sm90.py builds.

// Filter rows and the image's, or columns.
struct Axis {
    int in, out, tile;                               // the image's, the outputs', a tile's
    int pad, stride, dilation;
    int taps, taps_per_item;
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
    for (const int tiles = g.columns.all_tiles * g.image_tiles;; o.r += g.rows.taps_per_item) {
        o.rows = span_of(g.rows, o.r);
        if (rest < o.rows.tiles * tiles) break;
        rest -= o.rows.tiles * tiles, o.begin += o.rows.tiles * tiles;
    }
    for (const int tiles = o.rows.tiles * g.image_tiles;; o.s += g.columns.taps_per_item) {
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

// Calls visit(filter, tap row, tap column, channel) for the first of the sums that a consumer thread has of eight columns j:
// those of the channels c, c + 1 of the filters k and k + 8. `own_k`: the block's first filter, of the item's.
template <class Visit>
__device__ __forceinline__ void place_sums(const Item &item, int own_k, bool window, int chunk_channels, int j, int thread, Visit visit) {
    const int group = thread >> 7, warp = thread >> 5 & 3, lane = thread & 31, chunk = window ? j / (chunk_channels / 8) : 0;
    const int k = item.k + own_k + (window ? 0 : group * 64) + warp * 16 + (lane >> 2);
    visit(k, item.r + (window ? group : 0), item.s + chunk, item.c + (j - chunk * (chunk_channels / 8)) * 8 + (lane & 3) * 2);
}

__device__ __forceinline__ void add(float4 &sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

#ifdef COLUMNS

DEFINE_WGMMA(multiply, COLUMNS, 1, 1)

#define PAIR_X 1
#define PAIR_SUMS 2

constexpr int CLUSTER = PAIR ? 2 : 1;
constexpr int X_CHUNKS = WINDOW ? 1 : COLUMNS / CB;  // loads of x, CB channels each, of a stage
constexpr int DY_CHUNKS = WINDOW ? 1 : CONSUMERS;    // loads of dy, 64 filters each
constexpr int SHARERS = PAIR == PAIR_X ? 2 : 1;       // of a stage's x
constexpr int OWN_X_CHUNKS = X_CHUNKS / SHARERS;      // that a block copies for all of them
static_assert(X_CHUNKS % SHARERS == 0, "both blocks of a pair copy as much");
constexpr u32 SUMS_STRIDE = 16 * 128 * CONSUMERS, SUMS_BYTES = COLUMNS / 16 * SUMS_STRIDE;  // that a block shows the other
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
    int stage_bytes, stages;
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

// Adds up 64 filters' dy of a stage: the lane has eight filters, every fourth pixel. Rows are 128 bytes whose chunks of 16
// are swizzled by the row.
__device__ __forceinline__ void add_pixels(float (&sums)[8], u32 at, int rows, int lane) {
    const u32 row = lane >> 3, chunk = lane & 7;
    const u32 even = at + row * 128 + ((chunk ^ row) << 4), odd = at + (row + 4) * 128 + ((chunk ^ (row + 4)) << 4);
#pragma unroll 2
    for (int i = 0; i < rows; i += 8) {
        const uint4 v[2] = {load_shared16(even + i * 128), load_shared16(odd + i * 128)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 words[4] = {v[half].x, v[half].y, v[half].z, v[half].w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums[2 * e] += __uint_as_float(words[e] << 16);
                sums[2 * e + 1] += __uint_as_float(words[e] & 0xffff0000u);
            }
        }
    }
}

// Zeros in shared memory, by all threads.
__device__ __forceinline__ void clear(u32 at, int nbytes) {
    for (int i = threadIdx.x * 16; i < nbytes; i += blockDim.x * 16) store_shared16(at + i, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
}

// ---- Pairs of blocks --------------------------------------------------------------------------------------------------

// Arrive at the barrier at the same place of the cluster's `block`. It orders nothing beyond the own block: a release for the
// cluster is a fence of the whole GPU, a microsecond.
__device__ __forceinline__ void barrier_arrive_at(int block, u32 barrier) {
    asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
                 "r"(block)
                 : "memory");
}

// `load_tile` for each block of the cluster whose bit is set in `blocks`, to the same place of its shared memory; it counts at
// the barrier of that place too.
__device__ __forceinline__ void load_tile_to(u16 blocks, u32 to, const TensorMap &map, u32 barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3,%4,%5,%6}], [%2], %7;" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks)
                 : "memory");
}

// Among all threads of a cluster. It shows none the others' writes, only initialised barriers after their fence.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed;\n barrier.cluster.wait.acquire;" ::: "memory");
}

// A warp has read a stage: of all blocks whose copies it comes from.
__device__ __forceinline__ void release(u32 empty, int lane) {
    if (SHARERS == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else if (lane < SHARERS) {
        barrier_arrive_at(lane, empty);
    }
}

extern "C" __global__ void
#if PAIR
__cluster_dims__(2, 1, 1)
#endif
__launch_bounds__(128 * (CONSUMERS + 1), 1)
    conv_wgrad_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap dy, float *__restrict__ dw,
                    float *__restrict__ db, float *__restrict__ partial, const __grid_constant__ Problem g) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared), full = base + g.stages * g.stage_bytes, empty = full + 8 * g.stages;
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const int block = blockIdx.x % CLUSTER, sharer = PAIR == PAIR_X ? block : 0, own_k = sharer * (DY_CHUNKS * 64);
    int place = blockIdx.x / CLUSTER, place_item;
    if (g.places) place = divide(place, g.by_items, place_item), place += place_item * g.places;
    const int share = PAIR == PAIR_SUMS ? 2 * place + block : place;
    const int begin = share * g.items.share, pair_begin = 2 * place * g.items.share;
    const FastDiv &by_item = g.items.by_filters_channels;
    const int end = min(min(begin + g.items.share, g.items.tiles), quotient(begin, by_item) * (int)by_item.d + g.items.most);
    if (threadIdx.x == 0) {
        for (int i = 0; i < g.stages; ++i)
            barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, SHARERS * (4 * CONSUMERS + (db ? DY_CHUNKS : 0)));
        barrier_init_fence();
        prefetch(x), prefetch(dy);
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
    if (SHARERS > 1) cluster_meet();
    await_predecessors();
    float *own = partial + (u64)(place * SHARERS + sharer) * g.slot_size;
    const u32 dy_offset = X_CHUNKS * g.x_chunk_bytes;
    Ring ring;

    if (group == CONSUMERS) {
        if (CONSUMERS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (warp == 0 && lane == 0) {
            const Axis &rows = g.items.rows, &columns = g.items.columns;
            for (int at = begin; at < end;) {
                const Item item = item_of(g.items, at);
                const Walk walk(g.items, item, share);
                const Divisor by_rows(item.rows.tiles), by_columns(item.columns.tiles);
                for (const int last = min(item.begin + item.tiles, end); at < last; ++at, ring.next(g.stages)) {
                    int column, row;
                    const int tile = PAIR == PAIR_SUMS || g.places ? at - item.begin : walk.tile(at - begin);
                    const int n = by_rows.divide(by_columns.divide(tile, column), row) * g.tile_n;
                    const int q = item.columns.first + column * columns.tile, p = item.rows.first + row * rows.tile;
                    const int w = q * columns.stride - columns.pad + item.s * columns.dilation;
                    const int h = p * rows.stride - rows.pad + item.r * rows.dilation;
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
            if (PAIR == PAIR_X)  // a block's memory lives until the other has arrived at its barriers for the last time
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
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    bias[e] += __shfl_xor_sync(0xffffffffu, bias[e], 8);
                    bias[e] += __shfl_xor_sync(0xffffffffu, bias[e], 16);
                }
                v = half ? make_float4(bias[4], bias[5], bias[6], bias[7]) : make_float4(bias[0], bias[1], bias[2], bias[3]);
                if (PAIR != PAIR_SUMS) store_bias(item, at);
            }
        }
        if (PAIR == PAIR_SUMS) {
            __syncwarp();
            __syncthreads();
            const u32 at = base + SUMS_BYTES + 4 * filter;
            if (has_bias && lane < 16) store_shared16(at, v);
            cluster_barrier();
            if (has_bias && lane < 16 && block == 0) {
                add(v, load_remote16(at, 1));
                store_bias(item_of(g.items, pair_begin), pair_begin);
            }
        }
    } else {
        if (CONSUMERS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
        const u32 own_x = base + (WINDOW ? group * g.x_row_bytes : 0);
        const u32 own_dy = base + dy_offset + (WINDOW ? 0 : group * g.dy_chunk_bytes);
        float sums[COLUMNS / 2];
        if (PAIR == PAIR_SUMS) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) sums[i] = 0.0f;  // of a block without tiles
        }
        auto sums_of = [&](int j) { return make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]); };
        auto store_partial = [&](int j, float4 v) { store4(own + 4 * (j * 128 * CONSUMERS + threadIdx.x), v); };
        auto store_result = [&](const Item &item, int j, float4 v) {
            place_sums(item, own_k, WINDOW, CB, j, threadIdx.x, [&](int k, int r, int s, int c) {
                const int taps_r = g.items.rows.taps, taps_s = g.items.columns.taps, channels = g.items.c;
                if (r >= taps_r || s >= taps_s || c >= channels) return;
                float *to = dw + ((u32)(k * taps_r + r) * taps_s + s) * channels + c;
                if (k < g.items.k) *reinterpret_cast<float2 *>(to) = make_float2(v.x, v.y);
                if (k + 8 < g.items.k) *reinterpret_cast<float2 *>(to + 8 * taps_r * taps_s * channels) = make_float2(v.z, v.w);
            });
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

            if (PAIR == PAIR_SUMS) continue;
            if (at > item.begin) {
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j) store_partial(j, sums_of(j));
            } else {
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j) store_result(item, j, sums_of(j));
            }
        }
        if (PAIR == PAIR_SUMS) {  // the first block has the even eights of columns, the other one the odd
            const u32 to = base + threadIdx.x * 16;
            __syncthreads();  // nobody reads the ring any more
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j += 2) {
                store_shared16(to + j / 2 * SUMS_STRIDE, block ? sums_of(j) : sums_of(j + 1));
                const float4 v = block ? sums_of(j + 1) : sums_of(j);
                sums[2 * j] = v.x, sums[2 * j + 1] = v.y, sums[2 * j + 2] = v.z, sums[2 * j + 3] = v.w;
            }
            cluster_barrier();
            const Item item = item_of(g.items, pair_begin);
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; ++j) {
                float4 v = sums_of(j);
                add(v, load_remote16(to + j * SUMS_STRIDE, block ^ 1));
                if (pair_begin > item.begin) store_partial(2 * j + block, v);
                else store_result(item, 2 * j + block, v);
            }
        }
    }
    if (PAIR == PAIR_SUMS) cluster_barrier();  // a block's memory lives until the other has read it
}

#else

// Twin of the struct that conv_wgrad_sm90.py builds.
struct Parts {
    Items items;
    int window, chunk_channels;                      // WINDOW and CB of what made the parts
    int slot_size, sums;                             // elements of a block's place; fours of products in it
    int sharers;                                     // SHARERS of it
    FastDiv by_threads, by_chunks, by_tap_rows, by_tap_columns;  // consumer threads; blocks an item; items of a filter's taps
};

extern "C" __global__ void __launch_bounds__(256)
    conv_wgrad_sm90_sum(const float *__restrict__ partial, float *__restrict__ dw, float *__restrict__ db, const __grid_constant__ Parts g) {
    __shared__ Item shared_item;
    __shared__ float4 sums[256];
    int chunk;
    const int part = divide(blockIdx.x, g.by_chunks, chunk), number = part / g.sharers, block = part - number * g.sharers;
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        int row, column, c_block;
        const Items &items = g.items;
        const int both = divide(divide(number, g.by_tap_columns, column), g.by_tap_rows, row);
        Item o;
        o.k = divide(both, items.by_c_blocks, c_block) * items.filters, o.c = c_block * items.channels;
        o.begin = both * (int)items.by_filters_channels.d, o.r = 0, o.s = 0;
        for (;; o.r += items.rows.taps_per_item) {
            o.rows = span_of(items.rows, o.r);
            if (row-- == 0) break;
            o.begin += o.rows.tiles * items.columns.all_tiles * items.image_tiles;
        }
        for (;; o.s += items.columns.taps_per_item) {
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
    float2 *places[2] = {nullptr, nullptr};
    if (at < g.sums) {
        int thread;
        const int j = divide(at, g.by_threads, thread);
        place_sums(item, own_k, g.window, g.chunk_channels, j, thread, [&](int k, int r, int s, int c) {
            const int taps_r = g.items.rows.taps, taps_s = g.items.columns.taps, channels = g.items.c;
            if (r >= taps_r || s >= taps_s || c >= channels) return;
            float *to = dw + ((u32)(k * taps_r + r) * taps_s + s) * channels + c;
            if (k < g.items.k) places[0] = reinterpret_cast<float2 *>(to);
            if (k + 8 < g.items.k) places[1] = reinterpret_cast<float2 *>(to + 8 * taps_r * taps_s * channels);
        });
    } else if (db && sums_bias(g.items, item)) {
        const int filter = own_k + (at - g.sums) * 4;
        if (filter < own_k + filters && item.k + filter < g.items.k)
            places[0] = reinterpret_cast<float2 *>(db + item.k + filter), places[1] = places[0] + 1;
    }
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (threadIdx.y == 0) {
        if (places[0]) sum.x = places[0]->x, sum.y = places[0]->y;
        if (places[1]) sum.z = places[1]->x, sum.w = places[1]->y;
    }
    if (places[0]) {
#pragma unroll 8
        for (int share = own_first; share < own_end; ++share) add(sum, load4(partial + (u64)(share * g.sharers + block) * g.slot_size + 4 * at));
    }
    if (blockDim.y > 1) {
        sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y != 0) return;
        for (int part = 1; part < blockDim.y; ++part) add(sum, sums[part * blockDim.x + threadIdx.x]);
    }
    if (places[0]) *places[0] = make_float2(sum.x, sum.y);
    if (places[1]) *places[1] = make_float2(sum.z, sum.w);
}

#endif
