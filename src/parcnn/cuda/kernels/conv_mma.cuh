// Products of bf16 tiles on the tensor cores of sm_80 and later: mma.sync.m16n8k16 with fp32 sums, ldmatrix, cp.async.
//
// A block multiplies an M x N tile by steps of the reduction. A step's operands are a stage of a ring in shared memory: tile
// A, then tile B. An operand lies *row-wise*, [row][reduction], or *column-wise*, [reduction][row], as global memory has it;
// ldmatrix transposes the latter. Rows are of 16-byte chunks, swizzled so that neither copies nor ldmatrix meet a bank twice.
// Addresses of shared memory are 32-bit, from the start of the block's dynamic shared memory.
#pragma once

#include "conv_common.cuh"
#include "gate.cuh"

typedef unsigned short u16;  // the bits of a bf16

#ifndef HOST_EMULATION
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Copy 16 bytes beside the arithmetic, or write zeros where `live` is false (`source` is then not read).
__device__ __forceinline__ void copy_chunk(u32 to, const u16 *source, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(live ? 16 : 0) : "memory");
}

// The same through L1, for pixels that the next taps need too. It pays where a line has pieces of several pixels (24
// channels: 277 against 415 us) or few products share a pixel; elsewhere L1's own traffic costs 2 to 8 %.
__device__ __forceinline__ void copy_cached_chunk(u32 to, const u16 *source, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(live ? 16 : 0) : "memory");
}

// The same of two elements, whose address is a multiple of 4.
__device__ __forceinline__ void copy_pair(u32 to, const u16 *source, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(source), "r"(live ? 4 : 0) : "memory");
}

// An element, or zero: without a branch, so that many are under way at once.
__device__ __forceinline__ u16 load_element(const u16 *source, bool live) {
    u16 v;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b16 %0, 0; @p ld.global.b16 %0, [%1]; }" : "=h"(v) : "l"(source), "r"((int)live));
    return v;
}

