// Device helpers that every kernel family shares. No headers are included: NVRTC has these types and functions built in.
//
// Template parameters are CamelCase: capitals are the macros of a variant.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- The order of kernels ---------------------------------------------------------------------------------------------

// Wait until the kernels that this one comes after are complete and what they wrote can be seen: from sm_90 on a kernel of
// a graph starts while its predecessor ends. Every kernel calls it, with all threads that touch global memory and before
// they do (or before a barrier that they pass first). A compiler may move loads through `const __restrict__` above the
// wait; a kernel whose code does so starts later (`awaits_predecessors` in cubin.py).
__device__ __forceinline__ void await_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel start once all blocks have said so or ended; it still waits, above, until this one is complete. Only where
// that was seen to pay: where all that a block wants of memory is on its way, or the next kernel is the closing sum of this one.
// Elsewhere a successor fills places beside blocks that still run, unevenly, and stands in the way of other streams. Measured on
// an H200, let in by every kernel: chains of small kernels gain 10 to 30 %, training steps lose up to 23 %.
__device__ __forceinline__ void let_successors_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

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

template <int Kind> __device__ __forceinline__ float activate(float x) {
    if (Kind == ACT_RELU) return x <= 0.0f ? 0.0f : x;
    if (Kind == ACT_GELU) return 0.5f * x * erfcf(-x * 0.70710678118654752f);  // 1 + erf would cancel in the tail
    if (Kind == ACT_GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    if (Kind == ACT_SILU) return x * sigmoid(x);
    if (Kind == ACT_TANH) return tanhf(x);
    if (Kind == ACT_SIGMOID) return sigmoid(x);
    return x;
}

// dy * act'(saved): saved is the output of relu, tanh, sigmoid (and of no activation), the input of gelu and silu.
template <int Kind> __device__ __forceinline__ float activation_dgrad(float dy, float saved) {
    if (Kind == ACT_RELU) return saved <= 0.0f ? 0.0f : dy;
    if (Kind == ACT_GELU) {
        float cdf = 0.5f * erfcf(-saved * 0.70710678118654752f);
        return dy * (cdf + saved * 0.39894228040143268f * expf(-0.5f * saved * saved));
    }
    if (Kind == ACT_GELU_TANH) {
        float t = tanhf(0.79788456080286536f * (saved + 0.044715f * saved * saved * saved));
        float inner = 0.79788456080286536f * (1.0f + 0.134145f * saved * saved);
        return dy * (0.5f * (1.0f + t) + 0.5f * saved * (1.0f - t * t) * inner);
    }
    if (Kind == ACT_SILU) {
        float s = sigmoid(saved);
        return dy * s * (1.0f + saved * (1.0f - s));
    }
    if (Kind == ACT_TANH) return dy * (1.0f - saved * saved);
    if (Kind == ACT_SIGMOID) return dy * saved * (1.0f - saved);
    return dy;
}

// ---- Maximum ------------------------------------------------------------------------------------------------------

// Whether v takes the place of `best` in a maximum: the first of equals stays, the first NaN wins.
__device__ __forceinline__ bool beats(float v, float best) { return !(v <= best) && best == best; }

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

// Sum over the Width lanes (a power of two) that share lane / Width; each of them gets it. All 32 lanes must call.
template <int Width = 32> __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = Width / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// Sum over a block of Threads (a multiple of 32) threads; every thread gets it. `scratch` holds Threads / 32 floats; the
// block may use it again after its next barrier.
template <int Threads> __device__ __forceinline__ float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Threads / 32; ++warp) sum += scratch[warp];
    return sum;
}

// ---- Accesses of several bytes at once ------------------------------------------------------------------------------

// The address must be a multiple of the word's size.
template <class Word> __device__ __forceinline__ Word load_word(const void *p) {
#ifdef HOST_EMULATION
    emulation::check_aligned(p, sizeof(Word));
#endif
    return *reinterpret_cast<const Word *>(p);
}

template <class Word> __device__ __forceinline__ void store_word(void *p, Word value) {
#ifdef HOST_EMULATION
    emulation::check_aligned(p, sizeof(Word));
#endif
    *reinterpret_cast<Word *>(p) = value;
}

__device__ __forceinline__ float4 load4(const float *p) { return load_word<float4>(p); }
__device__ __forceinline__ float2 load2(const float *p) { return load_word<float2>(p); }
__device__ __forceinline__ void store4(float *p, float4 v) { store_word(p, v); }

// ---- Shared memory -----------------------------------------------------------------------------------------------------

// Names the block's dynamic shared memory.
#ifdef HOST_EMULATION
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(emulation::dynamic_shared)
#else
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

// ---- Copies from global to shared memory that run beside the arithmetic (sm_80 and later) ----------------------------

#ifndef HOST_EMULATION
// Copy 16 (4) bytes, or write zeros where `live` is false (`source` is then not read). Both addresses aligned to the size.
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

// Wait until at most Pending of this thread's groups are under way. A barrier then shows the copies to the block.
template <int Pending> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
#endif

// ---- Elements of tensors: float, or bf16, the upper half of a float --------------------------------------------------

struct bf16 {
    u16 bits;
};

// Two floats as bf16, `low` in the lower half, each rounded to the nearest, ties to even; every NaN becomes 0x7fff.
__device__ __forceinline__ u32 round_bf16x2(float low, float high) {
#ifdef HOST_EMULATION
    auto round = [](float v) { return v != v ? 0x7fffu : (__float_as_uint(v) + 0x7fffu + (__float_as_uint(v) >> 16 & 1u)) >> 16; };
    return round(high) << 16 | round(low);
#else
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
#endif
}

