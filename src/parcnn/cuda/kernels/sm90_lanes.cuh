// A warp's lanes as the compiler shall see them, on Hopper and later.
#pragma once

#include "common.cuh"

#ifndef HOST_EMULATION
// One lane of the warp, the same each time: the one that copies. All must call. (Behind `lane == 0` a compiler wraps each tensor copy
// in a loop over lanes.)
__device__ __forceinline__ bool elect() {
    u32 is;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(is));
    return is;
}
#endif

// What is the same in all lanes, so that the compiler knows it.
__device__ __forceinline__ int same_in_all(int v) { return __shfl_sync(0xffffffffu, v, 0); }

// A value of each lane that the compiler may not compute again.
__device__ __forceinline__ u32 held(u32 v, int lane) { return __shfl_sync(0xffffffffu, v + lane, lane) - lane; }
