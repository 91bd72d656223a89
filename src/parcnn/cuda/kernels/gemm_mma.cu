// Groups of bf16 matrix products on the tensor cores of sm_80 and later: D_i = alpha * op(A_i) op(B_i) + beta * C_i, sums in
// fp32, rounded once.
//
// grid: tiles of all products; block and warps as in conv_mma.cuh. An operand is row-wise where the reduction is the inner
//   dimension of its matrix (A as it is, B transposed), else column-wise.
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

// The first `count` of eight results; all of them as 16 bytes.
__device__ __forceinline__ void write_run(u16 *to, const Floats<8> &v, int count) {
    Chunk run;
#pragma unroll
    for (int i = 0; i < 4; ++i) run.pairs[i] = round_pair(v.v[2 * i], v.v[2 * i + 1]);
    if (count >= 8 && (size_t)to % 16 == 0) {
        *reinterpret_cast<uint4 *>(to) = run.vector();
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (e < count) to[e] = (u16)(run.pairs[e / 2] >> (16 * (e % 2)));
    }
}

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

    // A thread adds and writes runs of eight elements, after the tile went through shared memory; where rows are of whole runs,
    // those of C are on their way while the block multiplies.
    constexpr int CHUNKS = BN / 8, ITEMS = BM * CHUNKS / Tile::Threads, STRIDE = BN + 8;
    const bool whole = task.n % 8 == 0;
    auto row_of = [](int item) { return (item * Tile::Threads + (int)threadIdx.x) / CHUNKS; };
    const int column = (int)threadIdx.x % CHUNKS * 8, count = columns - column;
    const long long corner = (long long)task.m0 * task.n + task.n0 + column;
    uint4 added[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        added[item] = make_uint4(0, 0, 0, 0);
        if (task.own.c && whole && row_of(item) < rows && count > 0)
            added[item] = *reinterpret_cast<const uint4 *>(task.own.c + (corner + (long long)row_of(item) * task.n));
    }

    Tile::Sums sums = {};
    reduce<STAGES>(tile, sums, shared_address(shared), (k + BK - 1) / BK, copy, settle, [](u32) {});

    float *results = reinterpret_cast<float *>(shared);  // [BM][STRIDE], where the ring was
#pragma unroll
    for (int i = 0; i < Tile::TilesM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::TilesN; ++j)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                *reinterpret_cast<float2 *>(results + tile.row(i, e) * STRIDE + tile.column(j)) =
                    make_float2(alpha * Tile::sum(sums, i, j, e), alpha * Tile::sum(sums, i, j, e + 1));
    __syncthreads();
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int row = row_of(item);
        if (row >= rows || count <= 0) continue;
        float *own = results + row * STRIDE + column;
        Floats<8> v = fetch<8>(own);
        const long long at = corner + (long long)row * task.n;
        if (task.own.c) {
            Chunk c = chunk_of(added[item]);
            if (!whole) {
#pragma unroll
                for (int e = 0; e < 8; ++e) c.put(e, e < count ? task.own.c[at + e] : 0);
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) v.v[e] += beta * (e % 2 ? high_of(c.pairs[e / 2]) : low_of(c.pairs[e / 2]));
            if (task.mirror) store<8>(own, v);
        }
        write_run(task.own.d + at, v, whole ? 8 : count);
    }
    if (!task.mirror) return;
    __syncthreads();
    // Columns become rows, lanes side by side in shared memory.
    const long long image = (long long)task.n0 * task.n + task.m0;
    for (int item = threadIdx.x; item < BN * (BM / 8); item += Tile::Threads) {
        const int to_row = item % BN, to_column = item / BN * 8;
        if (to_row >= columns) continue;
        Floats<8> v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.v[e] = results[(to_column + e) * STRIDE + to_row];
        write_run(task.own.d + (image + (long long)to_row * task.n + to_column), v, whole ? 8 : rows - to_column);
    }
}
