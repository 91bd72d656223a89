// 3x3 convolution, padding 1, of images of 3x3 pixels with bias, ReLU and the maximum of their only 2x2 window behind it, on Hopper's
// tensor cores; x (N,3,3,C), w (K,3,3,C), y (N,1,1,K) bf16, sums in fp32.
//
//     y[n,k] = max over p, q < 2 of act(bias[k] + sum_{r,s,c} x[n, p+r-1, q+s-1, c] * w[k,r,s,c])
//
// A step is 64 channels c, in three stages. Stage r has the images' r-th row of pixels and the filters' r-th row of taps. Images are
// innermost, 64 of them, and before the row's three pixels lies one of zeros, its padding: so the two outputs of a row read, for
// each tap, 128 neighbouring rows of shared memory. Each pixel is copied once for all taps, and no row of padding is copied or
// multiplied (15 products a step where conv_sm90.cu has 18):
//
//     stage 0:                            lower outputs += taps[0] * pixels[0]
//     stage 1: upper outputs += taps[1] * pixels[0], lower += taps[1] * pixels[1]
//     stage 2: upper outputs += taps[2] * pixels[1], lower += taps[2] * pixels[2]
//
// so a stage is given back two groups of products later, the last one one later. Sums lie as of conv_sm90.cu's tiles of 2x2 outputs of
// 64 images (POOL 4), whose epilogue this has; it is staged in the first stage's zeros, of which it has the size.
//
// grid: (groups of 64 images, groups of 64 output channels), 160 threads: one warpgroup consumes, one warp copies.
// Bytes: a block reads its images once, and the weights of its channels, from L2; y is written once.
// Preconditions: C and K are multiples of 8; less than 2^31 elements a tensor.

#define CB 64
#define CHANNELS 128
#define POOL 4
#define FLIPPED 0
#define FILTER 3
#define COLUMNS 1
#define MOMENTS 0
#define PIXELS 256
#define WIDTH 2
#define IMAGES 64

#include "conv_sm90_epilogue.cuh"
#include "sm90_lanes.cuh"
#include "sm90_wgmma.cuh"

DEFINE_WGMMA(multiply, 128, 0, 0)

constexpr int OUT_CHANNELS = 64;  // of a block
constexpr u32 PIXEL_BYTES = IMAGES * CB * 2, TAP_BYTES = OUT_CHANNELS * CB * 2;
constexpr u32 TAPS_AT = 4 * PIXEL_BYTES, STAGE_BYTES = TAPS_AT + 3 * TAP_BYTES;  // of a stage
constexpr int STAGES = 4;
constexpr int CONSUMER_WARPS = 4, COPIER = CONSUMER_WARPS;  // warps
constexpr u32 DESCRIPTOR = 8 * CB * 2 >> 4 | SWIZZLE_128B << 30;  // upper half, of both operands
static_assert(PIXELS / 4 * OUT_CHANNELS * 2 == PIXEL_BYTES, "the epilogue's staging is a pixel of zeros");

// A row of outputs by a row of taps: sums += taps[s] * pixels[q + s - 1], whose first is the padding's.
__device__ __forceinline__ void multiply_row(float (&sums)[PIXELS / 4], u32 pixels, u32 taps) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
#pragma unroll
        for (int i = 0; i < CB / 16; ++i)
            multiply(sums, descriptor_of(DESCRIPTOR, taps + tap * (TAP_BYTES >> 4) + 2 * i), descriptor_of(DESCRIPTOR, pixels + tap * (PIXEL_BYTES >> 4) + 2 * i), 1);
}

