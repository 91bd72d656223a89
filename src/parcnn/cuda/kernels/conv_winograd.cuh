// What Winograd's kernels share: a block of 256 threads multiplies 16 pairs of matrices, the products of F(2x2, 3x3), each
// 64 x depth by depth x 32, from shared memory. Sixteen threads have one of them, of which each owns 16 x 8.
#pragma once

#include "conv_common.cuh"

#define THREADS 256
#define ROWS 64
#define COLUMNS 32
#define DEPTH 8             // of a step
#define E_ROW (COLUMNS + 4)  // where the products meet

// Where a thread stands: its product, and its first row and column there; others follow in groups of four 16 apart.
struct Share {
    int product, row, column;
    __device__ __forceinline__ Share() {
        int t = threadIdx.x;
        product = t / 16, row = t / 2 % 4 * 4, column = (t % 2 + t / 8 % 2 * 2) * 4;
    }
};

// One step of the depth: `a` and `b` are the thread's first row and column of it.
__device__ __forceinline__ void multiply(float (&acc)[16][8], const float *a, const float *b) {
    float4 right[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) right[j] = load4(b + 16 * j);
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        float4 left = load4(a + 4 * i);
#pragma unroll
        for (int t = 0; t < 32; ++t) {  // to and fro: so compilers make few conflicts of register banks
            const int e = t / 8, j = e % 2 ? 7 - t % 8 : t % 8;
            acc[i + e][j] += at(left, e) * at(right[j / 4], j % 4);
        }
    }
}

// B' applied to four inputs; the last one has the other sign here, and in A, too.
__device__ __forceinline__ void transform_input(float &a, float &b, float &c, float &d) {
    float t = b + c;
    a = a - c;
    d = d - b;
    c = c - b;
    b = t;
}
