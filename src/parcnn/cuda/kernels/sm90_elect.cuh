// The thread that copies, on Hopper and later.
#pragma once

#include "common.cuh"

#ifndef HOST_EMULATION
// One lane of the warp, the same each time. All must call. (Behind `lane == 0` a compiler wraps each tensor copy in a loop over lanes.)
__device__ __forceinline__ bool elect() {
    u32 is;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(is));
    return is;
}
#endif
