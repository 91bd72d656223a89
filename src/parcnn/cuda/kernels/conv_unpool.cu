// The error signal before a 2x2 pool: dy (N,P,Q,K) goes to each window's winner, zeros to the other three, where idx
// (N,P,Q,K/4) has 2 bits a channel; without idx the pool is the mean, and a quarter goes to each. out (N,2P,2Q,K).
// With ACT dy is first multiplied by the derivative of an activation, from its output `saved` (N,P,Q,K).
//
// A thread takes 16 bytes of channels of a pooled pixel. Bytes: dy, saved and idx are read once, out is written once.
// Preconditions: K is a multiple of 8 (float: of 4); pointers aligned to 16 bytes; fewer than 2^31 elements.
// Macros: ELEMENT (float, bf16); ACT (ReLU, tanh or sigmoid; ACT_NONE: `saved` is null).

#include "common.cuh"

struct Divisors {
    FastDiv by_chunks, by_q;  // chunks of 16 bytes of channels; pooled columns
};

constexpr int EACH = sizeof(u32) / sizeof(ELEMENT);  // elements of a word

// Of a thread's channels: two bits each.
__device__ __forceinline__ u32 load_index(const u8 *idx, int at) { return EACH == 2 ? reinterpret_cast<const u16 *>(idx)[at] : idx[at]; }

__device__ __forceinline__ u32 times_derivative(u32 dy, u32 saved) {
    if (EACH == 1) return __float_as_uint(activation_dgrad<ACT>(__uint_as_float(dy), __uint_as_float(saved)));
    return round_bf16x2(activation_dgrad<ACT>(low_bf16(dy), low_bf16(saved)), activation_dgrad<ACT>(high_bf16(dy), high_bf16(saved)));
}

__device__ __forceinline__ u32 quarter(u32 dy) {
    if (EACH == 1) return __float_as_uint(0.25f * __uint_as_float(dy));
    return round_bf16x2(0.25f * low_bf16(dy), 0.25f * high_bf16(dy));
}

// The bits of a word's elements that won at `position`.
__device__ __forceinline__ u32 winners(u32 index, int word, u32 position) {
    if (EACH == 1) return (index >> 2 * word & 3) == position ? 0xffffffffu : 0u;
    u32 low = (index >> 4 * word & 3) == position ? 0x0000ffffu : 0u, high = (index >> (4 * word + 2) & 3) == position ? 0xffff0000u : 0u;
    return low | high;
}

extern "C" __global__ void __launch_bounds__(256)
    conv_unpool(const uint4 *__restrict__ dy, const u8 *__restrict__ idx, const uint4 *__restrict__ saved, uint4 *__restrict__ out,
                int count, Divisors d) {
    await_predecessors();
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int chunk, q;
    int row = divide(divide(at, d.by_chunks, chunk), d.by_q, q);  // image and pooled row
    uint4 v = dy[at];
    u32 in[4] = {v.x, v.y, v.z, v.w};
    u32 index = idx ? load_index(idx, at) : 0;
    if (ACT != ACT_NONE) {
        uint4 s = saved[at];
        in[0] = times_derivative(in[0], s.x), in[1] = times_derivative(in[1], s.y);
        in[2] = times_derivative(in[2], s.z), in[3] = times_derivative(in[3], s.w);
    }
    const u32 chunks = d.by_chunks.d, columns = 2 * d.by_q.d;
#pragma unroll
    for (u32 position = 0; position < 4; ++position) {
        u32 kept[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) kept[e] = idx ? in[e] & winners(index, e, position) : quarter(in[e]);
        u64 pixel = (u64)(2 * row + (position >> 1)) * columns + 2 * q + (position & 1);
        out[pixel * chunks + chunk] = make_uint4(kept[0], kept[1], kept[2], kept[3]);
    }
}
