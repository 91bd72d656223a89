// Groups of fp32 matrix products, true fp32 (no TF32): D_i = alpha * op(A_i) op(B_i) + beta * C_i.
//
// A block of 256 threads computes 64 x 64 elements of one D, a thread 4 x 4; the reduction goes in steps of 16 through shared
//   memory, the next step's operands on their way in registers meanwhile. grid: tiles of all products.
// VEC = 4: rows of A and B are multiples of 4, so that 16 bytes are loaded at once; 1: any.
//
// Bytes: A and B are read once for each column (row) of tiles, mostly from L2; C is read once, D written once.
// Preconditions: pointers aligned to 16 bytes; every matrix has less than 2^31 elements.
//
// Macros: TRANSPOSE_A, TRANSPOSE_B, VEC.

#include "gemm.cuh"

#define TILE 64
#define DEPTH 16
#define THREADS 256

typedef float Tile[DEPTH][TILE + 4];  // [reduction][row]

struct __align__(16) Tiles {
    Tile a[2], b[2];
};

// What a thread loads of one operand's tile; either of reduction and row may be the inner one in global memory.
template <bool ReductionInner> struct Operand {
    Floats<4> v;
    int row, depth;  // of the first of the thread's four elements

    __device__ __forceinline__ Operand() {
        if (ReductionInner)
            row = threadIdx.x / (DEPTH / 4), depth = threadIdx.x % (DEPTH / 4) * 4;
        else
            row = threadIdx.x % (TILE / 4) * 4, depth = threadIdx.x / (TILE / 4);
    }

    // rows, deep: what is left of the matrix from the tile's corner on, which is row row0, reduction k0.
    __device__ __forceinline__ void load(const float *matrix, int row0, int k0, int rows, int deep, int all_rows, int all_deep) {
        const bool live = row < rows && depth < deep;
        const float *p = ReductionInner ? matrix + (size_t)(row0 + row) * all_deep + k0 + depth : matrix + (size_t)(k0 + depth) * all_rows + row0 + row;
        const int count = live ? (ReductionInner ? deep - depth : rows - row) : 0;
        if (VEC == 4) {
            v = count >= 4 ? fetch<4>(p) : splat<4>(0.0f);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) v.v[e] = e < count ? p[e] : 0.0f;
        }
    }

    __device__ __forceinline__ void keep(Tile &tile) const {
        if (ReductionInner) {
#pragma unroll
            for (int e = 0; e < 4; ++e) tile[depth + e][row] = v.v[e];
        } else {
            store<4>(&tile[depth][row], v);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) gemm(const __grid_constant__ Group<float> group, float alpha, float beta, int symmetric) {
    __shared__ Tiles tiles;
    const Task<float> task = find_task<TILE, TILE>(group, symmetric);
    await_predecessors();
    const int rows = task.m - task.m0, columns = task.n - task.n0;
    const int tm = threadIdx.x / (TILE / 4) * 4, tn = threadIdx.x % (TILE / 4) * 4;
    Operand<!TRANSPOSE_A> a;
    Operand<TRANSPOSE_B> b;
    auto load = [&](int k0) {
        a.load(task.own.a, task.m0, k0, rows, task.k - k0, task.m, task.k);
        b.load(task.own.b, task.n0, k0, columns, task.k - k0, task.n, task.k);
    };
    float sums[4][4] = {};
    load(0);
    a.keep(tiles.a[0]), b.keep(tiles.b[0]);
    __syncthreads();
    int stage = 0;
#pragma unroll 1
    for (int k0 = 0; k0 < task.k; k0 += DEPTH) {
        load(k0 + DEPTH);
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            const Floats<4> own_a = fetch<4>(&tiles.a[stage][k][tm]), own_b = fetch<4>(&tiles.b[stage][k][tn]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] += own_a.v[i] * own_b.v[j];
        }
        stage ^= 1;
        a.keep(tiles.a[stage]), b.keep(tiles.b[stage]);
        __syncthreads();
    }
    const bool whole = task.n % 4 == 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (tm + i >= rows) continue;
        const size_t at = (size_t)(task.m0 + tm + i) * task.n + task.n0 + tn;
        const int count = min(4, columns - tn);
        Floats<4> v;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            v.v[e] = alpha * sums[i][e];
            if (task.own.c && e < count) v.v[e] += beta * task.own.c[at + e];
        }
        if (whole && count == 4) {
            store<4>(task.own.d + at, v);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (e < count) task.own.d[at + e] = v.v[e];
        }
        if (task.mirror) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (e < count) task.own.d[(size_t)(task.n0 + tn + e) * task.n + task.m0 + tm + i] = v.v[e];
        }
    }
}
