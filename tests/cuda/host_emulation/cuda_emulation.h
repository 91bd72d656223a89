// Runs a CUDA kernel on the host, for tests without a GPU: each thread of a block is a fiber, blocks run one by one, those of a
// cluster together.
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
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

static dim3 gridDim, blockDim, blockIdx, threadIdx;
static const int warpSize = 32;

namespace emulation {

constexpr size_t STACK_BYTES = 128 << 10, SHARED_ALIGNMENT = 1024, SHARED_GUARD = 256;
constexpr size_t MOST_SHARED_BYTES = 232448;  // of a block of sm_90

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
    int block, thread;  // of the cluster, of the block
    ucontext_t start;
    jmp_buf at;
    std::unique_ptr<char[]> stack;
    bool started = false, finished = false;
    const unsigned *watched = nullptr;  // it goes on when this is another number than `seen`
    unsigned seen;
    const char *awaited;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> pending;
};

struct Warp {
    Barrier barrier;
    unsigned char values[32][8];
};

struct Block {
    dim3 index;
    int live;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<char> memory;
    char *shared;  // dynamic
};

static std::vector<Fiber> fibers;  // of all blocks of the cluster
static std::vector<Block> blocks;
static Fiber *self;
static Block *own;                 // block
static int current;                // thread of the block
static bool descending_order;
static jmp_buf scheduler;
static std::string fault;
static std::function<void()> body;
static char *dynamic_shared;
static size_t dynamic_bytes;
static std::vector<std::function<void()>> at_begin;        // of each cluster
static std::vector<std::function<std::string()>> at_end;   // of it; says what is wrong
static std::vector<std::function<std::string()>> at_deadlock;  // more of what is awaited

[[noreturn]] inline void fail(const std::string &what) {
    char where[160];
    snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
             threadIdx.y, threadIdx.z);
    fault = what + where;
    _longjmp(scheduler, 2);
}

inline void yield() {
    if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
}

// Wait while `word` is `seen`.
inline void await_change(const unsigned &word, unsigned seen, const char *what) {
    self->watched = &word, self->seen = seen, self->awaited = what;
    while (word == seen) yield();
    self->watched = nullptr;
}

inline void open(Barrier &barrier) {
    barrier.arrived = 0;
    ++barrier.generation;
}

// `last`: what the last one does before all go on. It does not go ahead of its warp: lanes are together behind a barrier.
template <class Last> void wait(Barrier &barrier, int expected, const char *what, Last last) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived >= expected) {
        last();
        open(barrier);
        yield();
    } else {
        await_change(barrier.generation, generation, what);
    }
}

inline void wait(Barrier &barrier, int expected, const char *what) {
    wait(barrier, expected, what, [] {});
}

inline Warp &own_warp() { return own->warps[current / 32]; }

inline void wait_warp(unsigned mask) {
    int present = std::min<int>(32, (int)(blockDim.x * blockDim.y * blockDim.z) - current / 32 * 32);
    wait(own_warp().barrier, __builtin_popcount(present == 32 ? mask : mask & ((1u << present) - 1)), "its warp");
}

inline void enter() {
    body();
    self->finished = true;
    if (--own->live > 0 && own->barrier.arrived >= own->live) open(own->barrier);  // a thread that has left counts as arrived
    _longjmp(scheduler, 1);
}

// noinline: its locals must not be kept in registers across setjmp in the caller's loop.
__attribute__((noinline)) inline bool resume(Fiber &fiber) {
    self = &fiber;
    own = &blocks[fiber.block];
    current = fiber.thread;
    threadIdx = fiber.index;
    blockIdx = own->index;
    dynamic_shared = own->shared;
    int why = _setjmp(scheduler);
    if (why == 0) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }
    return why != 2;
}

// What the threads wait for that are left.
inline void name_deadlock() {
    std::map<std::string, int> waiting;
    for (const Fiber &fiber : fibers)
        if (!fiber.finished) ++waiting[fiber.awaited];
    fault = "a barrier that some threads never reach:";
    for (const auto &[what, count] : waiting) fault += " " + std::to_string(count) + " threads wait for " + what + ";";
    for (const auto &more : at_deadlock) fault += more();
    const dim3 &index = blocks[0].index;
    fault += " block " + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z);
}

