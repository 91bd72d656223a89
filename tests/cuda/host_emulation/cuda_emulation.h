// Runs a CUDA kernel on the host, for tests without a GPU: each thread of a block is a fiber, blocks run one by one.
//
// Included before the kernel's source. Shared memory is filled with NaN before each block; asynchronous copies land only
// when they are waited for; fibers run in ascending or descending order of the thread index, so a barrier that is missing
// shows in one of the two. A fault (barrier not reached by all, misaligned vector access) ends the launch with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#define HOST_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
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

static dim3 gridDim, blockDim, blockIdx, threadIdx;
static const int warpSize = 32;

namespace emulation {

constexpr size_t STACK_BYTES = 128 << 10;

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Copy {
    void *target;
    const void *source;  // null: zeros
    size_t nbytes;
};

struct Fiber {
    dim3 index;
    ucontext_t start;
    jmp_buf at;
    std::vector<char> stack;
    bool started = false, finished = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> pending;
};

struct Warp {
    Barrier barrier;
    unsigned char values[32][8];
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block_barrier;
static int live, current;
static bool progress;
static jmp_buf scheduler;
static std::string fault;
static std::function<void()> body;
static char *dynamic_shared;

[[noreturn]] inline void fail(const std::string &what) {
    char where[160];
    snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
             threadIdx.y, threadIdx.z);
    fault = what + where;
    _longjmp(scheduler, 2);
}

inline void yield() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier &barrier, int expected) {
    unsigned generation = barrier.generation;
    progress = true;
    if (++barrier.arrived >= expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
    progress = true;
}

inline void wait_warp(unsigned mask) {
    int present = std::min<int>(32, (int)fibers.size() - current / 32 * 32);
    wait(warps[current / 32].barrier, __builtin_popcount(present == 32 ? mask : mask & ((1u << present) - 1)));
}

inline void enter() {
    body();
    Fiber &fiber = fibers[current];
    fiber.finished = true;
    progress = true;
    --live;
    if (live > 0 && block_barrier.arrived >= live) {  // a thread that has left counts as arrived
        block_barrier.arrived = 0;
        ++block_barrier.generation;
    }
    _longjmp(scheduler, 1);
}

// noinline: its locals must not be kept in registers across setjmp in the caller's loop.
__attribute__((noinline)) inline bool resume(int thread) {
    current = thread;
    Fiber &fiber = fibers[thread];
    threadIdx = fiber.index;
    int why = _setjmp(scheduler);
    if (why == 0) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }
    return why != 2;
}

inline bool run_block(bool descending) {
    int threads = (int)fibers.size();
    block_barrier = Barrier();
    warps.assign((threads + 31) / 32, Warp());
    live = threads;
    for (Fiber &fiber : fibers) {
        fiber.started = fiber.finished = false;
        fiber.open.clear();
        fiber.pending.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    if (__start_emulated_shared) memset(__start_emulated_shared, 0xFF, __stop_emulated_shared - __start_emulated_shared);
    while (live > 0) {
        progress = false;
        for (int i = 0; i < threads; ++i) {
            int thread = descending ? threads - 1 - i : i;
            if (!fibers[thread].finished && !resume(thread)) return false;
        }
        if (!progress) {
            fault = "a barrier that some threads never reach";
            return false;
        }
    }
    return true;
}

template <class T> T next(const unsigned char *args, size_t &offset) {
    offset = (offset + alignof(T) - 1) / alignof(T) * alignof(T);
    T value;
    memcpy((void *)&value, args + offset, sizeof(T));
    offset += sizeof(T);
    return value;
}

template <class T> void measure(size_t &size) { size = (size + alignof(T) - 1) / alignof(T) * alignof(T) + sizeof(T); }

// Runs kernel(args...) on the whole grid; `args` are packed as CUDA packs them. Null, or what went wrong.
template <class... Args>
const char *launch(void (*kernel)(Args...), const unsigned *grid, const unsigned *block, size_t shared_bytes,
                   const unsigned char *args, size_t args_bytes, int descending) {
    size_t size = 0;
    (measure<std::remove_cv_t<Args>>(size), ...);
    if (size != args_bytes) {
        fault = "the kernel takes " + std::to_string(size) + " bytes of arguments, the launch has " + std::to_string(args_bytes);
        return fault.c_str();
    }
    size_t offset = 0;
    std::tuple<std::remove_cv_t<Args>...> values{next<std::remove_cv_t<Args>>(args, offset)...};
    body = [&] { std::apply(kernel, values); };
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    fibers.resize(block[0] * block[1] * block[2]);
    for (size_t i = 0; i < fibers.size(); ++i) {
        fibers[i].stack.resize(STACK_BYTES);
        fibers[i].index = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]), unsigned(i / block[0] / block[1])};
    }
    std::vector<char> shared(shared_bytes + 256);
    dynamic_shared = (char *)(((uintptr_t)shared.data() + 127) / 128 * 128);
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                std::fill(shared.begin(), shared.end(), (char)0xFF);
                if (!run_block(descending)) return fault.c_str();
                for (char *p = dynamic_shared + shared_bytes; p < shared.data() + shared.size(); ++p)
                    if (*p != (char)0xFF) {
                        fault = "written behind the dynamic shared memory";
                        return fault.c_str();
                    }
            }
    return nullptr;
}

inline void check_aligned(const void *p, size_t nbytes) {
    if ((uintptr_t)p % nbytes) fail("an access of " + std::to_string(nbytes) + " bytes at an address not aligned to it");
}

inline void copy_async(void *target, const void *source, size_t nbytes) {
    check_aligned(target, nbytes);
    if (source) check_aligned(source, nbytes);
    fibers[current].open.push_back({target, source, nbytes});
}

template <class T> T exchange(unsigned mask, T value, int source_lane) {
    static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
    Warp &warp = warps[current / 32];
    int lane = current % 32;
    memcpy(warp.values[lane], &value, sizeof(T));
    wait_warp(mask);
    memcpy(&value, warp.values[source_lane < 0 || source_lane > 31 ? lane : source_lane], sizeof(T));
    wait_warp(mask);
    return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier, emulation::live); }
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

// A copy of 16 or 4 bytes that lands in shared memory when its group is waited for.
inline void copy_async16(float *shared, const float *source, bool is_live) {
    emulation::copy_async(shared, is_live ? source : nullptr, 16);
}
inline void copy_async4(float *shared, const float *source, bool is_live) {
    emulation::copy_async(shared, is_live ? source : nullptr, 4);
}
inline void copy_async_commit() {
    auto &fiber = emulation::fibers[emulation::current];
    fiber.pending.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int PENDING> void copy_async_wait() {
    auto &pending = emulation::fibers[emulation::current].pending;
    while (pending.size() > PENDING) {
        for (const emulation::Copy &copy : pending.front()) {
            if (copy.source)
                memcpy(copy.target, copy.source, copy.nbytes);
            else
                memset(copy.target, 0, copy.nbytes);
        }
        pending.pop_front();
    }
}

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

#define EMULATE(entry)                                                                                             \
    extern "C" const char *emulate(const unsigned *grid, const unsigned *block, size_t shared_bytes,               \
                                   const unsigned char *args, size_t args_bytes, int descending) {                 \
        return emulation::launch(entry, grid, block, shared_bytes, args, args_bytes, descending);                  \
    }
