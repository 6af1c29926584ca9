// What the kernels need of the card beyond C++: its memories, asynchronous copies, tensor cores, conversions.
// The tests put an emulation of this header in its place (tests/cuda/emulator/intrinsics.cuh).
#ifndef SPARSECOMP_INTRINSICS
#define SPARSECOMP_INTRINSICS

#if defined(F32)
typedef float value_t;
#elif defined(INT8)
typedef signed char value_t;
#else  // F16 or BF16, as bits
typedef unsigned short value_t;
#endif
#if defined(BF16)
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

template <class T>
using Global = T*;
template <class T>
using Shared = T*;
#define SHARED(type, name, size) __shared__ __align__(16) type name[size]
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

// N words of 32 bits that are loaded and stored at once.
template <int N>
struct alignas(4 * N) Words {
    unsigned word[N];
    __device__ unsigned& operator[](int i) { return word[i]; }
    __device__ unsigned operator[](int i) const { return word[i]; }
};

template <int N, class T>
__device__ inline Words<N> load(const T* from) {
    return *reinterpret_cast<const Words<N>*>(from);
}

template <int N, class T>
__device__ inline void store(T* to, const Words<N>& words) {
    *reinterpret_cast<Words<N>*>(to) = words;
}

// Begin a copy of 16 bytes into shared memory, or of zeros.
template <class T>
__device__ inline void copy_async(T* to, const T* from, bool zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 : : "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(zeros ? 0 : 16) : "memory");
}

// The copies that this thread began since the last call are a group.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Wait for all groups of this thread but the last N.
template <int N>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#if defined(INT8)
// d[16, 8] += a[16, 32] b[32, 8], int32 sums.
__device__ inline void mma(int d[4], const Words<4>& a, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 64] b[64, 8], int32 sums: a as 2 of each 4 values with their places in e of all lanes (selector 0).
__device__ inline void mma_sp(int d[4], const Words<4>& a, const unsigned b[4], unsigned e) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,0x0;"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
}
#else
// Four 8x8 matrices of 16-bit values: lane l points at row l % 8 of matrix l / 8, lane 4 g + t gets of each matrix
// column g of the rows 2 t and 2 t + 1.
__device__ inline void ldmatrix_trans(unsigned to[4], const value_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], float32 sums.
__device__ inline void mma(float d[4], const Words<4>& a, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 32] b[32, 8], float32 sums: a as 2 of each 4 values with their places in e of the lanes 4 g and
// 4 g + 1 (selector 0).
__device__ inline void mma_sp(float d[4], const Words<4>& a, const unsigned b[4], unsigned e) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." ELEMENT "." ELEMENT ".f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,0x0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
}

#endif

#if defined(F32)
__device__ inline float to_float(float value) { return value; }
__device__ inline float from_float(float value) { return value; }
#elif !defined(INT8)
__device__ inline float to_float(value_t bits) {
#if defined(BF16)
    return __uint_as_float((unsigned)bits << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

__device__ inline value_t from_float(float value) {
    value_t bits;
    asm("cvt.rn." ELEMENT ".f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif
#endif
