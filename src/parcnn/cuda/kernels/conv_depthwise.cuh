// What the depthwise kernels share: the problem, and where a thread stands in it.
//
// A thread owns VEC neighbouring channels of COLUMNS neighbouring pixels and walks down a strip of rows. Its horizontal
// overlap with its neighbours is read from L1; what rows have in common stays in registers.
// Macros: ELEMENT (float, bf16) of images and filters; FILTER (R = S), STRIDE (of both sides), VEC, COLUMNS; AHEAD, the rows that a
// thread fetches before their turn; BLOCKS, on a multiprocessor at least.
#pragma once

#include "conv_common.cuh"

#define TAPS (FILTER * FILTER)
// A filter column's outputs under way beside the newest: an image's row has a part in so many more rows of outputs.
#define BEHIND ((FILTER - 1) / STRIDE)

// Twin of `Depthwise.argument` in conv_depthwise.py. Dgrad calls dy the image and dx the outputs; with a stride it counts rows
// and columns of dx from the first that a dy's filter would start at.
struct Depthwise {
    int h, w, c;            // image
    int p, q;               // outputs
    int top, left;          // from an output to the first tap that it sees
    int rows;               // of a strip
    int items;              // strips of all images, in pieces of `COLUMNS`
    int first_p, first_q;   // of the outputs, where strips and pieces begin
    int act;
    FastDiv by_pieces, by_strips, by_slices;  // pieces of a row, strips of an image, slices of a block's channels
};

struct Spot {
    int image, row, column, channel;  // first row and column of the strip's piece
};

// Item `item`, channels of the thread. Items run along a row, then down an image: neighbours share what they read.
__device__ __forceinline__ Spot spot_of(int item, int slice, const Depthwise &g) {
    Spot spot;
    int strip;
    spot.image = divide(divide(item, g.by_pieces, spot.column), g.by_strips, strip);
    spot.column = g.first_q + spot.column * COLUMNS;
    spot.row = g.first_p + strip * g.rows;
    spot.channel = (slice * blockDim.x + threadIdx.x) * VEC;
    return spot;
}

// Bit j: column `first` + j lies in a row of `width`.
template <int Count> __device__ __forceinline__ u32 columns_inside(int first, int width) {
    u32 mask = 0;
#pragma unroll
    for (int j = 0; j < Count; ++j) mask |= (u32)((u32)(first + j) < (u32)width) << j;
    return mask;
}

// `Count` neighbouring pixels of a row, as they lie in memory; zeros where `mask` is 0.
template <int Count> struct Pixels {
    Fetched<ELEMENT, VEC> at[Count];
};

template <int Count> __device__ __forceinline__ Pixels<Count> fetch_pixels(const ELEMENT *first, int step, u32 mask) {
    Pixels<Count> pixels;
#pragma unroll
    for (int j = 0; j < Count; ++j) {
        pixels.at[j] = {};
        if (mask >> j & 1) pixels.at[j] = fetch<VEC>(first + j * step);
    }
    return pixels;
}

template <int Count> __device__ __forceinline__ void widen_pixels(const Pixels<Count> &pixels, float (&v)[Count][VEC]) {
#pragma unroll
    for (int j = 0; j < Count; ++j) {
        Floats<VEC> wide = widen(pixels.at[j]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) v[j][e] = wide.v[e];
    }
}

// tap[t][e]: of channel e's filter, the VEC filters from `w` on; taps in reverse order where Mirror.
template <bool Mirror> __device__ __forceinline__ void filter_taps(const ELEMENT *w, float (&tap)[TAPS][VEC]) {
    // VEC filters are TAPS vectors, one after the other.
#pragma unroll
    for (int i = 0; i < TAPS; ++i) {
        const Floats<VEC> part = load<VEC>(w + i * VEC);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            const int t = (i * VEC + e) % TAPS;
            tap[Mirror ? TAPS - 1 - t : t][(i * VEC + e) / TAPS] = part.v[e];
        }
    }
}

// Adds the filter and bias gradients of the block's threads in their order and writes those of its channels, from `first_channel`
// on: into row `run` of `partial` (dw, then db), or where that is null to dw and db (which may be null). All threads must call, of
// a block (channel vectors, any, any); `shared` holds FILTER floats for each thread's channel.
__device__ __forceinline__ void write_gradients(const float (&sums)[TAPS][VEC], const float (&bias_sums)[VEC], float *shared, int c,
                                                int first_channel, int run, float *dw, float *db, float *partial) {
    const int row_size = c * TAPS + (db ? c : 0);
    float *dw_out = partial ? partial + (long long)run * row_size : dw;
    float *db_out = partial ? dw_out + c * TAPS : db;
    const int width = blockDim.x * VEC, height = blockDim.y * blockDim.z;
    const int row = threadIdx.z * blockDim.y + threadIdx.y;
    float *own = shared + row * width + threadIdx.x * VEC;
#pragma unroll
    for (int r = 0; r <= FILTER; ++r) {  // the filter's rows, then the bias
        const int count = r < FILTER ? FILTER : 1;
        __syncthreads();
#pragma unroll
        for (int s = 0; s < count; ++s)
#pragma unroll
            for (int e = 0; e < VEC; ++e) own[s * height * width + e] = r < FILTER ? sums[r * FILTER + s][e] : bias_sums[e];
        __syncthreads();
        for (int i = row * blockDim.x + threadIdx.x; i < count * width; i += blockDim.x * height) {
            const int s = i / width, at = i - s * width, channel = first_channel + at;
            if (channel >= c) continue;
            float sum = 0.0f;
            for (int y = 0; y < height; ++y) sum += shared[(s * height + y) * width + at];
            if (r < FILTER)
                dw_out[channel * TAPS + r * FILTER + s] = sum;
            else if (db)
                db_out[channel] = sum;
        }
    }
}
