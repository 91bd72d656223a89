// Gradient of a convolution with respect to its filters and bias on Hopper's tensor cores; x (N,H,W,C), dy (N,P,Q,K)
// bf16; dw (K,R,S,C), db (K) fp32.
//
//     dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c]
//     db[k]       = sum_{n,p,q} dy[n,p,q,k]
//
// conv_wgrad_sm90: D[filter][tap, channel] += dY[pixel][filter] * X[pixel + tap][channel]. Both operands are read from
//   shared memory as TMA writes them, a row of channels for a pixel: M and N run along the rows (the transposed operands
//   of wgmma) and the reduction goes from row to row, 16 pixels an instruction. A block has one item (filters, channels,
//   taps) and one split of the pixels' tiles; the last warpgroup keeps a ring of stages full, the others multiply.
//   WINDOW 1: stride and dilation 1. Three warpgroups take three filter rows of the same 64 filters, and the COLUMNS of
//      one wgmma are three filter columns of CB channels each: windows of one tile of x with its halo that overlap, a
//      pixel (the operand's leading stride) apart. So one stage serves nine taps. Tiles are eight pixels wide; of an image
//      the 16 pixels of an instruction are two neighbouring rows, of two images the same row of both.
//      Larger filters are covered by several such groups of taps, what hangs over is not stored.
//   WINDOW 0: one tap an item, its stride and dilation in the copies; CONSUMERS * 64 filters, COLUMNS channels. A 1x1
//      convolution is a matrix product in this form. Any tile of a multiple of 16 pixels.
//   Pixels of a tile beyond the outputs are zeros of dy (TMA's), which meet whatever of x lies there: an infinity in x can
//   make NaN of a tap that does not reach it.
//   db: warps of the last warpgroup, one for 64 filters, add up the stages' dy beside the tensor cores.
//   The splits that a cluster of blocks has of an item are added from its blocks' shared memory, in their order, each block a
//   share of the columns. With one cluster an item the sums are the result, else they are rows [cluster][dw, then db] of
//   `partial`.
// conv_wgrad_sm90_sum: adds the rows in a fixed order; a thread has four elements, blockDim.y threads share them.
//
// grid: items * splits blocks of 128 (CONSUMERS + 1) threads in clusters of CLUSTER splits. Bytes: an item reads its channels
// of x and dy once from L2 (x with its halo); partial sums are written and read once.
// Preconditions: C and K are multiples of 8; tensors have less than 2^31 elements; no split is empty; CLUSTER divides splits.
// Macros: WINDOW, CONSUMERS, COLUMNS, CB (32 or 64), CLUSTER for the first; none for the sum.

#include "sm90.cuh"
#include "sm90_wgmma.cuh"

#ifdef COLUMNS

DEFINE_WGMMA(multiply, COLUMNS, 1, 1)

constexpr int ROW_BYTES = CB * 2;                    // of x
constexpr int WINDOW_PITCH = 10;                     // pixels of a row of the window's tile: eight and the halo
constexpr int WINDOW_TAPS = 3;                       // filter rows, and columns, of an item
constexpr int X_CHUNKS = WINDOW ? 1 : COLUMNS / CB;  // loads of x, CB channels each, of a stage
constexpr int DY_CHUNKS = WINDOW ? 1 : CONSUMERS;     // loads of dy, 64 filters each
static_assert(!WINDOW || (CONSUMERS == WINDOW_TAPS && COLUMNS == WINDOW_TAPS * CB), "a window is three rows of three taps");

// Twin of the struct that conv_wgrad_sm90.py builds.
struct Problem {
    int k, r, s, c;
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int tile_n, tile_h, tile_w;                      // output pixels of a tile
    int tiles, splits;
    int dw_size, row_size;                           // elements of dw, of a row of `partial`
    int steps;                                       // of 16 pixels in a tile
    u32 x_descriptor, x_leading_bytes, x_step;       // upper half; between chunks of columns; to the next step (16-byte units)
    u32 dy_descriptor, dy_step;
    int x_chunk_bytes, dy_chunk_bytes, load_bytes;   // of a stage: a chunk of x, of dy, all that arrives
    int stage_bytes, stages;
    FastDiv by_tiles_w, by_tiles_h;                  // tiles of an image
    FastDiv by_items, by_tap_columns, by_tap_rows, by_c_blocks;  // an item: filters, channels, tap row, tap column
};

