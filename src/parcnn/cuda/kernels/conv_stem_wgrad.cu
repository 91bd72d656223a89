// Gradient of the filters and the bias of a bf16 convolution of few channels; x (N,H,W,C), dy (N,P,Q,K) bf16, dw (K,R,S,C), db (K)
// fp32. For sm_80 and later.
//
//     dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*stride+r*dilation-top, q*stride+s-left, c]        db[k] = sum dy[n,p,q,k]
//
// GEMM: M = 16 * TILES filters, N = a filter row's run of S * C elements, padded to 8 * RUNS, reduction = pixels. grid (blocks
//   that share the tiles of pixels; groups of filters). A block has `groups` groups of warps; in each, a warp has a row of the
//   filters, and one more, if there is a bias, multiplies by ones. Groups take steps of 16 pixels in turn. A group's sums are a
//   row [dw, then db] of `partial`, which conv_wgrad_sum of conv_wgrad.cu adds in a fixed order.
//   dy lies in shared memory by pixels, 16 bytes apart more than they are long, and is transposed by ldmatrix. A block's next
//   tile is copied beside the products of the last.
// POOL = 1: dy is a pooled error; its share goes to the pixel of the window that `idx` names.
//
// Bytes: x and dy read once (and the tiles' common edges of x), partial sums written once a group of warps.
// Preconditions: as conv_stem_fprop.cu.
//
// Macros: RUNS, TILES, POOL.
#include "conv_stem.cuh"

#define PIXEL_BYTES (TILES * 32 + 16)

// Errors of the tile's pixels, zeros where there are none.
__device__ __forceinline__ void fill_errors(const Problem &g, const u16 *dy, const u8 *idx, Origin at, int first_k, u32 errors) {
    const int columns = UNIT_COLUMNS * g.units_w, rows = 2 * g.units_h, bytes = (g.k + 3) / 4;
    if constexpr (POOL) {
        const int out_p = g.p / 2, out_q = g.q / 2;
        for (int item = threadIdx.x; item < rows / 2 * (columns / 2) * TILES * 2; item += blockDim.x) {
            int chunk = item % (TILES * 2), window = item / (TILES * 2);
            int unit_row = window / (columns / 2), in = window % (columns / 2);
            int p = at.p / 2 + unit_row, q = at.q / 2 + in, k = first_k + 8 * chunk;
            Chunk error = {{0, 0, 0, 0}};
            u32 winners = 0;
            if (p < out_p && q < out_q && k < g.k) {
                int pixel = (at.n * out_p + p) * out_q + q, count = min(8, g.k - k);
                const u16 *from = dy + (long long)pixel * g.k + k;
                if (g.k % 8 == 0)
                    error = chunk_of(*reinterpret_cast<const uint4 *>(from));
                else
#pragma unroll
                    for (int e = 0; e < 8; ++e) error.put(e, e < count ? from[e] : 0u);
                winners = winners_of(idx + (long long)pixel * bytes, k, count);
            }
#pragma unroll
            for (int position = 0; position < 4; ++position) {
                int row = 2 * unit_row + position / 2, column = 2 * in + position % 2;
                store_chunk(errors + (row * columns + column) * PIXEL_BYTES + chunk * 16,
                            route(error, winners, position, POOL_MAX).vector());
            }
        }
    } else {
        for (int item = threadIdx.x; item < rows * columns * TILES * 2; item += blockDim.x) {
            int chunk = item % (TILES * 2), pixel = item / (TILES * 2);
            int row = pixel / columns, column = pixel % columns;
            int p = at.p + row, q = at.q + column, k = first_k + 8 * chunk;
            bool live = p < g.p && q < g.q && k < g.k;
            const u16 *from = dy + (live ? ((long long)(at.n * g.p + p) * g.q + q) * g.k + k : 0);
            u32 to = errors + pixel * PIXEL_BYTES + chunk * 16;
            if (g.k % 8 == 0) {
                copy_chunk(to, from, live);
            } else {
                Chunk error = {{0, 0, 0, 0}};
#pragma unroll
                for (int e = 0; e < 8; ++e) error.put(e, live && k + e < g.k ? from[e] : 0u);
                store_chunk(to, error.vector());
            }
        }
    }
}

