// Emulation of sparsecomp/cuda/kernels/intrinsics.cuh, and of the parts of CUDA that its kernels use. What the tensor
// cores compute follows the PTX ISA (sections on mma.m16n8k16, ldmatrix, mma.sp.m16n8k32 and sparse matrix storage; for
// int8 on mma.m16n8k32 and mma.sp.m16n8k64).
// The places of the metadata in the threads, which the ISA gives as figures, are those of two programs that run on
// cards: CUTLASS (tools/util/include/cutlass/util/host_reorder.h, `reorder_meta`, whose words ldmatrix hands to the
// lanes; host_uncompress.h for the bits) and LLVM (mlir/test/Integration/Dialect/SparseTensor/GPU/CUDA/
// sparse-mma-2-4-f16.mlir).
#pragma once
#include "machine.h"

#if defined(F32)
typedef float value_t;
#elif defined(INT8)
typedef signed char value_t;
#else
typedef unsigned short value_t;
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define __syncthreads() emu::sync_block(__FILE__, __LINE__)
#define __syncwarp() emu::sync_warp(__FILE__, __LINE__)
#define copy_wait emu::Site{__FILE__, __LINE__}.copy_wait
#define SHARED(type, name, size) const Shared<type> name{emu::shared_buffer(#name, sizeof(type) * (size)), 0}
#define DYNAMIC_SHARED(type, name) const Shared<type> name{emu::shared_buffer(#name, emu::dynamic_bytes), 0}

template <class T>
using Global = emu::Pointer<T>;
template <class T>
using Shared = emu::Pointer<T>;
inline int min(int a, int b) { return a < b ? a : b; }

template <int N>
struct alignas(4 * N) Words {
    unsigned word[N];
    unsigned& operator[](int i) { return word[i]; }
    unsigned operator[](int i) const { return word[i]; }
};

template <int N, class T>
Words<N> load(emu::Pointer<T> from) {
    Words<N> words;
    emu::read(from.buffer, from.at, 4 * N, &words);
    return words;
}

template <int N, class T>
void store(emu::Pointer<T> to, const Words<N>& words) {
    emu::write(to.buffer, to.at, 4 * N, &words);
}

template <class T>
void copy_async(emu::Pointer<T> to, emu::Pointer<const T> from, bool zeros) {
    emu::begin_copy(to.buffer, to.at, from.buffer, from.at, zeros);
}

inline void copy_commit() { emu::commit_copies(); }

inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
inline int __popc(unsigned word) { return __builtin_popcount(word); }

// Nibble i of the selector names the byte of {high, low} that becomes byte i (without its sign mode).
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

// The products of four bytes of each, added.
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += (signed char)(a >> 8 * i & 0xff) * (signed char)(b >> 8 * i & 0xff);
    return sum;
}

#if defined(F32)
inline float to_float(float value) { return value; }
inline float from_float(float value) { return value; }
#elif defined(INT8)  // has no floats
#elif defined(BF16)
inline float to_float(value_t bits) { return __uint_as_float((unsigned)bits << 16); }
inline value_t from_float(float value) {  // to the nearest, ties to even
    const unsigned bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
inline float to_float(value_t bits) { _Float16 value; memcpy(&value, &bits, 2); return (float)value; }
inline value_t from_float(float value) { const _Float16 half = (_Float16)value; value_t bits; memcpy(&bits, &half, 2); return bits; }
#endif

inline void all_lanes(unsigned mask) {
    if (mask != 0xffffffffu) emu::fail("mask: the emulator knows shuffles and ballots of whole warps");
}

// `compute` for all lanes, from what each of them gives to what each of them gets.
template <class Out, class In>
Out together(const char* what, const In& in, void (*compute)(const In* const*, Out* const*)) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
    Out out;
    emu::together(what, &in, sizeof in, &out, sizeof out, reinterpret_cast<void (*)(const void* const*, void* const*)>(compute));
    return out;
}

template <class T>
struct Offer {
    T value;
    int from;
};

template <class T>
T exchange(const char* what, T value, int from) {
    return together<T, Offer<T>>(what, {value, from}, [](const Offer<T>* const* in, T* const* out) {
        for (int i = 0; i < 32; ++i) *out[i] = in[in[i]->from & 31]->value;
    });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) { all_lanes(mask); return exchange("__shfl_sync", value, from); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int apart) { all_lanes(mask); return exchange("__shfl_xor_sync", value, emu::me % 32 ^ apart); }

inline unsigned __ballot_sync(unsigned mask, bool value) {
    all_lanes(mask);
    return together<unsigned, int>("__ballot_sync", value, [](const int* const* in, unsigned* const* out) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= (unsigned)(*in[i] != 0) << i;
        for (int i = 0; i < 32; ++i) *out[i] = votes;
    });
}

