// bf16 convolution forward of few channels with bias, ReLU and 2x2 maximum pooling; x (N,H,W,C), w (K,R,S,C), y (N,P,Q,K) bf16,
// bias fp32. For sm_80 and later.
//
//     y[n,p,q,k] = pool(act(bias[k] + sum_{r,s,c} x[n, p*stride+r*dilation-top, q*stride+s-left, c] * w[k,r,s,c]))
//
// GEMM without a matrix of patches: M = pixels, N = 8 * TILES filters, reduction (r; run of S * C elements, padded to 16 * RUN16
//   + 8 * RUN8). Fragments of A are words of the image's own rows in shared memory (conv_stem.cuh); where a pixel starts at an
//   odd element, of a second copy that is shifted by one. grid (blocks that share the tiles; groups of filters), 8 warps; a
//   warp takes units of the tile in turn. Fragments of B lie in shared memory in the order in which lanes read them.
// POOL = 1: a thread holds the four pixels of its windows. Values are rounded before they are compared.
//
// Bytes: x read once (and the tiles' common edges), w once a block, y and the 2-bit indices written once.
// Preconditions: S * C <= 32, no dilation along the width; every tensor has less than 2^31 elements.
//
// Macros: RUN16, RUN8, TILES, POOL.
#include "conv_stem.cuh"

#define WARPS 8
#define STEPS (RUN16 + RUN8)
#define FILTER_WORDS (TILES * 32 * (2 * RUN16 + RUN8))  // of fragments, for a row of the filters
#define STAGING_PITCH (TILES * 4 + 4)                   // words of a pixel

// Fragments of B: [r][step][tile][lane], one word or two a lane.
__device__ __forceinline__ void fill_filters(const Problem &g, const u16 *w, int first_k, u32 *filters) {
    for (int i = threadIdx.x; i < g.r * FILTER_WORDS; i += WARPS * 32) {
        int r = i / FILTER_WORDS, in = i % FILTER_WORDS, step = in / (TILES * 64), rest = in % (TILES * 64);
        bool wide = step < RUN16;
        int tile = wide ? rest / 64 : rest / 32, lane = wide ? rest % 64 / 2 : rest % 32;
        int k = first_k + tile * 8 + lane / 4, j = step * 16 + lane % 4 * 2 + (wide ? rest % 2 * 8 : 0);
        filters[i] = pair_of(w + ((long long)k * g.r + r) * g.run, j, k < g.k ? g.run : 0);
    }
}


// sums[16][8] += a[16][8] * b[8][8] by a warp.
__device__ __forceinline__ void multiply_add8(float *sums, u32 a0, u32 a1, u32 b0) {
#ifdef HOST_EMULATION
    multiply_add(sums, {a0, a1, 0u, 0u}, b0, 0u);
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(b0));
#endif
}

// Eight channels of `pixels` pixels from shared memory to y: pixel i to to(i), negative where there is none.
template <int Pixels, class To>
__device__ __forceinline__ void write_pixels(const u32 *staging, u16 *y, int k, int first_k, To to) {
    const int lane = threadIdx.x % 32;
#pragma unroll 2
    for (int item = lane; item < Pixels * TILES; item += 32) {
        int pixel = item / TILES, channel = first_k + item % TILES * 8, place = to(pixel);
        if (place < 0 || channel >= k) continue;
        const u32 *from = staging + pixel * STAGING_PITCH + item % TILES * 4;
        u16 *out = y + (long long)place * k + channel;
        if (k % 8 == 0) {
            *reinterpret_cast<uint4 *>(out) = *reinterpret_cast<const uint4 *>(from);
        } else {
            for (int e = 0; e < 8 && channel + e < k; ++e) out[e] = (u16)(from[e / 2] >> 16 * (e % 2));
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    conv_stem_fprop(const u16 *__restrict__ x, const u16 *__restrict__ w, const float *__restrict__ bias, u16 *__restrict__ y,
                    u8 *__restrict__ idx, Problem g) {
    await_predecessors();
    DYNAMIC_SHARED(u32, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4;
    const int first_k = blockIdx.y * TILES * 8;
    const int filter_words = g.r * FILTER_WORDS;
    u32 *filters = shared, *staging = filters + filter_words + warp * 16 * STAGING_PITCH;
    float *biases = reinterpret_cast<float *>(filters + filter_words + WARPS * 16 * STAGING_PITCH);
    u32 *patch = reinterpret_cast<u32 *>(biases + TILES * 8);
    fill_filters(g, w, first_k, filters);
    for (int i = threadIdx.x; i < TILES * 8; i += WARPS * 32) biases[i] = bias && first_k + i < g.k ? bias[first_k + i] : 0.0f;
    // Of the last step's elements those that the run has: beyond it lie other pixels, which may not be numbers.
    const int last = 16 * RUN16 - (RUN8 ? 0 : 16) + 2 * pair;
    u32 keep[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int j = last + 8 * half;
        keep[half] = (j < g.run ? 0x0000ffffu : 0u) | (j + 1 < g.run ? 0xffff0000u : 0u);
    }
    const int row_words = g.dilation_h * g.pitch;
    for (int tile = blockIdx.x; tile < g.tiles; tile += gridDim.x) {
        const Origin at = origin_of(g, tile);
        __syncthreads();  // nobody reads the last tile's patch any more
        fill(g, x, at, patch, 0);
        if (g.step % 2) fill(g, x, at, patch + g.patch_bytes / 4, 1);
        __syncthreads();
        if (tile + (int)gridDim.x < g.tiles) prefetch_patch(g, x, origin_of(g, tile + gridDim.x));
        const int units = g.units_w * g.units_h;
        for (int unit = warp; unit < units; unit += WARPS) {
            int unit_w, unit_h = divide(unit, g.by_units_w, unit_w);
            // Of rows of A (half 0: `row`, 1: row + 8) of two products (i): the four differ by what all threads share.
            const int p_first = 2 * unit_h, q_first = 16 * unit_w + (POOL ? 2 * row : row), element = q_first * g.step;
            const u32 *a = patch + (element & 1) * (g.patch_bytes / 4) + p_first * g.stride_h * g.pitch + element / 2 + pair;
            const int down = g.stride_h * g.pitch, along = POOL ? g.step / 2 + (g.step & 1) * (g.patch_bytes / 4) : 4 * g.step;
            const int to_i = POOL ? along : down, to_half = POOL ? down : along;
            float sums[2][TILES][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < TILES; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
            const u32 *b = filters + lane * 2;
#pragma unroll 1
            for (int r = 0; r < g.r; ++r) {
#pragma unroll
                for (int step = 0; step < RUN16; ++step) {
                    u32 f[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            f[i][e] = a[i * to_i + e % 2 * to_half + 8 * step + e / 2 * 4];
                            if (step == STEPS - 1) f[i][e] &= keep[e / 2];
                        }
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        uint2 v = *reinterpret_cast<const uint2 *>(b + (step * TILES + j) * 64);
#pragma unroll
                        for (int i = 0; i < 2; ++i) multiply_add(sums[i][j], f[i], v.x, v.y);
                    }
                }
                if (RUN8) {
                    u32 f[2][2];
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll
                        for (int e = 0; e < 2; ++e) f[i][e] = a[i * to_i + e * to_half + 8 * RUN16] & keep[0];
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        u32 v = b[RUN16 * TILES * 64 + j * 32 - lane];
#pragma unroll
                        for (int i = 0; i < 2; ++i) multiply_add8(sums[i][j], f[i][0], f[i][1], v);
                    }
                }
                b += FILTER_WORDS;
                a += row_words;
            }

            const int p0 = at.p + 2 * unit_h, q0 = at.q + 16 * unit_w;
            u32 values[2][TILES][2];
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                float2 add = *reinterpret_cast<const float2 *>(biases + j * 8 + pair * 2);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float low = sums[i][j][2 * half] + add.x, high = sums[i][j][2 * half + 1] + add.y;
                        if (g.act == ACT_RELU) low = activate<ACT_RELU>(low), high = activate<ACT_RELU>(high);
                        values[i][j][half] = round_pair(low, high);
                    }
            }
            if constexpr (POOL) {
                const int pooled_q = g.q / 2, pooled_p = g.p / 2, bytes = (g.k + 3) / 4;
                const int q_of_row = q0 / 2 + row, window = (at.n * pooled_p + p0 / 2) * pooled_q;
                const bool live = p0 < g.p && q_of_row < pooled_q;
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    float best_low = low_of(values[0][j][0]), best_high = high_of(values[0][j][0]);
                    u32 code_low = 0, code_high = 0;
#pragma unroll
                    for (int position = 1; position < 4; ++position) {
                        u32 v = values[position % 2][j][position / 2];
                        if (beats(low_of(v), best_low)) best_low = low_of(v), code_low = position;
                        if (beats(high_of(v), best_high)) best_high = high_of(v), code_high = position;
                    }
                    staging[row * STAGING_PITCH + j * 4 + pair] = round_pair(best_low, best_high);
                    u32 code = (code_low | code_high << 2) << 4 * (pair % 2);
                    code |= __shfl_xor_sync(0xffffffffu, code, 1);
                    int at_byte = (first_k + 8 * j) / 4 + pair / 2;
                    if (idx && live && pair % 2 == 0 && at_byte < bytes) idx[(long long)(window + q_of_row) * bytes + at_byte] = (u8)code;
                }
                __syncwarp();
                write_pixels<8>(staging, y, g.k, first_k, [&](int pixel) {
                    return p0 < g.p && q0 / 2 + pixel < pooled_q ? window + q0 / 2 + pixel : -1;
                });
                __syncwarp();
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int j = 0; j < TILES; ++j)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            staging[(8 * half + row) * STAGING_PITCH + j * 4 + pair] = values[i][j][half];
                    __syncwarp();
                    write_pixels<16>(staging, y, g.k, first_k, [&](int pixel) {
                        return p0 + i < g.p && q0 + pixel < g.q ? (at.n * g.p + p0 + i) * g.q + q0 + pixel : -1;
                    });
                    __syncwarp();
                }
            }
        }
    }
}
