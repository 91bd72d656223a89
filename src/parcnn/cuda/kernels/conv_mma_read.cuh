// What an epilogue reads of memory at the places of a tile's results, brought to shared memory by wide copies.
#pragma once

#include "conv_mma.cuh"

// Copy to shared memory what lies at the places of a tile's results, by words; the counterpart of write_words.
template <int Width, int Rows, int Columns, int Threads, class Place>
__device__ __forceinline__ void read_words(char *tile, const u16 *from, int columns, Place place) {
    constexpr int Words = Columns / Width, Lanes = Words < 32 ? Words : 32;
    const u32 tile_at = shared_address(tile);
#pragma unroll 1
    for (int row = threadIdx.x / Lanes; row < Rows; row += Threads / Lanes) {
        const int at = place(row);
        if (at < 0) continue;
#pragma unroll
        for (int i = 0; i < Columns; i += Lanes * Width) {
            const int column = i + threadIdx.x % Lanes * Width;
            if (column >= columns) continue;
            const u32 to = chunk_offset<Columns / 8>(row, column / 8) + column % 8 * 2;
            if (Width == 8)
                copy_chunk(tile_at + to, from + at + column, true);
            else if (Width == 2)
                copy_pair(tile_at + to, from + at + column, true);
            else
                *reinterpret_cast<u16 *>(tile + to) = from[at + column];
        }
    }
}

// The same by the widest words, as write_rows; it is there for all threads at the end.
template <int Rows, int Columns, int Threads, class Place>
__device__ __forceinline__ void read_rows(char *tile, const u16 *from, int columns, int channels, int of_group, Place place) {
    const int odd = (channels | of_group) & 7;
    if (odd == 0)
        read_words<8, Rows, Columns, Threads>(tile, from, columns, place);
    else if (odd % 2 == 0)
        read_words<2, Rows, Columns, Threads>(tile, from, columns, place);
    else
        read_words<1, Rows, Columns, Threads>(tile, from, columns, place);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
}

// An input gradient's sums: the addend added, then times the derivative of `act` where its output is `saved`; either may be
// null. Both come through shared memory, where each thread finds the words of its results. What lies beyond the image or the
// group is not there, and is not written.
template <int Rows, int Columns, class Tile, class Place>
__device__ __forceinline__ void derive_tile(const Tile &tile, typename Tile::Sums &sums, char *shared, const u16 *saved, const u16 *addend, int act,
                                            int columns, int channels, int of_group, Place place) {
    if (addend) {
        read_rows<Rows, Columns, Tile::Threads>(shared, addend, columns, channels, of_group, place);
        each_word<Columns>(tile, sums, shared, [](u32 &two, float &v, float &u) { v += low_of(two), u += high_of(two); });
        if (saved) __syncthreads();  // the memory is written again
    }
    if (saved) {
        read_rows<Rows, Columns, Tile::Threads>(shared, saved, columns, channels, of_group, place);
        each_word<Columns>(tile, sums, shared, [&](u32 &two, float &v, float &u) {
            asm volatile("" ::: "memory");  // or words are read far ahead, into registers that there are not
            v = activation_dgrad_of(v, low_of(two), act), u = activation_dgrad_of(u, high_of(two), act);
        });
    }
}
