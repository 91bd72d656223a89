// The borders of a step. state is int32[8] (parcnn.ops.feed): [0] step in this pass, [1] step since training began,
// [2] first sample of the batch in `order`, [3], [4] random key.
//   gather_batch   x[i] = images[order[state[2] + i]] * scale[c] + shift[c], augmented; targets[i] likewise, unscaled
//   end_step       losses[state[0]] = loss; corrects[state[0]] = correct; state[0] += 1; state[1] += train; state[2] += batch
//   write_output   out[state[2] + i] = y[i]
//
// gather_batch: grid (batch, chunks of a sample); a block does 4 * 256 groups of VEC neighbouring elements of one sample,
//   whose random words one of its threads draws. The first chunk also copies the sample's targets.
// write_output: a block of 256 threads does 1024 words, which it moves as bits.
// Bytes: every element read once and written once.
// Preconditions: order's entries are samples of `images`; tensors start on 16 bytes; VEC = 4 only with a sample of a multiple
// of 4 elements, with augmentation a row of as many; WORD divides a row. Product and sum round apart (no fused multiply-add),
// as NumPy rounds them.
// Macros: IMAGE (u8 or float), ELEMENT (float or bf16, the type of x), VEC, AUGMENT (0 or 1): gather_batch only.
// WORD: write_output only.
#include "common.cuh"

#define THREADS 256
#define GROUPS 4

#ifdef IMAGE
#define MAX_ENTRIES 16
#define AUGMENT_STREAM 0x41554721u  // parcnn.ops.philox.AUGMENT

struct Normalise {
    int entries;  // one a channel, or one for all
    float scale[MAX_ENTRIES], shift[MAX_ENTRIES];
};

struct Image {
    int height, width, channels;
    FastDiv by_width, by_channels;
};

template <int V> __device__ __forceinline__ Floats<V> load_pixels(const u8 *p) {
    Floats<V> r;
    if constexpr (V == 4) {
        uchar4 t = *reinterpret_cast<const uchar4 *>(p);
        r.v[0] = t.x, r.v[1] = t.y, r.v[2] = t.z, r.v[3] = t.w;
    } else {
        r.v[0] = *p;
    }
    return r;
}

template <int V> __device__ __forceinline__ Floats<V> load_pixels(const float *p) { return load<V>(p); }

// How the sample is moved: mirrored first, then shifted; where the moved image does not reach, the result is zero.
struct Move {
    int mirrored, down, right;
};

__device__ __forceinline__ Move draw_move(const int *state, int place, int flip, int shift_px) {
    uint4 word = philox4x32(make_uint4((u32)place, AUGMENT_STREAM, (u32)state[1], 0u),
                            make_uint2((u32)state[3], (u32)state[4]));
    u32 span = 2 * shift_px + 1;
    return {(int)(flip && (word.x & 1u)), (int)(word.y % span) - shift_px, (int)(word.z % span) - shift_px};
}

// VEC neighbouring elements of a row of the moved image, from element c of pixel (h, w) on; inside: those that it reaches.
__device__ __forceinline__ Floats<VEC> load_moved(const IMAGE *source, const Image &image, const Move &move, int h, int w,
                                                  int c, bool (&inside)[VEC]) {
    h -= move.down, w -= move.right;
    int pixel = h * image.width + (move.mirrored ? image.width - 1 - w : w);
    int next_pixel = move.mirrored ? 1 - 2 * image.channels : 1;  // from a pixel's last element to the next one's first
    const IMAGE *p = source + pixel * image.channels + c;
    bool row_inside = (u32)h < (u32)image.height;
    Floats<VEC> value;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
        inside[e] = row_inside && (u32)w < (u32)image.width;
        value.v[e] = inside[e] ? (float)*p : 0.0f;
        bool last = ++c == image.channels;
        p += last ? next_pixel : 1;
        if (last) c = 0, ++w;
    }
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
gather_batch(const IMAGE *__restrict__ images, const u32 *__restrict__ targets, const int *__restrict__ order,
             const int *state, ELEMENT *__restrict__ x, u32 *__restrict__ batch_targets, Image image,
             int target_words, int flip, int shift_px, const __grid_constant__ Normalise normalise) {
    await_predecessors();
    // Lanes ask for entries of different channels: an argument's bank would serve them one after the other.
    __shared__ float scales[MAX_ENTRIES], shifts[MAX_ENTRIES];
    __shared__ Move shared_move;
    int place = state[2] + blockIdx.x;
    size_t sample = order[place];
    int elements = image.height * image.width * image.channels;
    const IMAGE *source = images + sample * elements;
    ELEMENT *result = x + (size_t)blockIdx.x * elements;

    if (threadIdx.x < MAX_ENTRIES) {
        scales[threadIdx.x] = normalise.scale[threadIdx.x];
        shifts[threadIdx.x] = normalise.shift[threadIdx.x];
    }
    if (AUGMENT && threadIdx.x == 0) shared_move = draw_move(state, place, flip, shift_px);
    if (AUGMENT || normalise.entries > 1) __syncthreads();
    Move move = {0, 0, 0};
    if (AUGMENT) move = shared_move;

    if (blockIdx.y == 0)
        for (int i = threadIdx.x; i < target_words; i += THREADS)
            batch_targets[(size_t)blockIdx.x * target_words + i] = targets[sample * target_words + i];

#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
        int i = VEC * ((blockIdx.y * GROUPS + j) * THREADS + threadIdx.x);
        if (i >= elements) break;
        int c, pixel = divide(i, image.by_channels, c);
        Floats<VEC> value;
        bool inside[VEC];
        if (AUGMENT) {
            int w, h = divide(pixel, image.by_width, w);
            value = load_moved(source, image, move, h, w, c, inside);
        } else {
            value = load_pixels<VEC>(source + i);
        }
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            float scale = normalise.entries == 1 ? normalise.scale[0] : scales[c];
            float shift = normalise.entries == 1 ? normalise.shift[0] : shifts[c];
            float scaled = __fadd_rn(__fmul_rn(value.v[e], scale), shift);
            value.v[e] = !AUGMENT || inside[e] ? scaled : 0.0f;
            if (++c == image.channels) c = 0;
        }
        store<VEC>(result + i, value);
    }
}
#elif defined(WORD)
// n words in all, `row` of them a sample.
extern "C" __global__ void __launch_bounds__(THREADS)
write_output(const WORD *__restrict__ y, const int *state, WORD *__restrict__ out, long long n, int row) {
    await_predecessors();
    WORD *target = out + (size_t)state[2] * row;
    long long first = (long long)blockIdx.x * (GROUPS * THREADS) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
        long long i = first + j * THREADS;
        if (i < n) store_word(target + i, load_word<WORD>(y + i));
    }
}
#else
// Null logs are not kept.
extern "C" __global__ void end_step(int *state, float *losses, const float *loss, int *corrects, const int *correct, int batch,
                                    int train) {
    await_predecessors();
    // Every load before the first store: they then wait for memory together, not one after the other.
    int step = state[0], train_step = state[1], first = state[2];
    float value = losses ? *loss : 0.0f;
    int hits = corrects ? *correct : 0;
    if (losses) losses[step] = value;
    if (corrects) corrects[step] = hits;
    state[0] = step + 1;
    state[1] = train_step + train;
    state[2] = first + batch;
}
#endif
