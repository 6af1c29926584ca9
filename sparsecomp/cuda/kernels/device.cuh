// What the kernels share. Elements are F32, F16, BF16 or INT8 by the definition of that name. Sums are float32 and leave
// as elements; those of int8 are int32 and leave as they are, since scales and what follows are not the kernels'.
#ifndef SPARSECOMP_DEVICE
#define SPARSECOMP_DEVICE
#include <intrinsics.cuh>

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WORDS_OF_FOUR = sizeof(value_t);  // four values take as many words as one takes bytes

#if defined(INT8)
typedef int sum_t;
typedef int result_t;
__device__ inline int to_sum(value_t value) { return value; }
__device__ inline int from_sum(int sum) { return sum; }
__device__ inline int activate(int sum, int) { return sum; }
#else
typedef float sum_t;
typedef value_t result_t;
__device__ inline float to_sum(value_t value) { return to_float(value); }
__device__ inline value_t from_sum(float sum) { return from_float(sum); }

// The activations of sparsecomp.kernels.epilogue.ACTIVATIONS, in their order.
__device__ inline float activate(float v, int activation) {
    switch (activation) {
        case 1: return v > 0 ? v : 0;
        case 2: return 0.5f * v * (1 + erff(v * 0.70710678f));
        case 3: return 0.5f * v * (1 + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
        case 4: return v / (1 + expf(-v));
        case 5: return fminf(fmaxf(v, 0.0f), 6.0f);
        case 6: return v * fminf(fmaxf(v + 3, 0.0f), 6.0f) * (1 / 6.0f);
        case 7: return v > 0 ? v * v : 0;
        default: return v;
    }
}
#endif

#if defined(F16) || defined(BF16)
// The 16-bit values of a word, the lower one first.
__device__ inline float low(unsigned word) { return to_float((value_t)(word & 0xffff)); }
__device__ inline float high(unsigned word) { return to_float((value_t)(word >> 16)); }
#endif

// Two and four neighbouring values.
template <class Pointer>
__device__ inline void load_pair(Pointer from, sum_t to[2]) {
#if defined(F32)
    const Words<2> words = load<2>(from);
    for (int i = 0; i < 2; ++i) to[i] = __uint_as_float(words[i]);
#elif defined(INT8)
    to[0] = from[0], to[1] = from[1];
#else
    const unsigned word = load<1>(from)[0];
    to[0] = low(word), to[1] = high(word);
#endif
}

template <class Pointer>
__device__ inline void load_four(Pointer from, sum_t to[4]) {
    const Words<WORDS_OF_FOUR> words = load<WORDS_OF_FOUR>(from);
#if defined(F32)
    for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(words[i]);
#elif defined(INT8)
    for (int i = 0; i < 4; ++i) to[i] = (value_t)(words[0] >> 8 * i & 0xff);
#else
    for (int i = 0; i < 2; ++i) to[2 * i] = low(words[i]), to[2 * i + 1] = high(words[i]);
#endif
}

template <class Pointer>
__device__ inline void store_pair(Pointer to, sum_t first, sum_t second) {
#if defined(F32)
    store<2>(to, Words<2>{{__float_as_uint(first), __float_as_uint(second)}});
#elif defined(INT8)
    store<2>(to, Words<2>{{(unsigned)first, (unsigned)second}});
#else
    store<1>(to, Words<1>{{from_float(first) | (unsigned)from_float(second) << 16}});
#endif
}

// A block copies x of a token into shared memory, and zeros behind it up to a multiple of 4.
__device__ inline void fill(Shared<value_t> to, Global<const value_t> from, int count, int padded, int threads) {
#if defined(INT8)
    for (int i = 4 * threadIdx.x; i < padded; i += 4 * threads) {
        unsigned word = 0;
        for (int k = 0; k < 4; ++k) word |= (i + k < count ? (unsigned)from[i + k] & 0xff : 0) << 8 * k;
        store<1>(to + i, Words<1>{{word}});
    }
#else
    for (int i = threadIdx.x; i < padded; i += threads) to[i] = i < count ? from[i] : from_float(0);
#endif
}

// The sum over a warp, in every lane.
__device__ inline sum_t warp_sum(sum_t value) {
    for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(ALL_LANES, value, apart);
    return value;
}
#endif
