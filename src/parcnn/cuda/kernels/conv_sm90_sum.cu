// The sums of conv_sm90's splits, added in their order, and its epilogue; y bf16, for dgrad dx with its addend and saved tensor.
//
//     y = act(kept), kept = bias + addend + sum_split partial[split]      fprop
//     y = act'(saved) * (addend + sum_split partial[split])               dgrad; saved is the output of act, of gelu and silu the input
//
// partial [split][tile][64 channels' group][pixel][64 channels], as `store_partial` writes it. A thread takes eight channels of a
// pixel. Bytes: partial sums, addend and saved are read once, y and (where not null) kept are written once. y may be addend or saved.
// Preconditions: K is a multiple of 8; pointers aligned to 16 bytes; y has fewer than 2^31 elements.

#include "conv_common.cuh"

#define CLASSES 4  // twin of conv_sm90.cuh's

// Twin of the struct that conv_sm90.py builds.
struct Outputs {
    int n, p, q, k;                                         // y
    int splits, units, pixels;                              // of 64 channels: tiles, and the pixels of a tile that are stored
    int tile_n, tile_h, tile_w, images_inner;               // as in conv_sm90.cuh's Problem
    int spread_h, spread_w;
    int is_gradient, act;
    FastDiv by_pixels, by_groups;                           // groups of 64 channels of a tile
    FastDiv by_class, by_tiles_w, by_tiles_h;               // tiles of a class; of an image
    FastDiv by_inner, by_middle;                            // the tile's extents from the innermost on
    int first_h[CLASSES], first_w[CLASSES];
};

extern "C" __global__ void __launch_bounds__(256)
    conv_sm90_sum(const float *__restrict__ partial, const float *__restrict__ bias, const bf16 *addend, const bf16 *saved, bf16 *y, bf16 *kept,
                  Outputs g) {
    await_predecessors();
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, row = thread >> 3;  // pixels of all tiles
    int pixel, group, x, up, inner, middle, kind_tile;
    const int unit = divide((int)row, g.by_pixels, pixel);
    if (unit >= g.units) return;
    const int tile = divide(unit, g.by_groups, group), kind = divide(tile, g.by_class, kind_tile);
    const int image = divide(divide(kind_tile, g.by_tiles_w, x), g.by_tiles_h, up) * g.tile_n;
    const int outer = divide(divide(pixel, g.by_inner, inner), g.by_middle, middle);
    const int i = g.images_inner ? inner : outer, column = g.images_inner ? middle : inner, line = g.images_inner ? outer : middle;
    const int n = image + i, h = (up * g.tile_h + line) * g.spread_h + g.first_h[kind], w = (x * g.tile_w + column) * g.spread_w + g.first_w[kind];
    const int k = group * 64 + (int)(thread & 7) * 8;
    if (i >= g.tile_n || line >= g.tile_h || n >= g.n || h >= g.p || w >= g.q || k >= g.k) return;

    const u64 row_size = (u64)g.units * g.pixels * 64;
    const float *from = partial + (u64)row * 64 + (thread & 7) * 8;
    Floats<8> sum = fetch<8>(from);
#pragma unroll 4
    for (int split = 1; split < g.splits; ++split) {
        const Floats<8> v = fetch<8>(from + split * row_size);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum.v[e] += v.v[e];
    }
    const u64 at = ((u64)((u32)n * g.p + h) * g.q + w) * g.k + k;
    if (bias) {
        const Floats<8> b = fetch<8>(bias + k);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum.v[e] += b.v[e];
    }
    if (addend) {
        const Floats<8> a = load<8>(addend + at);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum.v[e] += a.v[e];
    }
    if (kept) store<8>(kept + at, sum);
    if (g.is_gradient && g.act) {
        const Floats<8> s = load<8>(saved + at);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum.v[e] = any_activation_dgrad(sum.v[e], s.v[e], g.act);
    } else if (g.act == ACT_RELU) {
        activate_each<ACT_RELU>(sum.v);
    } else {
        activate_each(sum.v, g.act);
    }
    store<8>(y + at, sum);
}
