// The problem that conv_sm90.cu works on, and how its output is cut into tiles.
#pragma once

#include "gate.cuh"
#include "sm90.cuh"

// Twin of the structs that conv_sm90.py builds. Sizes of the convolution that is computed: of dgrad, "image" is dy, "filter"
// is w with its taps in reverse order, C and K are exchanged.
//
// A class of outputs: all, or of dgrad with a stride every stride-th, from `first` on; they have the same taps. Each class is
// a convolution of its own, with stride 1.
#define CLASSES 4
struct Class {
    int r, s;          // taps
    int pad_h, pad_w;  // top, left
    int tap;           // the filter's that is their first
    int first_h, first_w;
};

struct Problem {
    int h, w, r, s, c, k;                                          // image, filter, channels reduced and put out
    int n, p, q;                                                   // images, outputs that are stored (after the pool)
    int stride_h, stride_w, dilation_h, dilation_w;
    int spread_h, spread_w;                                        // from an output of a class to the next
    int tap_row, tap_column;                                       // from a tap to the next in the filter
    int c_blocks, units;                                           // steps of CB reduction channels; of 64 channels, tiles of all groups
    int tile_n, tile_h, tile_w;                                    // pixels of a tile, before the pool
    int images_inner;                                              // whether a tile's images are innermost of its pixels, not its columns
    int items, slots;                                              // tiles (entries of `Order`); blocks that share a group of channels
    int k_groups;                                                  // groups of output channels that blocks are bound to; 1: none
    int k_rounds;                                                  // groups that follow each other on one X stage; 1: each loads its own
    int ordered;                                                   // ORDERED, TURNED, BY_PATCH (below), or 0: tiles are counted
    int load_rows, load_columns, loads;                            // taps that an X stage serves, at most; X stages of a tile, 0 where tiles differ
    int x_row_step, x_column_step;                                 // from a tap to the next inside an X stage, 16 bytes each
    u32 x_descriptor;                                              // upper half
    int x_box_bytes, x_stage_bytes, x_stages;                      // bytes that a load brings; of a stage; ring
    int w_stages, resident;                                        // ring, or every tap's weights at once
    int own_staging, staging_offset, barrier_offset;               // tiles that a consumer's own staging holds (0 to 2); bytes from the start
    int staging_bytes;                                             // of a tile, or what is staged of it where it is pooled
    int act;                                                       // other than ReLU; of dgrad, whose derivative follows
    int mean;                                                      // whether a pool is that, not a maximum
    int add, operand_bytes;                                        // whether there is an addend (SECOND 1: else `kept`); of an operand's tile
    u32 floor;                                                     // a pair of bf16: 0 for ReLU, -infinity for none
    FastDiv by_dilation_h, by_dilation_w;
    FastDiv by_class, by_k_inner, by_tiles_w, by_tiles_h;          // tiles of a class; channel groups of an item; tiles of an image
    FastDiv by_k_rounds, by_x_stages, by_w_stages;
    FastDiv by_pooled_w, by_pooled_h;                              // pooled pixels of a tile; of dgrad: classes, patches of a turn
    Class classes[CLASSES];
    Gate gate;                                                     // act's, where it is one
    // POOL = 3: the pool's window, and the convolution's outputs.
    int window_h, window_w, window_stride_h, window_stride_w, window_pad_h, window_pad_w, conv_p, conv_q;
#if POOL == 3
    int divisor, include_pad;                                      // of means; 0: elements are counted, the padding's too or not
#endif
};

// Output channels that share the M of a product with those of the row of taps above: twice 32 are 64. Then `load_rows` counts
// products, whose weights lie side by side, and a consumer's pixels are OUT_PIXELS.
constexpr bool PAIRED = CHANNELS == 32;
constexpr int OUT_PIXELS = PAIRED ? PIXELS / 2 : PIXELS;

// Whether tiles may leave out columns of taps that lie in the padding. (Beside moments it takes more registers than there are.)
constexpr bool SKIPS_COLUMNS = FILTER == 3 && COLUMNS == 1 && (FLIPPED || !MOMENTS);
constexpr bool ALIKE = FILTER && !SKIPS_COLUMNS;  // all tiles have all taps

// What is constant where FILTER or COLUMNS is.
__device__ __forceinline__ int taps_of(const Problem &g) { return PAIRED ? 2 * FILTER : g.r * g.s; }
__device__ __forceinline__ int k_rounds(const Problem &g) { return FILTER == 1 ? g.k_rounds : 1; }
__device__ __forceinline__ int load_rows(const Problem &g) { return PAIRED ? 2 : FILTER ? FILTER : COLUMNS ? 1 : g.load_rows; }
__device__ __forceinline__ int load_columns(const Problem &g) { return COLUMNS ? COLUMNS : g.load_columns; }
__device__ __forceinline__ int tap_row(const Problem &g) { return PAIRED ? 1 : FILTER ? (FLIPPED ? -FILTER : FILTER) : g.tap_row; }
__device__ __forceinline__ int tap_column(const Problem &g) { return PAIRED ? 2 : FILTER ? (FLIPPED ? -1 : 1) : g.tap_column; }
__device__ __forceinline__ int x_row_step(const Problem &g) { return FILTER == 3 ? g.x_row_step : COLUMNS ? 0 : g.x_row_step; }
__device__ __forceinline__ int x_column_step(const Problem &g) { return COLUMNS ? CB * 2 >> 4 : g.x_column_step; }
__device__ __forceinline__ bool are_alike(const Problem &g) { return ALIKE || g.loads; }

// Whether there may be classes of outputs; whether a stage may serve several taps of such, of which not all have as many: then it has
// the halo of the class with the most.
#define OF_OUTPUTS (FLIPPED && !FILTER)
#define SHARED_BY_CLASSES (FLIPPED && !FILTER && !COLUMNS)
// Whether classes are of x's pixels, which a tile goes through one after the other: with a stride, those that the same taps meet, a
// stride apart, each an image of its own. (Without one there is one class; those that there are not have no taps.)
#define OF_PIXELS (!FLIPPED && !FILTER && !COLUMNS)

// A value that the compiler may not read from constant memory again.
template <typename T> __device__ __forceinline__ T in_register(T v) {
    asm volatile("" : "+r"(v));
    return v;
}
__device__ __forceinline__ float in_register(float v) {
#ifndef HOST_EMULATION
    asm volatile("" : "+f"(v));
#endif
    return v;
}

// Tiles in the order in which blocks take them, [round][slot]: where taps are skipped, tiles differ in work, and the
// launcher deals them out, heaviest first (ORDERED). Where they are too many to list and it is the columns at the images' sides
// that have less work, blocks take other columns of each image (TURNED): else these might be some blocks' alone. Where there are
// classes, all of a patch's follow each other (BY_PATCH), not all of a class's patches: so they find dy in L2, and dx's pixels
// come there together, of which neighbours share what memory writes at once. Twins: ORDER_ENTRIES, ORDERED, TURNED and BY_PATCH
// in conv_sm90.py.
#define ORDERED 1
#define TURNED 2
#define BY_PATCH 3
#define ORDER_ENTRIES 1280
#define NO_ITEM 0xffff
struct Order {
    u16 items[ORDER_ENTRIES];
};

// A tile: its class, its first pixel (of the class) and channel; x's pixel that the first tap meets there; taps
// r0 <= r < r1, s0 <= s < s1 are those that reach the image, `tap` the filter's of r = s = 0.
struct Tile {
    int item, kind, n, h, w, k, top, left, r0, r1, s0, s1, tap, taps, loads;
};

#if OF_OUTPUTS
// The item that comes at-th by patches. Which class begins is another from turn to turn: else a slot might have only one's.
__device__ __forceinline__ int by_patch(const Problem &g, int at) {
    const FastDiv by_classes = g.by_pooled_w, by_turn = g.by_pooled_h;
    int k_inner, kind;
    const int patch = divide(divide(at, g.by_k_inner, k_inner), by_classes, kind);
    divide(kind + quotient(patch, by_turn), by_classes, kind);
    return kind * (int)g.by_class.d + patch * (int)g.by_k_inner.d + k_inner;
}
#endif

