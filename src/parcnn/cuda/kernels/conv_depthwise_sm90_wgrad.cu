// Gradients of the filters and bias of a depthwise 3x3 convolution of stride 1 on Hopper; x (N,H,W,C), dy (N,P,Q,C) bf16,
// dw (C,3,3) and db (C) f32.
//
//     dw[c,r,s] = sum_{n,p,q} x[n, p+r-top, q+s-left, c] * dy[n,p,q,c]        db[c] = sum_{n,p,q} dy[n,p,q,c]
//
// Grid: that of conv_depthwise_sm90.cu; block (channel vectors, pieces of COLUMNS columns, images), thread 0 of which has the copy
// engine bring the rows, too. A stage of the ring holds a row of x and one of dy. A thread keeps the sums of
// its channels' taps, and the three rows of dy that a row of x meets. At the end the block's threads are added in their order,
// into a row of `partial` (dw, then db), one for each block of a slice, which conv_wgrad_sum adds up; without `partial` there is
// one, and it writes dw and db. Bytes: x and dy once, the halo of x again. Preconditions: those of conv_depthwise_sm90.cu.
#include "conv_depthwise_sm90.cuh"

__device__ __forceinline__ int thread_of_block() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }

// The ring: stages in shared memory, barriers that say that one is full, and that all warps are done with one.
struct Stages {
    u32 memory, full, empty;
    Ring now;

    __device__ __forceinline__ Stages(const u8 *ring, u64 *barriers, int stages) {
        memory = shared_address(ring), full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
        const int threads = blockDim.x * blockDim.y * blockDim.z;
        for (int i = thread_of_block(); i < stages; i += threads) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, (threads + WARP - 1) / WARP);
            barrier_init_fence();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full + 8 * now.stage, now.parity); }
    // The warp is done with the stage.
    __device__ __forceinline__ void release() const {
        __syncwarp();
        if (thread_of_block() % WARP == 0) barrier_arrive(empty + 8 * now.stage);
    }
    // Until all warps are done with the stage of the turn before.
    __device__ __forceinline__ void wait_past(int stages) const {
        const bool wrapped = now.stage == 0;
        barrier_wait(empty + 8 * ((wrapped ? stages : now.stage) - 1), now.parity ^ wrapped);
    }
};

// What thread 0 has brought: the turns of strips one after the other, as stages become free. (In shared memory, but at the start: it
// would cost all threads registers.)
struct Feed {
    int4 next;    // strip.first + the next turn, the last one's successor, the strip's image, the stage that the turn goes to
    Share share;  // after the strip
    int y_end;    // behind the strip's last row of outputs
};

// Have the next turn's rows of x and dy brought; what lies outside of the image or the strip is zeros. With the last ones on their
// way, the closing sum may start.
__device__ __forceinline__ void feed_row(Feed &f, const TensorMap &x, const TensorMap &dy, const Stages &stages, const Rows &g) {
    int4 next = f.next;
    if (next.x >= next.y) {
        if (f.share.first >= f.share.end) return;
        const Strip strip = strip_at<true>(f.share.first, f.share.end, g);
        f.share.first += strip.end - strip.first;
        next.x = strip.first + strip.turn, next.y = strip.first + strip.stop, next.z = strip.image;
        f.y_end = strip.end;
    }
    const u32 full = stages.full + 8 * next.w, to = stages.memory + next.w * g.stage_bytes;
    barrier_expect(full, g.x_bytes + g.y_bytes);
    load_tile(to, x, full, f.share.channel, f.share.column - g.left + BESIDE, next.x - g.top, next.z);
    load_tile(to + g.y_at, dy, full, f.share.channel, f.share.column, next.x, next.x < f.y_end ? next.z : g.n);
    f.next = make_int4(next.x + 1, next.y, next.z, next.w + 1 == g.stages ? 0 : next.w + 1);
    if (next.x + 1 == next.y && f.share.first >= f.share.end) let_successors_start();
}

