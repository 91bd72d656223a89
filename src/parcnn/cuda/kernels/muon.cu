// Muon's own passes, for a group of weights in one launch each; the matrix products between them are gemm's. A weight is a
// matrix rows x columns; its direction x is the wide one of that and its transpose, padded by zeros to multiples of 8.
//   muon_momentum   buf = momentum*buf + g;  partial[block] = sum of squares of u = nesterov ? g + momentum*buf : buf
//   muon_direction  x = u / (sqrt(sum of the weight's partial) + eps)
//   muon_norm       partial[block] = sum of squares of w
//   muon_update     w *= keep, and where there are partial sums keep *= sqrt(rows) / |w|;  w -= rate*factor * x, where
//                   rate = hyper[4*state[0] + 3] and keep = 1 - rate*weight_decay;  copy = w in bf16, where there is one
//
// Parallel over elements of the weight (muon_direction: of x): a block of 256 threads does 1024 of one weight, a thread 4.
// Bytes: muon_momentum reads g and buf, writes buf; muon_direction reads both again and writes x; muon_norm reads w;
//   muon_update reads w and x, writes w and its copy. Of a transpose, neighbours lie a row apart.
// Precondition: tensors start on 16 bytes and have less than 2^31 elements.
//
// Macro: ELEMENT, of x: float or bf16. muon_momentum and muon_norm have none.
#include "common.cuh"

#define THREADS 256
#define CHUNK (4 * THREADS)
#define MAX_GROUP 24
#define COLUMN 3  // of hyper: Muon's learning rate

struct Parameter {
    float *tensor;       // buf or w, which is written
    const float *other;  // g
    void *x;
    bf16 *copy;  // of w, or null
};

struct Group {
    Parameter parameter[MAX_GROUP];
    int rows[MAX_GROUP], columns[MAX_GROUP];
    int end[MAX_GROUP];  // blocks of this weight and of all before it; 2^31 - 1 where there is none
    int sums[MAX_GROUP];  // partial sums of this weight and of all before it
    float factor[MAX_GROUP];
};

__device__ __forceinline__ int find_slot(const Group &group, int &first) {
    int slot = 0;
    first = 0;
#pragma unroll
    for (int s = 0; s < MAX_GROUP - 1; ++s)
        if ((int)blockIdx.x >= group.end[s]) slot = s + 1, first = group.end[s];
    return slot;
}

// The root of the sum of the weight's partial sums, in a fixed order; every thread gets it.
__device__ __forceinline__ float norm_of(const Group &group, int slot, const float *partial, float *scratch) {
    float sum = 0.0f;
    for (int i = (slot ? group.sums[slot - 1] : 0) + threadIdx.x; i < group.sums[slot]; i += THREADS) sum += partial[i];
    return sqrtf(block_sum<THREADS>(sum, scratch));
}

// Rows of a direction in memory.
__device__ __forceinline__ int padded(int side) { return (side + 7) / 8 * 8; }

extern "C" __global__ void __launch_bounds__(THREADS)
muon_momentum(const __grid_constant__ Group group, float *partial, float momentum, int nesterov) {
    __shared__ float scratch[THREADS / 32];
    int first, slot = find_slot(group, first);
    await_predecessors();
    const Parameter &own = group.parameter[slot];
    const int i = ((int)blockIdx.x - first) * CHUNK + 4 * threadIdx.x, count = group.rows[slot] * group.columns[slot] - i;
    Floats<4> g = load_part(own.other + i, count), buf = load_part(own.tensor + i, count);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        buf.v[e] = momentum * buf.v[e] + g.v[e];
        float u = nesterov ? g.v[e] + momentum * buf.v[e] : buf.v[e];
        sum += u * u;
    }
    store_part(own.tensor + i, buf, count);
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
muon_norm(const __grid_constant__ Group group, float *partial) {
    __shared__ float scratch[THREADS / 32];
    int first, slot = find_slot(group, first);
    await_predecessors();
    const int i = ((int)blockIdx.x - first) * CHUNK + 4 * threadIdx.x, count = group.rows[slot] * group.columns[slot] - i;
    Floats<4> w = load_part(group.parameter[slot].tensor + i, count);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum += w.v[e] * w.v[e];
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

#ifdef ELEMENT

extern "C" __global__ void __launch_bounds__(THREADS)
muon_direction(const __grid_constant__ Group group, const float *partial, float momentum, int nesterov, float eps) {
    __shared__ float scratch[THREADS / 32];
    int first, slot = find_slot(group, first);
    await_predecessors();
    const Parameter &own = group.parameter[slot];
    const int rows = group.rows[slot], columns = group.columns[slot];
    const bool tall = rows > columns;
    const int x_rows = tall ? columns : rows, x_columns = tall ? rows : columns, width = padded(x_columns);
    const int i = ((int)blockIdx.x - first) * CHUNK + 4 * threadIdx.x, r = i / width, c = i % width;
    Floats<4> u = splat<4>(0.0f);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (r >= x_rows || c + e >= x_columns) continue;
        const int at = tall ? (c + e) * columns + r : r * columns + c + e;
        const float buf = own.tensor[at];
        u.v[e] = nesterov ? own.other[at] + momentum * buf : buf;
    }
    const float scale = 1.0f / (norm_of(group, slot, partial, scratch) + eps);
#pragma unroll
    for (int e = 0; e < 4; ++e) u.v[e] *= scale;
    if (i < padded(x_rows) * width) store<4>(static_cast<ELEMENT *>(own.x) + i, u);
}

extern "C" __global__ void __launch_bounds__(THREADS)
muon_update(const __grid_constant__ Group group, const float *hyper, const int *state, const float *partial, float weight_decay) {
    __shared__ float scratch[THREADS / 32];
    int first, slot = find_slot(group, first);
    await_predecessors();
    const int step = state[0];
    const Parameter &own = group.parameter[slot];
    const int rows = group.rows[slot], columns = group.columns[slot];
    const bool tall = rows > columns;
    const int width = padded(tall ? rows : columns);
    const ELEMENT *x = static_cast<const ELEMENT *>(own.x);
    const int i = ((int)blockIdx.x - first) * CHUNK + 4 * threadIdx.x, count = rows * columns - i;
    Floats<4> w = load_part(own.tensor + i, count), u = splat<4>(0.0f);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (e >= count) continue;
        const int r = (i + e) / columns, c = (i + e) % columns;
        u.v[e] = load<1>(x + (tall ? c * width + r : r * width + c)).v[0];
    }
    const float rate = hyper[4 * (size_t)step + COLUMN];
    float keep = 1.0f - rate * weight_decay;
    if (partial) {
        const float norm = norm_of(group, slot, partial, scratch);
        if (norm != 0.0f) keep *= sqrtf((float)rows) / norm;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) w.v[e] = keep * w.v[e] - rate * group.factor[slot] * u.v[e];
    store_part(own.tensor + i, w, count);
    if (own.copy) store_part(own.copy + i, w, count);
}

#endif
