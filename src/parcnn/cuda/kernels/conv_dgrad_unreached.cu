// dL/dx of a convolution with a stride at the pixels that no tap of the filter reaches; dx (N,H,W,C) bf16.
//
//     dx[n,h,w,c] = act'(saved[n,h,w,c]) * addend[n,h,w,c]        zero where there is no addend
//
// A thread takes eight channels of a pixel. Bytes: addend and saved outputs of those pixels are read, dx is written, once.
// dx may be addend or saved. Preconditions: C is a multiple of 8; pointers aligned to 16 bytes; fewer than 2^31 elements.

#include "conv_common.cuh"

// rows, columns: bits of the remainders modulo the stride that taps reach; a pixel is reached where both are.
struct Pixels {
    FastDiv by_chunks, by_w, by_h, by_stride_h, by_stride_w;  // chunks of eight channels
    u32 rows, columns;
};

extern "C" __global__ void __launch_bounds__(256)
    conv_dgrad_unreached(const uint4 *addend, const uint4 *saved, uint4 *dx, int count, int act, Pixels g) {
    await_predecessors();
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int chunk, w, h, rest_h, rest_w;
    divide(divide(divide(at, g.by_chunks, chunk), g.by_w, w), g.by_h, h);
    divide(h, g.by_stride_h, rest_h), divide(w, g.by_stride_w, rest_w);
    if (g.rows >> rest_h & g.columns >> rest_w & 1) return;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (addend) {
        v = addend[at];
        if (act != ACT_NONE) {
            const uint4 s = saved[at];
            const u32 signal[4] = {v.x, v.y, v.z, v.w}, output[4] = {s.x, s.y, s.z, s.w};
            u32 result[4];
#pragma unroll
            for (int e = 0; e < 4; ++e)
                result[e] = round_bf16x2(any_activation_dgrad(low_bf16(signal[e]), low_bf16(output[e]), act),
                                         any_activation_dgrad(high_bf16(signal[e]), high_bf16(output[e]), act));
            v = make_uint4(result[0], result[1], result[2], result[3]);
        }
    }
    dx[at] = v;
}
