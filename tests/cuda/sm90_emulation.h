// Twins of sm90.cuh's instructions for cuda_emulation.h: mbarriers, and tensor copies without swizzles (runner.py, `tensor_map`).
//
// Copies are made as late as they may be: when a thread waits for them.
#pragma once

#include <map>

#include "host_emulation/cuda_emulation.h"

struct TensorMap;

namespace emulation {

// What a wait in `sm90.cuh` calls an address: from the static shared memory's start, or from the dynamic one's.
constexpr unsigned DYNAMIC = 1u << 24;

struct TensorCopy {
    unsigned to;
    const unsigned long long *map;
    int at[4];
};

struct MemoryBarrier {
    int arrivals = 0, missing = 0;
    long long nbytes = 0;  // that copies have not yet brought
    unsigned phase = 0;
    std::vector<TensorCopy> copies;

    void arrive(int count) {
        progress = true;
        missing -= count;
        if (missing < 0) fail("more arrivals at a memory barrier than it takes");
        complete();
    }

    void complete() {
        if (missing > 0 || nbytes != 0) return;
        phase ^= 1;
        missing = arrivals;
    }
};

static std::map<unsigned, MemoryBarrier> memory_barriers;

inline char *at_shared(unsigned address) {
    return address >= DYNAMIC ? dynamic_shared + (address - DYNAMIC) : __start_emulated_shared + address;
}

// Copies the box to shared memory, innermost dimension first, or out of it; what lies outside of the tensor is zero, and is not
// written. Returns its bytes.
inline long long copy_tensor(const TensorCopy &copy, bool out = false) {
    const unsigned long long *map = copy.map;
    const int rank = (int)map[1];
    char *const first = at_shared(copy.to);
    check_aligned(first, 128);
    long long boxes = 1;
    for (int d = 0; d < rank; ++d) boxes *= map[2 + 3 * d + 2];
    for (long long i = 0; i < boxes; ++i) {
        long long rest = i, offset = 0;
        bool inside = true;
        for (int d = 0; d < rank; ++d) {
            const unsigned long long *dimension = map + 2 + 3 * d;
            const long long at = copy.at[d] + rest % (long long)dimension[2];
            rest /= (long long)dimension[2];
            inside = inside && at >= 0 && at < (long long)dimension[0];
            offset += at * (long long)dimension[1];
        }
        if (out) {
            if (inside) memcpy(reinterpret_cast<char *>(map[0]) + offset, first + 2 * i, 2);
            continue;
        }
        unsigned short element = 0;
        if (inside) memcpy(&element, reinterpret_cast<const char *>(map[0]) + offset, 2);
        memcpy(first + 2 * i, &element, 2);
    }
    return 2 * boxes;
}

inline void copies_land(MemoryBarrier &barrier) {
    if (barrier.copies.empty()) return;
    for (const TensorCopy &copy : barrier.copies) barrier.nbytes -= copy_tensor(copy);
    barrier.copies.clear();
    progress = true;
    barrier.complete();
}

static std::map<int, std::deque<TensorCopy>> written_out;  // by thread

}  // namespace emulation

inline unsigned shared_address(const void *p) {
    const char *at = static_cast<const char *>(p);
    if (at >= __start_emulated_shared && at < __stop_emulated_shared) return (unsigned)(at - __start_emulated_shared);
    return emulation::DYNAMIC + (unsigned)(at - emulation::dynamic_shared);
}

inline void barrier_init(unsigned barrier, unsigned arrivals) {
    emulation::memory_barriers[barrier] = emulation::MemoryBarrier();
    emulation::memory_barriers[barrier].arrivals = emulation::memory_barriers[barrier].missing = (int)arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_arrive(unsigned barrier, unsigned count = 1) { emulation::memory_barriers[barrier].arrive((int)count); }
inline void barrier_expect(unsigned barrier, unsigned nbytes) {
    emulation::memory_barriers[barrier].nbytes += nbytes;
    emulation::memory_barriers[barrier].arrive(1);
}
inline void barrier_wait(unsigned barrier, unsigned parity) {
    emulation::MemoryBarrier &waited = emulation::memory_barriers[barrier];
    while (waited.phase == parity) {
        emulation::copies_land(waited);
        if (waited.phase == parity) emulation::yield();
    }
    emulation::progress = true;
}
inline void prefetch(const TensorMap &) {}
inline void prefetch(const void *p, unsigned nbytes) {
    emulation::check_aligned(p, 16);
    emulation::check_aligned(reinterpret_cast<const void *>((unsigned long long)nbytes), 16);
}
inline bool elect() { return threadIdx.x % 32 == 0; }
inline void load_tile(unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1, int c2, int c3) {
    emulation::memory_barriers[barrier].copies.push_back(
        {to, reinterpret_cast<const unsigned long long *>(&map), {c0, c1, c2, c3}});
}
inline void store_tile(const TensorMap &map, unsigned from, int c0, int c1, int c2, int c3) {
    emulation::written_out[emulation::current].push_back(
        {from, reinterpret_cast<const unsigned long long *>(&map), {c0, c1, c2, c3}});
}
template <int PENDING> void store_wait() {
    auto &copies = emulation::written_out[emulation::current];
    for (; copies.size() > PENDING; copies.pop_front())
        if (copies.front().map) emulation::copy_tensor(copies.front(), true);
}
inline void store_nothing() {
    emulation::written_out[emulation::current].push_back({0, nullptr, {}});
}
inline void fence_async() {}
inline void named_barrier(int, int) { __syncthreads(); }  // of all threads
inline void named_barrier_arrive(int, int) { __syncthreads(); }
template <int Words> void store_shared(unsigned at, const unsigned (&v)[Words]) {
    emulation::check_aligned(emulation::at_shared(at), sizeof v);
    memcpy(emulation::at_shared(at), v, sizeof v);
}
inline unsigned max_bf16x2(unsigned a, unsigned b) {
    unsigned result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        float v = __uint_as_float(a >> shift << 16), w = __uint_as_float(b >> shift << 16);
        unsigned larger = v != v || w != w ? 0x7fffu : (v > w ? a : b) >> shift & 0xffffu;
        result |= larger << shift;
    }
    return result;
}
