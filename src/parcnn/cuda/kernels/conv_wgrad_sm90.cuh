// What Hopper's filter gradients share: sums of dy from shared memory, and what goes to another block of a cluster.
#pragma once

#include "sm90.cuh"

__device__ __forceinline__ void add(float4 &sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

// Adds what lies at `at` of shared memory.
__device__ __forceinline__ void add_shared(float4 &sum, u32 at) {
    const uint4 v = load_shared16(at);
    add(sum, make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)));
}

// Adds up 64 filters' dy of a stage: the lane has eight filters, every fourth pixel. Rows are 128 bytes whose chunks of 16
// are swizzled by the row.
__device__ __forceinline__ void add_pixels(float (&sums)[8], u32 at, int rows, int lane) {
    const u32 row = lane >> 3, chunk = lane & 7;
    const u32 even = at + row * 128 + ((chunk ^ row) << 4), odd = at + (row + 4) * 128 + ((chunk ^ (row + 4)) << 4);
#pragma unroll 2
    for (int i = 0; i < rows; i += 8) {
        const uint4 v[2] = {load_shared16(even + i * 128), load_shared16(odd + i * 128)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 words[4] = {v[half].x, v[half].y, v[half].z, v[half].w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums[2 * e] += __uint_as_float(words[e] << 16);
                sums[2 * e + 1] += __uint_as_float(words[e] & 0xffff0000u);
            }
        }
    }
}

// All pixels' sums, of what lanes have by `add_pixels`: a lane gets those of its eight filters.
__device__ __forceinline__ void add_lanes(float (&sums)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 8);
        sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 16);
    }
}

// ---- Another block ----------------------------------------------------------------------------------------------------

#ifndef HOST_EMULATION
// Where an address of the own shared memory is in that of the cluster's `block`.
__device__ __forceinline__ u32 address_at(int block, u32 at) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
    return there;
}

// Sixteen bytes to another block's `there`, which count at its barrier.
__device__ __forceinline__ void push16(u32 there, float4 v, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(there), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w), "r"(barrier)
                 : "memory");
}

// Among all threads of a cluster. It shows none the others' writes, only initialised barriers after their fence.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed;\n barrier.cluster.wait.acquire;" ::: "memory");
}
#endif
