// Depthwise 3x3 convolution of stride 1 and its input gradient on Hopper, bf16.
//
//     y[n,p,q,c]  = act(bias[c] + sum_{r,s} x[n, p+r-top, q+s-left, c] * w[c,r,s])
//     dx[n,h,w,c] = sum_{r,s} dy[n, h+top-r, w+left-s, c] * w[c,r,s]
//
// x (N,H,W,C), w (C,3,3), y (N,P,Q,C), bias (C) f32. One-dimensional grid: (parts of the rows) x (columns) x (slices of the
// channels, innermost); block: see conv_depthwise_sm90.cuh. Dynamic shared memory: the ring; a stage holds a row of x, and beside
// it the row of outputs that it ends, which the copy engine writes out.
//
// A row, read once, has its part in three rows of outputs, whose sums lie in registers.
// Bytes: x (dy) once and the halo of shares again, y (dx) once.
// Preconditions: C % 8 == 0; tensors aligned to 16 bytes; dilation 1; fewer than 2^31 elements.
#include "conv_depthwise_sm90.cuh"

#define LEAST_BF16X2 0xff80ff80u  // two of -infinity

#ifndef HOST_EMULATION
#include "sm90_lanes.cuh"

// Bring memory into L2: a multiple of 16 bytes, aligned so. It may come before the wait for predecessors: what they write is in L2, too.
__device__ __forceinline__ void prefetch(const void *p, u32 nbytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(nbytes));
}

// In place of a tile that `store_wait` counts.
__device__ __forceinline__ void store_nothing() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

__device__ __forceinline__ void store_shared(u32 at, const u32 (&v)[1]) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v[0]) : "memory");
}

// (NVRTC made two stores of what the language would write in one.)
__device__ __forceinline__ void store_shared(u32 at, const u32 (&v)[2]) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(at), "r"(v[0]), "r"(v[1]) : "memory");
}
#endif

// A share's turns, one strip after the other.
struct Walk {
    int at, end;  // rows before `at` have their turns
    Strip strip;

    __device__ __forceinline__ Walk(const Share &share, const Rows &g) : at(share.first), end(share.end) { begin(g); }
    __device__ __forceinline__ void begin(const Rows &g) {
        strip = strip_at<false>(at, end, g);
        at += strip.end - strip.first;
    }
    __device__ __forceinline__ bool has_turn() const { return strip.turn < strip.stop; }
    __device__ __forceinline__ void next(const Rows &g) {
        if (++strip.turn == strip.stop && at < end) begin(g);
    }
};

// The ring: stages in shared memory, barriers that say that one is full, and that all warps are done with one.
struct Stages {
    u32 memory, full, empty;

    __device__ __forceinline__ Stages(const u8 *ring, const u64 *barriers)
        : memory(shared_address(ring)), full(shared_address(barriers)), empty(full + 8 * MOST_STAGES) {}
    __device__ __forceinline__ void wait_full(const Ring &now) const { barrier_wait(full + 8 * now.stage, now.parity); }
    __device__ __forceinline__ void wait_empty(const Ring &now) const { barrier_wait(empty + 8 * now.stage, now.parity); }
};

// What has been brought of a share.
struct Feed {
    Walk walk;
    Ring to;

    __device__ __forceinline__ Feed(const Share &share, const Rows &g) : walk(share, g) {}
    // Have the row of x brought that the next turn sees; what lies outside of the image is zeros, and with WHOLE_ROWS not brought below.
    __device__ __forceinline__ void bring(const TensorMap &x, const Share &share, const Stages &stages, const Rows &g) {
        const u32 full = stages.full + 8 * to.stage;
        const int row = walk.strip.first + walk.strip.turn - g.top;
        if (WHOLE_ROWS && row >= g.h) {
            barrier_arrive(full);
        } else {
            barrier_expect(full, g.x_bytes);
            load_tile(stages.memory + to.stage * g.stage_bytes, x, full, share.channel, share.column - g.left + BESIDE, row, walk.strip.image);
        }
        to.next(g.stages), walk.next(g);
    }
    // Whether rows of x are left to be brought, not only turns that see padding below.
    __device__ __forceinline__ bool has_rows(const Rows &g) const {
        return walk.at < walk.end || (walk.has_turn() && walk.strip.first + walk.strip.turn - g.top < g.h);
    }
};

