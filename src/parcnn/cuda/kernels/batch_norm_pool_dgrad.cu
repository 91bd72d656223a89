// Backward of a batch normalisation of x (N,H,W,C) behind which a maximum over windows stands, from the error dy (N,P,Q,C) of the
// maximum's outputs and its winners idx: the error before the pool is never in memory. With xhat = (x - mean) * rstd and
//   dz[pixel] = sum of dy over the windows that cover it and where it won
//   dbeta = sum dz;  dgamma = sum dz*xhat;  dx = gamma*rstd * (dz - (dbeta + xhat*dgamma)/pixels)
//
// A thread has VEC channels of a cell of CELL x CELL pixels; cells start where the padding does, and those of 2 x 2 pixels with
// a window. All pixels of a cell lie in the same REACH x REACH windows, which it loads once:
//   1: windows that do not overlap; CELL divides their strides
//   2: windows of 3 x 3 and strides of 2; CELL is 2
// Two launches, as in batch_norm.cu: a pass that leaves one partial sum a block and channel, and a pass whose blocks each add
//   the partial sums of their channels, in the same order, and then write dx (backwards: what the first pass read last is still
//   in the L2 cache). Every order is fixed.
// Bytes: x is read twice, dx written once; dy and idx are read twice, where windows overlap four times more from cache.
// Preconditions: those of batch_norm.cu; VEC * BITS is at most 32; rows of `shape` are cells; dx may be x.
// Macros: ELEMENT (float, bf16), VEC, BITS (of an index: 2, 4), CELL, REACH; ENTRY: which kernel is compiled.
#define KIND MAX
#include "batch_norm.cuh"
#include "pool.cuh"

#define GRADIENTS 0
#define DGRAD 1

#define PIXELS (CELL * CELL)
#define WINDOWS (REACH * REACH)
#define GROUP (128 / sizeof(Element))  // most channels of a block: a line
#define SUM_THREADS 512
#define WRITE_THREADS 256
// Cells of a tile that a thread has.
#if ENTRY == GRADIENTS
#define UNROLL (CELL == 1 ? 4 : 2)
#else
#define UNROLL ((CELL == 1 ? 8 : 4) / sizeof(Element))
#endif

struct Cell {
    u32 start;   // of the thread's channels of its first pixel, which may lie in the padding
    u32 inside;  // a bit a pixel
    int r, s;    // where its first pixel lies in the window; of overlapping ones, in the one that starts last
    Fetched<Element, VEC> x[PIXELS], error[WINDOWS];
    u32 winners[WINDOWS];
};

struct Grid {
    FastDiv by_columns, by_rows;  // of cells
};

__device__ __forceinline__ u32 offset_of(int pixel, const Window &window, int channels) {
    return (u32)(pixel / CELL * window.w.in + pixel % CELL) * channels;
}

// Cell i; all zeros, and nothing inside, where it is not `live`.
__device__ __forceinline__ Cell load_cell(u32 i, bool live, const Element *dy, const u8 *idx, const Element *x, const Part &at,
                                          int channels, const Grid &grid, const Window &window) {
    Cell cell = {};
    if (!live) return cell;
    int row, column, n = divide(divide(i, grid.by_columns, column), grid.by_rows, row);
    int y = row * CELL - window.h.pad, z = column * CELL - window.w.pad;
    cell.start = (u32)((n * window.h.in + y) * window.w.in + z) * channels + at.c;
#pragma unroll
    for (int pixel = 0; pixel < PIXELS; ++pixel) {
        if ((u32)(y + pixel / CELL) >= (u32)window.h.in || (u32)(z + pixel % CELL) >= (u32)window.w.in) continue;
        cell.x[pixel] = fetch<VEC>(x + (cell.start + offset_of(pixel, window, channels)));
        cell.inside |= 1u << pixel;
    }
    int p = row - 1, q = column - 1;
    if (REACH == 1) {
        p = divide(row * CELL, window.h.by_stride, cell.r);
        q = divide(column * CELL, window.w.by_stride, cell.s);
    }
#pragma unroll
    for (int k = 0; k < WINDOWS; ++k) {
        const int v = p + k / REACH, u = q + k % REACH;
        if ((u32)v >= (u32)window.h.out || (u32)u >= (u32)window.w.out) continue;
        const u32 from = (u32)((n * window.h.out + v) * window.w.out + u) * channels + at.c;
        cell.error[k] = fetch<VEC>(dy + from);
        cell.winners[k] = load_index(idx, from).words[0];
    }
    return cell;
}

// sum += dz * factor, of a pixel.
__device__ __forceinline__ void add_error(Vector &sum, const Vector &factor, int pixel, const Cell &cell, const Window &window) {
#pragma unroll
    for (int k = 0; k < WINDOWS; ++k) {
        u32 others;  // all bits of an index are zero where the pixel won
        const u32 tap_bits = BITS == 2 ? 0x55555555u : 0x11111111u;
        if (REACH == 1) {
            const int r = cell.r + pixel / CELL, s = cell.s + pixel % CELL;
            others = cell.winners[k] ^ (u32)(r * window.w.kernel + s) * tap_bits;
            if (r >= window.h.kernel || s >= window.w.kernel) others = 0xffffffffu;
        } else {
            const int r = pixel / CELL + 2 * (1 - k / REACH), s = pixel % CELL + 2 * (1 - k % REACH);
            if (r >= 3 || s >= 3) continue;
            others = cell.winners[k] ^ (u32)(r * 3 + s) * tap_bits;
        }
        const Vector error = widen(cell.error[k]);
#pragma unroll
        for (int e = 0; e < VEC; ++e)
            if (!(others & ((1u << BITS) - 1) << BITS * e)) sum.v[e] += error.v[e] * factor.v[e];
    }
}

