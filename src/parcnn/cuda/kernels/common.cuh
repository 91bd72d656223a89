// Device helpers that every kernel family shares. No headers are included: NVRTC has these types and functions built in.
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- Division by a constant of the run ----------------------------------------------------------------------------
// Exact for 0 <= n < 2^31 and 1 <= d < 2^31 (Granlund & Montgomery, PLDI '94); the host's twin is `fast_div` in common.py.

struct FastDiv {
    u32 mul, shift, d;
};

__device__ __forceinline__ int quotient(int n, FastDiv div) { return (int)(__umulhi(2u * (u32)n, div.mul) >> div.shift); }

// Quotient; the remainder comes back in `rest`.
__device__ __forceinline__ int divide(int n, FastDiv div, int &rest) {
    int q = quotient(n, div);
    rest = n - q * (int)div.d;
    return q;
}

// ---- Activations --------------------------------------------------------------------------------------------------
// The numbers are 1 + the position in parcnn.ops.base.ACTIVATIONS. NaN goes through every one of them.

#define ACT_NONE 0
#define ACT_RELU 1
#define ACT_GELU 2
#define ACT_GELU_TANH 3
#define ACT_SILU 4
#define ACT_TANH 5
#define ACT_SIGMOID 6

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <int ACT> __device__ __forceinline__ float activate(float x) {
    if (ACT == ACT_RELU) return x <= 0.0f ? 0.0f : x;
    if (ACT == ACT_GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    if (ACT == ACT_GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    if (ACT == ACT_SILU) return x * sigmoid(x);
    if (ACT == ACT_TANH) return tanhf(x);
    if (ACT == ACT_SIGMOID) return sigmoid(x);
    return x;
}

// dy * act'(saved): saved is the output of relu, tanh, sigmoid (and of no activation), the input of gelu and silu.
template <int ACT> __device__ __forceinline__ float activation_dgrad(float dy, float saved) {
    if (ACT == ACT_RELU) return saved <= 0.0f ? 0.0f : dy;
    if (ACT == ACT_GELU) {
        float cdf = 0.5f * (1.0f + erff(saved * 0.70710678118654752f));
        return dy * (cdf + saved * 0.39894228040143268f * expf(-0.5f * saved * saved));
    }
    if (ACT == ACT_GELU_TANH) {
        float t = tanhf(0.79788456080286536f * (saved + 0.044715f * saved * saved * saved));
        float inner = 0.79788456080286536f * (1.0f + 0.134145f * saved * saved);
        return dy * (0.5f * (1.0f + t) + 0.5f * saved * (1.0f - t * t) * inner);
    }
    if (ACT == ACT_SILU) {
        float s = sigmoid(saved);
        return dy * s * (1.0f + saved * (1.0f - s));
    }
    if (ACT == ACT_TANH) return dy * (1.0f - saved * saved);
    if (ACT == ACT_SIGMOID) return dy * saved * (1.0f - saved);
    return dy;
}

// ---- Maximum ------------------------------------------------------------------------------------------------------

// Whether v takes the place of `best` in a maximum: the first of equals stays, the first NaN wins.
__device__ __forceinline__ bool beats(float v, float best) { return v > best || (v != v && best == best); }

// ---- Random words: Philox4x32-10 (Salmon et al., SC '11); twin of parcnn.ops.philox --------------------------------

__device__ __forceinline__ uint4 philox4x32(uint4 c, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u32 high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
        u32 high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
        c = make_uint4(high1 ^ c.y ^ key.x, low1, high0 ^ c.w ^ key.y, low0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return c;
}

// ---- Sums in a fixed order ----------------------------------------------------------------------------------------

// Sum over the WIDTH lanes (a power of two) that share lane / WIDTH; each of them gets it. All 32 lanes must call.
template <int WIDTH = 32> __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// Sum over a block of THREADS (a multiple of 32) threads; every thread gets it. `scratch` holds THREADS / 32 floats; the
// block may use it again after its next barrier.
template <int THREADS> __device__ __forceinline__ float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += scratch[warp];
    return sum;
}

// ---- Copies from global to shared memory that run beside the arithmetic (sm_80 and later) ----------------------------

// Copy 16 (4) bytes, or write zeros where `live` is false (`source` is then not read). Both addresses aligned to the size.
#ifndef HOST_EMULATION
__device__ __forceinline__ void copy_async16(float *shared, const float *source, bool live) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(live ? 16 : 0));
}

__device__ __forceinline__ void copy_async4(float *shared, const float *source, bool live) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(source), "r"(live ? 4 : 0));
}

// Close the group of copies that this thread has started since the last group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;"); }

// Wait until at most PENDING of this thread's groups are under way. A barrier then shows the copies to the block.
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif
