// Runs a CUDA kernel on the host, for tests without a GPU: each thread of a block is a fiber, blocks run one by one, those of a
// cluster together.
//
// Included before the kernel's source; what it declares is in cuda_emulation.cpp, compiled once for all kernels. Shared memory is
// filled with NaN before each block; asynchronous copies land only when they are waited for; fibers run in ascending or descending
// order of the thread index, so a barrier that is missing shows in one of the two. A fault (barrier not reached by all, misaligned
// vector access) ends the launch with a message.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>

#define HOST_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // runner.py reads it
#define __align__(n) alignas(n)
#define __constant__ static
#define __grid_constant__
#define __shared__ static __attribute__((section("emulated_shared")))

extern "C" {
__attribute__((weak)) extern char __start_emulated_shared[];
__attribute__((weak)) extern char __stop_emulated_shared[];
}

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(4) uchar4 {
    unsigned char x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }

extern dim3 gridDim, blockDim, blockIdx, threadIdx;
static const int warpSize = 32;

namespace emulation {

extern int current;            // thread of the block that runs
extern char *dynamic_shared;   // its block's

[[noreturn]] void fail(const std::string &what);
void wait_block();
bool any_of_block(bool is);
void wait_warp(unsigned mask);
// Give `value` to the warp, get the one of a lane (if there is no such lane the own).
void exchange(unsigned mask, void *value, size_t nbytes, int source_lane);

inline void check_aligned(const void *p, size_t nbytes) {
    if ((uintptr_t)p % nbytes) fail("an access of " + std::to_string(nbytes) + " bytes at an address not aligned to it");
}

template <class T> T exchange(unsigned mask, T value, int source_lane) {
    static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
    exchange(mask, &value, sizeof(T), source_lane);
    return value;
}

// A copy that is made when its group is waited for; without a source, of zeros.
void copy_async(void *target, const void *source, size_t nbytes);
void commit_copies();
void await_copies(size_t pending);

template <class T> T next(const unsigned char *args, size_t &offset) {
    offset = (offset + alignof(T) - 1) / alignof(T) * alignof(T);
    T value;
    memcpy((void *)&value, args + offset, sizeof(T));
    offset += sizeof(T);
    return value;
}

// Where each argument begins in the block of them, and its bytes, as CUDA packs them. Returns how many there are.
template <class... Args> int list_parameters(void (*)(Args...), unsigned (*table)[2]) {
    unsigned count = 0, end = 0;
    const auto add = [&](unsigned alignment, unsigned nbytes) {
        table[count][0] = (end + alignment - 1) / alignment * alignment, table[count][1] = nbytes;
        end = table[count][0] + nbytes, ++count;
    };
    (add(alignof(Args), sizeof(Args)), ...);
    return (int)count;
}

struct Grid {
    dim3 blocks, threads;
    int cluster;  // neighbouring blocks that run together
    size_t shared_bytes;
    char *static_start, *static_end;  // shared memory of the kernel's library
    bool descending;
};

// Runs `thread` for each of the grid. Null, or what went wrong.
const char *run(const std::function<void()> &thread, const Grid &grid);

template <class... Args> const char *launch(void (*kernel)(Args...), const unsigned char *args, const Grid &grid) {
    size_t offset = 0;
    std::tuple<std::remove_cv_t<Args>...> values{next<std::remove_cv_t<Args>>(args, offset)...};
    return run([&] { std::apply(kernel, values); }, grid);
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_block(); }
inline int __syncthreads_or(int predicate) { return emulation::any_of_block(predicate); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::wait_warp(mask); }

template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
    int own = emulation::current % 32;
    return emulation::exchange(mask, v, own / width * width + lane % width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int flip, int width = 32) {
    return emulation::exchange(mask, v, (emulation::current % 32) ^ flip);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, int delta, int width = 32) {
    int own = emulation::current % 32;
    return emulation::exchange(mask, v, own % width + delta < width ? own + delta : own);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, int delta, int width = 32) {
    int own = emulation::current % 32;
    return emulation::exchange(mask, v, own % width >= delta ? own - delta : own);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned bits = predicate ? 1u << emulation::current % 32 : 0u;
    for (int flip = 1; flip < 32; flip *= 2) bits |= __shfl_xor_sync(mask, bits, flip);
    return bits;
}

inline bool __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline bool __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

// A copy of 16 or 4 bytes that lands in shared memory when its group is waited for.
inline void copy_async16(float *shared, const float *source, bool is_live) {
    emulation::copy_async(shared, is_live ? source : nullptr, 16);
}
inline void copy_async4(float *shared, const float *source, bool is_live) {
    emulation::copy_async(shared, is_live ? source : nullptr, 4);
}
inline void copy_async_commit() { emulation::commit_copies(); }
template <int PENDING> void copy_async_wait() { emulation::await_copies(PENDING); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t)a * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned((((uint64_t)high << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned(((uint64_t)high << 32 | low) >> (by & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
inline int __float_as_int(float v) { int i; memcpy(&i, &v, 4); return i; }
inline unsigned __float_as_uint(float v) { unsigned i; memcpy(&i, &v, 4); return i; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
template <class T> T __ldg(const T *p) { emulation::check_aligned(p, sizeof(T)); return *p; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint2float_rn(unsigned v) { return (float)v; }
inline float __int2float_rn(int v) { return (float)v; }
inline void __threadfence() {}
using std::max;
using std::min;

#define EMULATE(entry, cluster)                                                                                           \
    extern "C" int parameters(unsigned (*table)[2]) { return emulation::list_parameters(entry, table); }                 \
    extern "C" const char *emulate(const unsigned *grid, const unsigned *block, size_t shared_bytes,                     \
                                   const unsigned char *args, int descending) {                                          \
        return emulation::launch(entry, args, {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, cluster,      \
                                 shared_bytes, __start_emulated_shared, __stop_emulated_shared, descending != 0});        \
    }
