// Depthwise 3x3 convolution of stride 1 and its input gradient on Hopper, bf16.
//
//     y[n,p,q,c]  = act(bias[c] + sum_{r,s} x[n, p+r-top, q+s-left, c] * w[c,r,s])
//     dx[n,h,w,c] = sum_{r,s} dy[n, h+top-r, w+left-s, c] * w[c,r,s]
//
// x (N,H,W,C), w (C,3,3), y (N,P,Q,C), bias (C) f32. One-dimensional grid: (parts of the rows) x (columns) x (slices of the
// channels, innermost); see conv_depthwise_sm90.cuh. Dynamic shared memory: the ring; a stage holds a row of x, and beside it the
// row of outputs that it ends, which the copy engine writes out.
//
// A row, read once, has its part in three rows of outputs, whose sums lie in registers.
// Bytes: x (dy) once and the halo of shares again, y (dx) once.
// Preconditions: C % 8 == 0; tensors aligned to 16 bytes; dilation 1; fewer than 2^31 elements.
#include "conv_depthwise_sm90.cuh"

// Turns after which thread 0 looks whether all warps are done with a stage: at once it would wait for the slowest, and all for it.
#define LAG 2

// The thread's part in the rows of a block.
template <bool Mirror>
__device__ __forceinline__ void correlate(const TensorMap &x, const TensorMap &y, const ELEMENT *w, const float *bias, const Rows &g) {
    __shared__ u64 barriers[2 * MOST_STAGES];
    __shared__ int ended[MOST_STAGES];  // the row of all images' outputs that lies in a stage, or -1
    __shared__ int end;
    __shared__ Feed feed;
    RING_MEMORY(ring_memory);
    const int thread = thread_of_block();
    const Share share = share_of(blockIdx.x, g);
    if (thread == 0) {
        prefetch(x), prefetch(y);
        for (int i = 0; i < g.stages; ++i) ended[i] = -1;
        end = share.end;
    }
    Stages stages(ring_memory, barriers, g.stages);
    await_predecessors();
    if (thread == 0) feed = feed_first<false>(g.stages - LAG - 1, share, x, y, stages, g);

    const int channel = share.channel + threadIdx.x * VEC, pitch = blockDim.x * VEC;
    const int own_x = ((threadIdx.z * (blockDim.y * COLUMNS + FILTER - 1) + threadIdx.y * COLUMNS) * blockDim.x + threadIdx.x) * VEC;
    const int own_y = g.y_at / (int)sizeof(ELEMENT) + ((threadIdx.z * blockDim.y + threadIdx.y) * COLUMNS * blockDim.x + threadIdx.x) * VEC;
    float tap[TAPS][VEC];
    filter_taps<Mirror>(w + min(channel, g.c - VEC) * TAPS, tap);
    const Floats<VEC> start = bias && channel < g.c ? load<VEC>(bias + channel) : splat<VEC>(0.0f);

    // Thread 0: the outputs of LAG turns ago leave, and the stage that those before them have left is filled.
    auto serve = [&]() {
        const int past = stages.wait_past<LAG>(g.stages);
        store_wait<0>();
        feed_row<false>(feed, x, y, stages, g);
        if (ended[past] < 0) return;
        int row;
        const int images = divide(ended[past], g.by_p, row);
        store_tile(y, stages.memory + past * g.stage_bytes + g.y_at, share.channel, share.column, row, images * blockDim.z);
    };
    for (int at = share.first; at < end;) {
        const Strip strip = strip_at<false>(at, end, g);
        const int next = at + strip.end - strip.first;
        float sums[FILTER][COLUMNS][VEC];
#pragma unroll
        for (int i = 0; i + 1 < FILTER; ++i)
#pragma unroll
            for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                for (int e = 0; e < VEC; ++e) sums[i][q][e] = start.v[e];
        in_turn(at - (FILTER - 1) + strip.step, next, [&](int row) {  // the row that the turn ends
            if (thread == 0) serve();
            ELEMENT *stage = reinterpret_cast<ELEMENT *>(ring_memory + stages.now.stage * g.stage_bytes);
            stages.wait_full();
            multiply(fetch_shared<SEEN>(stage + own_x, pitch), [&](const Floats<VEC> &v, int i, int q, int t) {
#pragma unroll
                for (int e = 0; e < VEC; ++e) {
                    const float before = t == 0 ? start.v[e] : sums[i][q][e];
                    sums[i][q][e] = before + v.v[e] * tap[t][e];
                }
            });
            if (thread == 0) ended[stages.now.stage] = row < at ? -1 : row;
            if (row >= at) {
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
            stages.now.next(g.stages);
            move_up(sums);
        });
        at = next;
    }
    if (thread == 0) {
        for (int i = 0; i < LAG; ++i) serve(), stages.now.next(g.stages);
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
