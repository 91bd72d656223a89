// Gradient of a max-pooled convolution of few channels with respect to filters and bias: what only the pool's winners cost.
//
//     dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, i+r-top, j+s-left, c],  (i, j) the winner of window (n,p,q) for filter k
//     db[k]       = sum_{n,p,q} dy[n,p,q,k]
//
// grid (runs of images, groups of filters, groups of 32 FLOATS filter elements); a block keeps some images, zeros around
//   them, and their errors in shared memory at a time. A warp owns KG filters and every so-many-th window: lane l sums filter
//   elements l, l + 32, .. (FLOATS registers a filter); the winner's position only moves the address of x. Rows of x are laid
//   out so that the 32 lanes read 32 banks: their distance is s * c modulo 32. At the end the warps of a filter add up in a
//   fixed order; with several runs the sums are rows [run][dw, then db] of `partial`, which conv_wgrad_sum adds.
//
// Bytes: x is read once for each group of filters, dy and idx once; dw and db are written once a run.
// Preconditions: stride 1, dilation 1, 2x2 max-pooling; tensors of less than 2^31 elements. A loser's zero is not
// multiplied: 0 * Inf is not in the sum.

#include "conv_common.cuh"

// Twin of the struct that conv_wgrad_direct.py builds.
struct DirectWgrad {
    int batch, images, windows;          // images of the batch; at a time in a block; windows of an image
    int filters, groups, parts;          // filters of a block, KG * groups; warps that share a filter's windows
    int patch_h, patch_row;              // rows of x that windows reach, and floats of one
    int pitch, image_size;               // floats from row to row, and from image to image
    FastDiv by_filters, by_windows, by_patch_h, by_patch_row;
};

