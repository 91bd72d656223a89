// Epilogues of conv_sm90.cu: from a warpgroup's sums to a tile of bf16 in shared memory, or to pooled values and indices.
//
// A thread holds sums[4 j + e] of the pixels 8 j + 2 (lane % 4) + e % 2 and the channel 16 warp + lane / 4 + 8 (e / 2). The
// staged tile has a row of 64 channels, 128 bytes, for a pixel; its 16-byte chunks are swizzled by the pixel as TMA's
// 128-byte mode does, so that matrix stores and 16-byte reads meet no bank twice.
#pragma once

#include "conv_common.cuh"
#include "conv_sm90.cuh"

// Turn the first Groups groups of sums, each of eight pixels, into others, which become the last ones.
template <int Groups, int Count, typename Use> __device__ __forceinline__ void turn_first(float (&sums)[Count], int first, Use use) {
    constexpr int Moved = 4 * Groups;
    float v[Moved];
#pragma unroll
    for (int j = 0; j < Groups; ++j) use(first + j, sums + 4 * j, v + 4 * j);
#pragma unroll
    for (int i = 0; i + Moved < Count; ++i) sums[i] = sums[i + Moved];
#pragma unroll
    for (int i = 0; i < Moved; ++i) sums[Count - Moved + i] = v[i];
}

// All of them: use(group, sums[4], results[4]). They pass through a few places, so that the code is there once or twice. (More
// groups at a time, or a rest where it can be avoided, make registers spill.)
template <int Count, typename Use> __device__ __forceinline__ void turn_through(float (&sums)[Count], Use use) {
    constexpr int Groups = Count / 4, Even = Groups % 4 == 0 ? 4 : Groups % 3 == 0 ? 3 : Groups % 2 == 0 ? 2 : POOL ? 1 : 3;
    constexpr int Chunk = Even < Groups ? Even : Groups, Rest = Groups % Chunk;
#pragma unroll 1
    for (int first = 0; first + Chunk <= Groups; first += Chunk) turn_first<Chunk>(sums, first, use);
    if constexpr (Rest > 0) turn_first<Rest>(sums, Groups - Rest, use);
}

// An activation other than ReLU of every sum with its bias; ACT_NONE: the sum with its bias.
template <int Count>
__device__ __forceinline__ void activate_sums(float (&sums)[Count], float bias0, float bias1, int act, const Gate &gate) {
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[i] += i % 4 < 2 ? bias0 : bias1;
    if (act == ACT_TANH) {
        turn_through(sums, [](int, const float *s, float *v) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = tanhf(s[i]);
        });
    } else if (act == ACT_SILU || act == ACT_SIGMOID) {
        const bool gates = act == ACT_SILU;
        turn_through(sums, [&](int, const float *s, float *v) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = gate_of<true>(gate, s[i]) * (gates ? s[i] : 1.0f);
        });
    } else if (act != ACT_NONE) {
        turn_through(sums, [&](int, const float *s, float *v) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = gate_of<false>(gate, s[i]) * s[i];
        });
    }
}

// What a thread needs of the epilogue's operands.
struct Outputs {
    float bias0, bias1;  // of the thread's two channels; not -0, so that no sum with them is
    u32 floor;