__device__ __forceinline__ float low_bf16(u32 two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high_bf16(u32 two) { return __uint_as_float(two & 0xffff0000u); }

// ---- A run of V (1, 2, 4, 8) neighbouring elements -----------------------------------------------------------------------
// Kernels compute on Floats. An access moves up to 16 bytes, and its address must be a multiple of what it moves.

template <int V> struct Floats {
    float v[V];
};

// bf16 as they lie in memory, the first of two in the lower half of a word.
template <int V> struct Pairs {
    u32 word[(V + 1) / 2];
};

// The elements as they are: nothing waits for the load until they are widened.
template <int V> __device__ __forceinline__ Floats<V> fetch(const float *p) {
    Floats<V> r;
    if constexpr (V == 8) {
        float4 t = load4(p), u = load4(p + 4);
        r.v[0] = t.x, r.v[1] = t.y, r.v[2] = t.z, r.v[3] = t.w;
        r.v[4] = u.x, r.v[5] = u.y, r.v[6] = u.z, r.v[7] = u.w;
    } else if constexpr (V == 4) {
        float4 t = load4(p);
        r.v[0] = t.x, r.v[1] = t.y, r.v[2] = t.z, r.v[3] = t.w;
    } else if constexpr (V == 2) {
        float2 t = load2(p);
        r.v[0] = t.x, r.v[1] = t.y;
    } else {
        r.v[0] = *p;
    }
    return r;
}

template <int V> __device__ __forceinline__ Pairs<V> fetch(const bf16 *p) {
    Pairs<V> r;
    if constexpr (V == 8) {
        uint4 t = load_word<uint4>(p);
        r.word[0] = t.x, r.word[1] = t.y, r.word[2] = t.z, r.word[3] = t.w;
    } else if constexpr (V == 4) {
        uint2 t = load_word<uint2>(p);
        r.word[0] = t.x, r.word[1] = t.y;
    } else if constexpr (V == 2) {
        r.word[0] = load_word<u32>(p);
    } else {
        r.word[0] = p->bits;
    }
    return r;
}

// What `fetch` gives.
template <class Element, int V> using Fetched = decltype(fetch<V>((const Element *)nullptr));

template <int V> __device__ __forceinline__ Floats<V> widen(const Floats<V> &r) { return r; }

template <int V> __device__ __forceinline__ Floats<V> widen(const Pairs<V> &r) {
    Floats<V> wide;
#pragma unroll
    for (int e = 0; e < V; ++e) wide.v[e] = e % 2 ? high_bf16(r.word[e / 2]) : low_bf16(r.word[e / 2]);
    return wide;
}

template <int V, class Element> __device__ __forceinline__ Floats<V> load(const Element *p) { return widen(fetch<V>(p)); }

template <int V> __device__ __forceinline__ void store(float *p, const Floats<V> &r) {
    if constexpr (V >= 4) store4(p, make_float4(r.v[0], r.v[1], r.v[2], r.v[3]));
    if constexpr (V == 8) store4(p + 4, make_float4(r.v[4], r.v[5], r.v[6], r.v[7]));
    if constexpr (V == 2) store_word(p, make_float2(r.v[0], r.v[1]));
    if constexpr (V == 1) *p = r.v[0];
}

template <int V> __device__ __forceinline__ void store(bf16 *p, const Floats<V> &r) {
    if constexpr (V == 8)
        store_word(p, make_uint4(round_bf16x2(r.v[0], r.v[1]), round_bf16x2(r.v[2], r.v[3]),
                                 round_bf16x2(r.v[4], r.v[5]), round_bf16x2(r.v[6], r.v[7])));
    else if constexpr (V == 4)
        store_word(p, make_uint2(round_bf16x2(r.v[0], r.v[1]), round_bf16x2(r.v[2], r.v[3])));
    else if constexpr (V == 2)
        store_word(p, round_bf16x2(r.v[0], r.v[1]));
    else
        p->bits = (u16)round_bf16x2(r.v[0], 0.0f);
}

// What a store of v keeps of it.
template <class Element> __device__ __forceinline__ float rounded(float v) {
    return sizeof(Element) == sizeof(float) ? v : low_bf16(round_bf16x2(v, 0.0f));
}

template <int V> __device__ __forceinline__ Floats<V> splat(float value) {
    Floats<V> r;
#pragma unroll
    for (int e = 0; e < V; ++e) r.v[e] = value;
    return r;
}

// The first `count` of V elements (all where count >= V, then in accesses of 16 bytes); the others are zero.
template <int V> __device__ __forceinline__ Floats<V> fetch_part(const float *p, long long count) {
    if (count >= V) return fetch<V>(p);
    Floats<V> r = splat<V>(0.0f);
#pragma unroll
    for (int e = 0; e < V - 1; ++e)
        if (e < count) r.v[e] = p[e];
    return r;
}

template <int V> __device__ __forceinline__ Pairs<V> fetch_part(const bf16 *p, long long count) {
    if (count >= V) return fetch<V>(p);
    Pairs<V> r = {};
#pragma unroll
    for (int e = 0; e < V - 1; ++e)
        if (e < count) r.word[e / 2] |= (u32)p[e].bits << (16 * (e % 2));
    return r;
}

template <int V = 4, class Element> __device__ __forceinline__ Floats<V> load_part(const Element *p, long long count) {
    return widen(fetch_part<V>(p, count));
}

template <int V, class Element> __device__ __forceinline__ void store_part(Element *p, const Floats<V> &r, long long count) {
    if (count >= V) {
        store<V>(p, r);
        return;
    }
#pragma unroll
    for (int e = 0; e < V - 1; ++e)
        if (e < count) store<1>(p + e, {r.v[e]});
}
