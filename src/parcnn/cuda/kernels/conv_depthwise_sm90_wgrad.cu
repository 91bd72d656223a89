// Gradients of the filters and bias of a depthwise 3x3 convolution of stride 1 on Hopper; x (N,H,W,C), dy (N,P,Q,C) bf16,
// dw (C,3,3) and db (C) f32.
//
//     dw[c,r,s] = sum_{n,p,q} x[n, p+r-top, q+s-left, c] * dy[n,p,q,c]        db[c] = sum_{n,p,q} dy[n,p,q,c]
//
// Grid and block: those of conv_depthwise_sm90.cu. A stage of the ring holds a row of x and one of dy. A thread keeps the sums of
// its channels' taps, and the three rows of dy that a row of x meets. At the end the block's threads are added in their order,
// into a row of `partial` (dw, then db), one for each block of a slice, which conv_wgrad_sum adds up; without `partial` there is
// one, and it writes dw and db. Bytes: x and dy once, the halo of x again. Preconditions: those of conv_depthwise_sm90.cu.
#include "conv_depthwise_sm90.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_wgrad(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap dy, float *__restrict__ dw,
                              float *__restrict__ db, float *__restrict__ partial, Rows g) {
    __shared__ u64 barriers[2 * MOST_STAGES];
    __shared__ Feed feed;
    RING_MEMORY(ring_memory);  // at the end: write_gradients'
    const int thread = thread_of_block();
    const Share share = share_of(blockIdx.x, g);
    if (thread == 0) prefetch(x), prefetch(dy);
    Stages stages(ring_memory, barriers, g.stages);
    await_predecessors();
    if (thread == 0) feed = feed_first<true>(g.stages - 1, share, x, dy, stages, g);

    const int pitch = blockDim.x * VEC, columns = blockDim.y * COLUMNS;
    const int own_x = (threadIdx.z * (columns + FILTER - 1) + threadIdx.y * COLUMNS) * pitch + threadIdx.x * VEC;
    const int own_dy = g.y_at / (int)sizeof(ELEMENT) + (threadIdx.z * columns + threadIdx.y * COLUMNS) * pitch + threadIdx.x * VEC;
    float sums[TAPS][VEC] = {}, bias_sums[VEC] = {};

    for (int at = share.first; at < share.end;) {
        const Strip strip = strip_at<true>(at, share.end, g);
        float errors[FILTER][COLUMNS][VEC] = {};  // rows of dy, the newest last
        in_turn(strip.step, strip.stop, [&](int step) {
            if (thread == 0) {
                stages.wait_past<1>(g.stages);
                feed_row<true>(feed, x, dy, stages, g);
            }
            const ELEMENT *stage = reinterpret_cast<const ELEMENT *>(ring_memory + stages.now.stage * g.stage_bytes);
            stages.wait_full();
            move_up(errors);
            widen_pixels(fetch_shared<COLUMNS>(stage + own_dy, pitch), errors[FILTER - 1]);
            const Pixels<SEEN> pixels = fetch_shared<SEEN>(stage + own_x, pitch);
            stages.release();
            stages.now.next(g.stages);
            if (db) {
#pragma unroll
                for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                    for (int e = 0; e < VEC; ++e) bias_sums[e] += errors[FILTER - 1][q][e];
            }
            if (strip.first + step >= g.top)  // above, x is padding
                multiply(pixels, [&](const Floats<VEC> &v, int i, int q, int t) {
#pragma unroll
                    for (int e = 0; e < VEC; ++e) sums[t][e] += v.v[e] * errors[i][q][e];
                });
        });
        at += strip.end - strip.first;
    }

    const int run = quotient(blockIdx.x, g.by_slices);
    write_gradients(sums, bias_sums, reinterpret_cast<float *>(ring_memory), g.c, share.channel, run, dw, db, partial);
}
