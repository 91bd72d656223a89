// bf16 convolution of stride 1 on the tensor cores of sm_80 and later, forward or (DGRAD) with respect to its input: images
// `in` (N,IH,IW,channels) and `out` (N,OH,OW,channels), filters w (K,R,S,C/groups), all bf16, bias fp32.
//
//     forward:  out[n,h,w,k] = act(bias[k] + sum_{r,s,c} in[n, h+r*dilation-top, w+s*dilation-left, c] * w[k,r,s,c])
//     DGRAD:    out[n,h,w,c] = act'(saved) * (addend[n,h,w,c] + sum_{r,s,k} in[n, h+top-r*dilation, w+left-s*dilation, k] * w[k,r,s,c])
//
// Implicit GEMM over *positions*. The images' lines lie one behind the other, each with as many zeros behind it as taps reach
// beyond it, and so do images: a line's zeros on the left are those behind the line before. Then all pixels that a tap meets lie
// a constant distance from the outputs', and BM outputs in a row need one run of positions for all taps, which is brought to
// shared memory once. Positions among the zeros are computed too, and not written. Wide images are cut into stripes, each with
// the columns that its taps reach.
// M = positions, N = outputs of a group. grid (N tiles fastest, then M tiles; groups); block and warps as in conv_mma.cuh. A stage
//   is BK channels of one tap of the filters; the run has BK channels, 16 bytes from one position's to the next, so that ldmatrix
//   meets no bank twice wherever it starts. While the taps pass, the next channels' run comes.
//
// Bytes: `in` and w are read once from memory, their repetition over tiles comes from L2; `out` is written once.
// Preconditions: pointers aligned to 16 bytes; channels of a group are multiples of 8; every tensor has less than 2^31
// elements. out may be the memory of saved or addend.
//
// Macros: BM, BN, BK, WARPS_M, WARPS_N, STAGES, DGRAD.

#include "conv_mma_read.cuh"

// Twin of the struct that conv_mma_lines.py builds.
struct Problem {
    int positions;                   // of all images
    int in_h, in_w, in_c;            // channels: of a pixel
    int out_h, out_w, out_c;
    int group_in, group_out;
    int s, taps, slabs;              // slabs: runs of BK channels
    int next_r, next_s;              // positions from a tap to the next
    int back_h, back_w, stripe;      // position (0, 0) of stripe 0 is pixel (-back_h, -back_w); columns of a stripe of outputs
    int slots, loads;                // positions of a run; how many each thread brings while a tap passes
    int act;
    FastDiv by_width, by_height, by_stripes, by_n_tiles;  // width, height: positions of a stripe
    Gate gate;                                            // of `act`, forward
};

// One of several equal parts of some work, done among products.
struct Share {
    int number, of;

    __device__ __forceinline__ bool has(int i, int count) const { return i * of / count == number; }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, 1)
    conv_mma_lines(const u16 *__restrict__ in, const u16 *__restrict__ w, const float *__restrict__ bias, const u16 *saved, const u16 *addend,
                   u16 *out, Problem g) {
    typedef Product<BM, BN, BK, WARPS_M, WARPS_N, false, DGRAD> Tile;
    constexpr u32 Pitch = 2 * BK + 16, BytesB = 2 * BK * BN, Last = (STAGES - 1) * BytesB;
    constexpr int CHUNKS_A = BK / 8, ROWS = Tile::Threads / CHUNKS_A;
    constexpr int CHUNKS_B = (DGRAD ? BN : BK) / 8, STEP_B = Tile::Threads / CHUNKS_B, ROWS_B = DGRAD ? BK : BN;
    constexpr int LOADS_B = (ROWS_B + STEP_B - 1) / STEP_B;
    DYNAMIC_SHARED(char, shared);
    const Tile tile;
    int n_tile;
    const int m0 = divide((int)blockIdx.x, g.by_n_tiles, n_tile) * BM, n0 = n_tile * BN, group = blockIdx.y;
    const int columns = g.group_out - n0;  // that exist
    const u32 run_bytes = g.slots * Pitch, runs = shared_address(shared), other = g.slabs > 1 ? run_bytes : 0, ring = runs + run_bytes + other;

    // Where each of a run's positions lies in `in`; negative among the zeros.
    int *offsets = reinterpret_cast<int *>(shared + (ring - runs) + STAGES * BytesB);
    for (int slot = threadIdx.x; slot < g.slots; slot += Tile::Threads) {
        int stripe, left, h;
        const int n = divide(divide(divide(m0 + slot, g.by_width, left), g.by_height, h), g.by_stripes, stripe);
        h -= g.back_h, left += stripe * g.stripe - g.back_w;
        const bool live = m0 + slot < g.positions && (u32)h < (u32)g.in_h && (u32)left < (u32)g.in_w;
        offsets[slot] = live ? ((n * g.in_h + h) * g.in_w + left) * g.in_c + group * g.group_in : -1;
    }
    __syncthreads();

    // A thread's share of a run: the part-th, of `slab`, into the run that starts at `to`.
    const int chunk_a = threadIdx.x % CHUNKS_A, first_a = threadIdx.x / CHUNKS_A;
    auto copy_run = [&](int part, int slab, u32 to) {
        const int slot = part * ROWS + first_a, c = slab * BK + chunk_a * 8;
        if (slot >= g.slots) return;
        const int offset = offsets[slot];
        copy_chunk(to + slot * Pitch + chunk_a * 16, in + (offset + c), offset >= 0 && c < g.group_in);
    };

    // The filters of a stage, tap by tap, then slab by slab.
    const int chunk_b = threadIdx.x % CHUNKS_B, first_b = threadIdx.x / CHUNKS_B;
    const int row_step = g.taps * (DGRAD ? g.group_out : g.group_in);  // from a filter to the next
    int filter_tap = 0, filter_slab = 0;  // of the stage that is copied next
    auto copy_filters = [&](u32 stage, Share share) {
        const int tap = DGRAD ? g.taps - 1 - filter_tap : filter_tap, c0 = filter_slab * BK;
        const int at = DGRAD ? (group * g.group_in + c0 + first_b) * row_step + tap * g.group_out + n0 + chunk_b * 8
                             : (group * g.group_out + n0 + first_b) * row_step + tap * g.group_in + c0 + chunk_b * 8;
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) {
            const int row = first_b + i * STEP_B;
            if ((ROWS_B % STEP_B != 0 && row >= ROWS_B) || !share.has(i, LOADS_B)) continue;
            copy_chunk(stage + chunk_offset<CHUNKS_B, STEP_B>(first_b, i, chunk_b), w + (at + i * STEP_B * row_step),
                       DGRAD ? c0 + row < g.group_in && chunk_b * 8 < columns : c0 + chunk_b * 8 < g.group_in && row < columns);
        }
        if (share.number + 1 == share.of && ++filter_tap == g.taps) filter_tap = 0, ++filter_slab;
    };

    // The row that the lane addresses for ldmatrix, in the run.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8;
    const u32 a_at = runs + (warp % WARPS_M * (BM / WARPS_M) + (matrix & 1) * 8 + lane % 8) * Pitch + (matrix >> 1) * 16;
    typename Tile::Fragments f[2];
    auto load = [&](typename Tile::Fragments &to, u32 taps, u32 filters, int step, Share share) {
        constexpr int PAIRS = Tile::TilesN / 2;
#pragma unroll
        for (int i = 0; i < PAIRS + Tile::TilesM; ++i) {
            if (!share.has(i, PAIRS + Tile::TilesM)) continue;
            if (i < PAIRS)
                tile.load_b(to, filters - Tile::BytesA, step, 2 * i);
            else
                load_matrices(to.a[i - PAIRS], taps + step * 32 + (i - PAIRS) * 16 * Pitch);
        }
    };

    await_predecessors();
    const int stages = g.taps * g.slabs;
