// What the depthwise kernels for Hopper share: the problem, the rows that a block does, and the ring that brings them.
//
// Rows of all images lie one after the other (of `images` neighbouring images side by side); every block does an equal share of
// them, for its slice of the channels and its columns. One thread has the copy engine (TMA) bring the rows into a ring in
// shared memory; padding is what lies outside of the tensor and comes as zeros. Block (channel vectors, pieces of COLUMNS
// columns, images); a thread owns VEC channels of a piece of an image, and walks down the rows.
// Macros: those of conv_depthwise.cuh, with FILTER 3 and STRIDE 1; THREADS, on a multiprocessor in all.
#pragma once

#include "conv_depthwise.cuh"
#include "sm90.cuh"

#define MOST_STAGES 16
#define SEEN (COLUMNS + FILTER - 1)

// Names the ring in the block's dynamic shared memory: a tensor copy wants 128 bytes of alignment.
#ifdef HOST_EMULATION
#define RING_MEMORY(name) DYNAMIC_SHARED(u8, name)
#else
#define RING_MEMORY(name) extern __shared__ __align__(128) u8 name[]
#endif

__device__ __forceinline__ int thread_of_block() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }

// Twin of the argument in conv_depthwise_sm90.py's `launches`. Dgrad calls dy the image and dx the outputs.
struct Rows {
    int h, c;              // image
    int n, p, q;           // outputs
    int top, left;         // from an output to the first tap that it sees
    int each, more;        // rows of a block's share; so many blocks have one more
    int stages;
    int stage_bytes, x_bytes;
    int y_at, y_bytes;     // where a stage's row of outputs lies (wgrad: of dy)
    int act;
    FastDiv by_p, by_units, by_slices;  // rows of an image; (columns, slices) of a row; slices of the channels
};

struct Share {
    int channel, column;  // first of the block
    int first, end;       // rows
};

__device__ __forceinline__ Share share_of(int block, const Rows &g) {
    Share share;
    int unit, slice;
    const int part = divide(block, g.by_units, unit);
    share.column = divide(unit, g.by_slices, slice) * blockDim.y * COLUMNS;
    share.channel = slice * blockDim.x * VEC;
    share.first = part * g.each + min(part, g.more);
    share.end = share.first + g.each + (part < g.more);
    return share;
}

// The rows of one image among a share's: outputs first .. end - 1. Step i sees row first - top + i of the image, and ends row
// first + i - 2 of the outputs. Steps from `step` on to the one before `stop` have something to do: forward the others before
// see padding, of wgrad the others behind.
struct Strip {
    int image, first, end, step, stop;
};

// The strip that begins at row `at` of all images, of those before `end`.
template <bool Gradient> __device__ __forceinline__ Strip strip_at(int at, int end, const Rows &g) {
    Strip strip;
    strip.image = divide(at, g.by_p, strip.first) * blockDim.z;
    strip.end = min(g.p, strip.first + end - at);
    const int steps = strip.end - strip.first + FILTER - 1;
    strip.step = Gradient ? 0 : max(0, g.top - strip.first);
    strip.stop = Gradient ? min(steps, g.h + g.top - strip.first) : steps;
    return strip;
}

// The ring: stages in shared memory, barriers that say that one is full, and that all warps are done with one.
struct Stages {
    u32 memory, full, empty;
    Ring now;

    __device__ __forceinline__ Stages(const u8 *ring, u64 *barriers, int stages) {
        memory = shared_address(ring), full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
        const int threads = blockDim.x * blockDim.y * blockDim.z;
        for (int i = thread_of_block(); i < stages; i += threads) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, (threads + 31) / 32);
            barrier_init_fence();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full + 8 * now.stage, now.parity); }
    // The warp is done with the stage.
    __device__ __forceinline__ void release() const {
        __syncwarp();
        if (thread_of_block() % 32 == 0) barrier_arrive(empty + 8 * now.stage);
    }
    // The stage of Lag turns ago, when all warps are done with it; before there was one, at once.
    template <int Lag> __device__ __forceinline__ int wait_past(int stages) const {
        const bool wrapped = now.stage < Lag;
        const int past = now.stage - Lag + (wrapped ? stages : 0);
        barrier_wait(empty + 8 * past, now.parity ^ wrapped);
        return past;
    }
};

// What thread 0 has brought: the steps of strips one after the other, as stages become free. (In shared memory, but at the start: it
// would cost all threads registers.)
struct Feed {
    int4 next;    // strip.first + the next step, the last one's successor, the strip's image, the stage that the step goes to
    Share share;  // after the strip
    int y_end;    // behind the strip's last row of outputs
};

// Have the next step's row of x brought, and of wgrad that of dy; what lies outside of the image or the strip is zeros.
template <bool Gradient>
__device__ __forceinline__ void feed_row(Feed &f, const TensorMap &x, const TensorMap &dy, const Stages &stages, const Rows &g) {
    int4 next = f.next;
    if (next.x >= next.y) {
        if (f.share.first >= f.share.end) return;
        const Strip strip = strip_at<Gradient>(f.share.first, f.share.end, g);
        f.share.first += strip.end - strip.first;
        next.x = strip.first + strip.step, next.y = strip.first + strip.stop, next.z = strip.image;
        if (Gradient) f.y_end = strip.end;
    }
    const u32 full = stages.full + 8 * next.w, to = stages.memory + next.w * g.stage_bytes;
    barrier_expect(full, Gradient ? g.x_bytes + g.y_bytes : g.x_bytes);
    load_tile(to, x, full, f.share.channel, f.share.column - g.left, next.x - g.top, next.z);
    if (Gradient) load_tile(to + g.y_at, dy, full, f.share.channel, f.share.column, next.x, next.x < f.y_end ? next.z : g.n);
    f.next = make_int4(next.x + 1, next.y, next.z, next.w + 1 == g.stages ? 0 : next.w + 1);
}

// A feed that has the first `count` stages filled.
template <bool Gradient>
__device__ __forceinline__ Feed feed_first(int count, const Share &share, const TensorMap &x, const TensorMap &dy, const Stages &stages,
                                           const Rows &g) {
    Feed feed = {make_int4(0, 0, 0, 0), share, 0};
    for (int i = 0; i < count; ++i) feed_row<Gradient>(feed, x, dy, stages, g);
    return feed;
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

// product(v, i, q, tap): each of a row's pixels, and each tap that multiplies it with column q of the i-th of three rows of
// outputs (dy), the newest last.
template <class Product> __device__ __forceinline__ void multiply(const Pixels<SEEN> &pixels, Product product) {
#pragma unroll
    for (int at = 0; at < SEEN; ++at) {
        const Floats<VEC> v = widen(pixels.at[at]);
#pragma unroll
        for (int i = 0; i < FILTER; ++i)
#pragma unroll
            for (int q = 0; q < COLUMNS; ++q) {
                const int r = FILTER - 1 - i, s = at - q;
                if (s >= 0 && s < FILTER) product(v, i, q, r * FILTER + s);
            }
    }
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
