// Optimizer updates of a group of parameters in one launch. g: gradient, w: weight; lr and the bias corrections come from
// row state[0] of hyper, so that a captured launch stays valid.
//   sgd    g += weight_decay*w;  buf = g at state[1] == 0, else momentum*buf + (1-dampening)*g;
//          g = nesterov ? g + momentum*buf : buf;  w -= lr*g
//   adam   g += weight_decay*w, or decoupled w *= 1 - lr*weight_decay;  m += (1-beta1)*(g-m);
//          v = beta2*v + (1-beta2)*g*g;  w -= lr/hyper[1] * m / (sqrt(v/hyper[2]) + eps)
//
// Parallel over elements: a block of 256 threads does 1024 elements of one parameter, a thread 4. Each block finds its
//   parameter in the group's table, which lies in the argument block.
// Bytes: w, g and the buffers read once; w and the buffers written once.
// Precondition: tensors start on 16 bytes.
#include "common.cuh"

#define THREADS 256
#define CHUNK (4 * THREADS)
#define MAX_GROUP 24

struct Parameter {
    float *w;
    const float *g;
    float *buffer[2];  // momentum; or Adam's m and v
};

struct Group {
    Parameter parameter[MAX_GROUP];
    int size[MAX_GROUP];
    int end[MAX_GROUP];  // blocks of this parameter and of all before it
};

// Calls update(w, g, buffer0, buffer1) for every element that this thread owns; BUFFERS of the buffers are used.
template <int BUFFERS, class F> __device__ __forceinline__ void for_each(const Group &group, F update) {
    int slot = 0;
    while ((int)blockIdx.x >= group.end[slot]) ++slot;
    const Parameter &p = group.parameter[slot];
    int block = blockIdx.x - (slot ? group.end[slot - 1] : 0);
    int i = block * CHUNK + 4 * threadIdx.x, count = group.size[slot] - i;
    if (count <= 0) return;
    Floats<4> w = load_part(p.w + i, count), g = load_part(p.g + i, count), b0, b1;
    b0 = b1 = splat<4>(0.0f);
    if (BUFFERS > 0) b0 = load_part(p.buffer[0] + i, count);
    if (BUFFERS > 1) b1 = load_part(p.buffer[1] + i, count);
#pragma unroll
    for (int e = 0; e < 4; ++e) update(w.v[e], g.v[e], b0.v[e], b1.v[e]);
    store_part(p.w + i, w, count);
    if (BUFFERS > 0) store_part(p.buffer[0] + i, b0, count);
    if (BUFFERS > 1) store_part(p.buffer[1] + i, b1, count);
}

extern "C" __global__ void __launch_bounds__(THREADS)
sgd(const __grid_constant__ Group group, const float *hyper, const int *state, float weight_decay) {
    float lr = hyper[4 * (size_t)state[0]];
    for_each<0>(group, [=](float &w, float g, float &, float &) { w -= lr * (g + weight_decay * w); });
}

extern "C" __global__ void __launch_bounds__(THREADS)
sgd_momentum(const __grid_constant__ Group group, const float *hyper, const int *state, float weight_decay, float momentum,
             float one_less_dampening, int nesterov) {
    float lr = hyper[4 * (size_t)state[0]];
    bool first = state[1] == 0;
    for_each<1>(group, [=](float &w, float g, float &buf, float &) {
        g += weight_decay * w;
        buf = first ? g : momentum * buf + one_less_dampening * g;
        w -= lr * (nesterov ? g + momentum * buf : buf);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
adam(const __grid_constant__ Group group, const float *hyper, const int *state, float weight_decay, int decoupled,
     float one_less_beta1, float beta2, float one_less_beta2, float eps) {
    const float *row = hyper + 4 * (size_t)state[0];
    float lr = row[0], correction1 = row[1], correction2 = row[2];
    float rate = lr / correction1, decay = decoupled ? lr * weight_decay : 0.0f, penalty = decoupled ? 0.0f : weight_decay;
    for_each<2>(group, [=](float &w, float g, float &m, float &v) {
        w -= decay * w;
        g += penalty * w;
        m += one_less_beta1 * (g - m);
        v = beta2 * v + one_less_beta2 * g * g;
        w -= rate * m / (sqrtf(v / correction2) + eps);
    });
}
