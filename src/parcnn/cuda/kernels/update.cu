// Optimizer updates of a group of parameters in one launch. g: gradient, w: weight; lr and the bias corrections come from
// row state[0] of hyper, so that a captured launch stays valid.
//   sgd    g += weight_decay*w;  buf = g at state[1] == 0, else momentum*buf + (1-dampening)*g;
//          g = nesterov ? g + momentum*buf : buf;  w -= lr*g
//   adam   g += weight_decay*w, or decoupled w *= 1 - lr*weight_decay;  m += (1-beta1)*(g-m);
//          v = beta2*v + (1-beta2)*g*g;  w -= lr/hyper[1] * m / (sqrt(v/hyper[2]) + eps)
//   copy = w in bf16, of parameters that have one
//
// Parallel over elements: a block of 256 threads does 1024 elements of one parameter, a thread 4. Each block finds its
//   parameter in the group's table, which lies in the argument block.
// Bytes: w, g and the buffers read once; w, its copy and the buffers written once.
// Precondition: tensors start on 16 bytes.
#include "common.cuh"

#define THREADS 256
#define CHUNK (4 * THREADS)
#define MAX_GROUP 24

struct Parameter {
    float *w;
    const float *g;
    float *buffer[2];  // momentum; or Adam's m and v
    bf16 *copy;        // or null
};

struct Group {
    Parameter parameter[MAX_GROUP];
    int size[MAX_GROUP];
    int end[MAX_GROUP];  // blocks of this parameter and of all before it; 2^31 - 1 where there is none
};

// The elements of a thread: it reads them before it waits for the learning rate, which lies behind two loads.
template <int BUFFERS> struct Elements {
    float *w, *buffer[2];
    bf16 *copy;
    int count;  // below 1: none; above 4: four
    Floats<4> w4, g4, buffer4[2];
};

template <int BUFFERS> __device__ __forceinline__ Elements<BUFFERS> load_elements(const Group &group) {
    int slot = 0, first = 0;
#pragma unroll
    for (int s = 0; s < MAX_GROUP - 1; ++s)
        if ((int)blockIdx.x >= group.end[s]) slot = s + 1, first = group.end[s];
    const Parameter &p = group.parameter[slot];
    int i = ((int)blockIdx.x - first) * CHUNK + 4 * threadIdx.x;
    Elements<BUFFERS> own;
    own.count = group.size[slot] - i;
    own.w = p.w + i;
    own.copy = p.copy ? p.copy + i : nullptr;
    own.w4 = load_part(own.w, own.count);
    own.g4 = load_part(p.g + i, own.count);
#pragma unroll
    for (int b = 0; b < BUFFERS; ++b) {
        own.buffer[b] = p.buffer[b] + i;
        own.buffer4[b] = load_part(own.buffer[b], own.count);
    }
    return own;
}

template <int BUFFERS> __device__ __forceinline__ void store_elements(const Elements<BUFFERS> &own) {
    store_part(own.w, own.w4, own.count);
    if (own.copy) store_part(own.copy, own.w4, own.count);
#pragma unroll
    for (int b = 0; b < BUFFERS; ++b) store_part(own.buffer[b], own.buffer4[b], own.count);
}

extern "C" __global__ void __launch_bounds__(THREADS)
sgd(const __grid_constant__ Group group, const float *hyper, const int *state, float weight_decay) {
    await_predecessors();
    int step = state[0];
    Elements<0> own = load_elements<0>(group);
    float lr = hyper[4 * (size_t)step];
#pragma unroll
    for (int e = 0; e < 4; ++e) own.w4.v[e] -= lr * (own.g4.v[e] + weight_decay * own.w4.v[e]);
    store_elements(own);
}

extern "C" __global__ void __launch_bounds__(THREADS)
sgd_momentum(const __grid_constant__ Group group, const float *hyper, const int *state, float weight_decay, float momentum,
             float one_less_dampening, int nesterov) {
    await_predecessors();
    int step = state[0];
    bool first = state[1] == 0;
    Elements<1> own = load_elements<1>(group);
    float lr = hyper[4 * (size_t)step];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        float &w = own.w4.v[e], &buf = own.buffer4[0].v[e], g = own.g4.v[e] + weight_decay * w;
        buf = first ? g : momentum * buf + one_less_dampening * g;
        w -= lr * (nesterov ? g + momentum * buf : buf);
    }
    store_elements(own);
}

extern "C" __global__ void __launch_bounds__(THREADS)
adam(const __grid_constant__ Group group, const float *hyper, const int *state, float weight_decay, int decoupled,
     float one_less_beta1, float beta2, float one_less_beta2, float eps) {
    await_predecessors();
    int step = state[0];
    Elements<2> own = load_elements<2>(group);
    const float *row = hyper + 4 * (size_t)step;
    float lr = row[0], correction1 = row[1], correction2 = row[2];
    float rate = lr / correction1, decay = decoupled ? lr * weight_decay : 0.0f, penalty = decoupled ? 0.0f : weight_decay;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        float &w = own.w4.v[e], &m = own.buffer4[0].v[e], &v = own.buffer4[1].v[e];
        w -= decay * w;
        float g = own.g4.v[e] + penalty * w;
        m += one_less_beta1 * (g - m);
        v = beta2 * v + one_less_beta2 * g * g;
        w -= rate * m / (sqrtf(v / correction2) + eps);
    }
    store_elements(own);
}
