// Gradients of a depthwise convolution's filters and bias; x (N,H,W,C), dy (N,P,Q,C), dw (C,R,S) and db (C) f32.
//
//     dw[c,r,s] = sum_{n,p,q} x[n, p*stride+r-top, q*stride+s-left, c] * dy[n,p,q,c]        db[c] = sum_{n,p,q} dy[n,p,q,c]
//
// One-dimensional grid: (runs) x (slices of the channels, innermost); block (channels / VEC of a slice, items). A block takes
// every `runs`-th group of items (conv_depthwise.cuh); a thread keeps the sums of its channels' taps, and the BEHIND + 1 rows of
// dy that a row of x meets. At the end the block's threads are added in their order, into row `run` of `partial` (dw, then db),
// which conv_wgrad_sum adds up; without `partial` there is one run, and it writes dw and db.
// Bytes: x and dy once, the halo of x again. Preconditions: those of conv_depthwise.cu.
#include "conv_depthwise.cuh"

extern "C" __global__ void __launch_bounds__(128, BLOCKS)
    conv_depthwise_wgrad(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ dy, float *__restrict__ dw,
                         float *__restrict__ db, float *__restrict__ partial, Depthwise g, int runs) {
    constexpr int Seen = (COLUMNS - 1) * STRIDE + FILTER;
    // After so many rows each row of dy is in its own registers again: nothing moves. (Of 7x7 filters the code would be too long.)
    constexpr int Period = FILTER <= 5 ? BEHIND + 1 : 1;
    DYNAMIC_SHARED(float, shared);  // [tap of a row][item][channel of the slice]
    await_predecessors();
    int slice;
    const int run = divide(blockIdx.x, g.by_slices, slice), channel = (slice * blockDim.x + threadIdx.x) * VEC;
    const int x_step = g.w * g.c, dy_step = g.q * g.c;
    float sums[TAPS][VEC] = {}, bias_sums[VEC] = {};

    for (int item = run * blockDim.y + threadIdx.y; item < g.items && channel < g.c; item += runs * blockDim.y) {
        const Spot spot = spot_of(item, slice, g);
        const int left = spot.column * STRIDE - g.left, end = min(spot.row + g.rows, g.p), stop = end + BEHIND;
        const u32 mask = columns_inside<Seen>(left, g.w), dy_mask = columns_inside<COLUMNS>(spot.column, g.q);
        int row = spot.row * STRIDE - g.top, dy_row = spot.row;  // the next to be fetched
        const int last = min((end - 1) * STRIDE - g.top + FILTER, g.h);
        const ELEMENT *from = x + ((long long)spot.image * g.h + row) * x_step + (long long)left * g.c + channel;
        const ELEMENT *error = dy + ((long long)spot.image * g.p + dy_row) * dy_step + (long long)spot.column * g.c + channel;

        float errors[BEHIND + 1][COLUMNS][VEC] = {};  // rows of dy, the newest last
        Pixels<Seen> ahead[AHEAD];
        Pixels<COLUMNS> errors_ahead;
        auto fetch_row = [&](Pixels<Seen> &pixels) {
            pixels = fetch_pixels<Seen>(from, g.c, row >= 0 && row < last ? mask : 0);
            ++row, from += x_step;
        };
        auto fetch_error = [&]() {
            errors_ahead = fetch_pixels<COLUMNS>(error, g.c, dy_row < end ? dy_mask : 0);
            ++dy_row, error += dy_step;
        };
        fetch_error();
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) fetch_row(ahead[i]);
        for (int first = spot.row; first < stop; first += Period) {
#pragma unroll
            for (int p = first; p < first + Period; ++p) {
                if (p >= stop) break;
#pragma unroll
                for (int i = 0; i < BEHIND; ++i)
#pragma unroll
                    for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                        for (int e = 0; e < VEC; ++e) errors[i][q][e] = errors[i + 1][q][e];
                widen_pixels(errors_ahead, errors[BEHIND]);
                fetch_error();
                if (db) {
#pragma unroll
                    for (int q = 0; q < COLUMNS; ++q)
#pragma unroll
                        for (int e = 0; e < VEC; ++e) bias_sums[e] += errors[BEHIND][q][e];
                }
#pragma unroll
                for (int j = 0; j < STRIDE; ++j) {
                    const Pixels<Seen> pixels = ahead[0];
#pragma unroll
                    for (int i = 0; i + 1 < AHEAD; ++i) ahead[i] = ahead[i + 1];
                    fetch_row(ahead[AHEAD - 1]);
#pragma unroll
                    for (int at = 0; at < Seen; ++at) {
                        const Floats<VEC> v = widen(pixels.at[at]);
#pragma unroll
                        for (int i = 0; i <= BEHIND; ++i) {
                            const int r = j + (BEHIND - i) * STRIDE;
#pragma unroll
                            for (int q = 0; q < COLUMNS; ++q) {
                                const int s = at - q * STRIDE;
                                if (r >= FILTER || s < 0 || s >= FILTER) continue;
#pragma unroll
                                for (int e = 0; e < VEC; ++e) sums[r * FILTER + s][e] += v.v[e] * errors[i][q][e];
                            }
                        }
                    }
                }
            }
        }
    }

    write_gradients(sums, bias_sums, shared, g.c, slice * blockDim.x * VEC, run, dw, db, partial);
}