extern "C" __global__ void __launch_bounds__(32 * (CONSUMER_WARPS + 1), 1)
    conv_sm90_one_window(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap y,
                         const float *__restrict__ bias, int k, int blocks, int act, u32 floor,
                         const __grid_constant__ Gate gate) {
    ALIGNED_SHARED(u8, shared);
    const u32 base = shared_address(shared), full = base + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    const int warp = same_in_all(threadIdx.x >> 5), lane = threadIdx.x & 31;
    const int image = blockIdx.x * IMAGES, channel = blockIdx.y * OUT_CHANNELS, copies = 3 * blocks;

    Ring ring;
    int row = 0, block = 0;
    const auto copy = [&](bool leader) {
        if (leader) {
            const u32 at = base + ring.stage * STAGE_BYTES, barrier = full + 8 * ring.stage;
            barrier_expect(barrier, STAGE_BYTES - PIXEL_BYTES);
            load_tile(at + PIXEL_BYTES, x, barrier, block * CB, image, 0, row);
#pragma unroll
            for (int s = 0; s < 3; ++s) load_tile(at + TAPS_AT + s * TAP_BYTES, w, barrier, block * CB, row * 3 + s, channel);
        }
        ring.next(STAGES);
        if (++row == 3) row = 0, ++block;
    };
    const int at_once = min(copies, STAGES);
    if (warp == COPIER) {
        const bool leader = elect();
        if (leader) {
            prefetch(x), prefetch(w), prefetch(y);
            for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, CONSUMER_WARPS);
            barrier_init_fence();
        }
        __syncwarp();
        await_predecessors();
#pragma unroll 1
        for (int i = 0; i < at_once; ++i) copy(leader);
    } else {
        for (u32 i = threadIdx.x * 16; i < STAGES * PIXEL_BYTES; i += 32 * CONSUMER_WARPS * 16)
            store_shared16(base + i / PIXEL_BYTES * STAGE_BYTES + i % PIXEL_BYTES, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        fence_async();
        await_predecessors();
    }
    __syncthreads();

    if (warp == COPIER) {
        const bool leader = elect();
#pragma unroll 1
        for (int i = at_once; i < copies; ++i) {
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            copy(leader);
        }
        return;
    }

    const int own = channel + warp * 16 + (lane >> 2);
    const float bias0 = (bias && own < k ? bias[own] : 0.0f) + 0.0f, bias1 = (bias && own + 8 < k ? bias[own + 8] : 0.0f) + 0.0f;  // not -0
    const u32 first = held(descriptor_low(base), lane);
    float upper[PIXELS / 4] = {}, lower[PIXELS / 4] = {};
    const auto give_back = [&](int stage) {
        if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    // The stage that comes next, when it is full; and the one before it.
    u32 at = first, above = first;
    const auto await_stage = [&] {
        above = at, at = first + ring.stage * (STAGE_BYTES >> 4);
        barrier_wait(full + 8 * ring.stage, ring.parity);
        const int stage = ring.stage;
        ring.next(STAGES);
        return stage;
    };
    int middle = -1, bottom = -1;  // stages of the step before, whose last reader is its last group of products
#pragma unroll 1
    for (; block < blocks; ++block) {
        const int top = await_stage();
        wgmma_fence();
        multiply_row(lower, at, at + (TAPS_AT >> 4));
        wgmma_commit();
        wgmma_wait<1>();
        if (block > 0) give_back(middle), give_back(bottom);

        middle = await_stage();
        wgmma_fence();
        multiply_row(upper, above, at + (TAPS_AT >> 4));
        multiply_row(lower, at, at + (TAPS_AT >> 4));
        wgmma_commit();

        bottom = await_stage();
        wgmma_fence();
        multiply_row(upper, above, at + (TAPS_AT >> 4));
        multiply_row(lower, at, at + (TAPS_AT >> 4));
        wgmma_commit();
        wgmma_wait<1>();
        give_back(top);
    }
    wgmma_wait<0>();
    float sums[PIXELS / 2];
#pragma unroll
    for (int i = 0; i < PIXELS / 4; ++i) sums[i] = upper[i], sums[PIXELS / 4 + i] = lower[i];
    Outputs out = {bias0, bias1, floor};
    if (act || __any_sync(0xffffffffu, out.bias_is_infinite())) {
        activate_sums(sums, bias0, bias1, act, gate);
        out.bias0 = out.bias1 = 0.0f;
    }
    named_barrier(1, 32 * CONSUMER_WARPS);  // all have read the zeros
    stage_windows<PIXELS, true, MAXIMA>(sums, out, base, warp, lane);
    fence_async();
    named_barrier(1, 32 * CONSUMER_WARPS);
    if (threadIdx.x == 0) {
        store_tile(y, base, channel, image, 0, 0);
        store_wait<0>();
    }
}