#pragma unroll 4
    for (int part = 0; part * ROWS < g.slots; ++part) copy_run(part, 0, runs);
#pragma unroll
    for (int t = 0; t < STAGES - 1; ++t) {
        if (t < stages) copy_filters(ring + t * BytesB, Share{0, 1});
        copy_async_commit();
    }
    copy_async_wait<STAGES - 2>();
    __syncthreads();

    Tile::Sums sums = {};
    int slab = 0, tap = 0, s = 0;
    u32 taps = a_at, line = a_at, run = 0;  // where the tap's positions start, and those of the line's first; which run
    u32 reads = ring, writes = ring + Last;
    load(f[0], taps, reads, 0, Share{0, 1});
#pragma unroll 1
    for (int t = 0; t < stages; ++t) {
        if (slab + 1 < g.slabs)
#pragma unroll 1
            for (int i = 0; i < g.loads; ++i) copy_run(tap * g.loads + i, slab + 1, runs + (other - run));
#pragma unroll
        for (int step = 0; step < Tile::Steps; ++step) {
            if (step == Tile::Steps - 1) {
                copy_async_wait<STAGES - 2>();
                __syncthreads();  // the next stage and run are there, and this one may be written: its last fragments are in registers
                reads = reads == ring + Last ? ring : reads + BytesB;
                ++tap, taps += g.next_s * Pitch;
                if (++s == g.s) s = 0, taps = line += g.next_r * Pitch;
                if (tap == g.taps) tap = 0, ++slab, run = other - run, taps = line = a_at + run;
            }
#pragma unroll
            for (int i = 0; i < Tile::TilesM; ++i) {
                load(f[(step + 1) % 2], taps, reads, (step + 1) % Tile::Steps, Share{i, Tile::TilesM});
                if (step < Tile::Steps - 1) copy_filters(writes, Share{step * Tile::TilesM + i, (Tile::Steps - 1) * Tile::TilesM});
                if (step == Tile::Steps - 2 && i == Tile::TilesM - 1) copy_async_commit();
                Tile::multiply(sums, f[step % 2], i);
            }
        }
        writes = writes == ring + Last ? ring : writes + BytesB;
    }
    copy_async_wait<0>();
    __syncthreads();

    const int k0 = group * g.group_out + n0;
    auto place = [&](int row) {  // where it lies in `out`; negative among the zeros
        int stripe, left, h;
        const int n = divide(divide(divide(m0 + row, g.by_width, left), g.by_height, h), g.by_stripes, stripe);
        const bool live = m0 + row < g.positions && left < g.stripe && h < g.out_h;
        left += stripe * g.stripe;
        return live && left < g.out_w ? ((n * g.out_h + h) * g.out_w + left) * g.out_c + k0 : -1;
    };
#if DGRAD
    derive_tile<BM, BN>(tile, sums, shared, saved, addend, g.act, columns, g.out_c, g.group_out, place);
#else
    add_bias(tile, sums, bias ? bias + k0 : nullptr, columns);
    activate_sums(sums, g.act, g.gate);
#endif
    // The memory becomes the tile that is written.
    put_tile<BN>(tile, sums, shared);
    __syncthreads();
    write_rows<BM, BN, Tile::Threads>(shared, out, columns, g.out_c, g.group_out, place);
}
