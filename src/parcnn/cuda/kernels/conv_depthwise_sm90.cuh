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

// Twin of `Share.argument` in conv_depthwise_sm90.py. Dgrad calls dy the image and dx the outputs.
struct Rows {
    int h, c;              // image
    int n, p, q;           // outputs
    int top, left;         // from an output to the first tap that it sees
    int count, parts;      // rows of all images, and blocks that they are shared among
    int stages;
    int stage_bytes, x_bytes;
    int dy_at, dy_bytes;   // of wgrad: where a stage's row of dy lies
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
    share.first = (int)((long long)g.count * part / g.parts);
    share.end = (int)((long long)g.count * (part + 1) / g.parts);
    return share;
}

// The rows of one image among a share's: outputs first .. end - 1.
struct Strip {
    int image, first, end;
};

// Take the first strip off the share; false where nothing is left.
__device__ __forceinline__ bool next_strip(Share &share, Strip &strip, const Rows &g) {
    if (share.first >= share.end) return false;
    strip.image = divide(share.first, g.by_p, strip.first) * blockDim.z;
    strip.end = min(g.p, strip.first + share.end - share.first);
    share.first += strip.end - strip.first;
    return true;
}

// Step i of a strip sees row first - top + i of the image, and ends row first + i - 2 of the outputs.
struct Steps {
    int first, end;  // those that see a row inside the image
    int stop;        // of all, behind the last
};

__device__ __forceinline__ Steps steps_of(const Strip &strip, const Rows &g) {
    Steps steps;
    steps.stop = strip.end - strip.first + FILTER - 1;
    steps.first = max(0, g.top - strip.first);
    steps.end = min(steps.stop, g.h + g.top - strip.first);
    return steps;
}

// The stages of a ring in shared memory, the barriers that say that one is full, and that one is read.
struct Stages {
    u32 full, empty;

    __device__ __forceinline__ Stages(u64 *barriers, int stages) {
        full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
        const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        if (thread == 0) {
            const int warps = (blockDim.x * blockDim.y * blockDim.z + 31) / 32;
            for (int i = 0; i < stages; ++i) {
                barrier_init(full + 8 * i, 1);
                barrier_init(empty + 8 * i, warps);
            }
            barrier_init_fence();
        }
        __syncthreads();
    }
};

// `Count` neighbouring pixels of a row in shared memory, `pitch` elements apart.
template <int Count> __device__ __forceinline__ Pixels<Count> fetch_shared(const ELEMENT *first, int pitch) {
    Pixels<Count> pixels;
#pragma unroll
    for (int j = 0; j < Count; ++j) pixels.at[j] = fetch<VEC>(first + j * pitch);
    return pixels;
}

// A value that is the same in all threads, but the compiler must not know: it then multiplies and adds it in one instruction.
__device__ __forceinline__ u32 varying(u32 v) { return __shfl_sync(0xffffffffu, v, 0); }
