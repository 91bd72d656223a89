// Twins of sm90_wgmma.cuh's instructions for cuda_emulation.h: products of a warpgroup whose operands lie in shared memory.
//
// A warp's quarter of a product is made when the warp waits for it, of what its operands are then: that of one warp at once, those of
// the other three when nothing else can go on. Sums of a product's 16 terms are added one after the other in fp32, fused.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

// What a thread knows of a product.
struct Product {
    unsigned long long a, b;  // descriptors
    float *sums;
    unsigned words[4];        // of A, where it comes from registers
    bool in_registers, add, a_transposed, b_transposed;
    int columns;
};

void multiply(const Product &product);
void await_products(int pending);

}  // namespace emulation

#define DEFINE_WGMMA(name, N, TransA, TransB)                                                                     \
    inline void name(float (&sums)[N / 2], unsigned long long a, unsigned long long b, unsigned add) {            \
        emulation::multiply({a, b, sums, {}, false, add != 0, TransA != 0, TransB != 0, N});                      \
    }

// A from registers.
template <int Sums> void multiply(float (&sums)[Sums], const unsigned (&a)[4], unsigned long long b, unsigned add) {
    emulation::multiply({0, b, sums, {a[0], a[1], a[2], a[3]}, true, add != 0, false, false, 2 * Sums});
}

inline void wgmma_fence() {}
void wgmma_commit();
template <int Pending> void wgmma_wait() { emulation::await_products(Pending); }