// A thread that multiplies: its channel vector, piece and image among the block's; of a thread that has none, image >= g.images.
struct Worker {
    int lane, piece, image;

    __device__ __forceinline__ Worker(const Rows &g) {
        image = divide(divide(threadIdx.x, g.by_lanes, lane), g.by_pieces, piece);
    }
};

// Add what a row of pixels gives to three rows of outputs, of which the newest, the last one, begins here at `start`.
__device__ __forceinline__ void correlate(float (&sums)[FILTER][COLUMNS][VEC], const Floats<VEC> &start, const Pixels<SEEN - 2 * BESIDE> &pixels,
                                          const float (&tap)[TAPS][VEC]) {
#pragma unroll
    for (int at = BESIDE; at < SEEN - BESIDE; ++at) {
        const Floats<VEC> v = widen(pixels.at[at - BESIDE]);
#pragma unroll
        for (int i = 0; i < FILTER; ++i)
#pragma unroll
            for (int q = 0; q < COLUMNS; ++q) {
                const int t = (FILTER - 1 - i) * FILTER + at - q;
                if (at < q || at - q >= FILTER) continue;
#pragma unroll
                for (int e = 0; e < VEC; ++e) sums[i][q][e] = (t == max(BESIDE - q, 0) ? start.v[e] : sums[i][q][e]) + v.v[e] * tap[t][e];
            }
    }
}

// Has the taps widened once, not in every turn again, where there are registers for them.
__device__ __forceinline__ void keep(float (&tap)[TAPS][VEC]) {
#if !defined(HOST_EMULATION) && VEC * COLUMNS < 16
#pragma unroll
    for (int t = 0; t < TAPS; ++t)
#pragma unroll
        for (int e = 0; e < VEC; ++e) asm volatile("" : "+f"(tap[t][e]));
#endif
}

// A row of outputs to shared memory, pixels `pitch` bytes apart. None is less than that in `floor`; NaN stays.
__device__ __forceinline__ void write(u32 to, int pitch, const float (&sums)[COLUMNS][VEC], u32 floor) {
#pragma unroll
    for (int q = 0; q < COLUMNS; ++q) {
        u32 out[VEC / 2];
#pragma unroll
        for (int e = 0; e < VEC; e += 2) out[e / 2] = max_bf16x2(round_bf16x2(sums[q][e], sums[q][e + 1]), floor);
        store_shared(to + q * pitch, out);
    }
}

