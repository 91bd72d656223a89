// Depthwise convolution of any filter, stride, padding, dilation and number of filters a channel: forward, input gradient,
// gradients of filters and bias. x (N,H,W,C), w (K,R,S) with K = C * multiplier, y (N,P,Q,K); filter k sees channel k / multiplier.
//
// conv_depthwise_any_fprop, _dgrad: a thread makes VEC channels of one output pixel at a time, tap by tap. One-dimensional grid:
//   (pixels) x (slices of the channels, innermost); block (channels / VEC of a slice, pixels). The slice's filters lie in shared
//   memory as floats, [tap][filter], where they fit; each x (dy) is read once a tap, from L1.
// conv_depthwise_any_wgrad: a thread has one filter and TAPS_A_THREAD taps; grid (runs of pixels) x (chunks of taps) x (slices,
//   innermost); block (filters, pixels). A block's threads are added in their order, into row `run` of `partial` (dw, then db),
//   which conv_wgrad_sum adds up; without `partial` there is one run. x and dy are read once a chunk of taps.
// Preconditions: VEC = 4 needs multiplier 1 and C % 4 == 0; fewer than 2^31 elements. Macros: ELEMENT, VEC.
#include "conv_common.cuh"

#define TAPS_A_THREAD 9

// Twin of `_argument` in conv_depthwise_any.py.
struct Problem {
    int pixels;  // that threads take: of y, of dgrad those of dx
    int h, w, c, p, q, k, r, s, multiplier;
    int stride_h, stride_w, top, left, dilation_h, dilation_w;
    int act, in_shared;
    FastDiv by_rows, by_columns;  // of the pixels that threads take
    FastDiv by_stride_h, by_stride_w, by_multiplier, by_s, by_slices;
};

// Filters first .. first + count - 1, [tap][filter], in shared memory or where they are.
struct Weights {
    const ELEMENT *global;
    const float *shared;
    int taps, count;

    // All threads of the block must call.
    __device__ __forceinline__ Weights(const ELEMENT *w, float *memory, int first, int most, const Problem &g) {
        taps = g.r * g.s, count = min(most, g.k - first), global = w + (long long)first * taps;
        shared = g.in_shared ? memory : nullptr;
        if (!shared) return;
        for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count * taps; i += blockDim.x * blockDim.y)
            memory[i % taps * count + i / taps] = load<1>(global + i).v[0];
        __syncthreads();
    }

    __device__ __forceinline__ float at(int filter, int tap) const {
        return shared ? shared[tap * count + filter] : load<1>(global + filter * taps + tap).v[0];
    }
};

struct Spot {
    int image, row, column;
};

__device__ __forceinline__ Spot spot_of(int pixel, const Problem &g) {
    Spot spot;
    spot.image = divide(divide(pixel, g.by_columns, spot.column), g.by_rows, spot.row);
    return spot;
}

#ifdef VEC

extern "C" __global__ void __launch_bounds__(256)
    conv_depthwise_any_fprop(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ w, const float *__restrict__ bias,
                             ELEMENT *__restrict__ y, Problem g) {
    DYNAMIC_SHARED(float, memory);
    await_predecessors();
    int slice;
    const int block = divide(blockIdx.x, g.by_slices, slice), blocks = gridDim.x / g.by_slices.d;
    const int width = blockDim.x * VEC, own = threadIdx.x * VEC, k = slice * width + own;
    const Weights weights(w, memory, slice * width, width, g);
    if (k >= g.k) return;
    const int c = VEC == 1 ? quotient(k, g.by_multiplier) : k;
    const Floats<VEC> start = bias ? load<VEC>(bias + k) : splat<VEC>(0.0f);
    for (int pixel = block * blockDim.y + threadIdx.y; pixel < g.pixels; pixel += blocks * blockDim.y) {
        const Spot o = spot_of(pixel, g);
        Floats<VEC> sum = start;
        int tap = 0;
        for (int r = 0; r < g.r; ++r) {
            const int h = o.row * g.stride_h - g.top + r * g.dilation_h;
            const ELEMENT *row = x + (long long)(o.image * g.h + h) * g.w * g.c + c;
            for (int s = 0; s < g.s; ++s, ++tap) {
                const int column = o.column * g.stride_w - g.left + s * g.dilation_w;
                if ((u32)h >= (u32)g.h || (u32)column >= (u32)g.w) continue;
                const Floats<VEC> v = load<VEC>(row + column * g.c);
#pragma unroll
                for (int e = 0; e < VEC; ++e) sum.v[e] += v.v[e] * weights.at(own + e, tap);
            }
        }
        if (g.act) {
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum.v[e] = activate<ACT_RELU>(sum.v[e]);
        }
        store<VEC>(y + (long long)pixel * g.k + k, sum);
    }
}

// Output that tap offset `tap * dilation` of position `at` (padding added) belongs to; -1 for none.
__device__ __forceinline__ int output_of(int at, FastDiv by_stride, int outputs) {
    if (at < 0) return -1;
    int rest, output = divide(at, by_stride, rest);
    return rest == 0 && output < outputs ? output : -1;
}

