// Element by element, n elements of type ELEMENT:
//   act          y[i]  = act(a[i])
//   act_dgrad    dx[i] = dy[i] * act'(saved[i])      saved: output of relu, tanh, sigmoid; input of gelu, silu
//   add          y[i]  = act(a[i] + b[i])
//   dropout      y[i]  = a[i] * keep[i] * scale      keep from Philox, nothing is stored
//   cast         y[i]  = x[i], from FROM to ELEMENT, for each tensor of a group
//
// Parallel over elements: a block of 256 threads does 4 vectors a thread, all loaded before the first is used. A vector has 16
//   bytes: 4 floats or 8 bf16; in `cast` 4 elements. A block of `cast` finds its tensor in the group's table, which lies in
//   the argument block.
// Bytes: every operand read once, the result written once.
// Preconditions: tensors start on 16 bytes. The output may be one of the inputs (not in `cast`): an element is read only by
// the thread that writes it, and before.
// Macros: ELEMENT (float or bf16); ACT, or for `cast` FROM (float or bf16).
#include "common.cuh"

#define THREADS 256
#define VECTORS 4

#ifdef ACT
#define WIDTH (16 / (int)sizeof(ELEMENT))

typedef Floats<WIDTH> Vector;

template <bool BINARY, class F>
__device__ __forceinline__ void map(const ELEMENT *a, const ELEMENT *b, ELEMENT *y, long long n, F f) {
    long long first = (long long)blockIdx.x * (THREADS * VECTORS) + threadIdx.x;
    Fetched<ELEMENT, WIDTH> va[VECTORS], vb[VECTORS] = {};
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        long long i = first + j * THREADS;
        va[j] = fetch_part<WIDTH>(a + WIDTH * i, n - WIDTH * i);
        if (BINARY) vb[j] = fetch_part<WIDTH>(b + WIDTH * i, n - WIDTH * i);
    }
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        long long i = first + j * THREADS;
        store_part(y + WIDTH * i, f(i, widen(va[j]), widen(vb[j])), n - WIDTH * i);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) act(const ELEMENT *a, ELEMENT *y, long long n) {
    await_predecessors();
    map<false>(a, nullptr, y, n, [](long long, Vector va, Vector) {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) va.v[e] = activate<ACT>(va.v[e]);
        return va;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
act_dgrad(const ELEMENT *dy, const ELEMENT *saved, ELEMENT *dx, long long n) {
    await_predecessors();
    map<true>(dy, saved, dx, n, [](long long, Vector va, Vector vb) {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) va.v[e] = activation_dgrad<ACT>(va.v[e], vb.v[e]);
        return va;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) add(const ELEMENT *a, const ELEMENT *b, ELEMENT *y, long long n) {
    await_predecessors();
    map<true>(a, b, y, n, [](long long, Vector va, Vector vb) {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) va.v[e] = activate<ACT>(va.v[e] + vb.v[e]);
        return va;
    });
}

// keep[i] = word[i % 4] >= threshold, word = philox4x32(counter = (i / 4, stream, state[1], 0), key = state[3:5]).
// threshold = p * 2^32 is up to 2^32 and so does not fit into 32 bits.
extern "C" __global__ void __launch_bounds__(THREADS)
dropout(const ELEMENT *a, const int *state, ELEMENT *y, long long n, long long threshold, float scale, u32 stream) {
    await_predecessors();
    u32 step = (u32)state[1];
    uint2 key = make_uint2((u32)state[3], (u32)state[4]);
    map<false>(a, nullptr, y, n, [=](long long i, Vector va, Vector) {
#pragma unroll
        for (int first = 0; first < WIDTH; first += 4) {
            uint4 word = philox4x32(make_uint4((u32)(i * (WIDTH / 4)) + first / 4, stream, step, 0u), key);
            u32 words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                va.v[first + e] = (long long)words[e] >= threshold ? va.v[first + e] * scale : 0.0f;
        }
        return va;
    });
}
#else
#define CHUNK (4 * VECTORS * THREADS)
#define MAX_GROUP 64  // a power of two

struct Tensor {
    const FROM *x;
    ELEMENT *y;
};

struct Group {
    Tensor tensor[MAX_GROUP];
    int size[MAX_GROUP];
    int end[MAX_GROUP];  // blocks of this tensor and of all before it; 2^31 - 1 where there is none
};

extern "C" __global__ void __launch_bounds__(THREADS) cast(const __grid_constant__ Group group) {
    await_predecessors();
    int block = blockIdx.x, slot = 0;
#pragma unroll
    for (int half = MAX_GROUP / 2; half > 0; half /= 2)
        if (block >= group.end[slot + half - 1]) slot += half;
    const Tensor &tensor = group.tensor[slot];
    int first = (block - (slot ? group.end[slot - 1] : 0)) * CHUNK + 4 * threadIdx.x, n = group.size[slot];
    Fetched<FROM, 4> v[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) v[j] = fetch_part<4>(tensor.x + first + 4 * j * THREADS, n - first - 4 * j * THREADS);
#pragma unroll
    for (int j = 0; j < VECTORS; ++j)
        store_part(tensor.y + first + 4 * j * THREADS, widen(v[j]), n - first - 4 * j * THREADS);
}
#endif