// The same as fill(), beside the arithmetic where the image's rows are of whole words; from the even element at or before
// the tile's first.
__device__ __forceinline__ void fill_beside(const Problem &g, const u16 *x, Origin at, u32 *patch) {
    if (g.row % 2) {
        fill(g, x, at, patch, -(g.left & 1));
        return;
    }
    const int first = (at.q * g.step - g.left) & ~1;
    for (int i = threadIdx.x / 32; i < g.patch_rows; i += blockDim.x / 32) {
        int h = at.p * g.stride_h - g.top + i;
        bool live = (u32)h < (u32)g.h;
        const u16 *row = x + ((long long)at.n * g.h + (live ? h : 0)) * g.row;
        for (int j = threadIdx.x % 32; j < g.pitch; j += 32) {
            bool inside = live && (u32)(first + 2 * j) < (u32)g.row;
            copy_async4(reinterpret_cast<float *>(patch + i * g.pitch + j),
                        reinterpret_cast<const float *>(row + (inside ? first + 2 * j : 0)), inside);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    conv_stem_wgrad(const u16 *__restrict__ x, const u16 *__restrict__ dy, const u8 *__restrict__ idx,
                    float *__restrict__ partial, Problem g, int groups, int row_size) {
    DYNAMIC_SHARED(u32, shared);
    const int lane = threadIdx.x % 32, column = lane / 4, pair = lane % 4;
    const int roles = blockDim.x / 32 / groups, group = threadIdx.x / 32 / roles, r = threadIdx.x / 32 % roles;
    const int columns = UNIT_COLUMNS * g.units_w, first_k = blockIdx.y * TILES * 16;
    const int error_words = 2 * g.units_h * columns * PIXEL_BYTES / 4, stage_words = error_words + g.patch_bytes / 4;
    // The row of dy that the lane addresses for ldmatrix: pixels of the step, then filters.
    const u32 lane_at = (u32)((lane / 16 * 8 + lane % 8) * PIXEL_BYTES + lane / 8 % 2 * 16);

    float sums[TILES][RUNS][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < RUNS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;

    auto copy = [&](int tile, u32 *stage) {
        if (tile < g.tiles) {
            const Origin at = origin_of(g, tile);
            fill_errors(g, dy, idx, at, first_k, shared_address(stage));
            fill_beside(g, x, at, stage + error_words);
        }
        copy_async_commit();
    };
    u32 *stage = shared, *other = shared + stage_words;
    copy(blockIdx.x, stage);
    for (int tile = blockIdx.x; tile < g.tiles; tile += gridDim.x) {
        copy(tile + gridDim.x, other);
        copy_async_wait<1>();
        __syncthreads();
        const u16 *elements = reinterpret_cast<const u16 *>(stage + error_words) + (g.left & 1);
        const u32 errors = shared_address(stage) + lane_at;
        for (int step = group; step < 2 * g.units_h * g.units_w; step += groups) {
            int unit_w, p = divide(step, g.by_units_w, unit_w);
            u32 f[TILES][4];
#pragma unroll
            for (int i = 0; i < TILES; ++i) load_transposed_matrices(f[i], errors + step * 16 * PIXEL_BYTES + i * 32);
            if (r < g.r) {
                const u16 *from = elements + (p * g.stride_h + r * g.dilation_h) * 2 * g.pitch +
                                  (UNIT_COLUMNS * unit_w + 2 * pair) * g.step + column;
#pragma unroll
                for (int j = 0; j < RUNS; ++j) {
                    u32 b0 = (u32)from[8 * j] | (u32)from[8 * j + g.step] << 16;
                    u32 b1 = (u32)from[8 * j + 8 * g.step] | (u32)from[8 * j + 9 * g.step] << 16;
#pragma unroll
                    for (int i = 0; i < TILES; ++i) multiply_add(sums[i][j], f[i], b0, b1);
                }
            } else {
#pragma unroll
                for (int i = 0; i < TILES; ++i) multiply_add(sums[i][0], f[i], 0x3f803f80u, 0x3f803f80u);  // ones
            }
        }
        __syncthreads();  // before the stage is written again
        u32 *done = stage;
        stage = other, other = done;
    }

    float *own = partial + (long long)(blockIdx.x * groups + group) * row_size;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < RUNS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int k = first_k + 16 * i + column + e / 2 * 8, in = 8 * j + 2 * pair + e % 2;
                if (k >= g.k) continue;
                if (r < g.r) {
                    if (in < g.run) own[(k * g.r + r) * g.run + in] = sums[i][j][e];
                } else if (in == 0) {
                    own[g.k * g.r * g.run + k] = sums[i][j][e];
                }
            }
}
