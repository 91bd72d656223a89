// bf16 convolution forward of few channels on Hopper (sm_90a) with bias, ReLU and 2x2 maximum pooling; x (N,H,W,C), w (K,R,S,C),
// y (N,P,Q,K) bf16, bias fp32.
//
//     y[n,p,q,k] = pool(act(bias[k] + sum_{r,s,c} x[n, p*stride+r*dilation-top, q*stride+s-left, c] * w[k,r,s,c]))
//
// GEMM by wgmma: M = 64 filters, N = PIXELS output columns, reduction (r; run of S * C elements, padded to 8 * RUNS). The filters'
//   fragments stay in registers. A row of the image lies in shared memory as the tensor cores read it: for each output column
//   its whole run, [eight of the run][column][element]; an output row's operand is R such rows, wherever they lie.
//
// Strips, items and the ring of rows are those of conv_stem_sm90.cuh. One or two warpgroups make rows; two take items in turns, so
//   that one's epilogue hides behind the other's products.
// grid (blocks that share the items; groups of 64 filters), 128 (PRODUCERS + 2) threads.
//
// POOL = 1: a thread holds the four pixels of its windows. Values are rounded before they are compared. Without `idx` values alone.
//
// Bytes: x read once for each group of filters (and the strips' common edges), y and the 2-bit indices written once.
// Preconditions: S * C <= 32, R <= ROWS, no dilation along the width; x begins at a multiple of 16 bytes; every
//   tensor has less than 2^31 elements.
//
// Macros: RUNS, ROWS, PIXELS, POOL.
// As many warpgroups that make rows as the others leave registers for.
#if PIXELS == 128
#define PRODUCERS 1
#define PRODUCER_REGISTERS 72
#define CONSUMER_REGISTERS 216
#elif RUNS * ROWS == 28
#define PRODUCERS 1
#define PRODUCER_REGISTERS 88
#define CONSUMER_REGISTERS 208
#else
#define PRODUCERS 2
#define PRODUCER_REGISTERS 64
#define CONSUMER_REGISTERS 192
#endif
// A block starts with so many a thread, for 128 of each warpgroup's; who asks for more than the others have left waits forever.
static_assert(PRODUCERS * PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= (PRODUCERS + 2) * (PRODUCERS == 2 ? 128 : 168), "registers of a block");
#include "conv_stem_sm90.cuh"
#include "sm90_wgmma.cuh"

#define FILTERS 64
#define FEWEST_ROWS (ROWS == 7 ? 4 : 1)
#define STEPS ((RUNS * ROWS + 1) / 2)
#define ROW16 (RUNS * PIXELS)     // in sixteen bytes
#define STAGING_BYTES (PIXELS * 128)

