// wgmma of Hopper (sm_90a): D[64][N] += A[64][16] * B[16][N], bf16 operands in shared memory, fp32 sums in registers.
//
// The instruction names its N/2 sums one by one, so the asm text and the operand list are built from lists of eight
// columns; only the lists up to the N in use are expanded. N is any multiple of 8 from 8 to 256 (PTX ISA, "wgmma.mma_async").
#pragma once

#include "common.cuh"

// Registers in the asm text, four for eight columns.
#define WGMMA_TEXT_8 "%0, %1, %2, %3"
#define WGMMA_TEXT_16 WGMMA_TEXT_8 ", " "%4, %5, %6, %7"
#define WGMMA_TEXT_24 WGMMA_TEXT_16 ", " "%8, %9, %10, %11"
#define WGMMA_TEXT_32 WGMMA_TEXT_24 ", " "%12, %13, %14, %15"
#define WGMMA_TEXT_40 WGMMA_TEXT_32 ", " "%16, %17, %18, %19"
#define WGMMA_TEXT_48 WGMMA_TEXT_40 ", " "%20, %21, %22, %23"
#define WGMMA_TEXT_56 WGMMA_TEXT_48 ", " "%24, %25, %26, %27"
#define WGMMA_TEXT_64 WGMMA_TEXT_56 ", " "%28, %29, %30, %31"
#define WGMMA_TEXT_72 WGMMA_TEXT_64 ", " "%32, %33, %34, %35"
#define WGMMA_TEXT_80 WGMMA_TEXT_72 ", " "%36, %37, %38, %39"
#define WGMMA_TEXT_88 WGMMA_TEXT_80 ", " "%40, %41, %42, %43"
#define WGMMA_TEXT_96 WGMMA_TEXT_88 ", " "%44, %45, %46, %47"
#define WGMMA_TEXT_104 WGMMA_TEXT_96 ", " "%48, %49, %50, %51"
#define WGMMA_TEXT_112 WGMMA_TEXT_104 ", " "%52, %53, %54, %55"
#define WGMMA_TEXT_120 WGMMA_TEXT_112 ", " "%56, %57, %58, %59"
#define WGMMA_TEXT_128 WGMMA_TEXT_120 ", " "%60, %61, %62, %63"
#define WGMMA_TEXT_136 WGMMA_TEXT_128 ", " "%64, %65, %66, %67"
#define WGMMA_TEXT_144 WGMMA_TEXT_136 ", " "%68, %69, %70, %71"
#define WGMMA_TEXT_152 WGMMA_TEXT_144 ", " "%72, %73, %74, %75"
#define WGMMA_TEXT_160 WGMMA_TEXT_152 ", " "%76, %77, %78, %79"
#define WGMMA_TEXT_168 WGMMA_TEXT_160 ", " "%80, %81, %82, %83"
#define WGMMA_TEXT_176 WGMMA_TEXT_168 ", " "%84, %85, %86, %87"
#define WGMMA_TEXT_184 WGMMA_TEXT_176 ", " "%88, %89, %90, %91"
#define WGMMA_TEXT_192 WGMMA_TEXT_184 ", " "%92, %93, %94, %95"
#define WGMMA_TEXT_200 WGMMA_TEXT_192 ", " "%96, %97, %98, %99"
#define WGMMA_TEXT_208 WGMMA_TEXT_200 ", " "%100, %101, %102, %103"
#define WGMMA_TEXT_216 WGMMA_TEXT_208 ", " "%104, %105, %106, %107"
#define WGMMA_TEXT_224 WGMMA_TEXT_216 ", " "%108, %109, %110, %111"
#define WGMMA_TEXT_232 WGMMA_TEXT_224 ", " "%112, %113, %114, %115"
#define WGMMA_TEXT_240 WGMMA_TEXT_232 ", " "%116, %117, %118, %119"
#define WGMMA_TEXT_248 WGMMA_TEXT_240 ", " "%120, %121, %122, %123"
#define WGMMA_TEXT_256 WGMMA_TEXT_248 ", " "%124, %125, %126, %127"