__device__ __forceinline__ void store_chunk(u32 to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Four 8x8 matrices of 16-bit values; lanes 8i .. 8i+7 give the addresses of the rows of the i-th.
__device__ __forceinline__ void load_matrices(u32 (&v)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ void load_transposed_matrices(u32 (&v)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
}

// sums[16][8] += a[16][16] * b[16][8] by a warp.
__device__ __forceinline__ void multiply_add(float *sums, const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as bf16, rounded to nearest even; the first in the low half.
__device__ __forceinline__ u32 round_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// ---- Places in an image, both sides in one register ----------------------------------------------------------------------
// Each side is biased by 2^15, so that its 16 bits say by the highest whether it is below zero, and neither sums nor
// differences carry into the other. Sides are within +-2^14, and so are displacements.

#define PLACE_BIAS 0x80008000u

__device__ __forceinline__ u32 displacement(int h, int w) { return ((u32)h << 16) + (u32)w; }
__device__ __forceinline__ u32 place_of(int h, int w) { return displacement(h, w) + PLACE_BIAS; }
__device__ __forceinline__ u32 no_displacement() { return displacement(-0x4000, 0); }  // out of every image
__device__ __forceinline__ u32 no_place() { return place_of(-0x4000, 0); }

// Whether `place`, displaced, lies in the image, of which `sides` is displacement(height, width).
__device__ __forceinline__ bool in_image(u32 place, u32 displaced, u32 sides) {
    u32 not_negative = place + displaced, beyond = place + (displaced - sides);
    return (not_negative & ~beyond & PLACE_BIAS) == PLACE_BIAS;
}

// ---- Tiles in shared memory ----------------------------------------------------------------------------------------------

// Bytes from a tile's start to a chunk of one of its rows, each of Chunks chunks. Rows 8 apart are swizzled alike, and the
// offset of chunk c ^ d is that of chunk c, ^ (d << 4).
template <int Chunks> __device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    int swizzle = Chunks >= 8 ? row & 7 : Chunks == 4 ? row >> 1 & 3 : row >> 2 & 1;
    return (u32)(row * Chunks + (chunk ^ swizzle)) * 16;
}

// The same for row `first` + i * Step, as an offset from the first that is known to the compiler where Step allows it.
template <int Chunks, int Step> __device__ __forceinline__ u32 chunk_offset(int first, int i, int chunk) {
    return Step % 8 == 0 ? chunk_offset<Chunks>(first, chunk) + i * Step * Chunks * 16 : chunk_offset<Chunks>(first + i * Step, chunk);
}

// What a warp multiplies: its part of a Rows x Columns tile, and the fragments of it.
template <int Rows, int Columns, int Depth, int WarpsM, int WarpsN, bool ColumnWiseA, bool ColumnWiseB> struct Product {
    static constexpr int Threads = 32 * WarpsM * WarpsN, Steps = Depth / 16;
    static constexpr int TilesM = Rows / WarpsM / 16, TilesN = Columns / WarpsN / 8;  // mma.sync tiles of a warp
    static constexpr int ChunksA = (ColumnWiseA ? Rows : Depth) / 8, ChunksB = (ColumnWiseB ? Columns : Depth) / 8;
    static constexpr u32 BytesA = 2 * Rows * Depth, StageBytes = BytesA + 2 * Columns * Depth;
    // A column-wise operand's tiles are found by their number's bits.
    static_assert(Depth >= 32 && (!ColumnWiseA || (TilesM & (TilesM - 1)) == 0) && (TilesN & (TilesN - 1)) == 0 && TilesN >= 2,
                  "no such tile");

    struct Fragments {
        u32 a[TilesM][4], b[TilesN][2];
    };
    // sums[(i * TilesN + j) / 2][(i * TilesN + j) % 2 * 4 + e] is row 16 i + lane / 4 + 8 (e / 2) and column 8 j + lane % 4 *
    // 2 + e % 2 of the warp's part.
    typedef float Sums[TilesM * TilesN / 2][8];

    int row0, column0;  // of the thread's first sum
    int warp_n;
    u32 a_at, b_at;  // of the row that the lane addresses for ldmatrix

    __device__ __forceinline__ Product() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, in = lane % 8;
        warp_n = warp / WarpsM;
        const int m = warp % WarpsM * (Rows / WarpsM), n = warp_n * (Columns / WarpsN);
        row0 = m + lane / 4, column0 = n + lane % 4 * 2;
        a_at = ColumnWiseA ? chunk_offset<ChunksA>((matrix >> 1) * 8 + in, m / 8 + (matrix & 1))
                           : chunk_offset<ChunksA>(m + (matrix & 1) * 8 + in, matrix >> 1);
        b_at = ColumnWiseB ? chunk_offset<ChunksB>((matrix & 1) * 8 + in, n / 8 + (matrix >> 1))
                           : chunk_offset<ChunksB>(n + (matrix >> 1) * 8 + in, matrix & 1);
    }

    __device__ __forceinline__ int row(int i, int e) const { return row0 + 16 * i + e / 2 * 8; }
    __device__ __forceinline__ int column(int j) const { return column0 + 8 * j; }
    __device__ __forceinline__ static float &sum(Sums &sums, int i, int j, int e) {
        return sums[(i * TilesN + j) / 2][(i * TilesN + j) % 2 * 4 + e];
    }

    // The i-th 16 rows of A.
    __device__ __forceinline__ void load_a(u32 (&a)[4], u32 stage, int step, int i) const {
        if (ColumnWiseA)
            load_transposed_matrices(a, stage + (a_at ^ (i << 5)) + step * 16 * ChunksA * 16);
        else
            load_matrices(a, stage + (a_at ^ (step << 5)) + i * 16 * ChunksA * 16);
    }

    // The j-th and the next 8 columns of B.
    __device__ __forceinline__ void load_b(Fragments &f, u32 stage, int step, int j) const {
        u32 v[4];
        if (ColumnWiseB)
            load_transposed_matrices(v, stage + BytesA + (b_at ^ (j << 4)) + step * 16 * ChunksB * 16);
        else
            load_matrices(v, stage + BytesA + (b_at ^ (step << 5)) + j * 8 * ChunksB * 16);
        f.b[j][0] = v[0], f.b[j][1] = v[1], f.b[j + 1][0] = v[2], f.b[j + 1][1] = v[3];
    }

    __device__ __forceinline__ void load(Fragments &f, u32 stage, int step) const {
#pragma unroll
        for (int i = 0; i < TilesM; ++i) load_a(f.a[i], stage, step, i);
#pragma unroll
        for (int j = 0; j < TilesN; j += 2) load_b(f, stage, step, j);
    }

    // The i-th 16 rows.
    __device__ __forceinline__ static void multiply(Sums &sums, const Fragments &f, int i) {
#pragma unroll
        for (int j = 0; j < TilesN; ++j) multiply_add(&sum(sums, i, j, 0), f.a[i], f.b[j][0], f.b[j][1]);
    }

    __device__ __forceinline__ static void multiply(Sums &sums, const Fragments &f) {
#pragma unroll
        for (int i = 0; i < TilesM; ++i) multiply(sums, f, i);
    }
};

// Walk the reduction: `tiles` stages' worth, Stages - 1 of them under way. copy(t, stage) starts the copies of the t-th into
// a stage, settle(stage) stores what it kept in registers, watch(stage) may read one before it is multiplied. Among
// the products copy() is also called for Stages - 1 beyond the last, so that no branch keeps it from running there: it fills with
// zeros then.
// Where settle() stores, there are three stages at least: the next tile's readers pass no barrier behind it.
template <int Stages, class Tile, class Copy, class Settle, class Watch>
__device__ __forceinline__ void reduce(const Tile &tile, typename Tile::Sums &sums, u32 ring, int tiles, Copy copy, Settle settle, Watch watch) {
    constexpr u32 Last = (Stages - 1) * Tile::StageBytes;
    if (tiles <= 0) return;
#pragma unroll
    for (int t = 0; t < Stages - 1; ++t) {
        if (t < tiles) {
            copy(t, ring + t * Tile::StageBytes);
            settle(ring + t * Tile::StageBytes);
        }
        copy_async_commit();
    }
    copy_async_wait<Stages - 2>();
    __syncthreads();
    typename Tile::Fragments f[2];
    tile.load(f[0], ring, 0);
    u32 reads = ring, writes = ring + Last;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
        watch(reads);
#pragma unroll
        for (int step = 0; step < Tile::Steps; ++step) {
            if (step == Tile::Steps - 1) {
                copy_async_wait<Stages - 2>();
                __syncthreads();  // the next stage is there, and this one may be written: its last fragments are in registers
                reads = reads == ring + Last ? ring : reads + Tile::StageBytes;
            }
            tile.load(f[(step + 1) % 2], reads, (step + 1) % Tile::Steps);
            if (step == 0) {
                copy(t + Stages - 1, writes);
                copy_async_commit();
            }
            Tile::multiply(sums, f[step % 2]);
        }
        settle(writes);
        writes = writes == ring + Last ? ring : writes + Tile::StageBytes;
    }
    copy_async_wait<0>();
    __syncthreads();  // all have read their last fragments, and nothing comes any more: the ring is free
}

