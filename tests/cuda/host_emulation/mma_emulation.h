// Twins of conv_mma.cuh's instructions for cuda_emulation.h: copies of 16 bytes, ldmatrix, mma.sync, rounding to bf16.
//
// Addresses of shared memory are offsets from the block's dynamic shared memory. A product's 16 terms are added in double
// and rounded once: a GPU rounds no finer.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

static unsigned lane_words[32][32][6];  // of a warp's lanes, while they exchange them

inline char *at_shared(unsigned address, size_t nbytes) {
    char *p = dynamic_shared + address;
    check_aligned(p, nbytes);
    return p;
}

inline float bf16(unsigned pair, int high) {
    unsigned bits = high ? pair & 0xffff0000u : pair << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline unsigned round_bf16(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void matrices(unsigned (&v)[4], unsigned at, bool transposed) {
    int warp = current / 32, lane = current % 32;
    lane_words[warp][lane][0] = at;
    wait_warp(0xffffffffu);
    for (int i = 0; i < 4; ++i) {
        unsigned short pair[2];
        for (int e = 0; e < 2; ++e) {
            int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
            memcpy(&pair[e], at_shared(lane_words[warp][8 * i + row][0], 16) + 2 * column, 2);
        }
        v[i] = pair[0] | (unsigned)pair[1] << 16;
    }
    wait_warp(0xffffffffu);
}

}  // namespace emulation

inline unsigned shared_address(const void *p) { return (unsigned)((const char *)p - emulation::dynamic_shared); }
inline void copy_chunk(unsigned to, const unsigned short *source, bool is_live) {
    emulation::copy_async(emulation::at_shared(to, 16), is_live ? source : nullptr, 16);
}
inline void copy_cached_chunk(unsigned to, const unsigned short *source, bool is_live) { copy_chunk(to, source, is_live); }
inline void copy_pair(unsigned to, const unsigned short *source, bool is_live) {
    emulation::check_aligned(is_live ? source : nullptr, 4);
    emulation::copy_async(emulation::at_shared(to, 4), is_live ? source : nullptr, 4);
}
inline unsigned short load_element(const unsigned short *source, bool is_live) { return is_live ? *source : 0; }
inline void store_chunk(unsigned to, uint4 v) { memcpy(emulation::at_shared(to, 16), &v, 16); }
inline void load_matrices(unsigned (&v)[4], unsigned at) { emulation::matrices(v, at, false); }
inline void load_transposed_matrices(unsigned (&v)[4], unsigned at) { emulation::matrices(v, at, true); }

inline void multiply_add(float *sums, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    using namespace emulation;
    int warp = current / 32, lane = current % 32;
    std::copy(a, a + 4, lane_words[warp][lane]);
    lane_words[warp][lane][4] = b0, lane_words[warp][lane][5] = b1;
    wait_warp(0xffffffffu);
    for (int e = 0; e < 4; ++e) {
        int row = lane / 4, column = lane % 4 * 2 + e % 2;
        double sum = sums[e];
        for (int k = 0; k < 16; ++k)
            sum += (double)bf16(lane_words[warp][row * 4 + k % 8 / 2][e / 2 + k / 8 * 2], k % 2) *
                   bf16(lane_words[warp][column * 4 + k % 8 / 2][4 + k / 8], k % 2);
        sums[e] = (float)sum;
    }
    wait_warp(0xffffffffu);
}

inline unsigned round_pair(float low, float high) { return emulation::round_bf16(low) | emulation::round_bf16(high) << 16; }