// The same registers as operands.
#define WGMMA_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_8(d) WGMMA_FOUR(d, 0)
#define WGMMA_SUMS_16(d) WGMMA_SUMS_8(d), WGMMA_FOUR(d, 4)
#define WGMMA_SUMS_24(d) WGMMA_SUMS_16(d), WGMMA_FOUR(d, 8)
#define WGMMA_SUMS_32(d) WGMMA_SUMS_24(d), WGMMA_FOUR(d, 12)
#define WGMMA_SUMS_40(d) WGMMA_SUMS_32(d), WGMMA_FOUR(d, 16)
#define WGMMA_SUMS_48(d) WGMMA_SUMS_40(d), WGMMA_FOUR(d, 20)
#define WGMMA_SUMS_56(d) WGMMA_SUMS_48(d), WGMMA_FOUR(d, 24)
#define WGMMA_SUMS_64(d) WGMMA_SUMS_56(d), WGMMA_FOUR(d, 28)
#define WGMMA_SUMS_72(d) WGMMA_SUMS_64(d), WGMMA_FOUR(d, 32)
#define WGMMA_SUMS_80(d) WGMMA_SUMS_72(d), WGMMA_FOUR(d, 36)
#define WGMMA_SUMS_88(d) WGMMA_SUMS_80(d), WGMMA_FOUR(d, 40)
#define WGMMA_SUMS_96(d) WGMMA_SUMS_88(d), WGMMA_FOUR(d, 44)
#define WGMMA_SUMS_104(d) WGMMA_SUMS_96(d), WGMMA_FOUR(d, 48)
#define WGMMA_SUMS_112(d) WGMMA_SUMS_104(d), WGMMA_FOUR(d, 52)
#define WGMMA_SUMS_120(d) WGMMA_SUMS_112(d), WGMMA_FOUR(d, 56)
#define WGMMA_SUMS_128(d) WGMMA_SUMS_120(d), WGMMA_FOUR(d, 60)
#define WGMMA_SUMS_136(d) WGMMA_SUMS_128(d), WGMMA_FOUR(d, 64)
#define WGMMA_SUMS_144(d) WGMMA_SUMS_136(d), WGMMA_FOUR(d, 68)
#define WGMMA_SUMS_152(d) WGMMA_SUMS_144(d), WGMMA_FOUR(d, 72)
#define WGMMA_SUMS_160(d) WGMMA_SUMS_152(d), WGMMA_FOUR(d, 76)
#define WGMMA_SUMS_168(d) WGMMA_SUMS_160(d), WGMMA_FOUR(d, 80)
#define WGMMA_SUMS_176(d) WGMMA_SUMS_168(d), WGMMA_FOUR(d, 84)
#define WGMMA_SUMS_184(d) WGMMA_SUMS_176(d), WGMMA_FOUR(d, 88)
#define WGMMA_SUMS_192(d) WGMMA_SUMS_184(d), WGMMA_FOUR(d, 92)
#define WGMMA_SUMS_200(d) WGMMA_SUMS_192(d), WGMMA_FOUR(d, 96)
#define WGMMA_SUMS_208(d) WGMMA_SUMS_200(d), WGMMA_FOUR(d, 100)
#define WGMMA_SUMS_216(d) WGMMA_SUMS_208(d), WGMMA_FOUR(d, 104)
#define WGMMA_SUMS_224(d) WGMMA_SUMS_216(d), WGMMA_FOUR(d, 108)
#define WGMMA_SUMS_232(d) WGMMA_SUMS_224(d), WGMMA_FOUR(d, 112)
#define WGMMA_SUMS_240(d) WGMMA_SUMS_232(d), WGMMA_FOUR(d, 116)
#define WGMMA_SUMS_248(d) WGMMA_SUMS_240(d), WGMMA_FOUR(d, 120)
#define WGMMA_SUMS_256(d) WGMMA_SUMS_248(d), WGMMA_FOUR(d, 124)

