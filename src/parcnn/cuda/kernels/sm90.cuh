// Hopper's copy engine and barriers (sm_90a): mbarriers, tensor copies (TMA), rings of stages, matrix stores.
//
// Addresses of shared memory are 32-bit. PTX ISA, "mbarrier", "cp.async.bulk.tensor", "stmatrix".
#pragma once

#include "bf16_pairs.cuh"

// A CUtensorMap, passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    u64 words[16];
};

#ifndef HOST_EMULATION
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// ---- mbarriers -----------------------------------------------------------------------------------------------------
// A wait names the parity of the phase that it waits for. It cannot tell a phase from the one two later, so whoever waits
// must never be two phases behind.

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes the initialised barriers visible to the copy engine; a __syncthreads shows them to the block.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Arrive, and let the phase also wait for `nbytes` that copies will bring.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 nbytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(nbytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra WAIT; DONE: }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// The hardware barrier `id` (0 is __syncthreads') among `threads` threads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Count as one of them that has come to it, and go on. Who waits must do so at one place in the code.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Have fewer (more) registers a thread, of all threads of a warpgroup; the block has them, or waits for those that others give.
template <int Registers> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)); }
template <int Registers> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)); }

// Names the block's dynamic shared memory, aligned to what swizzles span.
#define ALIGNED_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#else
#define ALIGNED_SHARED(type, name) DYNAMIC_SHARED(type, name)
#endif

// A place in a ring of stages, and the parity of the phase in which it is filled.
struct Ring {
    int stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void skip(int count, FastDiv by_stages) {
        parity ^= divide(stage + count, by_stages, stage) & 1;
    }
};

#ifndef HOST_EMULATION
// ---- Tensor copies ---------------------------------------------------------------------------------------------------
// Coordinates start at the innermost dimension. What lies outside of the tensor is zero when read, and not written.

__device__ __forceinline__ void prefetch(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void load_tile(u32 to, const TensorMap &map, u32 barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

__device__ __forceinline__ void load_tile(u32 to, const TensorMap &map, u32 barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// Bring a tile into L2.
__device__ __forceinline__ void prefetch_tile(const TensorMap &map, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1,%2,%3,%4}];" ::"l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// Begin to write a tile out. The writers of the tile must have passed `fence_async` and a barrier.
__device__ __forceinline__ void store_tile(const TensorMap &map, u32 from, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(&map), "r"(from), "r"(c0), "r"(c1),
                 "r"(c2), "r"(c3)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the shared memory of all tiles that this thread writes out has been read, but for the last Pending.
template <int Pending> __device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory"); }

// Orders this thread's accesses to shared memory before what the copy engine and the tensor cores do after a barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Shared memory ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_shared16(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared16(u32 at, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// To global memory. (NVRTC made four stores of what the language would write in one where this is used.)
__device__ __forceinline__ void store_global16(void *to, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Store two (four) transposed 8x8 matrices of 16-bit values; lanes 8i .. 8i+7 give the rows' addresses of the i-th.
__device__ __forceinline__ void store_matrices(u32 at, u32 m0, u32 m1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(at), "r"(m0), "r"(m1) : "memory");
}

__device__ __forceinline__ void store_matrices(u32 at, u32 m0, u32 m1, u32 m2, u32 m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(m0), "r"(m1), "r"(m2), "r"(m3)
                 : "memory");
}

// Load what `store_matrices` stores, from the same addresses.
__device__ __forceinline__ void load_matrices(u32 at, u32 &m0, u32 &m1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(m0), "=r"(m1) : "r"(at) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 at, u32 &m0, u32 &m1, u32 &m2, u32 &m3) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
                 : "r"(at)
                 : "memory");
}
#endif

// Sixteen bytes of a staged pixel, whose row of 128 is swizzled as TMA's 128-byte mode does.
__device__ __forceinline__ u32 chunk_address(u32 staging, int pixel, int chunk) {
    return staging + pixel * 128 + ((chunk ^ (pixel & 7)) << 4);
}
