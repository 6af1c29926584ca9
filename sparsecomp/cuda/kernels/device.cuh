// What the kernels share. Elements are F32, F16 or BF16 by the definition of that name; sums are float32.
#ifndef SPARSECOMP_DEVICE
#define SPARSECOMP_DEVICE
#include <intrinsics.cuh>

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WORDS_OF_FOUR = sizeof(value_t);  // four values take as many words as one takes bytes

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

// The 16-bit values of a word, the lower one first.
__device__ inline float low(unsigned word) { return to_float((value_t)(word & 0xffff)); }
__device__ inline float high(unsigned word) { return to_float((value_t)(word >> 16)); }

// Two and four neighbouring values.
template <class Pointer>
__device__ inline void load_pair(Pointer from, float to[2]) {
#if defined(F32)
    const Words<2> words = load<2>(from);
    for (int i = 0; i < 2; ++i) to[i] = __uint_as_float(words[i]);
#else
    const unsigned word = load<1>(from)[0];
    to[0] = low(word), to[1] = high(word);
#endif
}

template <class Pointer>
__device__ inline void load_four(Pointer from, float to[4]) {
    const Words<WORDS_OF_FOUR> words = load<WORDS_OF_FOUR>(from);
#if defined(F32)
    for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(words[i]);
#else
    for (int i = 0; i < 2; ++i) to[2 * i] = low(words[i]), to[2 * i + 1] = high(words[i]);
#endif
}

template <class Pointer>
__device__ inline void store_pair(Pointer to, float first, float second) {
#if defined(F32)
    store<2>(to, Words<2>{{__float_as_uint(first), __float_as_uint(second)}});
#else
    store<1>(to, Words<1>{{from_float(first) | (unsigned)from_float(second) << 16}});
#endif
}

// The sum over a warp, in every lane.
__device__ inline float warp_sum(float value) {
    for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(ALL_LANES, value, apart);
    return value;
}
#endif