// The thread's cells of a tile.
__device__ __forceinline__ void load_tile(Cell (&cells)[UNROLL], int tile, const Element *dy, const u8 *idx, const Element *x,
                                          const Part &at, const Shape &shape, const Grid &grid, const Window &window) {
    u32 first = ((u32)tile * UNROLL << at.step_log2) + at.row;
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
        u32 i = first + ((u32)j << at.step_log2);
        cells[j] = load_cell(i, at.live && i < (u32)shape.rows, dy, idx, x, at, shape.channels, grid, window);
    }
}

#if ENTRY == GRADIENTS
// Add a cell's dz * (x - center), and the error of the window that starts in it.
__device__ __forceinline__ void add_cell(Vector (&sums)[2], const Cell &cell, const Vector &center, const Window &window) {
#pragma unroll
    for (int pixel = 0; pixel < PIXELS; ++pixel) {
        Vector centred = widen(cell.x[pixel]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) centred.v[e] -= center.v[e];
        add_error(sums[0], centred, pixel, cell, window);
    }
    if (cell.r || cell.s) return;
    const Vector error = widen(cell.error[WINDOWS - 1]);
#pragma unroll
    for (int e = 0; e < VEC; ++e) sums[1].v[e] += error.v[e];
}

// dgammas, dbetas: partial sums (gridDim.y, C).
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
batch_norm_pool_gradients(const Element *__restrict__ dy, const u8 *__restrict__ idx, const Element *__restrict__ x,
                          const float *__restrict__ mean, const float *__restrict__ rstd, float *__restrict__ dgammas,
                          float *__restrict__ dbetas, Shape shape, Grid grid, const __grid_constant__ Window window) {
    await_predecessors();
    __shared__ float4 scratch[2 * SUM_THREADS / 32 * GROUP / 4];
    Part at = part_of(shape);
    Vector center = {}, sums[2] = {splat<VEC>(0.0f), splat<VEC>(0.0f)};
    if (at.live) center = load<VEC>(mean + at.c);
    for (int tile = blockIdx.y; tile < shape.tiles; tile += gridDim.y) {
        Cell cells[UNROLL];
        load_tile(cells, tile, dy, idx, x, at, shape, grid, window);
#pragma unroll
        for (int j = 0; j < UNROLL; ++j)
            add_cell(sums, cells[j], center, window);
    }
    if (at.live) sums[0] = product(sums[0], load<VEC>(rstd + at.c));
    sum_rows(sums, at, shape.lanes_log2, &scratch->x);
    store_sums(dgammas, dbetas, (size_t)blockIdx.y * shape.channels, &scratch->x, shape);
}
#endif

#if ENTRY == DGRAD
// dgammas, dbetas: `partials` sums of each channel that the first pass left. pixels: N*H*W.
extern "C" __global__ void __launch_bounds__(WRITE_THREADS, 3)
batch_norm_pool_dgrad(const Element *__restrict__ dy, const u8 *__restrict__ idx, const Element *x,
                      const float *__restrict__ gamma, const float *__restrict__ mean, const float *__restrict__ rstd,
                      const float *__restrict__ dgammas, const float *__restrict__ dbetas, Element *dx,
                      float *__restrict__ dgamma, float *__restrict__ dbeta, int partials, int pixels, Shape shape, Grid grid,
                      const __grid_constant__ Window window) {
    await_predecessors();
    __shared__ float4 scratch[2 * WRITE_THREADS / 32 * GROUP / 4];
    Part at = part_of(shape);
    int tile = shape.tiles - 1 - (int)blockIdx.y;
    Cell cells[UNROLL];
    load_tile(cells, tile, dy, idx, x, at, shape, grid, window);  // on their way while the partial sums are added

    Vector sums[2] = {splat<VEC>(0.0f), splat<VEC>(0.0f)};
    sum_partials(sums, dgammas, dbetas, partials, at, shape, &scratch->x);
    if (blockIdx.y == gridDim.y - 1) store_sums(dgamma, dbeta, 0, &scratch->x, shape);
    if (!at.live) return;
    load_means(sums, &scratch->x, at, shape.lanes_log2, pixels);
    // dx = scale * dz + slope * (x - center) + shift
    const Vector r = load<VEC>(rstd + at.c), center = load<VEC>(mean + at.c), scale = product(load<VEC>(gamma + at.c), r);
    Vector shift = product(sums[1], scale), slope = product(product(sums[0], scale), r);
#pragma unroll
    for (int e = 0; e < VEC; ++e) shift.v[e] = -shift.v[e], slope.v[e] = -slope.v[e];
    while (true) {
#pragma unroll
        for (int j = 0; j < UNROLL; ++j)
#pragma unroll
            for (int pixel = 0; pixel < PIXELS; ++pixel) {
                if (!(cells[j].inside >> pixel & 1)) continue;
                Vector v = widen(cells[j].x[pixel]);
#pragma unroll
                for (int e = 0; e < VEC; ++e) v.v[e] = slope.v[e] * (v.v[e] - center.v[e]) + shift.v[e];
                add_error(v, scale, pixel, cells[j], window);
                store<VEC>(dx + (cells[j].start + offset_of(pixel, window, shape.channels)), v);
            }
        tile -= gridDim.y;
        if (tile < 0) return;
        load_tile(cells, tile, dy, idx, x, at, shape, grid, window);
    }
}
#endif
