// Depthwise 3x3 convolution of stride 1 and its input gradient on Hopper, bf16.
//
//     y[n,p,q,c]  = act(bias[c] + sum_{r,s} x[n, p+r-top, q+s-left, c] * w[c,r,s])
//     dx[n,h,w,c] = sum_{r,s} dy[n, h+top-r, w+left-s, c] * w[c,r,s]
//
// x (N,H,W,C), w (C,3,3), y (N,P,Q,C), bias (C) f32. One-dimensional grid: (parts of the rows) x (columns) x (slices of the
// channels, innermost); see conv_depthwise_sm90.cuh. Dynamic shared memory: the ring of rows.
//
// A row, read once, has its part in three rows of outputs, whose sums lie in registers.
// Bytes: x (dy) once and the halo of shares again, y (dx) once.
// Preconditions: C % 8 == 0; tensors aligned to 16 bytes; dilation 1; fewer than 2^31 elements.
#include "conv_depthwise_sm90.cuh"

// What thread 0 fetches: the rows of strips one after the other, as stages become free. (In shared memory: it would cost all
// threads registers.)
struct alignas(16) Fetcher {
    int row, end, image, stage;  // of the image: the next row, and the one behind the strip's last
    Share share;                 // after the strip
};

__device__ __forceinline__ void fetch_row(Fetcher &f, const TensorMap &x, const Stages &stages, const u8 *ring, const Rows &g) {
    int4 next = load_word<int4>(&f);
    if (next.x >= next.y) {
        Strip strip;
        if (!next_strip(f.share, strip, g)) return;
        next.x = max(strip.first - g.top, 0), next.y = min(strip.end - 1 - g.top + FILTER, g.h), next.z = strip.image;
    }
    const u32 full = stages.full + 8 * next.w;
    barrier_expect(full, g.x_bytes);
    load_tile(shared_address(ring) + next.w * g.stage_bytes, x, full, f.share.channel, f.share.column - g.left, next.x, next.z);
    store_word(&f, make_int4(next.x + 1, next.y, next.z, next.w + 1 == g.stages ? 0 : next.w + 1));
}

// The thread's part in the rows of a block.
template <bool Mirror>
__device__ __forceinline__ void correlate(const TensorMap &x, const ELEMENT *w, const float *bias, ELEMENT *y, const Rows &g) {
    __shared__ u64 barriers[2 * MOST_STAGES];
    __shared__ Fetcher fetcher;
    RING_MEMORY(ring_memory);
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const Stages stages(barriers, g.stages);
    Share share = share_of(blockIdx.x, g);
    await_predecessors();

    if (thread == 0) {
        prefetch(x);
        fetcher = {0, 0, 0, 0, share};
        for (int i = 0; i < g.stages; ++i) fetch_row(fetcher, x, stages, ring_memory, g);
    }

    const int channel = share.channel + threadIdx.x * VEC, column = share.column + threadIdx.y * COLUMNS;
    const int pitch = blockDim.x * VEC;
    const ELEMENT *own = reinterpret_cast<const ELEMENT *>(ring_memory) + (threadIdx.z * (blockDim.y * COLUMNS + FILTER - 1) + threadIdx.y * COLUMNS) * pitch + threadIdx.x * VEC;
    float tap[TAPS][VEC];
    filter_taps<Mirror>(w + min(channel, g.c - VEC) * TAPS, tap);
    const Floats<VEC> start = bias && channel < g.c ? load<VEC>(bias + channel) : splat<VEC>(0.0f);
    const u32 columns = channel < g.c ? columns_inside<COLUMNS>(column, g.q) : 0;
    const u32 pixel_bytes = varying(g.c * (int)sizeof(ELEMENT));

    Ring ring;
    Strip strip;
    while (next_strip(share, strip, g)) {
        const int image = strip.image + threadIdx.z;
        const u32 mask = image < g.n ? columns : 0;
        u8 *to = reinterpret_cast<u8 *>(y + (((long long)image * g.p + strip.first) * g.q + column) * g.c + channel);
        const Steps steps = steps_of(strip, g);
        float sums[FILTER][COLUMNS][VEC];
        auto finish = [&](float (&row_sums)[COLUMNS][VEC]) {
            if (g.act) {
#pragma unroll
                for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                    for (int e = 0; e < VEC; ++e) row_sums[q][e] = activate<ACT_RELU>(row_sums[q][e]);
            }
#pragma unroll
            for (int q = 0; q < COLUMNS; ++q) {
                Floats<VEC> out;
#pragma unroll
                for (int e = 0; e < VEC; ++e) out.v[e] = row_sums[q][e];
                if (mask >> q & 1) store<VEC>(reinterpret_cast<ELEMENT *>(to + (u64)pixel_bytes * q), out);
            }
            to += (long long)g.q * g.c * (int)sizeof(ELEMENT);
        };
#pragma unroll
        for (int i = 0; i + 1 < FILTER; ++i)
#pragma unroll
            for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                for (int e = 0; e < VEC; ++e) sums[i][q][e] = start.v[e];
        for (int first = steps.first;; first += FILTER) {
#pragma unroll
            for (int j = 0; j < FILTER; ++j) {  // after so many rows each sum is in its own register again: nothing moves
                const int step = first + j;
                if (step == steps.end) {  // what is left sees nothing more of the image
#pragma unroll
                    for (int i = 0; i + 1 < FILTER; ++i)
                        if (step + i >= FILTER - 1 && step + i < steps.stop) finish(sums[i]);
                    goto next;
                }
                const ELEMENT *from = own + ring.stage * (g.stage_bytes / (int)sizeof(ELEMENT));
                barrier_wait(stages.full + 8 * ring.stage, ring.parity);
                const Pixels<SEEN> pixels = fetch_shared<SEEN>(from, pitch);
                __syncwarp();
                if (thread % 32 == 0) barrier_arrive(stages.empty + 8 * ring.stage);
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
                            for (int e = 0; e < VEC; ++e) {
                                const float before = r == 0 && s == 0 ? start.v[e] : sums[i][q][e];
                                sums[i][q][e] = before + v.v[e] * tap[r * FILTER + s][e];
                            }
                        }
                }
                if (thread == 0) {
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity);
                    fetch_row(fetcher, x, stages, ring_memory, g);
                }
                ring.next(g.stages);
                if (step >= FILTER - 1) finish(sums[0]);
#pragma unroll
                for (int i = 0; i + 1 < FILTER; ++i)
#pragma unroll
                    for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                        for (int e = 0; e < VEC; ++e) sums[i][q][e] = sums[i + 1][q][e];
            }
        }
    next:;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_fprop(const __grid_constant__ TensorMap x, const ELEMENT *__restrict__ w, const float *__restrict__ bias,
                              ELEMENT *__restrict__ y, Rows g) {
    correlate<false>(x, w, bias, y, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_dgrad(const __grid_constant__ TensorMap dy, const ELEMENT *__restrict__ w, ELEMENT *__restrict__ dx, Rows g) {
    correlate<true>(dy, w, nullptr, dx, g);
}
