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

// Errors of the tile's pixels, zeros where there are none. A warp takes rows in turn, its lanes neighbouring chunks of eight
// filters, then neighbouring pixels or windows.
__device__ __forceinline__ void fill_errors(const Problem &g, const u16 *dy, const u8 *idx, Origin at, int first_k, u32 errors) {
    constexpr int Chunks = TILES * 2, Pixels = 32 / Chunks;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = lane % Chunks, k = first_k + 8 * chunk;
    const int columns = UNIT_COLUMNS * g.units_w, count = min(8, g.k - k), bytes = (g.k + 3) / 4;
    const int out_p = POOL ? g.p / 2 : g.p, out_q = POOL ? g.q / 2 : g.q;
    const int p0 = POOL ? at.p / 2 : at.p, q0 = POOL ? at.q / 2 : at.q;
    for (int row = warp; row < (POOL ? g.units_h : 2 * g.units_h); row += blockDim.x / 32) {
        const long long first = (long long)(at.n * out_p + p0 + row) * out_q + q0;
        const u32 to_row = errors + (POOL ? 2 : 1) * row * columns * PIXEL_BYTES + chunk * 16;
        for (int column = lane / Chunks; column < (POOL ? columns / 2 : columns); column += Pixels) {
            const bool live = p0 + row < out_p && q0 + column < out_q && count > 0;
            const u16 *from = dy + (live ? (first + column) * g.k + k : 0);
            const u32 to = to_row + (POOL ? 2 : 1) * column * PIXEL_BYTES;
            if (!POOL && g.k % 8 == 0) {
                copy_chunk(to, from, live);
                continue;
            }
            Chunk error = {{0, 0, 0, 0}};
            if (live && g.k % 8 == 0) {
                error = chunk_of(*reinterpret_cast<const uint4 *>(from));
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e) error.put(e, live && e < count ? from[e] : 0u);
            }
            if constexpr (POOL) {
                u32 winners = live ? winners_of(idx + (first + column) * bytes, k, count) : 0u;
#pragma unroll
                for (int position = 0; position < 4; ++position)
                    store_chunk(to + (position / 2 * columns + position % 2) * PIXEL_BYTES,
                                route(error, winners, position, POOL_MAX).vector());
            } else {
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

    // The warp for the bias multiplies by ones, whatever it reads.
    const bool ones = r == g.r;
    const int eight = 8 * g.step, row_elements = 2 * g.stride_h * g.pitch;
    const int first_element = (g.left & 1) + (ones ? 0 : r) * g.dilation_h * 2 * g.pitch + 2 * pair * g.step + column;

    float sums[TILES][RUNS][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < RUNS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;

    await_predecessors();
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
        const u16 *elements = reinterpret_cast<const u16 *>(stage + error_words) + first_element;
        const u32 errors = shared_address(stage) + lane_at;
        for (int p = group; p < 2 * g.units_h; p += groups) {
            const u16 *from = elements + p * row_elements;
            u32 at = errors + p * columns * PIXEL_BYTES;
#pragma unroll 2
            for (int unit = 0; unit < g.units_w; ++unit) {
                u32 f[TILES][4], b[RUNS][2];
#pragma unroll
                for (int i = 0; i < TILES; ++i) load_transposed_matrices(f[i], at + i * 32);
#pragma unroll
                for (int j = 0; j < RUNS; ++j)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const u16 *pixel = from + half * eight + 8 * j;
                        u32 pair = (u32)pixel[0] | (u32)pixel[g.step] << 16;
                        b[j][half] = ones ? 0x3f803f80u : pair;
                    }
#pragma unroll
                for (int j = 0; j < RUNS; ++j)
#pragma unroll
                    for (int i = 0; i < TILES; ++i) multiply_add(sums[i][j], f[i], b[j][0], b[j][1]);
                from += 2 * eight, at += UNIT_COLUMNS * PIXEL_BYTES;
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
                if (!ones) {
                    if (in < g.run) own[(k * g.r + r) * g.run + in] = sums[i][j][e];
                } else if (in == 0) {
                    own[g.k * g.r * g.run + k] = sums[i][j][e];
                }
            }
}
