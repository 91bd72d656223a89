// Depthwise 3x3 convolution of stride 1 and its input gradient on Hopper, bf16.
//
//     y[n,p,q,c]  = act(bias[c] + sum_{r,s} x[n, p+r-top, q+s-left, c] * w[c,r,s])
//     dx[n,h,w,c] = sum_{r,s} dy[n, h+top-r, w+left-s, c] * w[c,r,s]
//
// x (N,H,W,C), w (C,3,3), y (N,P,Q,C), bias (C) f32. One-dimensional grid: (parts of the rows) x (columns) x (slices of the
// channels, innermost); see conv_depthwise_sm90.cuh. Dynamic shared memory: the ring; a stage holds a row
// of x, and beside it the row of outputs that it ends, which the copy engine writes out.
//
// A row, read once, has its part in three rows of outputs, whose sums lie in registers.
// Bytes: x (dy) once and the halo of shares again, y (dx) once.
// Preconditions: C % 8 == 0; tensors aligned to 16 bytes; dilation 1; fewer than 2^31 elements.
#include "conv_depthwise_sm90.cuh"

// The thread's part in the rows of a block.
template <bool Mirror>
__device__ __forceinline__ void correlate(const TensorMap &x, const TensorMap &y, const ELEMENT *w, const float *bias, const Rows &g) {
    __shared__ u64 barriers[2 * MOST_STAGES];
    __shared__ Feed feed;
    RING_MEMORY(ring_memory);
    const int thread = thread_of_block();
    Stages stages(ring_memory, barriers, g.stages);
    Share share = share_of(blockIdx.x, g);
    await_predecessors();

    if (thread == 0) {
        prefetch(x), prefetch(y);
        feed = {0, 0, 0, 0, 0, share};
        for (int i = 0; i + 1 < g.stages; ++i) feed_row<false>(feed, x, y, stages, g);
    }

    const int channel = share.channel + threadIdx.x * VEC, pitch = blockDim.x * VEC;
    const int own_x = ((threadIdx.z * (blockDim.y * COLUMNS + FILTER - 1) + threadIdx.y * COLUMNS) * blockDim.x + threadIdx.x) * VEC;
    const int own_y = g.y_at / (int)sizeof(ELEMENT) + ((threadIdx.z * blockDim.y + threadIdx.y) * COLUMNS * blockDim.x + threadIdx.x) * VEC;
    float tap[TAPS][VEC];
    filter_taps<Mirror>(w + min(channel, g.c - VEC) * TAPS, tap);
    const Floats<VEC> start = bias && channel < g.c ? load<VEC>(bias + channel) : splat<VEC>(0.0f);

    Strip strip;
    int ended = -1, image = 0;  // row of outputs that the turn before ended
    // Thread 0, when the turn before is over: its outputs leave, and the stage that the outputs before them have left is filled.
    auto serve = [&]() {
        stages.wait_before();
        store_wait<0>();
        feed_row<false>(feed, x, y, stages, g);
        if (ended >= 0) store_tile(y, stages.memory + stages.before.stage * g.stage_bytes + g.y_at, share.channel, share.column, ended, image);
    };
    while (next_strip<false>(share, strip, g)) {
        float sums[FILTER][COLUMNS][VEC];
#pragma unroll
        for (int i = 0; i + 1 < FILTER; ++i)
#pragma unroll
            for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                for (int e = 0; e < VEC; ++e) sums[i][q][e] = start.v[e];
        in_turn(strip, [&](int step) {
            if (thread == 0 && stages.before.stage >= 0) serve();
            ELEMENT *stage = reinterpret_cast<ELEMENT *>(ring_memory + stages.now.stage * g.stage_bytes);
            stages.wait_full();
            if (strip.sees(step, g))
                multiply(fetch_shared<SEEN>(stage + own_x, pitch), [&](const Floats<VEC> &v, int i, int q, int t) {
#pragma unroll
                    for (int e = 0; e < VEC; ++e) {
                        const float before = t == 0 ? start.v[e] : sums[i][q][e];
                        sums[i][q][e] = before + v.v[e] * tap[t][e];
                    }
                });
            ended = step >= FILTER - 1 ? strip.first + step - (FILTER - 1) : -1, image = strip.image;
            if (ended >= 0) {
#pragma unroll
                for (int q = 0; q < COLUMNS; ++q) {
                    Floats<VEC> out;
#pragma unroll
                    for (int e = 0; e < VEC; ++e) out.v[e] = g.act ? activate<ACT_RELU>(sums[0][q][e]) : sums[0][q][e];
                    store<VEC>(stage + own_y + q * pitch, out);
                }
                fence_async();
            }
            stages.release();
            stages.next(g.stages);
            move_up(sums);
        });
    }
    if (thread == 0) {
        serve();
        store_wait<0>();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_fprop(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, const ELEMENT *__restrict__ w,
                              const float *__restrict__ bias, Rows g) {
    correlate<false>(x, y, w, bias, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_dgrad(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap dx, const ELEMENT *__restrict__ w,
                              Rows g) {
    correlate<true>(dy, dx, w, nullptr, g);
}
