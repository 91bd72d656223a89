// A ring of tiles as Hopper's kernels have it, with one fault or none: for tests of the host's emulation, which runs it.
//
//     y[m,n] = sum_{t,k} x[t, m, k] * x[t, 64 + n, k]        x (tiles, 72, 64), y (1, 1, 64, 8), bf16
//
// 160 threads: a warpgroup multiplies, a warp copies.
#include "sm90.cuh"
#include "sm90_lanes.cuh"
#include "sm90_wgmma.cuh"

// Twin of test_emulation.py's.
enum Fault {
    NONE,
    READS_EARLY,
    GIVES_BACK_EARLY,
    STORES_EARLY,
    EXPECTS_LESS,
    EXPECTS_MORE,
    ARRIVES_TOO_OFTEN,
    STAYS_AWAY,
    READS_BEYOND,
    IS_MISALIGNED,
    LEAVES_STORE,
    LEAVES_PRODUCT,
    TAKES_TOO_MUCH
};

constexpr int STAGES = 2, ROWS = 72, STAGE_BYTES = ROWS * 128, FILTERS = 64;

DEFINE_WGMMA(multiply, 8, 0, 0)

extern "C" __global__ void __launch_bounds__(160) ring(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, int tiles, int fault) {
    ALIGNED_SHARED(u8, shared);
    __shared__ u64 barriers[2 * STAGES];
    const u32 base = shared_address(shared), staging = base + STAGES * STAGE_BYTES, full = shared_address(barriers), empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 4);
        barrier_init_fence();
    }
    __syncthreads();
    Ring ring;
    if (warp == 4) {
        if (!elect()) return;
        const int expected = STAGE_BYTES + (fault == EXPECTS_LESS ? -16 : fault == EXPECTS_MORE ? 16 : 0);
        for (int tile = 0; tile < tiles; ++tile, ring.next(STAGES)) {
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(full + 8 * ring.stage, expected);
            load_tile(base + ring.stage * STAGE_BYTES, x, full + 8 * ring.stage, 0, 0, tile);
        }
        return;
    }
    if (fault == TAKES_TOO_MUCH) take_registers<512>();
    float sums[4] = {};
    for (int tile = 0; tile < tiles; ++tile, ring.next(STAGES)) {
        const u32 at = base + ring.stage * STAGE_BYTES + (fault == READS_BEYOND ? 3 * STAGE_BYTES : 0);
        if (fault != READS_EARLY) barrier_wait(full + 8 * ring.stage, ring.parity);
        if (fault == IS_MISALIGNED) load_shared16(at + 8);
        wgmma_fence();
        for (int step = 0; step < 4; ++step)
            multiply(sums, descriptor_of(descriptor_high(1024, SWIZZLE_128B), descriptor_low(at) + 2 * step),
                     descriptor_of(descriptor_high(1024, SWIZZLE_128B), descriptor_low(at + FILTERS * 128) + 2 * step), 1);
        wgmma_commit();
        if (fault == GIVES_BACK_EARLY && lane == 0) barrier_arrive(empty + 8 * ring.stage);
        if (fault == GIVES_BACK_EARLY) __syncwarp(), named_barrier(1, 128), __syncwarp();
        if (fault != LEAVES_PRODUCT) wgmma_wait<0>();
        if (fault == READS_EARLY) barrier_wait(full + 8 * ring.stage, ring.parity);
        if (fault != GIVES_BACK_EARLY && lane == 0) barrier_arrive(empty + 8 * ring.stage, fault == ARRIVES_TOO_OFTEN ? 3 : 1);
    }
    for (int e = 0; e < 2; ++e) {
        const u32 pair = round_bf16x2(sums[2 * e], sums[2 * e + 1]);
        *reinterpret_cast<u32 *>(shared + STAGES * STAGE_BYTES + (16 * warp + lane / 4 + 8 * e) * 16 + lane % 4 * 4) = pair;
    }
    fence_async();
    if (fault == STORES_EARLY && threadIdx.x == 127) store_tile(y, staging, 0, 0, 0, 0), store_wait<0>();
    if (fault != STAYS_AWAY || warp != 2) named_barrier(2, 128);
    if (fault != STORES_EARLY && threadIdx.x == 0) {
        store_tile(y, staging, 0, 0, 0, 0);
        if (fault != LEAVES_STORE) store_wait<0>();
    }
}
