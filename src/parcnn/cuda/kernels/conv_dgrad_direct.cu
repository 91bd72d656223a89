// Gradient of a max-pooled convolution of few channels with respect to its input: what only the winners of the pool cost.
//
//     dx[n,h,w,c] = act'(saved) * (addend[n,h,w,c] + sum_{r,s,k} e[n,p,q,k] * w[k,r,s,c]),  h = p - top + r, w = q - left + s
//         where e is dy at the winner of each 2x2 window and nothing at the other three outputs
//
// grid (runs of images, groups of channels); a block keeps its channels of all filters in shared memory and takes image
//   after image. A warp takes whole windows. Wherever the winner is, the window reaches (R+1) x (S+1) pixels, and lane l
//   holds floats l, l + 32, .. of them (FLOATS registers). Filters lie in shared memory with zeros around them, so that the
//   winner's position only moves the address. The windows' sums go to shared memory, where each pixel adds, in the order
//   of the windows, those that reach it.
//
// Bytes: dy, idx (saved, addend) are read once for each group of channels, w once a block; dx is written once.
// Preconditions: stride 1, dilation 1, 2x2 max-pooling; (R+1)(S+1) * channels of a group <= 32 FLOATS; tensors of less than
// 2^31 elements. dx may be the memory of saved or addend. A loser's zero is not multiplied: 0 * Inf is not in the sum.

#include "conv_common.cuh"

// Twin of the struct that conv_dgrad_direct.py builds.
struct DirectDgrad {
    int images, windows;     // of the batch; of an image
    int filters;             // k, rounded up to a multiple of 4: the others are zeros
    int channels;            // of a group
    int row;                 // floats of a row of a window's reach: (s + 1) * channels
    int lead;                // zeros before a filter: row + channels
    int filter_size;         // floats of a filter with its zeros
    int weights_size;        // floats of all of them and of what is read behind the last
    int group_size, pixels;  // r * s * channels; h * w * channels
    FastDiv by_filters, by_group_size, by_channels, by_w;
};

extern "C" __global__ void __launch_bounds__(512)
    conv_dgrad_direct(const ELEMENT *__restrict__ dy, const ELEMENT *__restrict__ w, const u8 *__restrict__ idx,
                      const ELEMENT *saved, const ELEMENT *addend, ELEMENT *dx, Conv g, DirectDgrad d) {
    DYNAMIC_SHARED(float, shared);
    float *winners = shared;                                  // [window][filter]: error, and where its weights start
    float *reach = winners + 2 * d.windows * d.filters;       // [window][32 FLOATS]
    float *weights = reach + d.windows * 32 * FLOATS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int c0 = blockIdx.y * d.channels;

    for (int e = threadIdx.x; e < d.weights_size; e += blockDim.x) weights[e] = 0.0f;
    await_predecessors();
    __syncthreads();
    for (int e = threadIdx.x; e < g.k * d.group_size; e += blockDim.x) {
        int tap_c, c, s;
        int k = divide(e, d.by_group_size, tap_c);
        int tap = divide(tap_c, d.by_channels, c), r = divide(tap, g.by_s, s);
        if (c0 + c < g.c)
            weights[k * d.filter_size + d.lead + r * d.row + s * d.channels + c] =
                load<1>(w + (k * g.r * g.s + tap) * g.c + c0 + c).v[0];
    }

    for (int n = blockIdx.x; n < d.images; n += gridDim.x) {
        for (int e = threadIdx.x; e < d.windows * d.filters; e += blockDim.x) {
            int k, window = n * d.windows + divide(e, d.by_filters, k);
            float error = 0.0f;
            int from = k * d.filter_size + d.lead;
            if (k < g.k) {
                error = load<1>(dy + window * g.k + k).v[0];
                int winner = idx[window * ((g.k + 3) / 4) + k / 4] >> 2 * (k % 4) & 3;
                from -= (winner >> 1) * d.row + (winner & 1) * d.channels;
            }
            winners[2 * e] = error;
            winners[2 * e + 1] = __int_as_float(from);
        }
        __syncthreads();

        for (int window = warp; window < d.windows; window += warps) {
            const float *list = winners + 2 * window * d.filters;
            float acc[FLOATS] = {};
            for (int k = 0; k < d.filters; k += 4) {
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    float4 two = load4(list + 2 * k + 4 * pair);
                    const float *first = weights + __float_as_int(two.y) + lane;
                    const float *second = weights + __float_as_int(two.w) + lane;
#pragma unroll
                    for (int i = 0; i < FLOATS; ++i) acc[i] += two.x * first[32 * i];
#pragma unroll
                    for (int i = 0; i < FLOATS; ++i) acc[i] += two.z * second[32 * i];
                }
            }
#pragma unroll
            for (int i = 0; i < FLOATS; ++i) reach[(window * FLOATS + i) * 32 + lane] = acc[i];
        }
        __syncthreads();

        for (int e = threadIdx.x; e < d.pixels; e += blockDim.x) {
            int c, left, h = divide(divide(e, d.by_channels, c), d.by_w, left);
            if (c0 + c >= g.c) continue;
            int to_h = h + g.pad_h, to_w = left + g.pad_w;
            int p_first = max(0, (to_h - g.r + 1) >> 1), p_last = min(to_h >> 1, g.p - 1);
            int q_first = max(0, (to_w - g.s + 1) >> 1), q_last = min(to_w >> 1, g.q - 1);
            float sum = 0.0f;
            for (int p = p_first; p <= p_last; ++p) {
                const float *from = reach + p * g.q * 32 * FLOATS + (to_h - 2 * p) * d.row + to_w * d.channels + c;
                for (int q = q_first; q <= q_last; ++q) sum += from[q * (32 * FLOATS - 2 * d.channels)];
            }
            int at = ((n * g.h + h) * g.w + left) * g.c + c0 + c;
            if (addend) sum += load<1>(addend + at).v[0];
            if (saved) sum = activation_dgrad_of(sum, load<1>(saved + at).v[0], g.act);
            store<1>(dx + at, {sum});
        }
    }
}
