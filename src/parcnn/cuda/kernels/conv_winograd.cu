// Convolution of stride 1 with 3x3 filters by Winograd's algorithm F(2x2, 3x3), fp32: y (N,P,Q,K) of x (N,H,W,C).
//
//     y tile = A' [ sum_c (G w[k,:,:,c] G') * (B' x patch[:,:,c] B) ] A        (Lavin and Gray, CVPR 2016)
//
// A tile of 2x2 outputs needs a patch of 4x4 inputs; both transforms turn 36 multiplications a tile, filter and channel
// into 16. The input's gradient is the same product on dy, with the filters turned by half a circle and their channel
// dimensions exchanged: here x is what is read and y what is written, whichever they are.
//
// conv_winograd_filters: u[K / FILTERS][C][16][FILTERS] of the filters, with zeros beyond K; grid (32 filters, 16 channels).
// conv_winograd: grid (tiles / TILES, K / FILTERS). Sixteen threads have one of the 16 products, FILTERS x TILES, of which
//   each owns 16 x 8. A step is DEPTH channels: u comes by copies beside the arithmetic, patches through registers, where
//   they are transformed. At the end the products meet in shared memory, 32 filters at a time, are transformed, and leave
//   with bias, activation and 2x2 pool (a pooling window is a tile), or as a gradient with addend and derivative.
//
// Preconditions: pointers aligned to 16 bytes; C % DEPTH == 0, K % 4 == 0; every tensor has less than 2^31 elements.

#include "conv_winograd.cuh"

#define FILTERS ROWS
#define TILES COLUMNS
#define U_STAGE (DEPTH * 16 * FILTERS)
#define V_ROW (16 * TILES + 4)  // of a channel: its four tiles of a warp's stores lie in other banks than the next one's
#define STAGE (U_STAGE + DEPTH * V_ROW)

// A row of G, applied to three values.
__device__ __forceinline__ void transform_filter(float a, float b, float c, float (&out)[4]) {
    out[0] = a;
    out[1] = 0.5f * ((a + c) + b);
    out[2] = 0.5f * ((a + c) - b);
    out[3] = c;
}