#if !defined(F32)
#if !defined(INT8)
// Four 8x8 matrices: the address of row r of matrix q comes from lane 8 q + r; transposed, lane l gets of each matrix the
// elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
inline void ldmatrix_trans(unsigned to[4], Shared<const value_t> row) {
    if (!emu::is_shared(row.buffer)) emu::fail("ldmatrix: it reads shared memory");
    struct Row { value_t value[8]; };
    const Words<4> mine = load<4>(row);
    Row in;
    memcpy(&in, &mine, 16);
    const Words<4> got = together<Words<4>, Row>("ldmatrix", in, [](const Row* const* in, Words<4>* const* out) {
        for (int lane = 0; lane < 32; ++lane)
            for (int q = 0; q < 4; ++q)
                (*out[lane])[q] = in[8 * q + lane % 4 * 2]->value[lane / 4] | (unsigned)in[8 * q + lane % 4 * 2 + 1]->value[lane / 4] << 16;
    });
    memcpy(to, &got, 16);
}
#endif

#if defined(INT8)
typedef int sums_t;
#else
typedef float sums_t;
#endif
constexpr int PACKED = 4 / sizeof(value_t);  // values of a word
constexpr int HALF_DEPTH = 8 * PACKED;       // columns of a that are stored for a product: all of mma, half of mma.sp
struct Operands {
    sums_t d[4];
    unsigned a[4], b[4], e;
};
struct Sums {
    sums_t d[4];
};
inline sums_t value_of(unsigned word, int i) {
#if defined(INT8)
    return (value_t)(word >> 8 * i & 0xff);
#else
    return to_float((value_t)(word >> 16 * i));
#endif
}

// With n values in a word (2, of int8 4), register i of lane 4 g + t holds of a [16, 8 n] matrix a: row g + 8 (i % 2),
// columns n t + 4 n (i / 2) and the next. Of b [K, 8]: rows n t + 4 n i and the next, column g. Of d [16, 8]: row
// g + 8 (i / 2), column 2 t + i % 2.
inline void products(const Operands* const* in, Sums* const* out, int depth, const sums_t a[16][2 * HALF_DEPTH]) {
    sums_t b[2 * HALF_DEPTH][8];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < depth / (4 * PACKED); ++i)
            for (int v = 0; v < PACKED; ++v) b[PACKED * (lane % 4 + 4 * i) + v][lane / 4] = value_of(in[lane]->b[i], v);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            sums_t sum = 0;
            for (int k = 0; k < depth; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
            out[lane]->d[i] = in[lane]->d[i] + sum;
        }
}

inline void compressed(const Operands* const* in, sums_t a[16][HALF_DEPTH]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int v = 0; v < PACKED; ++v)
                a[lane / 4 + i % 2 * 8][PACKED * (lane % 4 + 4 * (i / 2)) + v] = value_of(in[lane]->a[i], v);
}

inline void mma(sums_t d[4], const Words<4>& a, unsigned b0, unsigned b1) {
    const Operands mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1, 0, 0}, 0};
    const Sums sums = together<Sums, Operands>("mma", mine, [](const Operands* const* in, Sums* const* out) {
        sums_t given[16][HALF_DEPTH], full[16][2 * HALF_DEPTH] = {};
        compressed(in, given);
        for (int r = 0; r < 16; ++r) memcpy(full[r], given[r], sizeof given[r]);
        products(in, out, HALF_DEPTH, full);
    });
    memcpy(d, sums.d, 16);
}

// The places of the 8 groups of four (16 bits: 4) that a lane tells of row r: part 0 is the first half of the columns.
inline unsigned places_of(const Operands* const* in, int r, int part) {
#if defined(INT8)  // lane 4 g + t: row g + 8 (t % 2), the first half where t < 2
    return in[r % 8 * 4 + r / 8 + 2 * part]->e;
#else  // lane 4 g + part: row g in the low half, row g + 8 in the high one
    return in[r % 8 * 4 + part]->e >> 16 * (r / 8) & 0xffff;
#endif
}

inline void mma_sp(sums_t d[4], const Words<4>& a, const unsigned b[4], unsigned e) {
    const Operands mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, e};
    const Sums sums = together<Sums, Operands>("mma.sp", mine, [](const Operands* const* in, Sums* const* out) {
        sums_t given[16][HALF_DEPTH], full[16][2 * HALF_DEPTH] = {};
        compressed(in, given);
        for (int r = 0; r < 16; ++r)
            for (int part = 0; part < 2; ++part) {
                const unsigned metadata = places_of(in, r, part);
                for (int group = 0; group < HALF_DEPTH / 4; ++group) {
                    const int one = metadata >> 4 * group & 3, other = metadata >> (4 * group + 2) & 3;
                    if (one >= other) emu::fail("metadata: places %d and %d of four are not in order", one, other);
                    const int from = part * HALF_DEPTH / 2 + group * 2, to = part * HALF_DEPTH + group * 4;
                    full[r][to + one] = given[r][from];
                    full[r][to + other] = given[r][from + 1];
                }
            }
        products(in, out, 2 * HALF_DEPTH, full);
    });
    memcpy(d, sums.d, 16);
}
#endif