// The slot's item of a round; negative after the last one. An item takes k_rounds rounds, this is its k_round-th.
__device__ __forceinline__ int item_at(const Problem &g, const Order &order, int slot, int round, int &k_round) {
    k_round = 0;
    const int at = slot + (FILTER == 1 ? divide(round, g.by_k_rounds, k_round) : round) * g.slots;
    if (at >= g.items) return -1;
#if OF_OUTPUTS
    if (g.ordered == BY_PATCH) return by_patch(g, at);
#endif
    if (ALIKE || g.ordered != ORDERED) return at;
    int item = order.items[at];
    return item == NO_ITEM ? -1 : item;
}

// As many stages further in a ring as `other` is from its begin.
__device__ __forceinline__ void skip(Ring &ring, const Ring &other, int stages) {
    ring.stage += other.stage, ring.parity ^= other.parity;
    if (ring.stage >= stages) ring.stage -= stages, ring.parity ^= 1;
}

// `item_at`, walking from round to round.
struct Walk {
    int at, k_round;

    __device__ __forceinline__ void next(const Problem &g) {
        if (++k_round == k_rounds(g)) k_round = 0, at += g.slots;
    }
    __device__ __forceinline__ int item(const Problem &g, const Order &order) const {
        if (at >= g.items) return -1;
#if OF_OUTPUTS
        if (g.ordered == BY_PATCH) return by_patch(g, at);
#endif
        if (ALIKE || g.ordered != ORDERED) return at;
        const int item = order.items[at];
        return item == NO_ITEM ? -1 : item;
    }
};

// Copies of a tile's pixels, from the channel c, column w, row h and image n on.
__device__ __forceinline__ void load_pixels(const Problem &g, u32 to, const TensorMap &map, u32 barrier, int c, int w, int h, int n) {
    load_tile(to, map, barrier, c, g.images_inner ? n : w, g.images_inner ? w : h, g.images_inner ? h : n);
}

__device__ __forceinline__ void prefetch_pixels(const Problem &g, const TensorMap &map, int c, int w, int h, int n) {
    prefetch_tile(map, c, g.images_inner ? n : w, g.images_inner ? w : h, g.images_inner ? h : n);
}

__device__ __forceinline__ void store_pixels(const Problem &g, const TensorMap &map, u32 from, int c, int w, int h, int n) {
    store_tile(map, from, c, g.images_inner ? n : w, g.images_inner ? w : h, g.images_inner ? h : n);
}

// Taps whose first or last pixel's coordinate lies inside [0, extent); at least one, so that every tile loads something.
__device__ __forceinline__ void live_taps(int first, int last, int extent, FastDiv by_dilation, int taps, int &begin, int &end) {
    const int round_up = (int)by_dilation.d - 1;
    begin = quotient(max(0, -last) + round_up, by_dilation);
    end = min(taps, quotient(max(0, extent - first) + round_up, by_dilation));
    if (begin >= end) begin = 0, end = 1;
}

