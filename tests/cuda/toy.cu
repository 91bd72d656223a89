// Kernels for tests of the executor: small enough to know every result, with each kind of argument that there is.
#include "toy.cuh"

struct Scale {
    const float *x;
    int count;
    float factor;
};

struct Pair {
    Scale scale;
    unsigned char *flag;
};

// y[i] = x[i] * factor + add
extern "C" __global__ void __launch_bounds__(256) scale_add(float *y, Pair pair, int n, long long add) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && i < pair.scale.count) y[i] = twice(pair.scale.x[i]) * 0.5f * pair.scale.factor + (float)add;
}

// y[i] = x[i] + 1, read after `spin_ns` and passed through dynamic shared memory
extern "C" __global__ void __launch_bounds__(256) slow_increment(float *y, const float *x, int n, unsigned spin_ns) {
    extern __shared__ float tile[];
    unsigned long long start = nanoseconds();
    while (nanoseconds() - start < spin_ns) {}
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    tile[threadIdx.x] = i < n ? ((const volatile float *)x)[i] : 0.f;
    if (i < n) y[i] = tile[threadIdx.x] + 1.f;
}

// state[0] += 1; log[state[0]] = x[0]
extern "C" __global__ void write_log(int *state, float *log, const float *x, int rows) {
    int row = state[0];
    if (row < rows) log[row] = x[0];
    state[0] = row + 1;
}

// y[i] = x[(i + shift) % n] * 1664525 + i, and the other elements of y as they are: blocks read what other blocks wrote
extern "C" __global__ void __launch_bounds__(256) mix(unsigned *y, const unsigned *x, int count, int n, int shift) {
    launch_dependents();
    await_predecessors();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = x[(i + shift) % n] * 1664525u + i;
}

// y = nanoseconds at the start, after the wait and, `spin_ns` later, at the end
extern "C" __global__ void stamp(unsigned *y, unsigned spin_ns) {
    launch_dependents();
    unsigned long long start = nanoseconds();
    await_predecessors();
    unsigned long long waited = nanoseconds(), end = waited;
    while (end - waited < spin_ns) end = nanoseconds();
    y[0] = (unsigned)start, y[1] = (unsigned)waited, y[2] = (unsigned)end;
}

extern "C" __global__ void no_parameters() {}

extern "C" __global__ void fault() { *(volatile float *)8 = 1.f; }