extern "C" __global__ void __launch_bounds__(256)
    conv_depthwise_any_dgrad(const ELEMENT *__restrict__ dy, const ELEMENT *__restrict__ w, const ELEMENT *saved,
                             const ELEMENT *addend, ELEMENT *dx, Problem g) {
    DYNAMIC_SHARED(float, memory);
    await_predecessors();
    int slice;
    const int block = divide(blockIdx.x, g.by_slices, slice), blocks = gridDim.x / g.by_slices.d;
    const int width = blockDim.x * VEC, own = threadIdx.x * VEC, c = slice * width + own;
    const Weights weights(w, memory, slice * width * g.multiplier, width * g.multiplier, g);
    if (c >= g.c) return;
    for (int pixel = block * blockDim.y + threadIdx.y; pixel < g.pixels; pixel += blocks * blockDim.y) {
        const Spot i = spot_of(pixel, g);
        Floats<VEC> sum = splat<VEC>(0.0f);
        int tap = 0;
        for (int r = 0; r < g.r; ++r) {
            const int p = output_of(i.row + g.top - r * g.dilation_h, g.by_stride_h, g.p);
            const ELEMENT *row = dy + (long long)(i.image * g.p + p) * g.q * g.k + c * g.multiplier;
            for (int s = 0; s < g.s; ++s, ++tap) {
                const int q = output_of(i.column + g.left - s * g.dilation_w, g.by_stride_w, g.q);
                if (p < 0 || q < 0) continue;
                for (int j = 0; j < g.multiplier; ++j) {
                    const Floats<VEC> v = load<VEC>(row + q * g.k + j);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) sum.v[e] += v.v[e] * weights.at((own + e) * g.multiplier + j, tap);
                }
            }
        }
        const long long at = (long long)pixel * g.c + c;
        if (addend) {
            const Floats<VEC> other = load<VEC>(addend + at);
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum.v[e] += other.v[e];
        }
        if (g.act) {
            const Floats<VEC> kept = load<VEC>(saved + at);
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum.v[e] = activation_dgrad_of(sum.v[e], kept.v[e], g.act);
        }
        store<VEC>(dx + at, sum);
    }
}

#else

extern "C" __global__ void __launch_bounds__(256)
    conv_depthwise_any_wgrad(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ dy, float *__restrict__ dw,
                             float *__restrict__ db, float *__restrict__ partial, Problem g, FastDiv by_chunks) {
    DYNAMIC_SHARED(float, memory);  // [tap][pixel of the block][filter of the slice]
    await_predecessors();
    int slice, chunk;
    const int run = divide(divide(blockIdx.x, g.by_slices, slice), by_chunks, chunk);
    const int runs = gridDim.x / (g.by_slices.d * by_chunks.d);
    const int k = slice * blockDim.x + threadIdx.x, c = quotient(k, g.by_multiplier), taps = g.r * g.s;
    int down[TAPS_A_THREAD], right[TAPS_A_THREAD];  // from an output's corner to the tap's pixel
#pragma unroll
    for (int i = 0; i < TAPS_A_THREAD; ++i) {
        int s, r = divide(chunk * TAPS_A_THREAD + i, g.by_s, s);
        down[i] = r < g.r ? r * g.dilation_h - g.top : -(1 << 30);
        right[i] = s * g.dilation_w - g.left;
    }
    float sums[TAPS_A_THREAD] = {}, bias_sum = 0.0f;
    for (int pixel = run * blockDim.y + threadIdx.y; pixel < g.pixels && k < g.k; pixel += runs * blockDim.y) {
        const Spot o = spot_of(pixel, g);
        const float error = load<1>(dy + (long long)pixel * g.k + k).v[0];
        bias_sum += error;
#pragma unroll
        for (int i = 0; i < TAPS_A_THREAD; ++i) {
            const int h = o.row * g.stride_h + down[i], column = o.column * g.stride_w + right[i];
            if ((u32)h >= (u32)g.h || (u32)column >= (u32)g.w) continue;
            sums[i] += error * load<1>(x + ((long long)(o.image * g.h + h) * g.w + column) * g.c + c).v[0];
        }
    }

    const int row_size = g.k * taps + (db ? g.k : 0), lanes = blockDim.x, height = blockDim.y;
    float *dw_out = partial ? partial + (long long)run * row_size : dw;
    float *db_out = partial ? dw_out + g.k * taps : db;
#pragma unroll
    for (int i = 0; i <= TAPS_A_THREAD; ++i)
        memory[(i * height + threadIdx.y) * lanes + threadIdx.x] = i < TAPS_A_THREAD ? sums[i] : bias_sum;
    __syncthreads();
    for (int i = threadIdx.y; i <= TAPS_A_THREAD; i += height) {
        const int tap = chunk * TAPS_A_THREAD + i;
        float sum = 0.0f;
        for (int y = 0; y < height; ++y) sum += memory[(i * height + y) * lanes + threadIdx.x];
        if (k < g.k && i < TAPS_A_THREAD && tap < taps) dw_out[k * taps + tap] = sum;
        if (k < g.k && i == TAPS_A_THREAD && db && chunk == 0) db_out[k] = sum;
    }
}

#endif
