// The second pass of a batch normalisation of x (N,H,W,C) in training behind which a maximum over windows stands: y and idx
// (N,P,Q,C) are the maximum's, and what lies between is never in memory.
//   z = (x - mean) * gamma*rstd + beta;  y = act(max over the window of z);  idx: where it was in the window, the first of equals
//
// A thread has VEC channels of UNROLL outputs and all pixels of their windows under way at once. Before it, each block merges the
//   partial results of its channels as batch_norm.cu's second pass does.
// Bytes: x is read once (where windows overlap, again from cache), y and idx are written once.
// Preconditions: those of batch_norm.cu; `shape` has outputs as its rows; VEC * BITS is at most 32.
// Macros: ELEMENT (float, bf16), VEC, BITS (of an index: 2, 4), SIDE: of the window, 2 or 3.
#define KIND MAX
#include "batch_norm.cuh"
#include "pool.cuh"

#define GROUP (128 / sizeof(Element))  // most channels of a block: a line
#define WRITE_THREADS 256
#define TAPS (SIDE * SIDE)
#define UNROLL (SIDE == 2 ? 2 : 1)  // outputs of a tile that a thread has

struct Grid {
    FastDiv by_columns, by_rows;  // of outputs
};

// The pixels of an output's window.
struct Pixels {
    Fetched<Element, VEC> x[TAPS];
    u32 inside;  // the image: a bit a pixel
    u32 at;      // the thread's channels of the output
    bool live;
};

// Output i's.
__device__ __forceinline__ Pixels load_window(u32 i, const Element *x, const Part &at, const Shape &shape, const Grid &grid,
                                              const Window &window) {
    Pixels pixels = {};
    pixels.live = at.live && i < (u32)shape.rows;
    if (!pixels.live) return pixels;
    pixels.at = i * shape.channels + at.c;
    int p, q, n = divide(divide(i, grid.by_columns, q), grid.by_rows, p);
    int row = p * window.h.stride - window.h.pad, column = q * window.w.stride - window.w.pad;
    u32 from = (u32)((n * window.h.in + row) * window.w.in + column) * shape.channels + at.c;
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
        if ((u32)(row + t / SIDE) >= (u32)window.h.in || (u32)(column + t % SIDE) >= (u32)window.w.in) continue;
        pixels.x[t] = fetch<VEC>(x + (from + (u32)(t / SIDE * window.w.in + t % SIDE) * shape.channels));
        pixels.inside |= 1u << t;
    }
    return pixels;
}

// Write the maximum of a window and where it was.
__device__ __forceinline__ void write_maximum(Element *y, u8 *idx, const Pixels &own, const Normal &normal, int act) {
    if (!own.live) return;
    Vector best = splat<VEC>(__int_as_float(0xff800000));
    int position[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) position[e] = __ffs(own.inside) - 1;  // wins where all are -inf
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
        if (!(own.inside >> t & 1)) continue;
        const Vector v = widen(own.x[t]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            const float z = (v.v[e] - normal.mean.v[e]) * normal.scale.v[e] + normal.shift.v[e];
            if (z <= best.v[e] || best.v[e] != best.v[e]) continue;
            best.v[e] = z;  // greater, or the first NaN
            position[e] = t;
        }
    }
    if (act == ACT_RELU)
#pragma unroll
        for (int e = 0; e < VEC; ++e) best.v[e] = activate<ACT_RELU>(best.v[e]);
    store<VEC>(y + own.at, best);
    store_index(idx, own.at, position);
}

__device__ __forceinline__ void load_tile(Pixels (&own)[UNROLL], int tile, const Element *x, const Part &at, const Shape &shape,
                                          const Grid &grid, const Window &window) {
#pragma unroll
    for (int j = 0; j < UNROLL; ++j)
        own[j] = load_window(((u32)(tile * UNROLL + j) << at.step_log2) + at.row, x, at, shape, grid, window);
}

// partial: as batch_norm_train has it; split: of the pass that left it. pixels: N*H*W.
extern "C" __global__ void __launch_bounds__(WRITE_THREADS, 2)
batch_norm_pool_train(const Element *__restrict__ x, const float *__restrict__ gamma, const float *__restrict__ beta,
                      const float *__restrict__ partial, Element *__restrict__ y, u8 *__restrict__ idx, Statistics s, Split split,
                      int pixels, Shape shape, Grid grid, const __grid_constant__ Window window) {
    await_predecessors();
    __shared__ float4 scratch[3 * WRITE_THREADS / 32 * GROUP / 4];
    Part at = part_of(shape);
    int tile = shape.tiles - 1 - (int)blockIdx.y;
    Pixels own[UNROLL];
    load_tile(own, tile, x, at, shape, grid, window);  // on their way while the partial results are merged
    Shape rows = shape;
    rows.rows = pixels;
    // No block has fewer tiles than the last.
    const Normal normal = merge_partials(partial, gamma, beta, s, split, rows, at, &scratch->x, blockIdx.y == gridDim.y - 1);
    if (!at.live) return;

    while (true) {
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) write_maximum(y, idx, own[j], normal, window.act);
        tile -= gridDim.y;
        if (tile < 0) return;
        load_tile(own, tile, x, at, shape, grid, window);
    }
}
