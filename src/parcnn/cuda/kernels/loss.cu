// Losses: the mean over rows or elements and, where `dlogits` (`dpred`) is not null, the gradient.
//   cross_entropy       loss = mean_n -sum_c t[n,c] * log softmax(logits[n])_c,  t = (1-eps)*onehot(label) + eps/classes
//                       dlogits = (softmax - t) / N;  correct = rows whose first largest logit is the label
//   mean_squared_error  loss = mean (pred - target)^2;  dpred = 2 * (pred - target) / size
//   sum_partials        loss and correct from the partial sums of many blocks
//
// cross_entropy: 2^lanes_log2 lanes of a warp work on one row, blocks on runs of rows; a lane keeps KEPT logits of its row in
//   registers, so that a row of at most KEPT * 32 classes is read once. A longer one is read three times (largest, sum,
//   gradient), in turns of as many. A label outside 0..classes-1 makes the loss NaN.
// mean_squared_error: a thread does four elements at a time, blocks take turns.
// One block: the loss is written at once. More: each writes a partial sum, and sum_partials, one block, adds them.
// All sums run in an order that depends on the sizes alone.
// Bytes: predictions and targets read once, the gradient written once.
// Preconditions: tensors start on 16 bytes; the gradient may be the predictions' own memory:
// a lane reads and writes the same elements. KEPT << lanes_log2 is at least `classes`, or lanes_log2 is 5.
// Macros: ELEMENT (float or bf16), the type of predictions and gradients; targets, losses and all sums are floats. KEPT:
// cross_entropy only. sum_partials has none.
#include "common.cuh"

#define THREADS 1024  // of the largest block

// Sums over the block, which may have fewer than THREADS threads; thread 0 gets them.
__device__ __forceinline__ void sum_block(float &total, int &hits) {
    __shared__ float totals[32];
    __shared__ int counts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, offset);
        hits += __shfl_xor_sync(0xffffffffu, hits, offset);
    }
    if (lane == 0) totals[warp] = total, counts[warp] = hits;
    __syncthreads();
    if (warp > 0) return;
    total = lane < warps ? totals[lane] : 0.0f;
    hits = lane < warps ? counts[lane] : 0;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, offset);
        hits += __shfl_xor_sync(0xffffffffu, hits, offset);
    }
}

#ifdef KEPT
#define MOST_THREADS (KEPT > 4 ? 256 : THREADS)  // the more a lane keeps, the more registers it needs

// loss and correct: of the whole batch where there is one block; else element blockIdx.x of the partial sums, unscaled.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
cross_entropy(const ELEMENT *logits, const int *__restrict__ labels, float *loss, int *correct, ELEMENT *dlogits, int rows,
              int classes, int lanes_log2, float smoothing) {
    await_predecessors();
    int lanes = 1 << lanes_log2, lane = threadIdx.x & (lanes - 1), turn_classes = KEPT << lanes_log2;
    int rows_a_turn = gridDim.x * (blockDim.x >> lanes_log2);
    int row = blockIdx.x * (blockDim.x >> lanes_log2) + (threadIdx.x >> lanes_log2);
    float total = 0.0f;
    int hits = 0;
    // All lanes of a warp go on as long as its first has a row: they meet in the shuffles.
    for (int turn = 0; turn < rows; turn += rows_a_turn) {
        bool live = turn + row < rows;
        size_t start = (size_t)(live ? turn + row : 0) * classes;
        int label = live ? labels[turn + row] : 0, own_classes = live ? classes : 0;

        float kept[KEPT];
        auto load_turn = [&](int first) {
#pragma unroll
            for (int k = 0; k < KEPT; ++k) {
                int c = first + lane + (k << lanes_log2);
                if (c < own_classes) kept[k] = load<1>(logits + start + c).v[0];
            }
        };

        float largest = __int_as_float(0xff800000);
        int winner = classes;
        for (int first = 0; first < classes; first += turn_classes) {
            load_turn(first);
#pragma unroll
            for (int k = 0; k < KEPT; ++k) {
                int c = first + lane + (k << lanes_log2);
                if (c < own_classes && (beats(kept[k], largest) || winner == classes)) largest = kept[k], winner = c;
            }
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            float v = __shfl_xor_sync(0xffffffffu, largest, offset);
            int c = __shfl_xor_sync(0xffffffffu, winner, offset);
            if (c < classes && (winner == classes || beats(v, largest) || (c < winner && !beats(largest, v))))
                largest = v, winner = c;
        }

        float sum = 0.0f, shifted = 0.0f, own = 0.0f;  // of exp(z), of z, and z of the label; z = x - largest
        for (int first = 0; first < classes; first += turn_classes) {
            if (classes > turn_classes) load_turn(first);
#pragma unroll
            for (int k = 0; k < KEPT; ++k) {
                int c = first + lane + (k << lanes_log2);
                if (c < own_classes) {
                    float z = kept[k] - largest;
                    kept[k] = expf(z);
                    sum += kept[k];
                    shifted += z;
                    if (c == label) own = z;
                }
            }
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            shifted += __shfl_xor_sync(0xffffffffu, shifted, offset);
            own += __shfl_xor_sync(0xffffffffu, own, offset);
        }

        if (dlogits) {
            float share = 1.0f / rows, scale = 1.0f / sum, rest = smoothing / classes;
            for (int first = 0; first < classes; first += turn_classes) {
                if (classes > turn_classes) load_turn(first);
#pragma unroll
                for (int k = 0; k < KEPT; ++k) {
                    int c = first + lane + (k << lanes_log2);
                    if (c < own_classes) {
                        float e = classes > turn_classes ? expf(kept[k] - largest) : kept[k];
                        float target = c == label ? 1.0f - smoothing + rest : rest;
                        store<1>(dlogits + start + c, {(e * scale - target) * share});
                    }
                }
            }
        }
        if (live && lane == 0) {
            float row_loss = logf(sum) - (1.0f - smoothing) * own;
            if (smoothing != 0.0f) row_loss -= smoothing / classes * shifted;
            total += label >= 0 && label < classes ? row_loss : __int_as_float(0x7fc00000);
            hits += winner == label;
        }
    }
    sum_block(total, hits);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = gridDim.x == 1 ? total / rows : total;
        correct[blockIdx.x] = hits;
    }
}
#elif defined(ELEMENT)
extern "C" __global__ void __launch_bounds__(THREADS)
mean_squared_error(const ELEMENT *pred, const float *__restrict__ target, float *loss, ELEMENT *dpred, long long n) {
    await_predecessors();
    float total = 0.0f, scale = 2.0f / (float)n;
    int none = 0;
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
    sum_block(total, none);
    if (threadIdx.x == 0) loss[blockIdx.x] = gridDim.x == 1 ? total / (float)n : total;
}
#else
// One block. corrects null: there is nothing to count.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_partials(const float *losses, const int *corrects, float *loss, int *correct, int partials, float divisor) {
    await_predecessors();
    float total = 0.0f;
    int hits = 0;
    for (int i = threadIdx.x; i < partials; i += blockDim.x) {
        total += losses[i];
        if (corrects) hits += corrects[i];
    }
    sum_block(total, hits);
    if (threadIdx.x == 0) {
        *loss = total / divisor;
        if (corrects) *correct = hits;
    }
}
#endif
