// Gradient of 3x3 filters of stride 1, and of the bias, by Winograd's algorithm, fp32; x (N,H,W,C), dy (N,P,Q,K), dw (K,3,3,C).
//
//     dw[k,:,:,c] = G' [ sum_tiles (A dy[2x2 tile,k] A') * (B' x[4x4 patch,c] B) ] G
//
// The forward product of conv_winograd.cu transposed: the sum runs over tiles of 2x2 errors, each with its patch of 4x4
// inputs, and 16 products take the place of 36. grid (K / FILTERS, C / CHANNELS, splits): a split sums `chunk` tiles in
// steps of DEPTH. A warp has a step's tile: it loads and transforms its errors and its patch while the step before it is
// multiplied. Sixteen threads have one of the 16 products, FILTERS x CHANNELS, of which each owns 16 x 8; they meet in
// shared memory at the end, 32 filters at a time. With one split the sums are the result, else they are rows [split][dw,
// then db] of `partial`, which conv_wgrad_sum adds in a fixed order.
//
// Preconditions: pointers aligned to 16 bytes; C % 4 == 0, and K % 4 == 0 where there are splits and db; every tensor has
// less than 2^31 elements.

#include "conv_winograd.cuh"

#define FILTERS ROWS
#define CHANNELS COLUMNS
#define U_STAGE (DEPTH * 16 * FILTERS)
#define STAGE (U_STAGE + DEPTH * 16 * CHANNELS)

// Twin of conv_winograd_wgrad.py's arguments: p and q of g count tiles; `height` and `width` are the sides of dy.
extern "C" __global__ void __launch_bounds__(THREADS)
    conv_winograd_wgrad(const float *__restrict__ x, const float *__restrict__ dy, float *__restrict__ dw, float *__restrict__ db,
                        float *__restrict__ partial, Conv g, int tiles, int height, int width, int chunk) {
    DYNAMIC_SHARED(float, shared);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int k0 = blockIdx.x * FILTERS, c0 = blockIdx.y * CHANNELS;
    const int begin = blockIdx.z * chunk, end = min(tiles, begin + chunk), steps = (end - begin + DEPTH - 1) / DEPTH;
    const bool live_c = c0 + lane < g.c, live_k[2] = {k0 + lane < g.k, k0 + lane + 32 < g.k};
    const bool sums_bias = db && blockIdx.y == 0;
    const Share own;

    await_predecessors();
    float d[4][4], e[2][4], bias_sum[2] = {};
    const long long across = g.c, down = (long long)g.w * g.c, right = g.k, below = (long long)width * g.k;
    // Start to fetch a step's tile, zeros beyond the end.
    auto fetch = [&](int step) {
        int tile = begin + step * DEPTH + warp, q, p;
        const bool live = tile < end;
        const int n = divide(divide(live ? tile : 0, g.by_q, q), g.by_p, p);
        p *= 2, q *= 2;
        const int top = p - g.pad_h, left = q - g.pad_w;
        const float *row = x + ((n * g.h + top) * g.w + left) * g.c + c0 + lane;
        const float *error = dy + ((n * height + p) * width + q) * g.k + k0 + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i, row += down) {
            const bool inside_h = live && live_c && (u32)(top + i) < (u32)g.h;
            const float *pixel = row;
#pragma unroll
            for (int j = 0; j < 4; ++j, pixel += across)
                d[i][j] = inside_h && (u32)(left + j) < (u32)g.w ? *pixel : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool here = live && p + i / 2 < height && q + i % 2 < width;
            const float *pixel = error + (i / 2 ? below : 0) + (i % 2 ? right : 0);
#pragma unroll
            for (int half = 0; half < 2; ++half) e[half][i] = here && live_k[half] ? pixel[32 * half] : 0.0f;
        }
    };
    // Transform and store the errors of half of the filters; a row of the patch, of which the first comes with the
    // transform of the columns.
    auto store_errors = [&](int half, int turn) {
        float *u = shared + turn * STAGE + warp * (16 * FILTERS) + lane + 32 * half;
        float a = e[half][0], b = e[half][1], c = e[half][2], f = e[half][3];
        bias_sum[half] += (a + b) + (c + f);
        float left[4] = {a, a + c, a - c, c}, right[4] = {b, b + f, b - f, f};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float *row = u + 4 * i * FILTERS;
            row[0] = left[i], row[FILTERS] = left[i] + right[i];
            row[2 * FILTERS] = left[i] - right[i], row[3 * FILTERS] = right[i];
        }
    };
    auto store_row = [&](int i, int turn) {
#pragma unroll
        for (int j = 0; j < 4 && i == 0; ++j) transform_input(d[0][j], d[1][j], d[2][j], d[3][j]);
        transform_input(d[i][0], d[i][1], d[i][2], d[i][3]);
        float *row = shared + turn * STAGE + U_STAGE + warp * (16 * CHANNELS) + lane + 4 * i * CHANNELS;
#pragma unroll
        for (int j = 0; j < 4; ++j) row[j * CHANNELS] = d[i][j];
    };

    float acc[16][8] = {};
    auto multiply_tile = [&](int step, int t) {
        multiply(acc, shared + step % 2 * STAGE + t * (16 * FILTERS) + own.product * FILTERS + own.row,
                 shared + step % 2 * STAGE + U_STAGE + t * (16 * CHANNELS) + own.product * CHANNELS + own.column);
    };

    fetch(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i < 2) store_errors(i, 0);
        store_row(i, 0);
    }
    int step = 0;
    for (;; ++step) {
        __syncthreads();
        fetch(step + 1);
#pragma unroll
        for (int t = 0; t < DEPTH / 2; ++t) multiply_tile(step, t);
        if (step + 1 >= steps) break;  // in the middle, before which no compiler moves the transform of what is under way
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            multiply_tile(step, DEPTH / 2 + i);
            if (i < 2) store_errors(i, (step + 1) % 2);
            store_row(i, (step + 1) % 2);
        }
    }
