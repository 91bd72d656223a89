// Losses: the mean over rows or elements and, where `dlogits` (`dpred`) is not null, the gradient.
//   cross_entropy       loss = mean_n -sum_c t[n,c] * log softmax(logits[n])_c,  t = (1-eps)*onehot(label) + eps/classes
//                       dlogits = (softmax - t) / N;  correct = rows whose first largest logit is the label
//   mean_squared_error  loss = mean (pred - target)^2;  dpred = 2 * (pred - target) / size
//   sum_partials        loss and correct from the partial sums of many blocks
//
// cross_entropy: 2^lanes_log2 lanes of a warp work on one row (as many as there are classes, at most 32), blocks on runs of
//   rows; a row is read three times (largest, sum, gradient), the last two from cache. A label outside 0..classes-1 makes
//   the loss NaN.
// mean_squared_error: a thread does four elements at a time, blocks take turns.
// One block: the loss is written at once. More: each writes a partial sum, and sum_partials, one block, adds them.
// All sums run in an order that depends on the sizes alone.
// Bytes: predictions and targets read once, the gradient written once.
// Preconditions: tensors start on 16 bytes; the gradient may be the predictions' own memory:
// a lane reads and writes the same elements.
#include "common.cuh"

#define THREADS 1024  // of the largest block

// Sum over the block, which may have fewer than THREADS threads; thread 0 gets it.
__device__ __forceinline__ float sum_threads(float v, float *scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x < blockDim.x / 32 ? scratch[threadIdx.x] : 0.0f;
    if (threadIdx.x < 32) v = warp_sum(v);
    return v;
}

__device__ __forceinline__ int count_threads(int v, int *scratch) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < (int)blockDim.x / 32; ++warp) v += scratch[warp];
    return v;
}

// loss and correct: of the whole batch where there is one block; else element blockIdx.x of the partial sums, unscaled.
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy(const float *logits, const int *__restrict__ labels, float *loss, int *correct, float *dlogits, int rows,
              int classes, int lanes_log2, float smoothing) {
    __shared__ float sums[THREADS / 32];
    __shared__ int counts[THREADS / 32];
    int lanes = 1 << lanes_log2, lane = threadIdx.x & (lanes - 1);
    int rows_a_turn = gridDim.x * (blockDim.x >> lanes_log2);
    int row = blockIdx.x * (blockDim.x >> lanes_log2) + (threadIdx.x >> lanes_log2);
    float total = 0.0f;
    int hits = 0;
    // All lanes of a warp go on as long as its first has a row: they meet in the shuffles.
    for (int turn = 0; turn < rows; turn += rows_a_turn) {
        bool live = turn + row < rows;
        size_t start = (size_t)(live ? turn + row : 0) * classes;
        const float *x = logits + start;
        int label = live ? labels[turn + row] : 0;

        float largest = __int_as_float(0xff800000);
        int winner = classes;
        for (int c = lane; live && c < classes; c += lanes) {
            float v = x[c];
            if (beats(v, largest) || winner == classes) largest = v, winner = c;
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            float v = __shfl_xor_sync(0xffffffffu, largest, offset);
            int c = __shfl_xor_sync(0xffffffffu, winner, offset);
            if (c < classes && (winner == classes || beats(v, largest) || (c < winner && !beats(largest, v))))
                largest = v, winner = c;
        }

        float sum = 0.0f, shifted = 0.0f, own = 0.0f;  // of exp(z), of z, and z of the label; z = x - largest
        for (int c = lane; live && c < classes; c += lanes) {
            float z = x[c] - largest;
            sum += expf(z);
            shifted += z;
            if (c == label) own = z;
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            shifted += __shfl_xor_sync(0xffffffffu, shifted, offset);
            own += __shfl_xor_sync(0xffffffffu, own, offset);
        }

        if (live && lane == 0) {
            float row_loss = logf(sum) - (1.0f - smoothing) * own;
            if (smoothing != 0.0f) row_loss -= smoothing / classes * shifted;
            total += label >= 0 && label < classes ? row_loss : __int_as_float(0x7fc00000);
            hits += winner == label;
        }
        if (dlogits) {
            float share = 1.0f / rows, rest = smoothing / classes;
            for (int c = lane; live && c < classes; c += lanes) {
                float target = c == label ? 1.0f - smoothing + rest : rest;
                dlogits[start + c] = (expf(x[c] - largest) / sum - target) * share;
            }
        }
    }
    total = sum_threads(total, sums);
    hits = count_threads(hits, counts);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = gridDim.x == 1 ? total / rows : total;
        correct[blockIdx.x] = hits;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
mean_squared_error(const float *pred, const float *__restrict__ target, float *loss, float *dpred, long long n) {
    __shared__ float sums[THREADS / 32];
    float total = 0.0f, scale = 2.0f / (float)n;
    long long step = 4LL * gridDim.x * blockDim.x;
    for (long long i = 4LL * (blockIdx.x * blockDim.x + threadIdx.x); i < n; i += step) {
        Floats<4> a = load_part(pred + i, n - i), b = load_part(target + i, n - i);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            a.v[e] -= b.v[e];
            total += a.v[e] * a.v[e];
            a.v[e] *= scale;
        }
        if (dpred) store_part(dpred + i, a, n - i);
    }
    total = sum_threads(total, sums);
    if (threadIdx.x == 0) loss[blockIdx.x] = gridDim.x == 1 ? total / (float)n : total;
}

// One block. corrects null: there is nothing to count.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_partials(const float *losses, const int *corrects, float *loss, int *correct, int partials, float divisor) {
    __shared__ float sums[THREADS / 32];
    __shared__ int counts[THREADS / 32];
    float total = 0.0f;
    int hits = 0;
    for (int i = threadIdx.x; i < partials; i += blockDim.x) {
        total += losses[i];
        if (corrects) hits += corrects[i];
    }
    total = sum_threads(total, sums);
    hits = count_threads(hits, counts);
    if (threadIdx.x == 0) {
        *loss = total / divisor;
        if (corrects) *correct = hits;
    }
}