// ---- Operands through registers: an odd number of channels, errors that are routed ----------------------------------------

// Eight elements as they come, which stay in registers of their own until they are all there.
struct Elements {
    u16 of[8];

    __device__ __forceinline__ uint4 vector() const {
        return make_uint4(of[0] | (u32)of[1] << 16, of[2] | (u32)of[3] << 16, of[4] | (u32)of[5] << 16, of[6] | (u32)of[7] << 16);
    }
};

// Eight bf16 of a 16-byte chunk.
struct Chunk {
    u32 pairs[4];

    __device__ __forceinline__ void put(int e, u32 bits) {
        pairs[e / 2] = e % 2 ? pairs[e / 2] | bits << 16 : bits;
    }
    __device__ __forceinline__ uint4 vector() const { return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]); }
};

__device__ __forceinline__ Chunk chunk_of(uint4 v) { return Chunk{{v.x, v.y, v.z, v.w}}; }

// The share of a pooled error that a pixel of its window has; `position` is the pixel's in the window, `winners` holds two
// bits for each of the eight channels.
__device__ __forceinline__ Chunk route(const Chunk &error, u32 winners, u32 position, int pool) {
    Chunk out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 low = (winners >> 4 * i & 3) == position ? 0x0000ffffu : 0u, high = (winners >> (4 * i + 2) & 3) == position ? 0xffff0000u : 0u;
        out.pairs[i] = pool == POOL_AVG ? round_pair(0.25f * low_of(error.pairs[i]), 0.25f * high_of(error.pairs[i]))
                                        : error.pairs[i] & (low | high);
    }
    return out;
}

// Two bits for each of `count` channels from k on (eight at most, of which the bytes exist), of a pixel's indices.
__device__ __forceinline__ u32 winners_of(const u8 *indices, int k, int count) {
    u32 bits = indices[k / 4];
    int have = 4 - k % 4;
    bits >>= 2 * (k % 4);
    if (have < count) bits |= (u32)indices[k / 4 + 1] << 2 * have, have += 4;
    if (have < count) bits |= (u32)indices[k / 4 + 2] << 2 * have;
    return bits;
}