#pragma unroll
    for (int t = DEPTH / 2; t < DEPTH; ++t) multiply_tile(step, t);

    const int row_size = g.k * 9 * g.c + (db ? g.k : 0);
    float *dw_out = partial ? partial + blockIdx.z * row_size : dw;
    float *db_out = partial ? dw_out + g.k * 9 * g.c : db;
    if (sums_bias) {
        __syncthreads();
        shared[warp * FILTERS + lane] = bias_sum[0], shared[warp * FILTERS + lane + 32] = bias_sum[1];
        __syncthreads();
        if (thread < FILTERS && k0 + thread < g.k) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) sum += shared[i * FILTERS + thread];
            db_out[k0 + thread] = sum;
        }
    }
    const int four = thread % 8 * 4, c = c0 + four;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < 8; j += 4)
                store4(shared + (own.product * 32 + own.row + i / 4 * 16 + i % 4) * E_ROW + own.column + 4 * j,
                       make_float4(acc[8 * pass + i][j], acc[8 * pass + i][j + 1], acc[8 * pass + i][j + 2],
                                   acc[8 * pass + i][j + 3]));
        __syncthreads();
        const int k = k0 + 32 * pass + thread / 8;
        if (k >= g.k || c >= g.c) continue;
        float rows[3][4][4];  // [filter row][column of the product][channel]
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float4 m[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) m[i] = load4(shared + ((4 * i + j) * 32 + thread / 8) * E_ROW + four);
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                float sum = 0.5f * (at(m[1], f) + at(m[2], f));
                rows[0][j][f] = at(m[0], f) + sum;
                rows[1][j][f] = 0.5f * (at(m[1], f) - at(m[2], f));
                rows[2][j][f] = sum + at(m[3], f);
            }
        }
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            float out[3][4];
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                float sum = 0.5f * (rows[r][1][f] + rows[r][2][f]);
                out[0][f] = rows[r][0][f] + sum;
                out[1][f] = 0.5f * (rows[r][1][f] - rows[r][2][f]);
                out[2][f] = sum + rows[r][3][f];
            }
#pragma unroll
            for (int s = 0; s < 3; ++s)
                store4(dw_out + ((k * 3 + r) * 3 + s) * g.c + c, make_float4(out[s][0], out[s][1], out[s][2], out[s][3]));
        }
    }
}
