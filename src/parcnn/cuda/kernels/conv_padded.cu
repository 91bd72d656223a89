// Rows of bytes into rows of another length: tensors get channels of zeros, or lose them again. Several tensors at once.
//
// The last dimension of `from` has from_row bytes, that of `to` has to_row: what is beyond from_row, and rows beyond
// from's last, become zeros; what is beyond to_row is dropped. grid: for each tensor as many blocks as have 16 bytes of
// `to` a thread. A thread's 16 bytes are gathered from aligned loads of 16 bytes and shifts, wherever rows start.
//
// Bytes: `from` is read once, `to` is written once.
// Preconditions: both aligned to 16 bytes; a row and its half have less than 2^31 bytes; a tensor less than 2^31 units.

#include "common.cuh"

#define MOST_COPIES 5

// Twins of the structs that conv_padded.py builds.
struct Copy {
    const u8 *from;
    u8 *to;
    u64 from_bytes, to_bytes;
    int from_row, to_row;
    int unit;         // 1 or 2 bytes, of which rows are multiples
    int first_block;  // of those that do this copy
    FastDiv by_row;   // by the units of one of to's rows
};

struct Copies {
    Copy of[MOST_COPIES];
};

// The 16 bytes from `at` on, a multiple of 16; zeros past the tensor's end.
__device__ __forceinline__ void load_aligned(u32 (&to)[4], const u8 *from, u64 at, u64 bytes) {
    if (at + 16 <= bytes) {
        const uint4 v = load_word<uint4>(from + at);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[i] = 0;
        for (int e = 0; e < 4; ++e)
            if (at + 4 * i + e < bytes) to[i] |= (u32)from[at + 4 * i + e] << 8 * e;
    }
}

// The same from any byte on, of which `count` (1 to 16) are kept.
__device__ __forceinline__ void load_window(u32 (&to)[4], const u8 *from, u64 at, u64 bytes, int count) {
    const int skip = (int)(at & 15);
    u32 low[4], high[4] = {}, v[8];
    load_aligned(low, from, at - skip, bytes);
    if (skip + count > 16) load_aligned(high, from, at - skip + 16, bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = low[i], v[i + 4] = high[i];
#pragma unroll
    for (int i = 0; i < 6; ++i) v[i] = skip & 8 ? v[i + 2] : v[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) v[i] = skip & 4 ? v[i + 1] : v[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int kept = count - 4 * i;
        const u32 word = __funnelshift_r(v[i], v[i + 1], 8 * (skip & 3));
        to[i] = kept >= 4 ? word : kept > 0 ? word & ((1u << 8 * kept) - 1) : 0u;
    }
}

extern "C" __global__ void __launch_bounds__(256) conv_padded(const __grid_constant__ Copies copies) {
    await_predecessors();
    int which = 0;
#pragma unroll
    for (int i = 1; i < MOST_COPIES; ++i)
        if ((int)blockIdx.x >= copies.of[i].first_block) which = i;
    const Copy &copy = copies.of[which];
    const u32 chunk = (blockIdx.x - copy.first_block) * blockDim.x + threadIdx.x;
    const u64 at = (u64)chunk * 16;
    if (at >= copy.to_bytes) return;
    int column;
    u64 row = divide((int)(chunk * (16 / copy.unit)), copy.by_row, column);
    column *= copy.unit;

    u32 out[4] = {};
    for (int filled = 0; filled < 16;) {
        const int run = min(copy.to_row - column, 16 - filled), count = min(copy.from_row - column, run);
        const u64 source = row * copy.from_row + column;
        if (count > 0 && source < copy.from_bytes) {
            u32 v[4];
            load_window(v, copy.from, source, copy.from_bytes, count);
            // Up by the bytes that are there.
#pragma unroll
            for (int i = 3; i >= 2; --i) v[i] = filled & 8 ? v[i - 2] : v[i];
            if (filled & 8) v[0] = v[1] = 0;
#pragma unroll
            for (int i = 3; i >= 1; --i) v[i] = filled & 4 ? v[i - 1] : v[i];
            if (filled & 4) v[0] = 0;
#pragma unroll
            for (int i = 3; i >= 0; --i) out[i] |= __funnelshift_l(i ? v[i - 1] : 0u, v[i], 8 * (filled & 3));
        }
        filled += run;
        column = 0;
        ++row;
    }
    if (at + 16 <= copy.to_bytes) {
        store_word(copy.to + at, make_uint4(out[0], out[1], out[2], out[3]));
        return;
    }
#pragma unroll
    for (int e = 0; e < 16; ++e)
        if (at + e < copy.to_bytes) copy.to[at + e] = (u8)(out[e / 4] >> 8 * (e % 4));
}