// The operands after them: descriptors of A and B, and whether D is added to.
#define WGMMA_A_8 "%4"
#define WGMMA_B_8 "%5"
#define WGMMA_ADD_8 "%6"
#define WGMMA_A_16 "%8"
#define WGMMA_B_16 "%9"
#define WGMMA_ADD_16 "%10"
#define WGMMA_A_24 "%12"
#define WGMMA_B_24 "%13"
#define WGMMA_ADD_24 "%14"
#define WGMMA_A_32 "%16"
#define WGMMA_B_32 "%17"
#define WGMMA_ADD_32 "%18"
#define WGMMA_A_40 "%20"
#define WGMMA_B_40 "%21"
#define WGMMA_ADD_40 "%22"
#define WGMMA_A_48 "%24"
#define WGMMA_B_48 "%25"
#define WGMMA_ADD_48 "%26"
#define WGMMA_A_56 "%28"
#define WGMMA_B_56 "%29"
#define WGMMA_ADD_56 "%30"
#define WGMMA_A_64 "%32"
#define WGMMA_B_64 "%33"
#define WGMMA_ADD_64 "%34"
#define WGMMA_A_72 "%36"
#define WGMMA_B_72 "%37"
#define WGMMA_ADD_72 "%38"
#define WGMMA_A_80 "%40"
#define WGMMA_B_80 "%41"
#define WGMMA_ADD_80 "%42"
#define WGMMA_A_88 "%44"
#define WGMMA_B_88 "%45"
#define WGMMA_ADD_88 "%46"
#define WGMMA_A_96 "%48"
#define WGMMA_B_96 "%49"
#define WGMMA_ADD_96 "%50"
#define WGMMA_A_104 "%52"
#define WGMMA_B_104 "%53"
#define WGMMA_ADD_104 "%54"
#define WGMMA_A_112 "%56"
#define WGMMA_B_112 "%57"
#define WGMMA_ADD_112 "%58"
#define WGMMA_A_120 "%60"
#define WGMMA_B_120 "%61"
#define WGMMA_ADD_120 "%62"
#define WGMMA_A_128 "%64"
#define WGMMA_B_128 "%65"
#define WGMMA_ADD_128 "%66"
#define WGMMA_A_136 "%68"
#define WGMMA_B_136 "%69"
#define WGMMA_ADD_136 "%70"
#define WGMMA_A_144 "%72"
#define WGMMA_B_144 "%73"
#define WGMMA_ADD_144 "%74"
#define WGMMA_A_152 "%76"
#define WGMMA_B_152 "%77"
#define WGMMA_ADD_152 "%78"
#define WGMMA_A_160 "%80"
#define WGMMA_B_160 "%81"
#define WGMMA_ADD_160 "%82"
#define WGMMA_A_168 "%84"
#define WGMMA_B_168 "%85"
#define WGMMA_ADD_168 "%86"
#define WGMMA_A_176 "%88"
#define WGMMA_B_176 "%89"
#define WGMMA_ADD_176 "%90"
#define WGMMA_A_184 "%92"
#define WGMMA_B_184 "%93"
#define WGMMA_ADD_184 "%94"
#define WGMMA_A_192 "%96"
#define WGMMA_B_192 "%97"
#define WGMMA_ADD_192 "%98"
#define WGMMA_A_200 "%100"
#define WGMMA_B_200 "%101"
#define WGMMA_ADD_200 "%102"
#define WGMMA_A_208 "%104"
#define WGMMA_B_208 "%105"
#define WGMMA_ADD_208 "%106"
#define WGMMA_A_216 "%108"
#define WGMMA_B_216 "%109"
#define WGMMA_ADD_216 "%110"
#define WGMMA_A_224 "%112"
#define WGMMA_B_224 "%113"
#define WGMMA_ADD_224 "%114"
#define WGMMA_A_232 "%116"
#define WGMMA_B_232 "%117"
#define WGMMA_ADD_232 "%118"
#define WGMMA_A_240 "%120"
#define WGMMA_B_240 "%121"
#define WGMMA_ADD_240 "%122"
#define WGMMA_A_248 "%124"
#define WGMMA_B_248 "%125"
#define WGMMA_ADD_248 "%126"
#define WGMMA_A_256 "%128"
#define WGMMA_B_256 "%129"
#define WGMMA_ADD_256 "%130"

#define WGMMA_PASTE_(a, b) a##b
#define WGMMA_PASTE(a, b) WGMMA_PASTE_(a, b)
#define WGMMA_STRING_(a) #a
#define WGMMA_STRING(a) WGMMA_STRING_(a)

#ifndef HOST_EMULATION
// Define `name(sums, a, b, add)` for N columns. Tiles in shared memory are [m][k] and [n][k], with TransA = 1 [k][m], with
// TransB = 1 [k][n].
#define DEFINE_WGMMA(name, N, TransA, TransB)                                                                            \
    __device__ __forceinline__ void name(float (&d)[N / 2], u64 a, u64 b, u32 add) {                                     \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " WGMMA_PASTE(WGMMA_ADD_, N) ", 0; "                                \
                     "wgmma.mma_async.sync.aligned.m64n" WGMMA_STRING(N) "k16.f32.bf16.bf16 {"                           \
                     WGMMA_PASTE(WGMMA_TEXT_, N) "}, " WGMMA_PASTE(WGMMA_A_, N) ", " WGMMA_PASTE(WGMMA_B_, N)            \
                     ", p, 1, 1, " WGMMA_STRING(TransA) ", " WGMMA_STRING(TransB) "; }"                                   \
                     : WGMMA_PASTE(WGMMA_SUMS_, N)(d)                                                                    \
                     : "l"(a), "l"(b), "r"(add));                                                                        \
    }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most Pending groups of this warpgroup are under way.
template <int Pending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
#endif

// Upper half of an operand's descriptor: bytes between groups of eight rows, and the swizzle (PTX ISA, "Matrix descriptor").
// A tile that TMA wrote may start at any of its rows: the swizzle acts on address bits, so the base offset stays 0.
#define SWIZZLE_128B 1u
#define SWIZZLE_64B 2u
__device__ __forceinline__ u32 descriptor_high(u32 group_stride_bytes, u32 swizzle) { return group_stride_bytes >> 4 | swizzle << 30; }

// Descriptor of the tile at shared-memory address `at`: its lower half, of an operand one swizzle span wide, which counts
// 16 bytes; or the whole, of several spans along its rows (a transposed operand's m or n), `leading_bytes` apart.
__device__ __forceinline__ u32 descriptor_low(u32 at) { return 1u << 16 | (at & 0x3FFFF) >> 4; }
__device__ __forceinline__ u64 descriptor_of(u32 high, u32 low) { return (u64)high << 32 | low; }
__device__ __forceinline__ u64 descriptor(u32 high, u32 leading_bytes, u32 at) {
    return (u64)high << 32 | (u64)(leading_bytes >> 4) << 16 | (at & 0x3FFFF) >> 4;
}