extern "C" __global__ void __launch_bounds__(128)
    conv_winograd_filters(const float *__restrict__ w, float *__restrict__ u, int channels, int filters, int turned) {
    await_predecessors();
    const int k = blockIdx.x * 32 + threadIdx.x, c0 = (blockIdx.y * 4 + threadIdx.y) * 4;
    if (c0 >= channels) return;
    float4 in[3][3];
#pragma unroll
    for (int r = 0; r < 3; ++r)
#pragma unroll
        for (int s = 0; s < 3; ++s) {
            int tap = turned ? 8 - (3 * r + s) : 3 * r + s;
            const float *source = turned ? w + (c0 * 9 + tap) * filters + k : w + (k * 9 + tap) * channels + c0;
            if (k >= filters) in[r][s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            else in[r][s] = turned ? make_float4(source[0], source[9 * filters], source[18 * filters], source[27 * filters])
                              : load4(source);
        }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        float half[4][3], row[4];
#pragma unroll
        for (int s = 0; s < 3; ++s) {
            transform_filter(at(in[0][s], e), at(in[1][s], e), at(in[2][s], e), row);
#pragma unroll
            for (int i = 0; i < 4; ++i) half[i][s] = row[i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            transform_filter(half[i][0], half[i][1], half[i][2], row);
#pragma unroll
            for (int j = 0; j < 4; ++j) u[((k / FILTERS * channels + c0 + e) * 16 + 4 * i + j) * FILTERS + k % FILTERS] = row[j];
        }
    }
}

// Twin of conv_winograd.py's arguments: p and q of g count tiles; `height` and `width` are the outputs before a pool.
extern "C" __global__ void __launch_bounds__(THREADS)
    conv_winograd(const float *__restrict__ x, const float *__restrict__ u, const float *__restrict__ bias, const float *saved,
                  const float *addend, float *y, u8 *__restrict__ idx, Conv g, int tiles, int height, int width) {
    DYNAMIC_SHARED(float, shared);
    const int thread = threadIdx.x, k0 = blockIdx.y * FILTERS;

    // The patch that this thread transforms.
    const int channel = thread % DEPTH, place = thread / DEPTH, tile = blockIdx.x * TILES + place;
    int left, top;
    const int n = divide(divide(tile < tiles ? tile : 0, g.by_q, left), g.by_p, top);
    top = 2 * top - g.pad_h, left = 2 * left - g.pad_w;
    u32 live = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i)
        if (tile < tiles && (u32)(top + i / 4) < (u32)g.h && (u32)(left + i % 4) < (u32)g.w) live |= 1u << i;
    const float *patch = x + ((n * g.h + top) * g.w + left) * g.c + channel;
    const long long across = g.c, down = (long long)g.w * g.c;

    const Share own;
    await_predecessors();
    const int steps = g.c / DEPTH;
    // Start to fetch a step; it goes to the stage of `turn`.
    float d[4][4];
    auto fetch = [&](int step, int turn) {
        float *to = shared + turn * STAGE + 4 * thread;
        const float *from = u + (blockIdx.y * steps + step) * U_STAGE + 4 * thread;
#pragma unroll
        for (int i = 0; i < U_STAGE; i += 4 * THREADS) copy_async16(to + i, from + i, true);
        copy_async_commit();
        const float *row = patch + step * DEPTH;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float *pixel = row + i * down;
#pragma unroll
            for (int j = 0; j < 4; ++j, pixel += across) d[i][j] = live >> (4 * i + j) & 1 ? *pixel : 0.0f;
        }
    };
    // Transform a row of the patch, of which the first comes with the transform of the columns, and store it.
    auto store_row = [&](int i, int turn) {
        float *to = shared + turn * STAGE + U_STAGE + channel * V_ROW + place + 4 * i * TILES;
#pragma unroll
        for (int j = 0; j < 4 && i == 0; ++j) transform_input(d[0][j], d[1][j], d[2][j], d[3][j]);
        transform_input(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j * TILES] = d[i][j];
    };

    float acc[16][8] = {};
    // Multiply half of a step's channels.
    auto multiply_half = [&](int step, int half) {
        const float *a = shared + step % 2 * STAGE + own.product * FILTERS + own.row;
        const float *b = shared + step % 2 * STAGE + U_STAGE + own.product * TILES + own.column;
#pragma unroll
        for (int c = half * (DEPTH / 2); c < (half + 1) * (DEPTH / 2); ++c) multiply(acc, a + c * (16 * FILTERS), b + c * V_ROW);
    };

    fetch(0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) store_row(i, 0);
    int step = 0;
    for (;; ++step) {
        copy_async_wait<0>();
        __syncthreads();
        fetch(min(step + 1, steps - 1), (step + 1) % 2);
        multiply_half(step, 0);
        if (step + 1 >= steps) break;  // in the middle, before which no compiler moves the transform of what is under way
        multiply_half(step, 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) store_row(i, (step + 1) % 2);
    }
    multiply_half(step, 1);
    copy_async_wait<0>();

    // The outputs that this thread writes: a tile's, of four filters.
    const int four = thread % 8 * 4, mine = blockIdx.x * TILES + thread / 8;
    int q, p;
    const int image = divide(divide(mine < tiles ? mine : 0, g.by_q, q), g.by_p, p);
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 8; i += 4)
                store4(shared + (own.product * TILES + own.column + j / 4 * 16 + j % 4) * E_ROW + own.row + 4 * i,
                       make_float4(acc[8 * pass + i][j], acc[8 * pass + i + 1][j], acc[8 * pass + i + 2][j],
                                   acc[8 * pass + i + 3][j]));
        __syncthreads();
        const int k = k0 + 32 * pass + four;
        if (mine >= tiles || k >= g.k) continue;
        float half[2][4][4], out[4][4];  // [row][column of the product][filter], [pixel][filter]
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float4 m[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) m[i] = load4(shared + ((4 * i + j) * TILES + thread / 8) * E_ROW + four);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                half[0][j][e] = at(m[0], e) + at(m[1], e) + at(m[2], e);
                half[1][j][e] = at(m[1], e) - at(m[2], e) + at(m[3], e);
            }
        }
        float4 b = bias ? load4(bias + k) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                out[2 * i][e] = half[i][0][e] + half[i][1][e] + half[i][2][e] + at(b, e);
                out[2 * i + 1][e] = half[i][1][e] - half[i][2][e] + half[i][3][e] + at(b, e);
            }
        if (!saved) activate_all(out, g.act);
        if (g.pool) {
            float best[4];
            u32 byte = 0;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                u32 bits = 0;
                best[e] = pool_window(out[0][e], out[1][e], out[2][e], out[3][e], g.pool, bits);
                byte |= bits << 2 * e;
            }
            store4(y + mine * g.k + k, make_float4(best[0], best[1], best[2], best[3]));
            if (idx) idx[(mine * g.k + k) / 4] = (u8)byte;
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = 2 * p + i / 2, column = 2 * q + i % 2;
            if (row >= height || column >= width) continue;
            int at_k = ((image * height + row) * width + column) * g.k + k;
            float4 v = make_float4(out[i][0], out[i][1], out[i][2], out[i][3]);
            if (addend) {
                float4 more = load4(addend + at_k);
                v = make_float4(v.x + more.x, v.y + more.y, v.z + more.z, v.w + more.w);
            }
            if (saved) {
                float4 from = load4(saved + at_k);
                v = make_float4(activation_dgrad_of(v.x, from.x, g.act), activation_dgrad_of(v.y, from.y, g.act),
                                activation_dgrad_of(v.z, from.z, g.act), activation_dgrad_of(v.w, from.w, g.act));
            }
            store4(y + at_k, v);
        }
    }
}
