// Merge the partial moments that conv_sm90.cu leaves of each channel: partial holds how many pixels a row has of a channel,
// their mean, and the sum of squared deviations from it, (rows, K) each; moments gets the mean of all and the sum of squared
// deviations from that, (K) each. Two at a time (Chan, Golub & LeVeque 1979): no difference of large numbers, and of values
// that are all alike no deviation. Every order is fixed.
//
// grid: a block for CHANNELS channels; its threads have a channel each and every PARTS-th row.
// Bytes: reads partial once. Preconditions: K is a multiple of CHANNELS.
#include "common.cuh"

#define CHANNELS 8
#define PARTS 128
#define WARPS (CHANNELS * PARTS / 32)  // as many as a warp has lanes

struct Moments {
    float count, mean, m2;

    __device__ __forceinline__ void merge(const Moments &other) {
        if (other.count == 0.0f) return;  // whatever its mean is
        const float all = count + other.count, weight = __fdividef(other.count, all), delta = count == 0.0f ? 0.0f : other.mean - mean;
        mean = count == 0.0f ? other.mean : mean + delta * weight;
        m2 += other.m2 + delta * delta * (count * weight);
        count = all;
    }
};

// The first `lanes` lanes of a warp get what all those have that lie a multiple of `lanes` behind them.
__device__ __forceinline__ void merge_lanes(Moments &own, int lanes) {
#pragma unroll
    for (int offset = 16; offset >= lanes; offset /= 2) {
        const Moments other = {__shfl_down_sync(0xffffffffu, own.count, offset), __shfl_down_sync(0xffffffffu, own.mean, offset),
                               __shfl_down_sync(0xffffffffu, own.m2, offset)};
        own.merge(other);
    }
}

extern "C" __global__ void __launch_bounds__(CHANNELS *PARTS)
    conv_moments(const float *__restrict__ partial, float *__restrict__ moments, int rows, int channels) {
    __shared__ Moments scratch[WARPS][CHANNELS];
    await_predecessors();
    const int k = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const size_t plane = (size_t)rows * channels;
    Moments own = {0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int row = threadIdx.x / CHANNELS; row < rows; row += PARTS) {
        const float *at = partial + (size_t)row * channels + k;
        own.merge({at[0], at[plane], at[2 * plane]});
    }
    merge_lanes(own, CHANNELS);
    if (lane < CHANNELS) scratch[warp][lane] = own;
    __syncthreads();
    if (warp >= CHANNELS) return;
    own = scratch[lane][warp];
    merge_lanes(own, 1);
    if (lane > 0) return;
    const int channel = blockIdx.x * CHANNELS + warp;
    moments[channel] = own.mean;
    moments[channels + channel] = own.m2 < 0.0f ? 0.0f : own.m2;  // NaN stays
}