// Addresses in shared memory as the hardware counts them. The loop adds two numbers for each read; of pointers nvcc adds
// three, and then as many instructions find the operands as multiply them.
#ifdef HOST_EMULATION
__device__ __forceinline__ u32 address_of(const float *p) { return (u32)((const char *)p - emulation::dynamic_shared); }
__device__ __forceinline__ float read_shared(u32 address) { return *(const float *)(emulation::dynamic_shared + address); }
#else
__device__ __forceinline__ u32 address_of(const float *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float read_shared(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}
#endif

extern "C" __global__ void __launch_bounds__(512)
    conv_wgrad_direct(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ dy, const u8 *__restrict__ idx,
                      float *__restrict__ dw, float *__restrict__ db, float *__restrict__ partial, Conv g, DirectWgrad d) {
    DYNAMIC_SHARED(float, shared);
    float *winners = shared;                                           // [window][filter]: error, and where its x starts
    float *patch = winners + 2 * d.images * d.windows * d.filters;     // [image][patch_h][pitch]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int group = warp % d.groups, part = warp / d.groups;
    const int k0 = blockIdx.y * d.filters, j0 = blockIdx.z * 32 * FLOATS;

    // Bytes from a winner's x to that of the lane's filter elements; those that there are not read a float of their own bank.
    u32 offset[FLOATS];
#pragma unroll
    for (int i = 0; i < FLOATS; ++i) {
        int j = j0 + 32 * i + lane, c, s;
        int r = divide(divide(j, g.by_c, c), g.by_s, s);
        offset[i] = 4 * (j < g.taps_c ? r * d.pitch + s * g.c + c : lane);
    }
    int bias_k;
    const int bias_part = divide((int)threadIdx.x, d.by_filters, bias_k), bias_parts = quotient((int)blockDim.x, d.by_filters);
    const bool sums_bias = db && blockIdx.z == 0 && bias_part < bias_parts;
    float acc[KG][FLOATS] = {}, bias_sum = 0.0f;

    await_predecessors();
    for (int n0 = blockIdx.x * d.images; n0 < d.batch; n0 += gridDim.x * d.images) {
        const int windows = min(d.images, d.batch - n0) * d.windows;
        __syncthreads();
#pragma unroll 4
        for (int e = threadIdx.x; e < d.images * d.patch_h * d.patch_row; e += blockDim.x) {
            int column, h;
            int image = divide(divide(e, d.by_patch_row, column), d.by_patch_h, h), n = n0 + image;
            float *to = patch + image * d.image_size + h * d.pitch + column;
            h -= g.pad_h, column -= g.pad_w * g.c;
            bool live = n < d.batch && (u32)h < (u32)g.h && (u32)column < (u32)(g.w * g.c);
            copy_element(to, live ? x + (n * g.h + h) * g.w * g.c + column : x, live);
        }
        copy_async_commit();
        for (int e = threadIdx.x; e < windows * d.filters; e += blockDim.x) {
            int k, of_image, p, q, window = divide(e, d.by_filters, k), image = divide(window, d.by_windows, of_image);
            p = divide(of_image, g.by_q, q);
            float error = 0.0f;
            int from = image * d.image_size + 2 * p * d.pitch + 2 * q * g.c;
            if (k0 + k < g.k) {
                int at = n0 * d.windows + window;
                error = load<1>(dy + at * g.k + k0 + k).v[0];
                int winner = idx[at * ((g.k + 3) / 4) + (k0 + k) / 4] >> 2 * ((k0 + k) % 4) & 3;
                from += (winner >> 1) * d.pitch + (winner & 1) * g.c;
            }
            winners[2 * e] = error;
            winners[2 * e + 1] = __uint_as_float(address_of(patch + from));
        }
        copy_async_wait<0>();
        __syncthreads();

        for (int window = part; window < windows; window += d.parts) {
            const float *list = winners + 2 * (window * d.filters + group * KG);
#pragma unroll
            for (int e = 0; e < KG; e += 2) {
                float4 two = load4(list + 2 * e);
                u32 first = __float_as_uint(two.y), second = __float_as_uint(two.w);
#pragma unroll
                for (int i = 0; i < FLOATS; ++i) acc[e][i] += two.x * read_shared(first + offset[i]);
#pragma unroll
                for (int i = 0; i < FLOATS; ++i) acc[e + 1][i] += two.z * read_shared(second + offset[i]);
            }
        }
        if (sums_bias)
            for (int window = bias_part; window < windows; window += bias_parts)
                bias_sum += winners[2 * (window * d.filters + bias_k)];
    }

    const int row_size = g.k * g.taps_c + (db ? g.k : 0);
    float *dw_out = partial ? partial + blockIdx.x * row_size : dw;
    float *db_out = partial ? dw_out + g.k * g.taps_c : db;
    if (db && blockIdx.z == 0) {
        __syncthreads();
        if (bias_part < bias_parts) shared[threadIdx.x] = bias_sum;
        __syncthreads();
        if ((int)threadIdx.x < d.filters && k0 + (int)threadIdx.x < g.k) {
            float sum = 0.0f;
#pragma unroll 8
            for (int i = 0; i < bias_parts; ++i) sum += shared[i * d.filters + threadIdx.x];
            db_out[k0 + threadIdx.x] = sum;
        }
    }
    // The parts' sums, one part after the other.
    float *sums = shared + group * KG * FLOATS * 32 + lane;
    for (int turn = d.parts - 1; turn > 0; --turn) {
        __syncthreads();
        if (part == turn) {
#pragma unroll
            for (int e = 0; e < KG; ++e)
#pragma unroll
                for (int i = 0; i < FLOATS; ++i) sums[(e * FLOATS + i) * 32] = acc[e][i];
        }
        __syncthreads();
        if (part == turn - 1) {
#pragma unroll
            for (int e = 0; e < KG; ++e)
#pragma unroll
                for (int i = 0; i < FLOATS; ++i) acc[e][i] += sums[(e * FLOATS + i) * 32];
        }
    }
    if (part != 0) return;
#pragma unroll
    for (int e = 0; e < KG; ++e) {
        int k = k0 + group * KG + e;
#pragma unroll
        for (int i = 0; i < FLOATS; ++i) {
            int j = j0 + 32 * i + lane;
            if (k < g.k && j < g.taps_c) dw_out[k * g.taps_c + j] = acc[e][i];
        }
    }
}