// What a block works on: first filter, channel and tap, and tiles begin <= t < end.
struct Item {
    int k, c, r, s, split, begin, end;
};

__device__ __forceinline__ Item item_of(const Problem &g, int block) {
    Item o;
    int item, column, row, c_block;
    o.split = divide(block / CLUSTER, g.by_items, item) * CLUSTER + block % CLUSTER;
    o.k = divide(divide(divide(item, g.by_tap_columns, column), g.by_tap_rows, row), g.by_c_blocks, c_block) * (DY_CHUNKS * 64);
    o.c = c_block * (X_CHUNKS * CB);
    o.r = WINDOW ? row * WINDOW_TAPS : row, o.s = WINDOW ? column * WINDOW_TAPS : column;
    o.begin = (int)((u64)g.tiles * o.split / g.splits);
    o.end = (int)((u64)g.tiles * (o.split + 1) / g.splits);
    return o;
}

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

// Write the consumer thread's sums of its eight columns j: filters k and k + 8, channels c and c + 1.
__device__ __forceinline__ void store_sums(const Problem &g, const Item &item, float *dw, int j, float4 v) {
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, chunk = WINDOW ? j / (CB / 8) : 0;
    const int k = item.k + (WINDOW ? 0 : group * 64) + warp * 16 + (lane >> 2), r = item.r + (WINDOW ? group : 0), s = item.s + chunk;
    const int c = item.c + (j - chunk * (CB / 8)) * 8 + (lane & 3) * 2;
    if (r >= g.r || s >= g.s || c >= g.c) return;
    float *to = dw + ((u32)(k * g.r + r) * g.s + s) * g.c + c;
    if (k < g.k) *reinterpret_cast<float2 *>(to) = make_float2(v.x, v.y);
    if (k + 8 < g.k) *reinterpret_cast<float2 *>(to + 8 * g.r * g.s * g.c) = make_float2(v.z, v.w);
}

#if CLUSTER > 1
// Where blocks show each other their sums, in place of the ring: [eight columns][consumer thread] of four, then those of dy.
constexpr u32 SUMS_STRIDE = 16 * 128 * CONSUMERS, SUMS_BYTES = COLUMNS / 8 * SUMS_STRIDE;