// ---- Epilogue -----------------------------------------------------------------------------------------------------------

// sums += bias, of the columns that exist; null: none.
template <class Tile>
__device__ __forceinline__ void add_bias(const Tile &tile, typename Tile::Sums &sums, const float *bias, int columns) {
    if (!bias) return;
#pragma unroll
    for (int j = 0; j < Tile::TilesN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int n = tile.column(j) + e;
            const float b = n < columns ? bias[n] : 0.0f;
#pragma unroll
            for (int i = 0; i < Tile::TilesM; ++i) Tile::sum(sums, i, j, e) += b, Tile::sum(sums, i, j, e + 2) += b;
        }
}

// Every sum after the activation; gelu and silu as gates.
template <int Rows, int Columns> __device__ __forceinline__ void activate_sums(float (&sums)[Rows][Columns], int act, const Gate &gate) {
    activate_rows(sums, act, [&](float (&row)[Columns]) {
        if (act == ACT_TANH) {
            activate_each<ACT_TANH>(row);
        } else if (act == ACT_SILU || act == ACT_SIGMOID) {
            const bool gates = act == ACT_SILU;
#pragma unroll
            for (int j = 0; j < Columns; ++j) row[j] = gate_of<true>(gate, row[j]) * (gates ? row[j] : 1.0f);
        } else {
#pragma unroll
            for (int j = 0; j < Columns; ++j) row[j] = gate_of<false>(gate, row[j]) * row[j];
        }
    });
}

// use(word, sum, sum) of each two of a thread's sums, neighbours of a row, and of the word of shared memory that is their place.
template <int Columns, class Tile, class Use> __device__ __forceinline__ void each_word(const Tile &tile, typename Tile::Sums &sums, char *shared, Use use) {
#pragma unroll
    for (int i = 0; i < Tile::TilesM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::TilesN; ++j)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                use(*reinterpret_cast<u32 *>(shared + chunk_offset<Columns / 8>(tile.row(i, e), tile.column(j) / 8) + tile.column(j) % 8 * 2),
                    Tile::sum(sums, i, j, e), Tile::sum(sums, i, j, e + 1));
}

// Round a tile of sums to shared memory, for write_rows.
template <int Columns, class Tile> __device__ __forceinline__ void put_tile(const Tile &tile, typename Tile::Sums &sums, char *shared) {
    each_word<Columns>(tile, sums, shared, [](u32 &two, float &v, float &u) { two = round_pair(v, u); });
}

// Write a tile of Rows x Columns bf16 from shared memory by words: row r to place(r), negative where there is none, as many of
// its columns as `columns`. Neighbouring lanes write neighbouring words.
template <class Word, int Rows, int Columns, int Threads, class Place>
__device__ __forceinline__ void write_words(const char *tile, u16 *out, int columns, Place place) {
    constexpr int Width = sizeof(Word) / 2, Words = Columns / Width, Lanes = Words < 32 ? Words : 32;
#pragma unroll 2
    for (int row = threadIdx.x / Lanes; row < Rows; row += Threads / Lanes) {
        const int to = place(row);
        if (to < 0) continue;
#pragma unroll
        for (int i = 0; i < Columns; i += Lanes * Width) {
            const int column = i + threadIdx.x % Lanes * Width;
            if (column < columns)
                *reinterpret_cast<Word *>(out + to + column) =
                    *reinterpret_cast<const Word *>(tile + chunk_offset<Columns / 8>(row, column / 8) + column % 8 * 2);
        }
    }
}

// The same by the widest words that places and `columns` are multiples of, as `channels` are, and those of a group.
template <int Rows, int Columns, int Threads, class Place>
__device__ __forceinline__ void write_rows(const char *tile, u16 *out, int columns, int channels, int of_group, Place place) {
    const int odd = (channels | of_group) & 7;
    if (odd == 0)
        write_words<uint4, Rows, Columns, Threads>(tile, out, columns, place);
    else if (odd % 2 == 0)
        write_words<u32, Rows, Columns, Threads>(tile, out, columns, place);
    else
        write_words<u16, Rows, Columns, Threads>(tile, out, columns, place);
}
