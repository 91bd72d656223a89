// Few channels on Hopper (sm_90a): the image's rows, made in shared memory as the tensor cores read them.
//
// A *strip* is a tile of columns of the outputs, of one image or of several side by side; an *item* is two rows of a strip. A
// block takes neighbouring items, strip after strip. A row of the image lies in shared memory with its whole run (of S * C
// elements, rounded up to 8 * RUNS) for each output column: [eight of the run][column][element]. Rows pass through a ring, each
// made once for all items that read it: the copy engine brings rows as they are, in twos, and a warpgroup, a thread for each
// column, makes runs of both.
//
// Macros: RUNS, PIXELS (columns of a strip, a multiple of 16).
#pragma once

#include "sm90.cuh"
#include "sm90_lanes.cuh"

#define PLANE (PIXELS * 16)       // bytes of an eight of all columns' runs
#define ROW_BYTES (RUNS * PLANE)
#define EIGHTS (RUNS == 4 ? 2 : RUNS)  // that a thread makes at once
#ifndef PRODUCERS                  // warpgroups that make rows, the block's first; two do so in turns, two rows each time
#define PRODUCERS 2
#endif
#define PRODUCER_WARPS (4 * PRODUCERS)
#define RAW_STAGES 8              // of two rows
#define AHEAD 4                   // copies are by so many stages; the others' readers may fall behind
#define MOST_PAIRS 32             // of rows in the ring

// Twin of the struct that conv_stem_sm90.py builds.
struct Problem {
    int n, h, row;                     // images; rows of one, elements of a row
    int k, p, q;                       // channels of y; outputs before the pool, of those that its floor keeps
    int run, r;                        // elements of a filter's row, its rows
    int step, left;                    // elements from a column of outputs to the next; of the padding
    int stride_h, top, dilation_h;
    int columns, images;               // of a strip: output columns of an image, images
    int raw_bytes;                     // of a row of an image's part of a strip
    int pairs, twice;                  // of rows in the ring; rows that are there twice, before its first and behind its last
    int span;                          // rows of the image that an item takes: what it reads, at least as many as lie between items, rounded up to even
    int items, extra;                  // of a block, and blocks that have one more
    int act;
    u32 keep[4], one[4];               // of the last eight of a run: beyond its end lie other pixels, which may not be numbers; 1 behind it
    FastDiv by_rows, by_across, by_columns;  // items of a strip; strips across an image
};

// A pixel of a row of a strip's outputs: where it is in y, in elements from the strip's first on; its column, and image << 16.
// Where there is none the column is beyond any.
struct Place {
    int to, column;
};

// The table of them, or of a pool's outputs.
template <bool IsPooled> __device__ __forceinline__ void list_places(const Problem &g, Place *places) {
    const int i = threadIdx.x, out_p = IsPooled ? g.p / 2 : g.p, out_q = IsPooled ? g.q / 2 : g.q;
    if (i >= PIXELS) return;
    int column;
    const int image = divide(IsPooled ? 2 * i : i, g.by_columns, column);
    if (IsPooled) column /= 2;
    places[i].to = (image * out_p * out_q + column) * g.k;
    places[i].column = image < g.images ? column | image << 16 : 0xffff;
}

__device__ __forceinline__ bool is_there(Place place, int q, int out_q, int n, int images) {
    return q + (place.column & 0xffff) < out_q && n + (place.column >> 16) < images;
}

#ifndef HOST_EMULATION
__device__ __forceinline__ void store_shared2(u32 at, u16 v) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(v) : "memory"); }

__device__ __forceinline__ void copy_bytes(u32 to, u64 from, u32 nbytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(nbytes),
                 "r"(barrier)
                 : "memory");
}
#endif

// An image's part of a strip, of which a lane copies rows: the images' rows and bytes are counted from the part's first column,
// which may lie in the padding.
struct Part {
    u64 start;             // in memory, of the image's first row
    int left, right;       // bytes of a row that the image has: from, to
    bool is_there, is_last;  // of the tensor's images