// Add to the sums what a row of x gives with three rows of dy, the newest last.
__device__ __forceinline__ void multiply(const Pixels<SEEN - 2 * BESIDE> &pixels, const float (&errors)[FILTER][COLUMNS][VEC],
                                         float (&sums)[TAPS][VEC]) {
#pragma unroll
    for (int at = BESIDE; at < SEEN - BESIDE; ++at) {
        const Floats<VEC> v = widen(pixels.at[at - BESIDE]);
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
}

// Adds the block's threads' sums of each channel in their order, all taps between two barriers, and writes them, neighbours in memory
// by neighbours: into row `run` of `partial` (dw, then db), or where that is null to dw and db (which may be null).
__device__ __forceinline__ void write_sums(const float (&sums)[TAPS][VEC], const float (&bias_sums)[VEC], float *shared, const Rows &g,
                                           int first_channel, int run, float *dw, float *db, float *partial) {
    const int width = blockDim.x * VEC, height = blockDim.y * blockDim.z, threads = blockDim.x * height, thread = thread_of_block();
    const int pitch = height * width + (36 - height * width % 32) % 32;  // of a tap: four banks after the one before
    float *own = shared + thread / blockDim.x * width + threadIdx.x * VEC;
    __syncthreads();
#pragma unroll
    for (int t = 0; t <= TAPS; ++t) {
        if (t == TAPS && !db) break;
        Floats<VEC> v;
#pragma unroll
        for (int e = 0; e < VEC; ++e) v.v[e] = t < TAPS ? sums[t][e] : bias_sums[e];
        store<VEC>(own + t * pitch, v);
    }
    __syncthreads();
    const auto sum_of = [&](int tap, int channel) {
        float sum = 0.0f;
#pragma unroll 4
        for (int y = 0; y < height; ++y) sum += shared[tap * pitch + y * width + channel];
        return sum;
    };
    const int channels = min(width, g.c - first_channel);
    float *dw_out = partial ? partial + (long long)run * g.c * (TAPS + (db ? 1 : 0)) : dw;
    float *db_out = partial ? dw_out + g.c * TAPS : db;
    for (int i = thread; i < channels * TAPS; i += threads) dw_out[first_channel * TAPS + i] = sum_of(i % TAPS, i / TAPS);
    if (!db) return;
    for (int i = thread; i < channels; i += threads) db_out[first_channel + i] = sum_of(TAPS, i);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_wgrad(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap dy, float *__restrict__ dw,
                              float *__restrict__ db, float *__restrict__ partial, Rows g) {
    __shared__ u64 barriers[2 * MOST_STAGES];
    __shared__ Feed feed;
    RING_MEMORY(ring_memory);  // at the end: write_sums'
    const int thread = thread_of_block();
    const Share share = share_of(blockIdx.x, g);
    if (thread == 0) prefetch(x), prefetch(dy);
    Stages stages(ring_memory, barriers, g.stages);
    await_predecessors();
    if (thread == 0) {
        Feed first = {make_int4(0, 0, 0, 0), share, 0};
        for (int i = 0; i + 1 < g.stages; ++i) feed_row(first, x, dy, stages, g);
        feed = first;
    }

    const int pitch = blockDim.x * VEC, columns = blockDim.y * COLUMNS;
    const int own_x = (threadIdx.z * (columns + FILTER - 1 - 2 * BESIDE) + threadIdx.y * COLUMNS) * pitch + threadIdx.x * VEC;
    const int own_dy = g.y_at / (int)sizeof(ELEMENT) + (threadIdx.z * columns + threadIdx.y * COLUMNS) * pitch + threadIdx.x * VEC;
    float sums[TAPS][VEC] = {}, bias_sums[VEC] = {};

    for (int at = share.first; at < share.end;) {
        const Strip strip = strip_at<true>(at, share.end, g);
        float errors[FILTER][COLUMNS][VEC] = {};  // rows of dy, the newest last
        in_turn(strip.turn, strip.stop, [&](int turn) {
            if (thread == 0) {
                stages.wait_past(g.stages);
                feed_row(feed, x, dy, stages, g);
            }
            const ELEMENT *stage = reinterpret_cast<const ELEMENT *>(ring_memory + stages.now.stage * g.stage_bytes);
            stages.wait_full();
            move_up(errors);
            widen_pixels(fetch_shared<COLUMNS>(stage + own_dy, pitch), errors[FILTER - 1]);
            const Pixels<SEEN - 2 * BESIDE> pixels = fetch_shared<SEEN - 2 * BESIDE>(stage + own_x, pitch);
            stages.release();
            stages.now.next(g.stages);
            if (db) {
#pragma unroll
                for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                    for (int e = 0; e < VEC; ++e) bias_sums[e] += errors[FILTER - 1][q][e];
            }
            if (strip.first + turn >= g.top) multiply(pixels, errors, sums);  // above, x is padding
        });
        at += strip.end - strip.first;
    }

    const int run = quotient(blockIdx.x, g.by_slices);
    write_sums(sums, bias_sums, reinterpret_cast<float *>(ring_memory), g, share.channel, run, dw, db, partial);
}
