// Gradients of the filters and bias of a depthwise 3x3 convolution of stride 1 on Hopper; x (N,H,W,C), dy (N,P,Q,C) bf16,
// dw (C,3,3) and db (C) f32.
//
//     dw[c,r,s] = sum_{n,p,q} x[n, p+r-top, q+s-left, c] * dy[n,p,q,c]        db[c] = sum_{n,p,q} dy[n,p,q,c]
//
// Grid and block: those of conv_depthwise_sm90.cu. A stage of the ring holds a row of x and one of dy. A thread keeps the sums of
// its channels' taps, and the three rows of dy that a row of x meets. At the end the block's threads are added in their order,
// into a row of `partial` (dw, then db), one for each block of a slice, which conv_wgrad_sum adds up; without `partial` there is
// one, and it writes dw and db. Bytes: x and dy once, the halo of x again. Preconditions: those of conv_depthwise_sm90.cu.
#include "conv_depthwise_sm90.cuh"

// What thread 0 fetches: the steps of strips one after the other, as stages become free. (In shared memory: it would cost all
// threads registers.)
struct alignas(16) Fetcher {
    int row, rows, end, stage;  // the next row of dy; behind the strip's last; and where the last step would be
    Share share;                // after the strip
    int image;
};

// A step's rows of x and dy; what lies outside of the image or the strip is zeros.
__device__ __forceinline__ void fetch_rows(Fetcher &f, const TensorMap &x, const TensorMap &dy, const Stages &stages, const u8 *ring,
                                           const Rows &g) {
    int4 next = load_word<int4>(&f);
    if (next.x >= next.z) {
        Strip strip;
        if (!next_strip(f.share, strip, g)) return;
        next.x = strip.first, next.y = strip.end, next.z = strip.first + steps_of(strip, g).end, f.image = strip.image;
    }
    const u32 full = stages.full + 8 * next.w, to = shared_address(ring) + next.w * g.stage_bytes;
    barrier_expect(full, g.x_bytes + g.dy_bytes);
    load_tile(to, x, full, f.share.channel, f.share.column - g.left, next.x - g.top, f.image);
    load_tile(to + g.dy_at, dy, full, f.share.channel, f.share.column, next.x, next.x < next.y ? f.image : g.n);
    store_word(&f, make_int4(next.x + 1, next.y, next.z, next.w + 1 == g.stages ? 0 : next.w + 1));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_wgrad(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap dy, float *__restrict__ dw,
                              float *__restrict__ db, float *__restrict__ partial, Rows g) {
    __shared__ u64 barriers[2 * MOST_STAGES];
    __shared__ Fetcher fetcher;
    RING_MEMORY(ring_memory);  // at the end: [tap of a row][piece][channel of the slice]
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const Stages stages(barriers, g.stages);
    Share share = share_of(blockIdx.x, g);
    const int run = quotient(blockIdx.x, g.by_slices), first_channel = share.channel;
    await_predecessors();

    if (thread == 0) {
        prefetch(x), prefetch(dy);
        fetcher = {0, 0, 0, 0, share, 0};
        for (int i = 0; i < g.stages; ++i) fetch_rows(fetcher, x, dy, stages, ring_memory, g);
    }

    const int pitch = blockDim.x * VEC, columns = blockDim.y * COLUMNS;
    const ELEMENT *stage_memory = reinterpret_cast<const ELEMENT *>(ring_memory);
    const int own_x = (threadIdx.z * (columns + FILTER - 1) + threadIdx.y * COLUMNS) * pitch + threadIdx.x * VEC;
    const int own_dy = g.dy_at / (int)sizeof(ELEMENT) + (threadIdx.z * columns + threadIdx.y * COLUMNS) * pitch + threadIdx.x * VEC;
    float sums[TAPS][VEC] = {}, bias_sums[VEC] = {};

    Ring ring;
    Strip strip;
    while (next_strip(share, strip, g)) {
        const Steps steps = steps_of(strip, g);
        float errors[FILTER][COLUMNS][VEC] = {};  // rows of dy, the newest last
        const ELEMENT *stage;
        auto advance = [&]() {
#pragma unroll
            for (int i = 0; i + 1 < FILTER; ++i)
#pragma unroll
                for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                    for (int e = 0; e < VEC; ++e) errors[i][q][e] = errors[i + 1][q][e];
            stage = stage_memory + ring.stage * (g.stage_bytes / (int)sizeof(ELEMENT));
            barrier_wait(stages.full + 8 * ring.stage, ring.parity);
            widen_pixels(fetch_shared<COLUMNS>(stage + own_dy, pitch), errors[FILTER - 1]);
            if (db) {
#pragma unroll
                for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                    for (int e = 0; e < VEC; ++e) bias_sums[e] += errors[FILTER - 1][q][e];
            }
        };
        auto release = [&]() {
            __syncwarp();
            if (thread % 32 == 0) barrier_arrive(stages.empty + 8 * ring.stage);
        };
        auto refill = [&]() {
            if (thread == 0) {
                barrier_wait(stages.empty + 8 * ring.stage, ring.parity);
                fetch_rows(fetcher, x, dy, stages, ring_memory, g);
            }
            ring.next(g.stages);
        };
        for (int step = 0; step < steps.first; ++step) advance(), release(), refill();
        for (int step = steps.first;; step += FILTER) {
#pragma unroll
            for (int j = 0; j < FILTER; ++j) {  // after so many rows each row of dy is in its own registers again: nothing moves
                if (step + j == steps.end) goto next;
                advance();
                const Pixels<SEEN> pixels = fetch_shared<SEEN>(stage + own_x, pitch);
                release();
#pragma unroll
                for (int at = 0; at < SEEN; ++at) {
                    const Floats<VEC> v = widen(pixels.at[at]);
#pragma unroll
                    for (int i = 0; i < FILTER; ++i)
#pragma unroll
                        for (int q = 0; q < COLUMNS; ++q) {
                            const int r = FILTER - 1 - i, s = at - q;
                            if (s < 0 || s >= FILTER) continue;
#pragma unroll
                            for (int e = 0; e < VEC; ++e) sums[r * FILTER + s][e] += v.v[e] * errors[i][q][e];
                        }
                }
                refill();
            }
        }
    next:;
    }

    write_gradients(sums, bias_sums, reinterpret_cast<float *>(ring_memory), g.c, first_channel, run, dw, db, partial);
}