    __device__ __forceinline__ Part(const Problem &g, const u16 *x, int n, int first) {
        const int lane = threadIdx.x % 32, image = n + lane;
        start = (u64)x + 2 * ((long long)image * g.h * g.row + first);
        left = 2 * max(0, -first), right = 2 * min(g.row - first, (g.columns - 1) * g.step + g.run);
        is_there = lane < g.images && image < g.n && left < right, is_last = image == g.n - 1;
    }

    // Begin copying row h, of 16 bytes whatever of the row lies in them, if there is such a row; how many.
    __device__ __forceinline__ u32 prepare(const Problem &g, const u16 *x, int h, u32 raw, u64 &from, u32 &to) const {
        if (!is_there || (u32)h >= (u32)g.h) return 0;
        const u64 row = start + (u64)(2u * (u32)h * (u32)g.row);
        const u32 offset = (u32)row & 15, begin = offset + left & ~15u, end = offset + right + 15 & ~15u;
        from = row - offset + begin, to = raw + begin;
        u32 nbytes = end - begin;
        if (is_last && h == g.h - 1) {
            const u64 tensor_end = (u64)(x + (u64)g.n * g.h * g.row), until = from + nbytes;
            if (until > tensor_end) {  // within the last sixteen
                nbytes -= 16;
                for (u64 at = until - 16; at < tensor_end; at += 2) store_shared2(to + (u32)(at - from), *reinterpret_cast<const u16 *>(at));
            }
        }
        return nbytes;
    }
};

#ifndef HOST_EMULATION
__device__ __forceinline__ u32 load_shared4(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared_words(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// As above where `live`; a branch about so little takes longer.
__device__ __forceinline__ void store_shared_words_if(bool live, u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.shared.v4.u32 [%0], {%1,%2,%3,%4}; }" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d), "r"((u32)live)
                 : "memory");
}

// Wait for two barriers.
__device__ __forceinline__ void barrier_wait_both(u32 a, u32 parity_a, u32 b, u32 parity_b) {
    asm volatile("{ .reg .pred p, q; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; mbarrier.try_wait.parity.shared::cta.b64 q, [%2], %3;"
                 " and.pred p, p, q; @p bra DONE; bra WAIT; DONE: }" ::"r"(a),
                 "r"(parity_a), "r"(b), "r"(parity_b)
                 : "memory");
}

__device__ __forceinline__ int block_number() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}

// The signs of bytes of v, as bytes: those that the selector's four digits name, 8 to 11. (__byte_perm has no such digits.)
__device__ __forceinline__ u32 signs_of(u32 v, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(v), "r"(selector));
    return d;
}
#endif

// Wait until the rows that an item reads, from `slot` of the ring on, are there; `parity`: of that place. Two warpgroups make rows by turns, two at a
// time and each in order: so wait for the last of both.
__device__ __forceinline__ void await_rows(const Problem &g, u32 full, int slot, u32 parity) {
    const int last = (slot + g.span) / 2 - 1, before = PRODUCERS == 2 && g.span > 2 ? last - 1 : last;
    const int wraps = last >= g.pairs, before_wraps = before >= g.pairs;
    barrier_wait_both(full + 8 * (last - (wraps ? g.pairs : 0)), parity ^ wraps, full + 8 * (before - (before_wraps ? g.pairs : 0)), parity ^ before_wraps);
}

// A number that the compiler does not make anew wherever it is used.
__device__ __forceinline__ u32 opaque(u32 v) {
    asm volatile("" : "+r"(v));
    return v;
}

// The items of a block. (Each warpgroup asks for itself: nothing is then in registers where their number changes.)
struct Share {
    int begin, end;
    __device__ __forceinline__ explicit Share(const Problem &g) {
        const int block = same_in_all(block_number());
        begin = block * g.items + min(block, g.extra), end = begin + g.items + (block < g.extra);
    }
};

// Barriers and buffers of rows, as addresses of shared memory.
struct Rows {
    u32 ring, raw, zeros, full, empty, raw_full, raw_empty;

    // Two rows are full when the four warps that make them have, and empty when `readers` warps have given them back.
    __device__ __forceinline__ void init(const Problem &g, int readers) const {
        for (int i = 0; i < g.pairs; ++i) barrier_init(full + 8 * i, 4), barrier_init(empty + 8 * i, readers);
        for (int i = 0; i < RAW_STAGES; ++i) barrier_init(raw_full + 8 * i, 32), barrier_init(raw_empty + 8 * i, 4);
        barrier_init_fence();
    }
};

