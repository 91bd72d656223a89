// Groups of matrix products in one launch: D_i = alpha * op(A_i) op(B_i) + beta * C_i, matrices row-major. A block computes
// one tile of one product's D, which it finds in the group's table; the table lies in the argument block.
#pragma once

#include "common.cuh"

#define MAX_GROUP 24

// Twin of gemm.py's `group`.
template <class Element> struct Matrices {
    const Element *a, *b, *c;  // c: null where nothing is added
    Element *d;
};

template <class Element> struct Group {
    Matrices<Element> matrices[MAX_GROUP];
    int m[MAX_GROUP], n[MAX_GROUP], k[MAX_GROUP];
    int end[MAX_GROUP];  // tiles of this product and of all before it; 2^31 - 1 where there is none
};

// A block's product, and where its tile starts.
template <class Element> struct Task {
    Matrices<Element> own;
    int m, n, k, m0, n0;
};

// Tiles of a product are in the order of their columns: neighbours share rows of A.
template <int TileM, int TileN, class Element> __device__ __forceinline__ Task<Element> find_task(const Group<Element> &group) {
    int slot = 0, first = 0;
#pragma unroll
    for (int s = 0; s < MAX_GROUP - 1; ++s)
        if ((int)blockIdx.x >= group.end[s]) slot = s + 1, first = group.end[s];
    Task<Element> task = {group.matrices[slot], group.m[slot], group.n[slot], group.k[slot], 0, 0};
    int tile = (int)blockIdx.x - first, tiles_n = (task.n + TileN - 1) / TileN;
    task.m0 = tile / tiles_n * TileM, task.n0 = tile % tiles_n * TileN;
    return task;
}
