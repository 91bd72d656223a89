// Element by element, n floats:
//   act          y[i]  = act(a[i])
//   act_dgrad    dx[i] = dy[i] * act'(saved[i])      saved: output of relu, tanh, sigmoid; input of gelu, silu
//   add          y[i]  = act(a[i] + b[i])
//   dropout      y[i]  = a[i] * keep[i] * scale      keep from Philox, nothing is stored
//
// Parallel over elements: a block of 256 threads does 4096, a thread 4 vectors of 16 bytes, all loaded before the first
// is used.
// Bytes: every operand read once, the result written once.
// Preconditions: tensors start on 16 bytes. The output may be one of the inputs: an element is read only by the thread
// that writes it, and before.
// Macro: ACT.
#include "common.cuh"

#define THREADS 256
#define VECTORS 4

template <bool BINARY, class F>
__device__ __forceinline__ void map(const float *a, const float *b, float *y, long long n, F f) {
    long long first = (long long)blockIdx.x * (THREADS * VECTORS) + threadIdx.x;
    Floats<4> va[VECTORS], vb[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        long long i = first + j * THREADS;
        va[j] = load_part(a + 4 * i, n - 4 * i);
        vb[j] = BINARY ? load_part(b + 4 * i, n - 4 * i) : splat<4>(0.0f);
    }
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        long long i = first + j * THREADS;
        store_part(y + 4 * i, f(i, va[j], vb[j]), n - 4 * i);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) act(const float *a, float *y, long long n) {
    map<false>(a, nullptr, y, n, [](long long, Floats<4> va, Floats<4>) {
#pragma unroll
        for (int e = 0; e < 4; ++e) va.v[e] = activate<ACT>(va.v[e]);
        return va;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
act_dgrad(const float *dy, const float *saved, float *dx, long long n) {
    map<true>(dy, saved, dx, n, [](long long, Floats<4> va, Floats<4> vb) {
#pragma unroll
        for (int e = 0; e < 4; ++e) va.v[e] = activation_dgrad<ACT>(va.v[e], vb.v[e]);
        return va;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) add(const float *a, const float *b, float *y, long long n) {
    map<true>(a, b, y, n, [](long long, Floats<4> va, Floats<4> vb) {
#pragma unroll
        for (int e = 0; e < 4; ++e) va.v[e] = activate<ACT>(va.v[e] + vb.v[e]);
        return va;
    });
}

// keep[i] = word[i % 4] >= threshold, word = philox4x32(counter = (i / 4, stream, state[1], 0), key = state[3:5]).
// threshold = p * 2^32 is up to 2^32 and so does not fit into 32 bits.
extern "C" __global__ void __launch_bounds__(THREADS)
dropout(const float *a, const int *state, float *y, long long n, long long threshold, float scale, u32 stream) {
    u32 step = (u32)state[1];
    uint2 key = make_uint2((u32)state[3], (u32)state[4]);
    map<false>(a, nullptr, y, n, [=](long long i, Floats<4> va, Floats<4>) {
        uint4 word = philox4x32(make_uint4((u32)i, stream, step, 0u), key);
        u32 words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) va.v[e] = (long long)words[e] >= threshold ? va.v[e] * scale : 0.0f;
        return va;
    });
}