inline bool run_cluster() {
    const size_t threads = fibers.size() / blocks.size();
    for (Block &block : blocks) {
        std::fill(block.memory.begin(), block.memory.end(), (char)0xFF);
        block.barrier = Barrier();
        block.warps.assign((threads + 31) / 32, Warp());
        block.live = (int)threads;
    }
    for (Fiber &fiber : fibers) {
        fiber.started = fiber.finished = false;
        fiber.watched = nullptr;
        fiber.open.clear();
        fiber.pending.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    if (__start_emulated_shared) memset(__start_emulated_shared, 0xFF, __stop_emulated_shared - __start_emulated_shared);
    for (const auto &begin : at_begin) begin();
    for (size_t left = fibers.size(); left > 0;) {
        bool progress = false;
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber &fiber = fibers[descending_order ? fibers.size() - 1 - i : i];
            if (fiber.finished || (fiber.watched && *fiber.watched == fiber.seen)) continue;
            if (!resume(fiber)) return false;
            left -= fiber.finished;
            progress = true;
        }
        if (!progress) {
            name_deadlock();
            return false;
        }
    }
    for (const Block &block : blocks)
        for (const char *p = block.shared + dynamic_bytes; p < block.memory.data() + block.memory.size(); ++p)
            if (*p != (char)0xFF) {
                fault = "written behind the dynamic shared memory";
                return false;
            }
    for (const auto &end : at_end)
        if (!(fault = end()).empty()) return false;
    return true;
}

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

// Runs kernel(args...) on the whole grid, `cluster` neighbouring blocks at a time. Null, or what went wrong.
template <class... Args>
const char *launch(void (*kernel)(Args...), int cluster, const unsigned *grid, const unsigned *block, size_t shared_bytes,
                   const unsigned char *args, int descending) {
    const size_t static_bytes = __stop_emulated_shared - __start_emulated_shared;
    if (grid[0] % cluster || (cluster > 1 && static_bytes) || shared_bytes + static_bytes > MOST_SHARED_BYTES)
        return "no such cluster, or one with static shared memory, which blocks have in common here, or more shared memory than there is";
    size_t offset = 0;
    std::tuple<std::remove_cv_t<Args>...> values{next<std::remove_cv_t<Args>>(args, offset)...};
    body = [&] { std::apply(kernel, values); };
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    descending_order = descending, dynamic_bytes = shared_bytes;
    const int threads = block[0] * block[1] * block[2];
    fibers.resize(threads * cluster);
    for (int i = 0; i < (int)fibers.size(); ++i) {
        const unsigned thread = i % threads;
        if (!fibers[i].stack) fibers[i].stack.reset(new char[STACK_BYTES]);
        fibers[i].block = i / threads, fibers[i].thread = thread;
        fibers[i].index = {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]};
    }
    blocks.resize(cluster);
    for (Block &one : blocks) {
        one.memory.resize(SHARED_ALIGNMENT + shared_bytes + SHARED_GUARD);
        one.shared = (char *)(((uintptr_t)one.memory.data() + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT);
    }
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; x += cluster) {
                for (int i = 0; i < cluster; ++i) blocks[i].index = {x + i, y, z};
                if (!run_cluster()) return fault.c_str();
            }
    return nullptr;
}

inline void check_aligned(const void *p, size_t nbytes) {
    if ((uintptr_t)p % nbytes) fail("an access of " + std::to_string(nbytes) + " bytes at an address not aligned to it");
}

inline void copy_async(void *target, const void *source, size_t nbytes) {
    check_aligned(target, nbytes);
    if (source) check_aligned(source, nbytes);
    self->open.push_back({target, source, nbytes});
}

template <class T> T exchange(unsigned mask, T value, int source_lane) {
    static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
    Warp &warp = own_warp();
    int lane = current % 32;
    memcpy(warp.values[lane], &value, sizeof(T));
    wait_warp(mask);
    memcpy(&value, warp.values[source_lane < 0 || source_lane > 31 ? lane : source_lane], sizeof(T));
    wait_warp(mask);
    return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::own->barrier, emulation::own->live, "__syncthreads"); }
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

// A copy of 16 or 4 bytes that lands in shared memory when its group is waited for.
inline void copy_async16(float *shared, const float *source, bool is_live) {
    emulation::copy_async(shared, is_live ? source : nullptr, 16);
}
inline void copy_async4(float *shared, const float *source, bool is_live) {
    emulation::copy_async(shared, is_live ? source : nullptr, 4);
}
inline void copy_async_commit() {
    emulation::self->pending.push_back(std::move(emulation::self->open));
    emulation::self->open.clear();
}
template <int PENDING> void copy_async_wait() {
    auto &pending = emulation::self->pending;
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

#define EMULATE(entry, cluster)                                                                                       \
    extern "C" int parameters(unsigned (*table)[2]) { return emulation::list_parameters(entry, table); }             \
    extern "C" const char *emulate(const unsigned *grid, const unsigned *block, size_t shared_bytes,                 \
                                   const unsigned char *args, int descending) {                                      \
        return emulation::launch(entry, cluster, grid, block, shared_bytes, args, descending);                       \
    }
