// Groups of bf16 matrix products on the tensor cores of sm_80 and later: D_i = alpha * op(A_i) op(B_i) + beta * C_i, sums in
// fp32, rounded once.
//
// grid: tiles of all products; block and warps as in conv_mma.cuh. An operand is row-wise where the reduction is the inner
//   dimension of its matrix (A as it is, B transposed), else column-wise. A thread's elements of C are on their way while the
//   block multiplies.
// VEC = 8: rows of A and B are multiples of 8, and copied by 16 bytes; 1: elements are gathered through registers.
//
// Bytes: A and B are read once for each column (row) of tiles, mostly from L2; C is read once, D written once.
// Preconditions: pointers aligned to 16 bytes; every matrix has less than 2^31 elements.
//
// Macros: BM, BN, BK, WARPS_M, WARPS_N, STAGES, VEC, TRANSPOSE_A, TRANSPOSE_B.

#include "conv_mma.cuh"
#include "gemm.cuh"

// What a thread copies of one operand's part of a stage, Outer x Inner elements of the matrix.
template <int Outer, int Inner, int Threads> struct Copier {
    static constexpr int Chunks = Inner / 8, Step = Threads / Chunks, Loads = (Outer + Step - 1) / Step;
    const int chunk = threadIdx.x % Chunks, first = threadIdx.x / Chunks;
#if VEC == 1
    Chunk values[Loads];
#endif

    // From `source`, the stage's corner, in rows of `row_size`; `outer` x `inner` elements are left from there on.
    __device__ __forceinline__ void copy(u32 to, const u16 *source, int row_size, int outer, int inner) {
#pragma unroll
        for (int i = 0; i < Loads; ++i) {
            const int row = first + i * Step;
            if (Outer % Step != 0 && row >= Outer) continue;
            const u16 *from = source + (long long)row * row_size + chunk * 8;
#if VEC == 8
            copy_chunk(to + chunk_offset<Chunks, Step>(first, i, chunk), from, row < outer && chunk * 8 < inner);
#else
#pragma unroll
            for (int e = 0; e < 8; ++e) values[i].put(e, row < outer && chunk * 8 + e < inner ? from[e] : 0);
#endif
        }
    }

    __device__ __forceinline__ void settle(u32 to) const {
#if VEC == 1
#pragma unroll
        for (int i = 0; i < Loads; ++i)
            if (Outer % Step == 0 || first + i * Step < Outer) store_chunk(to + chunk_offset<Chunks, Step>(first, i, chunk), values[i].vector());
#endif
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, 1)
    gemm_mma(const __grid_constant__ Group<u16> group, float alpha, float beta, int symmetric) {
    typedef Product<BM, BN, BK, WARPS_M, WARPS_N, TRANSPOSE_A, !TRANSPOSE_B> Tile;
    DYNAMIC_SHARED(char, shared);
    const Tile tile;
    const Task<u16> task = find_task<BM, BN>(group, symmetric);
    await_predecessors();
    const int rows = task.m - task.m0, columns = task.n - task.n0, k = task.k;

    Copier<TRANSPOSE_A ? BK : BM, TRANSPOSE_A ? BM : BK, Tile::Threads> a;
    Copier<TRANSPOSE_B ? BN : BK, TRANSPOSE_B ? BK : BN, Tile::Threads> b;
    const u16 *corner_a = task.own.a + (TRANSPOSE_A ? task.m0 : (long long)task.m0 * k);
    const u16 *corner_b = task.own.b + (TRANSPOSE_B ? (long long)task.n0 * k : task.n0);
    auto copy = [&](int t, u32 stage) {
        const int k0 = t * BK, left = k - k0;
        if (TRANSPOSE_A)
            a.copy(stage, corner_a + (long long)k0 * task.m, task.m, left, rows);
        else
            a.copy(stage, corner_a + k0, k, rows, left);
        if (TRANSPOSE_B)
            b.copy(stage + Tile::BytesA, corner_b + k0, k, columns, left);
        else
            b.copy(stage + Tile::BytesA, corner_b + (long long)k0 * task.n, task.n, left, columns);
    };
    auto settle = [&](u32 stage) { a.settle(stage), b.settle(stage + Tile::BytesA); };

    // Two neighbours of a row at once, where rows are of whole pairs.
    const bool pairs = task.n % 2 == 0;
    u32 added[Tile::TilesM][Tile::TilesN][2];
#pragma unroll
    for (int i = 0; i < Tile::TilesM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::TilesN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = tile.row(i, 2 * half), column = tile.column(j);
                const u16 *from = task.own.c + ((long long)(task.m0 + row) * task.n + task.n0 + column);
                u32 two = 0;
                if (task.own.c && row < rows && column < columns) {
                    if (pairs)
                        two = *reinterpret_cast<const u32 *>(from);
                    else
                        two = from[0] | (column + 1 < columns ? (u32)from[1] << 16 : 0u);
                }
                added[i][j][half] = two;
            }

    Tile::Sums sums = {};
    reduce<STAGES>(tile, sums, shared_address(shared), (k + BK - 1) / BK, copy, settle, [](u32) {});

#pragma unroll
    for (int i = 0; i < Tile::TilesM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::TilesN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = tile.row(i, 2 * half), column = tile.column(j);
                if (row >= rows || column >= columns) continue;
                const u32 c = added[i][j][half];
                float low = alpha * Tile::sum(sums, i, j, 2 * half), high = alpha * Tile::sum(sums, i, j, 2 * half + 1);
                if (task.own.c) low += beta * low_of(c), high += beta * high_of(c);
                const u32 two = round_pair(low, high);
                u16 *to = task.own.d + ((long long)(task.m0 + row) * task.n + task.n0 + column);
                if (pairs) {
                    *reinterpret_cast<u32 *>(to) = two;
                } else {
                    to[0] = (u16)two;
                    if (column + 1 < columns) to[1] = (u16)(two >> 16);
                }
                if (task.mirror) {
                    u16 *image = task.own.d + ((long long)(task.n0 + column) * task.n + task.m0 + row);
                    image[0] = (u16)two;
                    if (column + 1 < columns) image[task.n] = (u16)(two >> 16);
                }
            }
}
