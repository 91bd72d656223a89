// Groups of matrix products in one launch: D_i = alpha * op(A_i) op(B_i) + beta * C_i, matrices row-major. A block computes
// one tile of one product's D, which it finds in the group's table; the table lies in the argument block. Of symmetric D only
// the tiles on the diagonal and above it are computed; the others are their mirror images.
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

// A block's product, and where its tile starts; `mirror`: the tile's mirror image is another one, which the block writes, too.
template <class Element> struct Task {
    Matrices<Element> own;
    int m, n, k, m0, n0;
    bool mirror;
};

// Tiles of a product are in the order of their columns: neighbours share rows of A. Tiles of symmetric D are square.
template <int TileM, int TileN, class Element>
__device__ __forceinline__ Task<Element> find_task(const Group<Element> &group, bool symmetric) {
    int slot = 0, first = 0;
#pragma unroll
    for (int s = 0; s < MAX_GROUP - 1; ++s)
        if ((int)blockIdx.x >= group.end[s]) slot = s + 1, first = group.end[s];
    Task<Element> task = {group.matrices[slot], group.m[slot], group.n[slot], group.k[slot], 0, 0, false};
    int tile = (int)blockIdx.x - first, row = 0, tiles_n = (task.n + TileN - 1) / TileN;
    if (symmetric) {
        for (; tile >= tiles_n - row; ++row) tile -= tiles_n - row;
        tile += row;
        task.mirror = tile != row;
    } else {
        row = tile / tiles_n, tile %= tiles_n;
    }
    task.m0 = row * TileM, task.n0 = tile * TileN;
    return task;
}