// Tile of an item, and of the group of channels that is its k_round-th.
__device__ __forceinline__ Tile tile_of(const Problem &g, int item, int k_group) {
    Tile t;
    int k_inner, x, y;
    t.item = item;
    t.kind = FLIPPED && !FILTER ? divide(item, g.by_class, item) : 0;
    const Class &outputs = g.classes[t.kind];
    int patch = divide(item, g.by_k_inner, k_inner);
    const int z = divide(divide(patch, g.by_tiles_w, x), g.by_tiles_h, y);
    t.n = z * g.tile_n;
    if (SKIPS_COLUMNS && g.ordered == TURNED) divide(x + z, g.by_tiles_w, x);
#if POOL == 3
    t.h = y * (int)g.by_pooled_h.d * g.window_stride_h - g.window_pad_h, t.w = x * (int)g.by_pooled_w.d * g.window_stride_w - g.window_pad_w;
#else
    t.h = y * g.tile_h, t.w = x * g.tile_w;
#endif
    t.k = (k_group + k_inner) * CHANNELS;
    t.top = t.h * g.stride_h - outputs.pad_h, t.left = t.w * g.stride_w - outputs.pad_w;
    t.tap = PAIRED ? 0 : outputs.tap;
    if (SKIPS_COLUMNS && !are_alike(g)) {
        t.r0 = 0, t.r1 = FILTER, t.s0 = max(0, 1 - t.left - g.tile_w), t.s1 = min(FILTER, g.w - t.left);
        if (t.s0 >= t.s1) t.s0 = 0, t.s1 = 1;
#if !SHARED_BY_CLASSES
    } else if (!are_alike(g)) {
        live_taps(t.top, t.top + (g.tile_h - 1) * g.stride_h, g.h, g.by_dilation_h, outputs.r, t.r0, t.r1);
        live_taps(t.left, t.left + (g.tile_w - 1) * g.stride_w, g.w, g.by_dilation_w, outputs.s, t.s0, t.s1);
#endif
    } else {
        t.r0 = t.s0 = 0, t.r1 = FILTER ? load_rows(g) : outputs.r, t.s1 = FILTER ? FILTER : outputs.s;
    }
    t.taps = (t.r1 - t.r0) * (t.s1 - t.s0) * g.c_blocks;
#if SHARED_BY_CLASSES
    t.loads = are_alike(g) ? g.loads : g.c_blocks * (load_columns(g) > 1 ? 1 : t.s1);
#else
    t.loads = are_alike(g) ? g.loads : t.taps / (FILTER ? FILTER : 1);
#endif
    return t;
}

#if OF_PIXELS
// Loads of a tile for each step of reduction channels, of a class of pixels: taps r0 <= r < r1, s0 <= s < s1, x's pixel that the first
// meets, the filter's tap of r = s = 0.
struct Loads {
    int r0, r1, s0, s1, left, top, tap;
};

__device__ __forceinline__ Loads loads_of(const Problem &g, const Tile &t, int kind) {
    const Class &pixels = g.classes[kind];
    return {0, pixels.r, 0, pixels.s, t.w - pixels.pad_w, t.h - pixels.pad_h, pixels.tap};
}
#define LOADS l
#define MAP x[kind]
#define FIRST_TAP (taps_before + l.tap)
#else
#define LOADS t
#define MAP x
#define FIRST_TAP taps_before
#endif

// Taps that loads of a tile, or of its class of pixels, serve: constants where all tiles have all. (Forward by 1x1 filters, 64 channels
// a tile, ptxas does better by loops: 64 to 256 channels of 56x56 take 138 us, 145 without.)
#define TAPS_ARE_CONSTANT (ALIKE && !(FILTER == 1 && CHANNELS == 64 && !POOL && !FLIPPED))
#define FIRST_ROW (TAPS_ARE_CONSTANT ? 0 : LOADS.r0)
#define FIRST_COLUMN (TAPS_ARE_CONSTANT ? 0 : LOADS.s0)
#define END_ROW (TAPS_ARE_CONSTANT ? load_rows(g) : LOADS.r1)
#define END_COLUMN (TAPS_ARE_CONSTANT ? FILTER : LOADS.s1)

// Taps of a load that begins with (r, s): of classes not all have as many. Consumers must show ptxas that all threads have the same
// number (FIND_TAPS), or it lets products wait for each other.
#if OF_PIXELS || SHARED_BY_CLASSES
#define ROWS_OF_TAPS min(load_rows(g), LOADS.r1 - r)
#define COLUMNS_OF_TAPS min(load_columns(g), LOADS.s1 - s)
#define FIND_TAPS const int rows = __shfl_sync(~0u, ROWS_OF_TAPS, 0), columns = __shfl_sync(~0u, COLUMNS_OF_TAPS, 0);
#define ROWS_OF_LOAD rows
#define COLUMNS_OF_LOAD columns
#else
#define ROWS_OF_TAPS load_rows(g)
#define COLUMNS_OF_TAPS load_columns(g)
#define FIND_TAPS
#define ROWS_OF_LOAD load_rows(g)
#define COLUMNS_OF_LOAD load_columns(g)
#endif