    // Pixel j, channels c and c + 8, or channel c, pixels j and j + 1: two sums with their biases, rounded. A pool's maximum
    // sees to the floor.
    template <bool Positive> __device__ __forceinline__ u32 channels(float first, float second) const {
        return Positive ? relu_bf16x2(first + bias0, second + bias1) : round_bf16x2(first + bias0, second + bias1);
    }
    // The mean of a window's pixels: sums of the channel that has the bias.
    __device__ __forceinline__ float mean(const float *s, float bias) const {
        return 0.25f * ((above(s[0] + bias) + above(s[1] + bias)) + (above(s[4] + bias) + above(s[5] + bias)));
    }
    __device__ __forceinline__ bool bias_is_infinite() const { return max(bias0, bias1) == __int_as_float(0x7f800000); }
    // Two pixels' maxima, rounded.
    __device__ __forceinline__ u32 maxima(float first, float second) const { return max_bf16x2(round_bf16x2(first, second), floor); }
    __device__ __forceinline__ float above(float v) const { return v <= low_bf16(floor) ? low_bf16(floor) : v; }
    template <bool Positive> __device__ __forceinline__ u32 pixels(float first, float second, float bias) const {
        if (Positive) return relu_bf16x2(first + bias, second + bias);
        const u32 two = round_bf16x2(first + bias, second + bias);
        return POOL == 1 ? two : max_bf16x2(two, floor);
    }
};

// Where the thread's first row (of the matrices it addresses) of the staged tile is: pairs of its matrices lie MATRIX_PAIR_BYTES
// apart. A warp has 16 channels of eight pixels; of PAIRED tiles eight, and then its next matrix is of the next eight pixels.
constexpr u32 MATRIX_PAIR_BYTES = PAIRED ? 2048 : 1024;

__device__ __forceinline__ u32 matrix_address(u32 staging, int warp, int lane) {
    if (PAIRED) return chunk_address(staging, lane, warp);
    return chunk_address(staging, (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1));
}

// Each of the thread's sums with the staged tile's value there: use(sum, value).
template <int Pixels, typename Use> __device__ __forceinline__ void with_staged(float (&sums)[Pixels / 2], u32 staging, int warp, int lane, Use use) {
    const u32 at = matrix_address(staging, warp, lane);
#pragma unroll
    for (int j = 0; j < Pixels / 8; j += 2) {
        u32 v[4];
        const int matrices = j + 1 < Pixels / 8 ? 4 : 2;
        if (matrices == 4)
            load_matrices(at + j * MATRIX_PAIR_BYTES, v[0], v[1], v[2], v[3]);
        else
            load_matrices(at + j * MATRIX_PAIR_BYTES, v[0], v[1]);
#pragma unroll
        for (int i = 0; i < matrices; ++i) {
            float *s = sums + j * 4 + 2 * i;
            s[0] = use(s[0], low_bf16(v[i]));
            s[1] = use(s[1], high_bf16(v[i]));
        }
    }
}

template <int Pixels> __device__ __forceinline__ void add_staged(float (&sums)[Pixels / 2], u32 staging, int warp, int lane) {
    with_staged<Pixels>(sums, staging, warp, lane, [](float sum, float addend) { return sum + addend; });
}

