// Moving elements.
//   copy_channels   y[row, y_start + c] = x[row, x_start + c],  c < channels     (Cat: one launch an input; ChannelSlice)
//   transpose       y[n, col, row] = x[n, row, col]              (ToChannelsFirst: rows = H*W; ToChannelsLast: rows = C)
//
// copy_channels: a thread moves VEC neighbouring channels of a row; threads run along channels, then rows.
// transpose4: a thread moves 4 x 4 elements, four rows of the source in and four of the result out, and needs nothing but its
//   registers; a warp has 32 rows x 16 columns, so that it reads runs of 64 bytes and writes runs of 128.
// transpose: a block moves a tile of tile_rows x tile_cols of one image through shared memory; threads run along the
//   source's rows when reading and along the result's rows when writing, so both sides are coalesced even where the
//   matrix has only a few rows or columns (the tile then spans all of them).
// Bytes: every element read once and written once.
// Preconditions: x and y are apart. copy_channels: for VEC = 4 channels, strides and starts are multiples of 4 and tensors
// start on 16 bytes. transpose4: rows and cols likewise. transpose: tile_rows * (tile_cols | 1) <= TILE_FLOATS.
// Macro: VEC (copy_channels only).
#include "common.cuh"

#define THREADS 256
#define TILE_FLOATS 2112

#ifdef VEC
extern "C" __global__ void __launch_bounds__(THREADS)
copy_channels(const float *__restrict__ x, float *__restrict__ y, int count, FastDiv by_vectors, int x_stride, int x_start,
              int y_stride, int y_start) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    int vector, row = divide(i, by_vectors, vector);
    store<VEC>(y + (size_t)row * y_stride + y_start + vector * VEC, load<VEC>(x + (size_t)row * x_stride + x_start + vector * VEC));
}
#else
// The tiles of a warp run along columns, then rows, then images.
extern "C" __global__ void __launch_bounds__(THREADS)
transpose4(const float *__restrict__ x, float *__restrict__ y, int tiles, int rows, int cols, FastDiv by_col_tiles,
           FastDiv by_row_tiles) {
    int lane = threadIdx.x % 32, tile = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (tile >= tiles) return;
    int col_tile, row_tile, image = divide(divide(tile, by_col_tiles, col_tile), by_row_tiles, row_tile);
    int row = 4 * (8 * row_tile + lane / 4), col = 4 * (4 * col_tile + lane % 4);
    if (row >= rows || col >= cols) return;
    size_t start = (size_t)image * rows * cols;
    const float *source = x + start + (size_t)row * cols + col;
    float *target = y + start + (size_t)col * rows + row;
    Floats<4> in[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) in[r] = load<4>(source + (size_t)r * cols);
#pragma unroll
    for (int c = 0; c < 4; ++c)
        store4(target + (size_t)c * rows, make_float4(in[0].v[c], in[1].v[c], in[2].v[c], in[3].v[c]));
}

// grid: (images, tiles along rows, tiles along columns)
extern "C" __global__ void __launch_bounds__(THREADS)
transpose(const float *__restrict__ x, float *__restrict__ y, int rows, int cols, FastDiv tile_rows, FastDiv tile_cols) {
    __shared__ float tile[TILE_FLOATS];
    size_t image = (size_t)blockIdx.x * rows * cols;
    int row0 = blockIdx.y * tile_rows.d, col0 = blockIdx.z * tile_cols.d;
    int pitch = tile_cols.d | 1;  // odd, so that a column of the tile lies in different banks
    int elements = tile_rows.d * tile_cols.d;
#pragma unroll 4
    for (int i = threadIdx.x; i < elements; i += THREADS) {
        int col, row = divide(i, tile_cols, col);
        if (row0 + row < rows && col0 + col < cols)
            tile[row * pitch + col] = x[image + (size_t)(row0 + row) * cols + col0 + col];
    }
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < elements; i += THREADS) {
        int row, col = divide(i, tile_rows, row);
        if (row0 + row < rows && col0 + col < cols)
            y[image + (size_t)(col0 + col) * rows + row0 + row] = tile[row * pitch + col];
    }
}
#endif
