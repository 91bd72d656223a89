// Twins of sm90.cuh's instructions, and of what the kernels for Hopper have beside them, for cuda_emulation.h: mbarriers, tensor
// copies, named barriers, registers of warpgroups, clusters. They are in sm90_emulation.cpp.
//
// Addresses of shared memory are 32-bit as on the device: static, then dynamic; from bit 24 on, what `mapa` gives: 1 + the block
// of the cluster. In ascending order of the threads copies are made as late as they may be, when a thread waits for them: who
// reads too early finds NaN; what is stored is read when nothing else can go on. In descending order they are made at once: who gives
// a stage back too early finds the next one's.
#pragma once

#include "cuda_emulation.h"
#include "pairs_emulation.h"
#include "wgmma_emulation.h"

struct TensorMap;
unsigned shared_address(const void *p);

void barrier_init(unsigned barrier, unsigned arrivals);
inline void barrier_init_fence() {}
void barrier_arrive(unsigned barrier, unsigned count = 1);
void barrier_expect(unsigned barrier, unsigned nbytes);
void barrier_wait(unsigned barrier, unsigned parity);
unsigned barrier_test(unsigned barrier, unsigned parity);
inline void barrier_arrive_if(unsigned does, unsigned barrier) {
    if (does) barrier_arrive(barrier);
}
inline void barrier_wait_both(unsigned a, unsigned parity_a, unsigned b, unsigned parity_b) {
    barrier_wait(a, parity_a);
    barrier_wait(b, parity_b);
}
void named_barrier(int id, int threads);
void named_barrier_arrive(int id, int threads);

namespace emulation {
void give_registers(unsigned count);
void take_registers(unsigned count);
void await_stores(size_t pending);
}  // namespace emulation
template <int Registers> void give_registers() { emulation::give_registers(Registers); }
template <int Registers> void take_registers() { emulation::take_registers(Registers); }

inline bool elect() { return threadIdx.x % 32 == 0; }
inline int block_number() { return (int)blockIdx.x; }
inline void prefetch(const TensorMap &) {}
inline void prefetch(const void *p, unsigned nbytes) {
    emulation::check_aligned(p, 16);
    emulation::check_aligned(reinterpret_cast<const void *>((unsigned long long)nbytes), 16);
}
inline void prefetch_tile(const TensorMap &, int, int, int, int) {}
void load_chunk(unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1);
void load_tile(unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1, int c2);
void load_tile(unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1, int c2, int c3);
void copy_bytes(unsigned to, unsigned long long from, unsigned nbytes, unsigned barrier);
void store_tile(const TensorMap &map, unsigned from, int c0, int c1, int c2, int c3);
void store_nothing();
template <int Pending> void store_wait() { emulation::await_stores(Pending); }
inline void fence_async() {}
void copy_chunk(unsigned to, const unsigned short *source, bool is_live);

unsigned load_shared4(unsigned at);
uint4 load_shared16(unsigned at);
void store_shared2(unsigned at, unsigned short v);
void store_shared4(unsigned at, unsigned v);
void store_shared8(unsigned at, float x, float y);
void store_shared16(unsigned at, float4 v);
void store_shared_words(unsigned at, unsigned a, unsigned b, unsigned c, unsigned d);
inline void store_shared_words_if(bool is_live, unsigned at, unsigned a, unsigned b, unsigned c, unsigned d) {
    if (is_live) store_shared_words(at, a, b, c, d);
}
void store_shared(unsigned at, const unsigned (&v)[1]);
void store_shared(unsigned at, const unsigned (&v)[2]);
inline void store_global16(void *to, uint4 v) {
    emulation::check_aligned(to, 16);
    memcpy(to, &v, 16);
}
void store_matrices(unsigned at, unsigned m0, unsigned m1);
void store_matrices(unsigned at, unsigned m0, unsigned m1, unsigned m2, unsigned m3);
void load_matrices(unsigned at, unsigned &m0, unsigned &m1);
void load_matrices(unsigned at, unsigned &m0, unsigned &m1, unsigned &m2, unsigned &m3);

// Of a cluster.
unsigned address_at(int block, unsigned at);
void barrier_arrive_at(int block, unsigned barrier);
void load_tile_to(unsigned short blocks, unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1, int c2, int c3);
void push16(unsigned there, float4 v, unsigned barrier);
void cluster_meet();