template <int Pixels, bool IsPlain>
__device__ __forceinline__ void multiply_by_slope(float (&sums)[Pixels / 2], const Gate &gate, u32 staging, int warp, int lane) {
    const u32 at = matrix_address(staging, warp, lane);
    turn_through(sums, [&](int group, const float *s, float *v) {
        u32 two[2];
        load_matrices(at + group * MATRIX_PAIR_BYTES, two[0], two[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = s[i] * gated_slope<IsPlain>(gate, i % 2 ? high_bf16(two[i / 2]) : low_bf16(two[i / 2]));
    });
}

// By the derivative of an activation, of which the tile holds the output, or of gelu and silu the input.
template <int Pixels>
__device__ __forceinline__ void multiply_by_derivative(float (&sums)[Pixels / 2], int act, const Gate &gate, u32 staging, int warp, int lane) {
    if (act == ACT_RELU) {
        with_staged<Pixels>(sums, staging, warp, lane, activation_dgrad<ACT_RELU>);
    } else if (act == ACT_TANH) {
        with_staged<Pixels>(sums, staging, warp, lane, activation_dgrad<ACT_TANH>);
    } else if (act == ACT_SIGMOID) {
        with_staged<Pixels>(sums, staging, warp, lane, activation_dgrad<ACT_SIGMOID>);
    } else if (act == ACT_SILU) {
        multiply_by_slope<Pixels, true>(sums, gate, staging, warp, lane);
    } else {
        multiply_by_slope<Pixels, false>(sums, gate, staging, warp, lane);
    }
}

// A PAIRED tile's outputs, in the place of its sums: what the group of pixels below has of each and what its own has.
__device__ __forceinline__ void add_pairs(float (&sums)[PIXELS / 2]) {
#pragma unroll
    for (int group = 0; group + 1 < PIXELS / 8; ++group)
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[2 * group + e] = sums[4 * group + 4 + e] + sums[4 * group + 2 + e];
}

// Write the tile's rows, after ReLU if Positive; `words` are what the thread has of them, of each eight pixels two words.
template <int Pixels, bool Positive = false>
__device__ __forceinline__ void stage_tile(u32 (&words)[Pixels / 4], const float (&sums)[Pixels / 2], const Outputs &out, u32 staging, int warp, int lane) {
    const u32 at = matrix_address(staging, warp, lane);
#pragma unroll
    for (int j = 0; j < Pixels / 8; j += 2) {
        u32 *v = words + 2 * j;
#pragma unroll
        for (int i = 0; i < 2 && j + i < Pixels / 8; ++i) {
            const float *s = sums + (j + i) * 4;
            v[2 * i] = out.pixels<Positive>(s[0], s[1], out.bias0);
            v[2 * i + 1] = out.pixels<Positive>(s[2], s[3], out.bias1);
        }
        if (j + 1 < Pixels / 8)
            store_matrices(at + j * MATRIX_PAIR_BYTES, v[0], v[1], v[2], v[3]);
        else
            store_matrices(at + j * MATRIX_PAIR_BYTES, v[0], v[1]);
    }
}

// Write the sums as they are, a row of 64 channels for a pixel. Eight lanes fill 32 bytes.
template <int Pixels> __device__ __forceinline__ void store_partial(const float (&sums)[Pixels / 2], float *to, int warp, int lane) {
    to += (lane & 3) * 128 + warp * 16 + (lane >> 2);
#pragma unroll
    for (int j = 0; j < Pixels / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) to[j * 512 + (e & 1) * 64 + (e >> 1) * 8] = sums[4 * j + e];
}

// What is written of the windows of a 2x2 pool: their means, maxima, or maxima and which element won, that also behind ReLU.
enum Pooling { MEANS, MAXIMA, WINNERS, POSITIVE_WINNERS };

// Pixels of a tile in rows of 64 channels, four at a time, of which a lane has one, the lane % 4-th: value(i, e) is that of the
// i-th four, of the thread's first (e = 0) or second channel; two of them are rounded by round(value, value).
template <int Fours, typename Value, typename Round>
__device__ __forceinline__ void stage_fours(u32 staging, int warp, int lane, Value value, Round round) {
    const int row = lane & 7, pixel = (row & 1) * 4 + (row >> 1);  // two fours are an 8x8 matrix
    const u32 at = chunk_address(staging, pixel, warp * 2 + (lane >> 3 & 1)) + (lane >> 4) * 1024;
    const auto two = [&](int i, int e) { return round(value(i, e), i + 1 < Fours ? value(i + 1, e) : 0.0f); };
#pragma unroll
    for (int i = 0; i < Fours; i += 4) {
        if (i + 2 < Fours)
            store_matrices(at + i * 512, two(i, 0), two(i, 1), two(i + 2, 0), two(i + 2, 1));
        else
            store_matrices(at + i * 512, two(i, 0), two(i, 1));
    }
}

template <bool Positive> __device__ __forceinline__ void best_of(u32 v0, u32 v1, u32 v2, u32 v3, u32 floor, u32 &value, u32 &index) {
    if constexpr (Positive) {
        const BestPositive best(v0, v1, v2, v3);
        value = best.value, index = best.index;
    } else {
        const Best best(v0, v1, v2, v3, floor);
        value = best.value, index = best.index;
    }
}

// Tiles eight pixels wide: a 2x2 window lies within a thread. Rows of pooled pixels: values, then (16 bits each) which of the
// four won, STAGED_VALUE_BYTES behind them.
template <int Pixels> constexpr u32 STAGED_VALUE_BYTES = (Pixels / 16 + 1) / 2 * 1024;

template <int Pixels, bool Positive>
__device__ __forceinline__ void stage_winners(const float (&sums)[Pixels / 2], const Outputs &out, u32 staging, int warp, int lane) {
    constexpr int Pairs = Pixels / 16;  // of rows; two pairs make one 8x8 matrix
    int row = lane & 7, pixel = (row & 1) * 4 + (row >> 1);
    u32 at = chunk_address(staging, pixel, warp * 2 + (lane >> 3 & 1)) + (lane >> 4) * STAGED_VALUE_BYTES<Pixels>;
#pragma unroll
    for (int i = 0; i < Pairs; i += 2) {
        u32 value[2] = {}, index[2] = {};
#pragma unroll
        for (int e = 0; e < 2 && i + e < Pairs; ++e) {
            const float *s = sums + (i + e) * 8;
            const u32 v0 = out.channels<Positive>(s[0], s[2]), v1 = out.channels<Positive>(s[1], s[3]);
            const u32 v2 = out.channels<Positive>(s[4], s[6]), v3 = out.channels<Positive>(s[5], s[7]);
            best_of<Positive>(v0, v1, v2, v3, out.floor, value[e], index[e]);
        }
        store_matrices(at + i * 512, __byte_perm(value[0], value[1], 0x5410), __byte_perm(value[0], value[1], 0x7632),
                       __byte_perm(index[0], index[1], 0x5410), __byte_perm(index[0], index[1], 0x7632));
    }
}

#if POOL == 4
// Tiles WIDTH wide of IMAGES images, which are the innermost of their pixels: a group of eight pixels is eight images, or two
// columns of four. The rows of a window are then the same elements of groups ROW apart; its columns of groups COLUMN apart, or
// of lanes two apart. Pooled pixels are in the order of images, columns, rows, too.
constexpr int ROW = WIDTH * IMAGES / 8, COLUMN = IMAGES / 8;
static_assert(WIDTH % 2 == 0 && (COLUMN ? IMAGES % 8 == 0 : IMAGES == 4) && PIXELS % (16 * ROW) == 0, "threads have whole windows");

// The upper left group of the i-th eight windows, or (four images) both columns' of the i-th four.
__device__ constexpr int upper_left(int i) {
#if IMAGES == 4
    return i / ROW * 2 * ROW + i % ROW;
#else
    return i / (COLUMN * WIDTH / 2) * 2 * ROW + i / COLUMN % (WIDTH / 2) * 2 * COLUMN + i % COLUMN;
#endif
}

// A thread has a column of two fours of windows, `first` and `second`, and of one of the fours comes to have both.
__device__ __forceinline__ void exchange_columns(u32 first, u32 second, bool is_right, u32 &left, u32 &right) {
    const u32 own = is_right ? second : first, other = __shfl_xor_sync(0xffffffffu, is_right ? first : second, 2);
    left = is_right ? other : own, right = is_right ? own : other;
}

// Write rows of pooled pixels: values, then (16 bits each) which of the four won, STAGED_VALUE_BYTES behind them.
template <int Pixels, Pooling Kind>
__device__ __forceinline__ void stage_image_windows(const float (&sums)[Pixels / 2], const Outputs &out, u32 staging, int warp, int lane) {
    constexpr bool Positive = Kind == POSITIVE_WINNERS, NamesWinners = Positive || Kind == WINNERS;
    const u32 at = chunk_address(staging, lane & 7, warp * 2 + (lane >> 3 & 1)) + (lane >> 4) * STAGED_VALUE_BYTES<Pixels>;
    const auto outputs = [&](int group, int e) {
        const float *s = sums + 4 * group + 2 * e, bias = e ? out.bias1 : out.bias0;
        return Positive ? relu_bf16x2(s[0] + bias, s[1] + bias) : round_bf16x2(s[0] + bias, s[1] + bias);
    };
    // Of two pixels of a group: what of their windows the thread has.
    const auto maxima = [&](int group, int e) {
        const float *s = sums + 4 * group + 2 * e, *below = s + 4 * ROW;
        const float bias = e ? out.bias1 : out.bias0;
#if IMAGES == 4
        return out.maxima(max_number(s[0], below[0]) + bias, max_number(s[1], below[1]) + bias);
#else
        const float *right = s + 4 * COLUMN, *last = below + 4 * COLUMN;
        return out.maxima(max_number(s[0], right[0], below[0], last[0]) + bias, max_number(s[1], right[1], below[1], last[1]) + bias);
#endif
    };
#pragma unroll
    for (int i = 0; i < (Pixels / 16 + 1) / 2; ++i) {
        u32 value[2], index[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            u32 v[4];
#if IMAGES == 4
            const int first = upper_left(2 * i), second = upper_left(min(2 * i + 1, Pixels / 16 - 1));  // the last one may be alone
            if (NamesWinners) {
                exchange_columns(outputs(first, e), outputs(second, e), lane & 2, v[0], v[1]);
                exchange_columns(outputs(first + ROW, e), outputs(second + ROW, e), lane & 2, v[2], v[3]);
            } else {
                exchange_columns(maxima(first, e), maxima(second, e), lane & 2, v[0], v[1]);
                value[e] = max_bf16x2(v[0], v[1]);
            }
#else
            if (NamesWinners) {
#pragma unroll
                for (int position = 0; position < 4; ++position) v[position] = outputs(upper_left(i) + (position & 1) * COLUMN + (position >> 1) * ROW, e);
            } else {
                value[e] = maxima(upper_left(i), e);
            }
#endif
            if (NamesWinners) best_of<Positive>(v[0], v[1], v[2], v[3], out.floor, value[e], index[e]);
        }
        if (NamesWinners)
            store_matrices(at + i * 1024, value[0], value[1], index[0], index[1]);
        else
            store_matrices(at + i * 1024, value[0], value[1]);
    }
}
#endif

// A tile's outputs, or as much of its windows as a thread has: all of them (InRegisters), else of maxima their rows. A maximum of
// sums, with the bias and rounded after it, is the maximum of what is rounded (infinite biases were added before).
template <int Pixels, bool InRegisters, Pooling Kind>
__device__ __forceinline__ void stage_windows(const float (&sums)[Pixels / 2], const Outputs &out, u32 staging, int warp, int lane) {
#if POOL == 4
    stage_image_windows<Pixels, Kind>(sums, out, staging, warp, lane);
#else
    constexpr bool Positive = Kind == POSITIVE_WINNERS;
    const auto round = [&](float first, float second) { return Kind == MAXIMA && InRegisters ? out.maxima(first, second) : round_bf16x2(first, second); };
    if constexpr ((Positive || Kind == WINNERS) && InRegisters) {
        stage_winners<Pixels, Positive>(sums, out, staging, warp, lane);
    } else if constexpr (Positive || Kind == WINNERS) {
        u32 words[Pixels / 4];
        stage_tile<Pixels, Positive>(words, sums, out, staging, warp, lane);
    } else if constexpr (Kind == MEANS) {
        const auto mean = [&](int i, int e) { return out.mean(sums + 8 * i + 2 * e, e ? out.bias1 : out.bias0); };
        stage_fours<Pixels / 16>(staging, warp, lane, mean, round);
    } else if constexpr (InRegisters) {
        const auto maximum = [&](int i, int e) {
            const float *s = sums + 8 * i + 2 * e;
            return max_number(s[0], s[1], s[4], s[5]) + (e ? out.bias1 : out.bias0);
        };
        stage_fours<Pixels / 16>(staging, warp, lane, maximum, round);
    } else {
        const auto maximum = [&](int j, int e) {
            const float *s = sums + 4 * j + 2 * e;
            return max_number(s[0], s[1]) + (e ? out.bias1 : out.bias0);
        };
        stage_fours<Pixels / 8>(staging, warp, lane, maximum, round);
    }
#endif
}

// A tile's, in whole rounds of a warpgroup; entries of `Pooled`.
template <int Pixels> constexpr int POOLED_PIXELS = (Pixels / 4 + 15) / 16 * 16;

// A pooled pixel of a tile: where it is in y, from the tile's first on, in elements; its column, row and image there, and the
// first of its window's pixels in the staged tile, a byte each.
struct Pooled {
    u32 to, place;
};

// The table of a tile's pooled pixels; of those that there are not, the first's.
template <int Pixels> __device__ __forceinline__ void list_pooled(const Problem &g, Pooled *table) {
    const int pooled_w = g.tile_w / 2, pooled_h = g.tile_h / 2, pixel = threadIdx.x;
    if (pixel >= POOLED_PIXELS<Pixels>) return;
    int x = 0, row = 0, image = 0;
#if POOL == 4
    if (pixel < pooled_w * pooled_h * g.tile_n) image = pixel % IMAGES, x = pixel / IMAGES % (WIDTH / 2), row = pixel / (IMAGES * WIDTH / 2);
#else
    if (pixel < pooled_w * pooled_h * g.tile_n) image = divide(divide(pixel, g.by_pooled_w, x), g.by_pooled_h, row);
#endif
    table[pixel].to = (((u32)image * g.p + row) * g.q + x) * g.k;
    table[pixel].place = x | row << 8 | image << 16 | ((image * g.tile_h + 2 * row) * g.tile_w + 2 * x) << 24;
}

// A thread's pooled pixels of any tile: where each is in y, and where (the first row of) its window is staged, and the second.
template <int Pixels, bool InRegisters> struct PooledPixels {
    static constexpr int Items = POOLED_PIXELS<Pixels> / 16;
    u32 to[Items], from[Items], below[Items];
    bool is_there[Items];

    __device__ __forceinline__ PooledPixels(const Problem &g, const Pooled *table, int thread) {
        const int chunk = thread & 7, first = thread >> 3, count = (g.tile_w / 2) * (g.tile_h / 2) * g.tile_n;
#pragma unroll
        for (int i = 0; i < Items; ++i) {
            const Pooled at = table[first + 16 * i];
            const int row = InRegisters ? first + 16 * i : at.place >> 25;  // of what is staged: a row of a window is a pixel there
            to[i] = at.to, from[i] = chunk_address(0, row, chunk), below[i] = chunk_address(0, row + g.tile_w / 2, chunk);
            is_there[i] = first + 16 * i < count;
        }
    }
};

// Stage a tile's outputs, pool what is not yet pooled of them, and write values and indices. y (N,P,Q,K), idx (N,P,Q,K/4).
template <int Pixels, bool InRegisters, Pooling Kind>
__device__ __forceinline__ void write_pooled(const Problem &g, const Tile &t, int k, const float (&sums)[Pixels / 2], const Outputs &out, u32 staging,
                                             const Pooled *table, const PooledPixels<Pixels, InRegisters> &pixels, int thread, int barrier,
                                             u16 *y, u8 *idx) {
    constexpr int Items = POOLED_PIXELS<Pixels> / 16;  // of a thread: eight channels of a pixel
    constexpr bool Positive = Kind == POSITIVE_WINNERS, NamesWinners = Positive || Kind == WINNERS;
    stage_windows<Pixels, InRegisters, Kind>(sums, out, staging, thread >> 5, thread & 31);
    const int chunk = thread & 7, first = thread >> 3, pooled_w = g.tile_w / 2, pooled_h = g.tile_h / 2, channel = k + chunk * 8;
    const int q = t.w / 2, p = t.h / 2;
    u16 *const to = y + ((((u32)t.n * g.p + p) * g.q + q) * g.k + channel);
    u8 *const idx_to = idx + ((((u32)t.n * g.p + p) * g.q + q) * g.k + channel) / 4;
    bool is_there[Items];
#pragma unroll
    for (int i = 0; i < Items; ++i) is_there[i] = pixels.is_there[i] && channel < g.k;
    if (q + pooled_w > g.q || p + pooled_h > g.p || t.n + g.tile_n > g.n) {
#pragma unroll
        for (int i = 0; i < Items; ++i) {
            const u32 place = table[first + 16 * i].place;
            const int x = place & 255, row = place >> 8 & 255, image = place >> 16 & 255;
            is_there[i] = is_there[i] && q + x < g.q && p + row < g.p && t.n + image < g.n;
        }
    }
    named_barrier(barrier, 128);
    uint4 value[Items], index[Items];
#pragma unroll
    for (int i = 0; i < Items; ++i) {
        if (InRegisters) {
            value[i] = load_shared16(staging + pixels.from[i]);
            if (NamesWinners) index[i] = load_shared16(staging + pixels.from[i] + STAGED_VALUE_BYTES<Pixels>);
        } else if (Kind == MAXIMA) {
            const uint4 v0 = load_shared16(staging + pixels.from[i]), v1 = load_shared16(staging + pixels.below[i]);
            value[i] = make_uint4(max_bf16x2(v0.x, v1.x), max_bf16x2(v0.y, v1.y), max_bf16x2(v0.z, v1.z), max_bf16x2(v0.w, v1.w));
        } else {
            const int corner = table[first + 16 * i].place >> 24;
            uint4 v[4];
#pragma unroll
            for (int position = 0; position < 4; ++position)
                v[position] = load_shared16(chunk_address(staging, corner + (position & 1) + (position >> 1) * g.tile_w, chunk));
            best_of<Positive>(v[0].x, v[1].x, v[2].x, v[3].x, out.floor, value[i].x, index[i].x);
            best_of<Positive>(v[0].y, v[1].y, v[2].y, v[3].y, out.floor, value[i].y, index[i].y);
            best_of<Positive>(v[0].z, v[1].z, v[2].z, v[3].z, out.floor, value[i].z, index[i].z);
            best_of<Positive>(v[0].w, v[1].w, v[2].w, v[3].w, out.floor, value[i].w, index[i].w);
        }
        if (Kind == MAXIMA) {
            uint4 &v = value[i];
            v = make_uint4(max_bf16x2(v.x, out.floor), max_bf16x2(v.y, out.floor), max_bf16x2(v.z, out.floor), max_bf16x2(v.w, out.floor));
        }
    }
#pragma unroll
    for (int i = 0; i < Items; ++i)
        if (is_there[i]) store_global16(to + pixels.to[i], value[i]);
    if constexpr (NamesWinners) {
#pragma unroll
        for (int i = 0; i < Items; ++i)
            if (is_there[i]) *reinterpret_cast<u16 *>(idx_to + pixels.to[i] / 4) = (u16)pack_indices(index[i]);
    }
}

#if POOL == 3
// Of a window so far, for two channels: the best, and which that is; at the begin, the `first` position inside of the image.
struct RunningBest {
    static constexpr bool IS_MEAN = false;
    u32 value, index;

    __device__ __forceinline__ RunningBest(u32 first) : value(0xff80ff80u), index(first * 0x10001u) {}
    __device__ __forceinline__ void consider(u32 v, u32 position) {
        u32 wins = beats_bf16x2(v, value);
        index = (index & ~wins) | (wins & position * 0x10001u);
        value = max_bf16x2(value, v);
    }
};

// The sum.
struct RunningSum {
    static constexpr bool IS_MEAN = true;
    float low, high;

    __device__ __forceinline__ RunningSum(u32) : low(0.0f), high(0.0f) {}
    __device__ __forceinline__ void consider(u32 v, u32) { low += low_bf16(v), high += high_bf16(v); }
    __device__ __forceinline__ u32 times(float share) const { return round_bf16x2(low * share, high * share); }
};

// Elements of a window that a mean's divisor counts along one axis: it begins at `start` and has `inside` of them in the image.
__device__ __forceinline__ int counted(const Problem &g, int start, int kernel, int image, int pad, int inside) {
    return g.include_pad ? min(kernel, image + pad - start) : inside;
}

// The maxima of a staged tile's windows, and which element won, or their means: fp32 sums of the rounded outputs in the window's
// order, times 1 / divisor, as pool_fprop.cu has them. y (N,P,Q,K), idx (N,P,Q,K/4 or K/2 bytes).
template <typename Running> __device__ __forceinline__ void write_windows(const Problem &g, const Tile &t, int k, u32 staging, int thread, u16 *y, u8 *idx) {
    const int chunk = thread & 7, across = g.by_pooled_w.d, down = g.by_pooled_h.d;
    const int q0 = (t.w + g.window_pad_w) / g.window_stride_w, p0 = (t.h + g.window_pad_h) / g.window_stride_h;
    const bool narrow = g.window_h * g.window_w <= 4;
    for (int pixel = thread >> 3; pixel < across * down * g.tile_n; pixel += 16) {
        int x, row;
        const int image = divide(divide(pixel, g.by_pooled_w, x), g.by_pooled_h, row);
        const int top = row * g.window_stride_h, left = x * g.window_stride_w, corner = (image * g.tile_h + top) * g.tile_w + left;
        // What lies inside of the convolution's outputs.
        const int r0 = max(0, -(t.h + top)), r1 = min(g.window_h, g.conv_p - t.h - top);
        const int s0 = max(0, -(t.w + left)), s1 = min(g.window_w, g.conv_q - t.w - left);
        const u32 first = r0 * g.window_w + s0;
        Running so_far[4] = {first, first, first, first};
#pragma unroll 1
        for (int r = r0; r < r1; ++r)
#pragma unroll 1
            for (int s = s0; s < s1; ++s) {
                const uint4 v = load_shared16(chunk_address(staging, corner + r * g.tile_w + s, chunk));
                const u32 position = r * g.window_w + s;
                so_far[0].consider(v.x, position), so_far[1].consider(v.y, position);
                so_far[2].consider(v.z, position), so_far[3].consider(v.w, position);
            }
        const int q = q0 + x, p = p0 + row, n = t.n + image;
        if (k + chunk * 8 >= g.k || q >= g.q || p >= g.p || n >= g.n) continue;
        const u64 at = ((u64)((u32)n * g.p + p) * g.q + q) * g.k + k + chunk * 8;
        if constexpr (Running::IS_MEAN) {
            const int rows = counted(g, t.h + top, g.window_h, g.conv_p, g.window_pad_h, r1 - r0);
            const int columns = counted(g, t.w + left, g.window_w, g.conv_q, g.window_pad_w, s1 - s0);
            const float share = 1.0f / (float)(g.divisor ? g.divisor : rows * columns);
            store_global16(y + at, make_uint4(so_far[0].times(share), so_far[1].times(share), so_far[2].times(share), so_far[3].times(share)));
        } else {
            store_global16(y + at, make_uint4(so_far[0].value, so_far[1].value, so_far[2].value, so_far[3].value));
            u32 packed = 0;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const u32 two = so_far[e].index;
                packed |= narrow ? ((two | two >> 14) & 0xf) << 4 * e : ((two | two >> 12) & 0xff) << 8 * e;
            }
            if (narrow)
                *reinterpret_cast<u16 *>(idx + at / 4) = (u16)packed;
            else
                *reinterpret_cast<u32 *>(idx + at / 2) = packed;
        }
    }
}
#endif