// The sum of what the cluster's blocks have at the same address, in their order.
__device__ __forceinline__ float4 cluster_sum(u32 at) {
    float4 sum = load_remote16(at, 0);
#pragma unroll
    for (int block = 1; block < CLUSTER; ++block) {
        const float4 v = load_remote16(at, block);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}
#endif

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(128 * (CONSUMERS + 1), 1)
    conv_wgrad_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap dy, float *__restrict__ dw,
                    float *__restrict__ db, float *__restrict__ partial, const __grid_constant__ Problem g) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared), full = base + g.stages * g.stage_bytes, empty = full + 8 * g.stages;
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const Item item = item_of(g, blockIdx.x);
    const bool sums_bias = db && item.c == 0 && item.r == 0 && item.s == 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < g.stages; ++i)
            barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 4 * CONSUMERS + (sums_bias ? DY_CHUNKS : 0));
        barrier_init_fence();
        prefetch(x), prefetch(dy);
    }
    __syncthreads();
    await_predecessors();
    float *dw_out = partial ? partial + (u64)(item.split / CLUSTER) * g.row_size : dw;
    const u32 dy_offset = X_CHUNKS * g.x_chunk_bytes;
    Ring ring;

    if (group == CONSUMERS) {
        if (CONSUMERS > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (warp == 0 && lane == 0) {
            for (int tile = item.begin; tile < item.end; ++tile, ring.next(g.stages)) {
                int column, row;
                const int n = divide(divide(tile, g.by_tiles_w, column), g.by_tiles_h, row) * g.tile_n;
                const int q = column * g.tile_w, p = row * g.tile_h;
                const int w = q * g.stride_w - g.pad_w + item.s * g.dilation_w, h = p * g.stride_h - g.pad_h + item.r * g.dilation_h;
                const u32 at = base + ring.stage * g.stage_bytes, barrier = full + 8 * ring.stage;
                barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
                barrier_expect(barrier, g.load_bytes);
                for (int i = 0; i < X_CHUNKS; ++i) load_tile(at + i * g.x_chunk_bytes, x, barrier, item.c + i * CB, w, h, n);
                for (int i = 0; i < DY_CHUNKS; ++i) load_tile(at + dy_offset + i * g.dy_chunk_bytes, dy, barrier, item.k + i * 64, q, p, n);
            }
        }
        float bias[8] = {};
        const bool has_bias = sums_bias && warp >= 1 && warp <= DY_CHUNKS;
        if (has_bias) {
            for (int tile = item.begin; tile < item.end; ++tile, ring.next(g.stages)) {
                barrier_wait(full + 8 * ring.stage, ring.parity);
                add_pixels(bias, base + ring.stage * g.stage_bytes + dy_offset + (warp - 1) * g.dy_chunk_bytes, 16 * g.steps, lane);
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * ring.stage);
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                bias[e] += __shfl_xor_sync(0xffffffffu, bias[e], 8);
                bias[e] += __shfl_xor_sync(0xffffffffu, bias[e], 16);
            }
        }
        // Lanes 0 to 7 have the first four of eight filters, 8 to 15 the others.
        const int half = lane >> 3 & 1, own = (warp - 1) * 64 + (lane & 7) * 8 + half * 4;
        const bool stores_bias = has_bias && lane < 16 && item.k + own < g.k;
        float4 sum = half ? make_float4(bias[4], bias[5], bias[6], bias[7]) : make_float4(bias[0], bias[1], bias[2], bias[3]);
#if CLUSTER > 1
        const u32 at = base + SUMS_BYTES + own * 4;
        __syncwarp();
        __syncthreads();
        if (stores_bias) store_shared16(at, sum);
        cluster_barrier();
        if (stores_bias) sum = cluster_sum(at);
        cluster_barrier();
#endif
        if (stores_bias && item.split % CLUSTER == 0) store4((partial ? dw_out + g.dw_size : db) + item.k + own, sum);
    } else {
        if (CONSUMERS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
        const u32 own_x = base + (WINDOW ? group * WINDOW_PITCH * ROW_BYTES : 0);
        const u32 own_dy = base + dy_offset + (WINDOW ? 0 : group * g.dy_chunk_bytes);
        float sums[COLUMNS / 2];
        u32 add = 0;
        int read = -1;  // the stage before this one
        for (int tile = item.begin; tile < item.end; ++tile, ring.next(g.stages)) {
            const u32 offset = ring.stage * g.stage_bytes;
            barrier_wait(full + 8 * ring.stage, ring.parity);
            u64 a = descriptor_of(g.dy_descriptor, descriptor_low(own_dy + offset)), b = descriptor(g.x_descriptor, g.x_leading_bytes, own_x + offset);
            wgmma_fence();
            multiply(sums, a, b, add);
            wgmma_commit();
            wgmma_wait<1>();  // all but this product are done; it keeps the tensor cores busy meanwhile
            if (read >= 0 && lane == 0) barrier_arrive(empty + 8 * read);
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

#if CLUSTER > 1
        const u32 at = base + threadIdx.x * 16;
        __syncthreads();  // nobody reads the ring any more
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
            store_shared16(at + j * SUMS_STRIDE, make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]));
        cluster_barrier();
        for (int j = item.split % CLUSTER; j < COLUMNS / 8; j += CLUSTER) store_sums(g, item, dw_out, j, cluster_sum(at + j * SUMS_STRIDE));
        cluster_barrier();  // a block's memory lives until all have read it
#else
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
            store_sums(g, item, dw_out, j, make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]));
#endif
    }
}

#else

extern "C" __global__ void __launch_bounds__(256)
    conv_wgrad_sm90_sum(const float *__restrict__ partial, float *__restrict__ dw, float *__restrict__ db, int dw_size, int row_size,
                        int splits) {
    __shared__ float4 sums[256];
    const int e = (blockIdx.x * blockDim.x + threadIdx.x) * 4, each = (splits + blockDim.y - 1) / blockDim.y;
    const int first = threadIdx.y * each, last = min(splits, first + each);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    await_predecessors();
    if (e < row_size) {
#pragma unroll 8
        for (int split = first; split < last; ++split) {
            const float4 v = load4(partial + (u64)split * row_size + e);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
    }
    sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || e >= row_size) return;
    for (int part = 1; part < blockDim.y; ++part) {
        const float4 v = sums[part * blockDim.x + threadIdx.x];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    store4(e < dw_size ? dw + e : db + (e - dw_size), sum);
}

#endif
