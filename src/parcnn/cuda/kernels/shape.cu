// Moving elements, as bits.
//   copy_channels   y[row, y_start + c] = x[row, x_start + c],  c < channels     (Cat: one launch an input; ChannelSlice;
//                   ChannelPad: zero where c >= x_channels)
//   transpose       y[n, col, row] = x[n, row, col]              (ToChannelsFirst: rows = H*W; ToChannelsLast: rows = C)
//
// copy_channels: a thread moves a word of a row; threads run along channels, then rows. Channels count in words.
// transpose_squares: a thread moves SIDE x SIDE elements, rows of 16 bytes in and rows of 16 bytes out, and needs nothing but
//   its registers; a warp has 8 squares along rows x 4 along columns, so that it reads runs of 64 bytes and writes runs of 128.
// transpose: a block moves a tile of tile_rows x tile_cols of one image through shared memory; threads run along the
//   source's rows when reading and along the result's rows when writing, so both sides are coalesced even where the
//   matrix has only a few rows or columns (the tile then spans all of them).
// Bytes: every element read once and written once.
// Preconditions: x and y are apart, tensors start on 16 bytes. copy_channels: rows and starts are whole words.
// transpose_squares: rows and cols are multiples of SIDE. transpose: tile_rows * (tile_cols | 1) <= TILE_ELEMENTS.
// Macros: WORD, the type of copy_channels' words; BITS, the type of the other kernels' elements (u16 or u32).
#include "common.cuh"

#define THREADS 256

#ifdef WORD
extern "C" __global__ void __launch_bounds__(THREADS)
copy_channels(const WORD *__restrict__ x, WORD *__restrict__ y, int count, FastDiv by_channels, int x_channels, int x_stride,
              int x_start, int y_stride, int y_start) {
    await_predecessors();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    int c, row = divide(i, by_channels, c);
    WORD word = {};
    if (c < x_channels) word = load_word<WORD>(x + (size_t)row * x_stride + x_start + c);
    store_word(y + (size_t)row * y_stride + y_start + c, word);
}
#else
#define SIDE (16 / (int)sizeof(BITS))
#define TILE_ELEMENTS 2112

struct Row {
    u32 word[4];
};

// Word `at` of column `col` of a square: one element, or those of two rows.
__device__ __forceinline__ u32 column_word(const Row (&in)[SIDE], int col, int at) {
    if constexpr (SIDE == 4) return in[at].word[col];
    else return __byte_perm(in[2 * at].word[col / 2], in[2 * at + 1].word[col / 2], col % 2 ? 0x7632 : 0x5410);
}

// The tiles of a warp run along columns, then rows, then images.
extern "C" __global__ void __launch_bounds__(THREADS)
transpose_squares(const BITS *__restrict__ x, BITS *__restrict__ y, int tiles, int rows, int cols, FastDiv by_col_tiles,
                  FastDiv by_row_tiles) {
    await_predecessors();
    int lane = threadIdx.x % 32, tile = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (tile >= tiles) return;
    int col_tile, row_tile, image = divide(divide(tile, by_col_tiles, col_tile), by_row_tiles, row_tile);
    int row = SIDE * (8 * row_tile + lane / 4), col = SIDE * (4 * col_tile + lane % 4);
    if (row >= rows || col >= cols) return;
    size_t start = (size_t)image * rows * cols;
    const BITS *source = x + start + (size_t)row * cols + col;
    BITS *target = y + start + (size_t)col * rows + row;
    Row in[SIDE];
#pragma unroll
    for (int r = 0; r < SIDE; ++r) {
        uint4 t = load_word<uint4>(source + (size_t)r * cols);
        in[r] = {t.x, t.y, t.z, t.w};
    }
#pragma unroll
    for (int c = 0; c < SIDE; ++c)
        store_word(target + (size_t)c * rows, make_uint4(column_word(in, c, 0), column_word(in, c, 1), column_word(in, c, 2),
                                                         column_word(in, c, 3)));
}

// grid: (images, tiles along rows, tiles along columns)
extern "C" __global__ void __launch_bounds__(THREADS)
transpose(const BITS *__restrict__ x, BITS *__restrict__ y, int rows, int cols, FastDiv tile_rows, FastDiv tile_cols) {
    await_predecessors();
    __shared__ BITS tile[TILE_ELEMENTS];
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
