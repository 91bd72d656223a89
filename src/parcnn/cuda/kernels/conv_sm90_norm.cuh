// Sums that a batch norm in training needs of the errors that dgrad writes for it: with xhat = (x - mean) * rstd and
// dz = dx * act'(gamma*xhat + beta), which takes the place of dx, dbeta = sum dz and dgamma = sum dz*xhat; of dz as it is stored,
// so after the rounding; of pixels inside the image only.
//
// x comes into the staged tile's place, where dz then goes. Each patch of pixels gives a row of partial sums, dgammas
// and dbetas, which batch_norm_sum_gradients adds.
#pragma once

#include "conv_sm90_moments.cuh"

// The batch norm's, (C) each.
struct Norm {
    const float *gamma, *beta, *mean, *rstd;
};

// What the batch norm does to the thread's two channels, k and k + 8. scale: gamma * rstd.
struct NormChannels {
    float mean[2], scale[2], beta[2];

    __device__ __forceinline__ NormChannels(const Norm &norm, int k, int channels) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int c = min(k + 8 * i, channels - 1);
            mean[i] = norm.mean[c], scale[i] = norm.gamma[c] * norm.rstd[c], beta[i] = norm.beta[c];
        }
    }
};

// Of the thread's two channels.
struct NormSums {
    float errors[2] = {}, products[2] = {};  // sums of dz and of dz * (x - mean)

    // Write the tile's rows, dz, over x's, and add them up.
    template <int Pixels>
    __device__ __forceinline__ void stage_tile(const float (&sums)[Pixels / 2], const NormChannels &norm, bool relu, const Inside &inside, int ends,
                                               u32 staging, int warp, int lane) {
        const u32 at = matrix_address(staging, warp, lane);
        const int whole = inside.whole[ends];
#pragma unroll
        for (int eight = 0; eight < Pixels / 8; eight += 2) {
            const int matrices = eight + 1 < Pixels / 8 ? 4 : 2;
            u32 x[4], dz[4];
            if (matrices == 4)
                load_matrices(at + eight * MATRIX_PAIR_BYTES, x[0], x[1], x[2], x[3]);
            else
                load_matrices(at + eight * MATRIX_PAIR_BYTES, x[0], x[1]);
            float centred[4][2], error[4][2];
#pragma unroll
            for (int i = 0; i < matrices; ++i) {
                const float *s = sums + 4 * eight + 2 * i;
                const int k = i % 2;
                centred[i][0] = low_bf16(x[i]) - norm.mean[k], centred[i][1] = high_bf16(x[i]) - norm.mean[k];
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    error[i][e] = relu ? activation_dgrad<ACT_RELU>(s[e], centred[i][e] * norm.scale[k] + norm.beta[k]) : s[e];
                dz[i] = round_bf16x2(error[i][0], error[i][1]);
                error[i][0] = low_bf16(dz[i]), error[i][1] = high_bf16(dz[i]);
            }
            if (matrices == 4)
                store_matrices(at + eight * MATRIX_PAIR_BYTES, dz[0], dz[1], dz[2], dz[3]);
            else
                store_matrices(at + eight * MATRIX_PAIR_BYTES, dz[0], dz[1]);
            if ((eight + matrices / 2) * 8 > whole) {
                const u32 bits = inside.pixels[ends][eight / 4] >> (eight % 4 * 8 + lane % 4 * 2);
#pragma unroll
                for (int i = 0; i < matrices; ++i) {  // (x beyond the tile's pixels is whatever was there)
                    if (!(bits >> i / 2 * 8 & 1)) error[i][0] = centred[i][0] = 0.0f;
                    if (!(bits >> i / 2 * 8 & 2)) error[i][1] = centred[i][1] = 0.0f;
                }
            }
#pragma unroll
            for (int i = 0; i < matrices; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) errors[i % 2] += error[i][e], products[i % 2] += error[i][e] * centred[i][e];
        }
    }

    // Write what the warp has of the channels k and k + 8.
    __device__ __forceinline__ void write(const PartialRows &to, const Norm &norm, int row, int k, int lane) {
        const size_t plane = (size_t)to.rows * to.channels;
        float *at = to.partial + (size_t)row * to.channels + k;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            errors[i] = sum_of_four(errors[i]), products[i] = sum_of_four(products[i]);
            if (lane % 4 != 0 || k + 8 * i >= to.channels) continue;
            at[8 * i] = products[i] * norm.rstd[k + 8 * i];
            at[plane + 8 * i] = errors[i];
        }
    }
};