// The thread's part in the rows of a block.
template <bool Mirror>
__device__ __forceinline__ void walk(const TensorMap &x, const TensorMap &y, const ELEMENT *w, const float *bias, const Rows &g) {
    __shared__ u64 barriers[2 * MOST_STAGES];
    RING_MEMORY(ring_memory);
    const int workers = blockDim.x - WARP, thread = threadIdx.x;
    const Share share = share_of(blockIdx.x, g);
    const Stages stages(ring_memory, barriers);
    Ring now;

    if (thread >= workers) {
        if (elect()) {
#pragma unroll 1
            for (int i = 0; i < g.stages; ++i) barrier_init(stages.full + 8 * i, 1), barrier_init(stages.empty + 8 * i, workers / WARP);
            barrier_init_fence();
        }
        named_barrier_arrive(1, blockDim.x);
        Feed feed(share, g);
        Walk out = feed.walk;
        await_predecessors();
        if (!elect()) return;
        for (int i = 0; i < g.stages && feed.walk.has_turn(); ++i) feed.bring(x, share, stages, g);
        if (!feed.has_rows(g)) let_successors_start();
        for (bool is_first = true; out.has_turn(); is_first = false) {
            stages.wait_empty(now);
            const int row = out.strip.first + out.strip.turn - (FILTER - 1);
            if (row >= out.strip.first)
                store_tile(y, stages.memory + now.stage * g.stage_bytes + g.y_at, share.channel, share.column, row, out.strip.image);
            else
                store_nothing();
            if (!is_first && feed.walk.has_turn()) {  // into the stage before, whose outputs are on their way
                store_wait<1>();
                feed.bring(x, share, stages, g);
            }
            now.next(g.stages), out.next(g);
            if (!feed.has_rows(g)) let_successors_start();
        }
        store_wait<0>();
        return;
    }

    if (thread == 0) {
        prefetch(x), prefetch(y);
        // Asked for together with so many rows of x, filters would be the last to come. One block for all: more asking for the same
        // lines only hold each other up.
        if (share.first == 0) {
            const int count = min(g.c - share.channel, g.lanes * VEC);
            prefetch(w + share.channel * TAPS, count * TAPS * sizeof(ELEMENT));
            if (bias) prefetch(bias + share.channel, count * sizeof(float));
        }
    }
    const Worker own(g);
    const bool is_leader = thread % WARP == 0, is_busy = own.image < g.images;
    const int channel = share.channel + own.lane * VEC, pitch = g.lanes * VEC, piece = is_busy ? own.image * g.pieces + own.piece : 0;
    const int halo = is_busy ? own.image * (FILTER - 1 - 2 * BESIDE) : 0;
    const ELEMENT *own_x = reinterpret_cast<const ELEMENT *>(ring_memory) + (piece * COLUMNS + halo) * pitch + own.lane * VEC;
    const u32 own_y = stages.memory + g.y_at + (piece * COLUMNS * pitch + own.lane * VEC) * sizeof(ELEMENT);
    named_barrier(1, blockDim.x);
    await_predecessors();
    float tap[TAPS][VEC];
    filter_taps<Mirror>(w + min(channel, g.c - VEC) * TAPS, tap);
    const Floats<VEC> start = bias && channel < g.c ? load<VEC>(bias + channel) : splat<VEC>(0.0f);
    keep(tap);

    const u32 floor = g.act ? 0u : LEAST_BF16X2;
    for (int at = share.first; at < share.end;) {
        const Strip strip = strip_at<false>(at, share.end, g);
        const int next = at + strip.end - strip.first;
        float sums[FILTER][COLUMNS][VEC];
        fill(sums[0], start), fill(sums[1], start);
        const int first = at - (FILTER - 1), below = WHOLE_ROWS ? min(next, first + g.h + g.top - strip.first) : next;
        const auto end_turn = [&](int row, int stage) {
            if (row >= at) {
                if (is_busy) write(own_y + stage, pitch * sizeof(ELEMENT), sums[0], floor);
                fence_async();
            }
            __syncwarp();
            if (is_leader) barrier_arrive(stages.empty + 8 * now.stage);
            now.next(g.stages);
            move_up(sums);
        };
        in_turn(first + strip.turn, below, [&](int row) {  // the row that the turn ends
            const int stage = now.stage * g.stage_bytes;
            stages.wait_full(now);
            correlate(sums, start, fetch_shared<SEEN - 2 * BESIDE>(own_x + stage / (int)sizeof(ELEMENT), pitch), tap);
            end_turn(row, stage);
        });
#if WHOLE_ROWS
#pragma unroll 1
        for (int row = below; row < next; ++row) {  // nothing is added any more
            stages.wait_full(now);
            end_turn(row, now.stage * g.stage_bytes);
            fill(sums[1], start);
        }
#endif
        at = next;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_fprop(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, const ELEMENT *__restrict__ w,
                              const float *__restrict__ bias, Rows g) {
    walk<false>(x, y, w, bias, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_depthwise_sm90_dgrad(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap dx, const ELEMENT *__restrict__ w,
                              Rows g) {
    walk<true>(dy, dx, w, nullptr, g);
}
