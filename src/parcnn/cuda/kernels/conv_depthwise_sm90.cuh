// What the depthwise kernels for Hopper share: the problem, and the rows that a block does.
//
// Rows of all images lie one after the other (of `images` neighbouring images side by side); every block does an equal share of
// them, for its slice of the channels and its columns. The copy engine (TMA) brings the rows into a ring in shared memory, as one
// thread tells it. Most of the others own VEC channels of a piece of COLUMNS columns of an image, and walk down the rows.
// Macros: those of conv_depthwise.cuh, with FILTER 3 and STRIDE 1; THREADS, on a multiprocessor in all; WHOLE_ROWS: a piece is a row
// of the image and of the outputs, with padding of one column on either side, which is left out.
#pragma once

#include "conv_depthwise.cuh"
#include "sm90.cuh"

#define MOST_STAGES 16
#define SEEN (COLUMNS + FILTER - 1)
#define BESIDE (WHOLE_ROWS ? 1 : 0)  // of the columns seen, those of padding that are left out on either side
#define WARP 32

// Names the ring in the block's dynamic shared memory: a tensor copy wants 128 bytes of alignment.
#ifdef HOST_EMULATION
#define RING_MEMORY(name) DYNAMIC_SHARED(u8, name)
#else
#define RING_MEMORY(name) extern __shared__ __align__(128) u8 name[]
#endif

// Twin of the argument in conv_depthwise_sm90.py's `launches`. Dgrad calls dy the image and dx the outputs.
struct Rows {
    int h, c;              // image
    int n, p, q;           // outputs
    int lanes, pieces, images;  // channel vectors, pieces of COLUMNS columns, and images of a block
    int top, left;         // from an output to the first tap that it sees
    int each, more;        // rows of a block's share; so many blocks have one more
    int stages;
    int stage_bytes, x_bytes;
    int y_at, y_bytes;     // where a stage's row of outputs lies (wgrad: of dy)
    int act;
    FastDiv by_p, by_units, by_slices;  // rows of an image; (columns, slices) of a row; slices of the channels
    FastDiv by_lanes, by_pieces;
};

struct Share {
    int channel, column;  // first of the block
    int first, end;       // rows
};

__device__ __forceinline__ Share share_of(int block, const Rows &g) {
    Share share;
    int unit, slice;
    const int part = divide(block, g.by_units, unit);
    share.column = divide(unit, g.by_slices, slice) * g.pieces * COLUMNS;
    share.channel = slice * g.lanes * VEC;
    share.first = part * g.each + min(part, g.more);
    share.end = share.first + g.each + (part < g.more);
    return share;
}

// The rows of one image among a share's: outputs first .. end - 1. Turn i sees row first - top + i of the image, and has the rows of
// outputs up to first + i. Turns from `turn` on to the one before `stop` have something to do: forward the others before see
// padding, of wgrad the others behind.
struct Strip {
    int image, first, end, turn, stop;
};

// The strip that begins at row `at` of all images, of those before `end`.
template <bool Gradient> __device__ __forceinline__ Strip strip_at(int at, int end, const Rows &g) {
    Strip strip;
    strip.image = divide(at, g.by_p, strip.first) * g.images;
    strip.end = min(g.p, strip.first + end - at);
    const int turns = strip.end - strip.first + FILTER - 1;
    strip.turn = Gradient ? 0 : max(0, g.top - strip.first);
    strip.stop = Gradient ? min(turns, g.h + g.top - strip.first) : turns;
    return strip;
}

// `Count` neighbouring pixels of a row in shared memory, `pitch` elements apart.
template <int Count> __device__ __forceinline__ Pixels<Count> fetch_shared(const ELEMENT *first, int pitch) {
    Pixels<Count> pixels;
#pragma unroll
    for (int j = 0; j < Count; ++j) pixels.at[j] = fetch<VEC>(first + j * pitch);
    return pixels;
}

// turn(i) for i from `first` on to the one before `end`. The code of FILTER turns is unrolled: after so many, each row that a thread
// keeps is in its own registers again, and nothing moves.
template <class Turn> __device__ __forceinline__ void in_turn(int first, int end, Turn turn) {
    for (;; first += FILTER) {
#pragma unroll
        for (int j = 0; j < FILTER; ++j) {
            if (first + j == end) return;
            turn(first + j);
        }
    }
}

__device__ __forceinline__ void fill(float (&row)[COLUMNS][VEC], const Floats<VEC> &value) {
#pragma unroll
    for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
        for (int e = 0; e < VEC; ++e) row[q][e] = value.v[e];
}

// Rows become one older: the last one's place is free.
__device__ __forceinline__ void move_up(float (&rows)[FILTER][COLUMNS][VEC]) {
#pragma unroll
    for (int i = 0; i + 1 < FILTER; ++i)
#pragma unroll
        for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
            for (int e = 0; e < VEC; ++e) rows[i][q][e] = rows[i + 1][q][e];
}