#define ROW_BARRIERS (2 * MOST_PAIRS + 2 * RAW_STAGES)

__device__ __forceinline__ Rows rows_of(u32 ring, u32 raw, u32 zeros, u32 barriers) {
    const u32 empty = barriers + 8 * MOST_PAIRS, raw_full = empty + 8 * MOST_PAIRS;
    return {ring, raw, zeros, barriers, empty, raw_full, raw_full + 8 * RAW_STAGES};
}

// The part of a strip that a block has, from an item on: its first image, column and element; the image's first row that it
// reads, the first of all that the block reads, and how many; the item after it.
struct Strip {
    int n, q, first, h, begin, rows, next;

    __device__ __forceinline__ Strip(const Problem &g, int item, int end, int begin = 0) : begin(begin) {
        int pair, across;
        n = divide(divide(item, g.by_rows, pair), g.by_across, across) * g.images;
        q = across * g.columns, first = q * g.step - g.left, h = pair * 2 * g.stride_h - g.top;
        next = min(end, item + (int)g.by_rows.d - pair), rows = (next - item - 1) * 2 * g.stride_h + g.span;
    }
};

// Make the rows that the block's items read, by the block's first warpgroups. For a gradient all columns are numbers, zeros where there is no
// output, and the element behind each run, if there is room, is 1: the gradient of the bias comes of it.
template <bool IsGradient> __device__ __forceinline__ void make_rows(const Problem &g, const u16 *x, const Rows &memory) {
    const int thread = threadIdx.x % 128, warp = threadIdx.x / 32, lane = thread % 32;
    const Share share(g);
    int column;
    const int image = divide(thread, g.by_columns, column);
    // Warps copy in turns, ahead of what is read and through all strips.
    Strip ahead(g, share.begin, share.end);
    Part part(g, x, ahead.n, ahead.first);
    const u32 turn = PRODUCERS == 2 ? 2 * (warp % 4) + warp / 4 : warp;  // a warp copies what its own warpgroup reads
    u32 copied = (turn + AHEAD) % PRODUCER_WARPS;
    auto copy_next = [&] {
        while (2 * (int)copied >= ahead.begin + ahead.rows) {
            if (ahead.next >= share.end) return;
            ahead = Strip(g, ahead.next, share.end, ahead.begin + ahead.rows);
            part = Part(g, x, ahead.n, ahead.first);
        }
        const u32 stage = copied % RAW_STAGES, raw = memory.raw + (stage * 2 * g.images + lane) * g.raw_bytes;
        barrier_wait(memory.raw_empty + 8 * stage, copied / RAW_STAGES & 1 ^ 1);
        const int h = ahead.h + 2 * (int)copied - ahead.begin;
        u64 from[2];
        u32 to[2], nbytes[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) nbytes[e] = part.prepare(g, x, h + e, raw + e * g.images * g.raw_bytes, from[e], to[e]);
        barrier_expect(memory.raw_full + 8 * stage, nbytes[0] + nbytes[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (nbytes[e]) copy_bytes(to[e], from[e], nbytes[e], memory.raw_full + 8 * stage);
        __syncwarp();
        copied += PRODUCER_WARPS;
    };
    while (copied < AHEAD) {
        const u32 before = copied;
        copy_next();
        if (copied == before) break;
    }
    u32 read = warp / 4;  // of twos of rows, the next that the warpgroup makes
    Ring made{(int)read, 0};
    const u32 full = opaque(memory.full), empty = full + (memory.empty - memory.full);
    const u32 raw_full = full + (memory.raw_full - memory.full), raw_empty = full + (memory.raw_empty - memory.full);
    const u32 raw_stage_bytes = 2 * g.images * g.raw_bytes, from_thread = memory.raw + image * g.raw_bytes, to_thread = memory.ring + 16 * thread;
    int before = 0;  // twos of rows of the strips before
    for (int item = share.begin; item < share.end;) {
        const Strip strip(g, item, share.end);
        item = strip.next;
        const int n = strip.n + image, element = strip.first + column * g.step;
        const bool is_live = image < g.images && n < g.n && (!IsGradient || strip.q + column < g.q);
        const bool is_stored = IsGradient ? thread < PIXELS : is_live;
        const bool is_inside = __all_sync(0xffffffffu, element >= 0 && element + g.run <= g.row);
        u32 inside = 0;  // which of the run's elements the image has: the signs of the bytes, by fours from bit to bit
#pragma unroll 1
        for (int j = 0; j < 8 * RUNS; ++j) inside |= (u32)(element + j) < (u32)g.row ? 0x80u << 8 * (j % 4) >> j / 4 : 0u;
        int h = strip.h + 2 * ((int)read - before);
        u32 start = (u32)(u64)x + 2 * (((u32)n * g.h + h) * g.row + strip.first);  // of the part's row in memory, modulo 16
        before += strip.rows / 2;
#pragma unroll 1
        for (; (int)read < before; read += PRODUCERS, h += 2 * PRODUCERS, start += 4 * PRODUCERS * g.row) {
            const u32 stage = read % RAW_STAGES;
            if (read % PRODUCER_WARPS == turn) copy_next();
            barrier_wait_both(raw_full + 8 * stage, read / RAW_STAGES & 1, empty + 8 * made.stage, made.parity ^ 1);
            u32 from[2], shift[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const u32 at = (start + 2 * e * g.row & 15) + 2 * column * g.step;
                const bool is_row = is_live && (u32)(h + e) < (u32)g.h;
                shift[e] = 8 * (at & 2);
                from[e] = is_row ? from_thread + stage * raw_stage_bytes + e * g.images * g.raw_bytes + (at & ~3u) : memory.zeros;
            }
#pragma unroll
            for (int run = 0; run < RUNS; run += EIGHTS) {
                u32 v[2][4 * EIGHTS + 1];
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (int j = 0; j <= 4 * EIGHTS; ++j) v[e][j] = load_shared4(from[e] + 16 * run + 4 * j);
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (int j = 0; j < 4 * EIGHTS; ++j) {
                        v[e][j] = __funnelshift_r(v[e][j], v[e][j + 1], shift[e]);
                        if (run + j / 4 == RUNS - 1) v[e][j] &= g.keep[j % 4];
                    }
                if (!is_inside) {
                    u32 signs = inside;
                    asm volatile("" : "+r"(signs));  // or the masks are made ahead of the rows, and fill the registers
#pragma unroll
                    for (int j = 0; j < 4 * EIGHTS; j += 2) {
                        const u32 four = signs << (2 * run + j / 2), low = signs_of(four, 0x9988), high = signs_of(four, 0xbbaa);
                        v[0][j] &= low, v[1][j] &= low, v[0][j + 1] &= high, v[1][j + 1] &= high;
                    }
                }
                if (IsGradient && run + EIGHTS == RUNS) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) v[0][4 * EIGHTS - 4 + j] |= g.one[j], v[1][4 * EIGHTS - 4 + j] |= g.one[j];
                }
                const u32 to = to_thread + made.stage * 2 * ROW_BYTES;
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (int j = 0; j < EIGHTS; ++j)
                        store_shared_words_if(is_stored, to + e * ROW_BYTES + (run + j) * PLANE, v[e][4 * j], v[e][4 * j + 1], v[e][4 * j + 2], v[e][4 * j + 3]);
                if (2 * made.stage >= g.twice) continue;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const bool is_twice = is_stored && 2 * made.stage + e < g.twice;
#pragma unroll
                    for (int j = 0; j < EIGHTS; ++j)
                        store_shared_words_if(is_twice, to + (2 * g.pairs + e) * ROW_BYTES + (run + j) * PLANE, v[e][4 * j], v[e][4 * j + 1], v[e][4 * j + 2],
                                              v[e][4 * j + 3]);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(raw_empty + 8 * stage);
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(full + 8 * made.stage);
            made.stage += PRODUCERS;
            if (made.stage >= g.pairs) made.stage -= g.pairs, made.parity ^= 1;
        }
    }
}