#ifndef HOST_EMULATION
// sums[64][PIXELS] += filters[64][16] * columns[16][PIXELS] by a warpgroup.
__device__ __forceinline__ void multiply(float (&d)[PIXELS / 2], const u32 (&a)[4], u64 b, u32 add) {
#if PIXELS == 112
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %61, 0; wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {" WGMMA_TEXT_112
                 "}, {%56, %57, %58, %59}, %60, p, 1, 1, 0; }"
                 : WGMMA_SUMS_112(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#elif PIXELS == 128
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_TEXT_128
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
                 : WGMMA_SUMS_128(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}
#endif

#ifndef HOST_EMULATION
// All bits of a half are set where those of the two differ, of which none has a sign. (`differ_bf16x2`.)
__device__ __forceinline__ u32 differ_positive(u32 a, u32 b) {
    u32 d;
    asm("set.neu.u32.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a ^ b), "r"(0u));
    return d;
}
#endif

// `BestPositive` by comparisons.
struct BestOfPositive {
    u32 value, index;

    __device__ __forceinline__ BestOfPositive(u32 v0, u32 v1, u32 v2, u32 v3) {
        value = max_bf16x2(max_bf16x2(v0, v1), max_bf16x2(v2, v3));
        const u32 not0 = differ_positive(v0, value), not1 = differ_positive(v1, value), not2 = differ_positive(v2, value);
        index = not0 & (((~not1 | not2) & 0x00010001u) | (not1 & 0x00020002u));
    }
};

// Pool a thread's windows: values and indices to the matrices at `matrix`. A pair of bf16 is of two windows, four columns of y apart, so
// that matrices take it as it is.
template <bool Positive> __device__ __forceinline__ void pool(const float (&sums)[2][PIXELS / 2], float bias0, float bias1, u32 matrix) {
#pragma unroll
    for (int j = 0; j < PIXELS / 8; j += 2) {
        u32 value[2], index[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            u32 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float *s = sums[i / 2] + 4 * j + 2 * e + i % 2, bias = e ? bias1 : bias0;
                v[i] = Positive ? relu_bf16x2(s[0] + bias, s[4] + bias) : round_bf16x2(s[0] + bias, s[4] + bias);
            }
            if constexpr (Positive) {
                const BestOfPositive best(v[0], v[1], v[2], v[3]);
                value[e] = best.value, index[e] = best.index;
            } else {
                const Best best(v[0], v[1], v[2], v[3], 0xff80ff80u);
                value[e] = best.value, index[e] = best.index;
            }
        }
        store_matrices(matrix + j * 512, value[0], value[1], index[0], index[1]);
    }
}

// Of eight channels of a pixel those that there are.
__device__ __forceinline__ void write_some(u16 *to, uint4 v, int count) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (e < count) to[e] = (u16)(words[e / 2] >> 16 * (e % 2));
}

extern "C" __global__ void __launch_bounds__(128 * (PRODUCERS + 2), 1)
    conv_stem_sm90(const u16 *__restrict__ x, const u16 *__restrict__ w, const float *__restrict__ bias, u16 *__restrict__ y,
                   u8 *__restrict__ idx, const __grid_constant__ TensorMap y_map,
                   const __grid_constant__ Problem g) {
    ALIGNED_SHARED(char, shared);
    __shared__ u64 barriers[ROW_BARRIERS];
    __shared__ Place places[PIXELS];
    const u32 staging = shared_address(shared), ring = staging + 2 * STAGING_BYTES, zeros = ring + (2 * g.pairs + g.twice) * ROW_BYTES;
    const Rows rows = rows_of(ring, zeros + PLANE, zeros, shared_address(barriers));
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = same_in_all(thread / 32), lane = thread % 32;
    if (threadIdx.x == 0) rows.init(g, 8);
    list_places<POOL>(g, places);
    if (threadIdx.x < PIXELS) store_shared_words(zeros + 16 * threadIdx.x, 0, 0, 0, 0);
    fence_async();
    await_predecessors();
    __syncthreads();
    if (group < PRODUCERS) {
        give_registers<PRODUCER_REGISTERS>();
        make_rows<false>(g, x, rows);
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const int rows_of_strip = g.by_rows.d, advance = 2 * g.stride_h;
    const Share share(g);
    const int begin = share.begin, end = share.end;
    const int consumer = group - PRODUCERS, first_k = blockIdx.y * FILTERS, k0 = first_k + 16 * warp + lane / 4;
    u32 filters[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int eight = 2 * step + i / 2, r = eight / RUNS, j = eight % RUNS * 8 + lane % 4 * 2, k = k0 + i % 2 * 8;
            const u16 *from = w + ((long long)k * g.r + r) * g.run + j;
            const bool is_there = k < g.k && r < g.r;
            u32 low = 0, high = 0;
            if (is_there && j < g.run) low = __ldg(from);
            if (is_there && j + 1 < g.run) high = __ldg(from + 1);
            filters[step][i] = low | high << 16;
        }
    const float bias0 = bias && k0 < g.k ? bias[k0] : 0.0f, bias1 = bias && k0 + 8 < g.k ? bias[k0 + 8] : 0.0f;
    const u32 own = staging + consumer * STAGING_BYTES;
    // Where the lane's row of the matrices that it stores is: of eight pixels; of pooled ones the even columns are the first four's.
    const int matrix_row = lane & 7, matrix_pixel = POOL ? (matrix_row & 1) * 4 + (matrix_row >> 1) : matrix_row + (lane >> 4) * 8;
    const u32 matrix = chunk_address(own, matrix_pixel, warp * 2 + (lane >> 3 & 1)) + (POOL ? (lane >> 4) * (STAGING_BYTES / 2) : 0);
    const int ring_rows = 2 * g.pairs;
    const u32 ring16 = ring / 16, ring_end16 = ring16 + ring_rows * ROW16, row16 = g.dilation_h * ROW16;

    int slot = 0;              // of the item's first row in the ring
    u32 parity = 0;            // of that
    int freed = 0;             // rows between the first that is not given back yet and the item's first
    int freed_stage = 0;       // of the first not given back
    int pair;
    divide(begin, g.by_rows, pair);
    float sums[2][PIXELS / 2];
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
        const int strip = quotient(item, g.by_rows);
        const bool is_last_of_strip = pair + 1 == rows_of_strip;
        const int to_next = is_last_of_strip ? g.span : advance;
        if ((item - begin & 1) == consumer) {
            if (thread == 0) store_wait<0>();  // what the others write to after the barrier
            if (item > begin) named_barrier(1 + consumer, 256);
            await_rows(g, rows.full, slot, parity);
            // The current row of the filters' for each of the item's two, in sixteen bytes as descriptors count.
            const u32 first_row = same_in_all(slot);
            u32 at[2] = {ring16 + first_row * ROW16, ring16 + (first_row + g.stride_h) * ROW16};
            at[1] -= at[1] >= ring_end16 ? ring_end16 - ring16 : 0;
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                // Two eights; where filters have fewer rows, zeros.
                const int r0 = 2 * step / RUNS, j0 = 2 * step % RUNS, r1 = (2 * step + 1) / RUNS, j1 = (2 * step + 1) % RUNS;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    u32 eight = at[e] + j0 * PIXELS, leading = (r1 - r0) * row16 + (j1 - j0) * PIXELS;
                    if (r1 >= ROWS || (r1 >= FEWEST_ROWS && r1 >= g.r)) leading = zeros / 16 - eight;
                    if (r0 >= FEWEST_ROWS && r0 >= g.r) eight = zeros / 16, leading = 0;
                    multiply(sums[e], filters[step], descriptor_of(descriptor_high(128, 0), leading << 16 | eight), step > 0);
                    at[e] += ((2 * step + 2) / RUNS - r0) * row16;
                    at[e] -= at[e] >= ring_end16 ? ring_end16 - ring16 : 0;
                }
            }
            wgmma_commit();
            if (item + 1 < end) named_barrier_arrive(2 - consumer, 256);
            wgmma_wait<0>();
            // Give back what this warpgroup's next item does not read.
            int give = freed + to_next;
            if (is_last_of_strip) {
                give += rows_of_strip == 1 ? g.span : advance;
            } else {
                give += pair + 2 == rows_of_strip ? g.span : advance;
            }
            freed -= give;
            __syncwarp();
            const int given_stage = freed_stage + lane;
            if (lane < give / 2) barrier_arrive(rows.empty + 8 * (given_stage - (given_stage >= g.pairs ? g.pairs : 0)));
            freed_stage += give / 2;
            freed_stage -= freed_stage >= g.pairs ? g.pairs : 0;

            // Epilogue.
            int across;
            const int n = divide(strip, g.by_across, across) * g.images, q = across * g.columns, p = 2 * pair;
            const int out_p = POOL ? g.p / 2 : g.p, out_q = POOL ? g.q / 2 : g.q, q0 = POOL ? q / 2 : q, p0 = POOL ? pair : p;
            const int chunk = thread & 7, channel = first_k + 8 * chunk;
            const u32 floor = g.act == ACT_RELU ? 0u : 0xff80ff80u;  // a pair of bf16: minus infinity where there is no ReLU
            const u32 pixel0 = ((u32)n * out_p + p0) * out_q + q0;
            if constexpr (POOL) {
                if (idx) {
                    if (g.act == ACT_RELU)
                        pool<true>(sums, bias0, bias1, matrix);
                    else
                        pool<false>(sums, bias0, bias1, matrix);
                } else {  // rounding keeps the order, so the maximum may come first
                    float shift[2] = {bias0, bias1};
                    if (max(bias0, bias1) == __int_as_float(0x7f800000)) {  // with it, the maximum of sums says not yet which are NaN
#pragma unroll
                        for (int i = 0; i < PIXELS / 2; ++i) sums[0][i] += shift[i / 2 % 2], sums[1][i] += shift[i / 2 % 2];
                        shift[0] = shift[1] = 0.0f;
                    }
#pragma unroll
                    for (int j = 0; j < PIXELS / 8; j += 2) {
                        u32 value[2];
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const float *a = sums[0] + 4 * j + 2 * e, *b = sums[1] + 4 * j + 2 * e;
                            const float first = max_number(a[0], a[1], b[0], b[1]), second = max_number(a[4], a[5], b[4], b[5]);
                            value[e] = max_bf16x2(round_bf16x2(first + shift[e], second + shift[e]), floor);
                        }
                        store_matrices(matrix + j * 512, value[0], value[1]);
                    }
                }
                const int count = channel < g.k ? PIXELS / 2 : 0;
                const u64 first = (u64)pixel0 * g.k + channel;
                if (g.k % 8 == 0) {
                    fence_async();
                    if (!idx && warp > 0) {
                        named_barrier_arrive(3 + consumer, 128);
                    } else {
                        named_barrier(3 + consumer, 128);
                        if (thread == 0) store_tile(y_map, own, first_k, q0, p0, n);
                    }
                    if (idx) {
#pragma unroll
                        for (int i = 0; i < (PIXELS / 2 + 15) / 16; ++i) {
                            const int pixel = thread / 8 + 16 * i;
                            if (pixel >= count) continue;
                            const Place place = places[pixel];
                            if (!is_there(place, q0, out_q, n, g.n)) continue;
                            const uint4 index = load_shared16(chunk_address(own, pixel, chunk) + STAGING_BYTES / 2);
                            *reinterpret_cast<u16 *>(idx + (first + place.to) / 4) = (u16)(pack_indices(index));
                        }
                    }
                } else {
                    named_barrier(3 + consumer, 128);
                    const int bytes = (g.k + 3) / 4;
#pragma unroll 1
                    for (int pixel = thread / 8; pixel < count; pixel += 16) {
                        const Place place = places[pixel];
                        if (!is_there(place, q0, out_q, n, g.n)) continue;
                        const u32 from = chunk_address(own, pixel, chunk);
                        write_some(y + first + place.to, load_shared16(from), g.k - channel);
                        if (!idx) continue;
                        const u32 codes = pack_indices(load_shared16(from + STAGING_BYTES / 2));
                        u8 *const to = idx + (u64)(pixel0 + (u32)(place.column >> 16) * out_p * out_q + (place.column & 0xffff)) * bytes + channel / 4;
                        to[0] = (u8)codes;
                        if (g.k - channel > 4) to[1] = (u8)(codes >> 8);
                    }
                }
            } else {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (p + e >= g.p) break;
                    if (e == 1) {
                        if (thread == 0) store_wait<0>();
                        named_barrier(3 + consumer, 128);
                    }
#pragma unroll
                    for (int j = 0; j < PIXELS / 8; j += 2) {
                        u32 v[4];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const float *s = sums[e] + 4 * (j + i);
                            v[2 * i] = max_bf16x2(round_bf16x2(s[0] + bias0, s[1] + bias0), floor);
                            v[2 * i + 1] = max_bf16x2(round_bf16x2(s[2] + bias1, s[3] + bias1), floor);
                        }
                        store_matrices(matrix + j * 1024, v[0], v[1], v[2], v[3]);
                    }
                    if (g.k % 8 == 0) {
                        fence_async();
                        if (warp > 0) {
                            named_barrier_arrive(5 + consumer, 128);
                        } else {
                            named_barrier(5 + consumer, 128);
                            if (thread == 0) store_tile(y_map, own, first_k, q, p + e, n);
                        }
                    } else {
                        named_barrier(5 + consumer, 128);
                        u16 *const to = y + ((u64)pixel0 + e * out_q) * g.k + channel;
#pragma unroll 1
                        for (int pixel = thread / 8; pixel < PIXELS; pixel += 16) {
                            const Place place = places[pixel];
                            if (!is_there(place, q0, out_q, n, g.n) || channel >= g.k) continue;
                            write_some(to + place.to, load_shared16(chunk_address(own, pixel, chunk)), g.k - channel);
                        }
                    }
                }
            }
        }
        slot += to_next, freed += to_next;
        while (slot >= ring_rows) slot -= ring_rows, parity ^= 1;
        pair = is_last_of_strip ? 0 : pair + 1;
    }
    if (thread == 0) store_wait<0>();  // the block's memory lives until then
}
