// What the kernels need of the card beyond the language; the tests put an emulation of this header in its place.
#ifdef BFLOAT16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif
#define SHARED(type, name, n) __shared__ type name[n]
// d[16, 8] += a[16, 32] b[32, 8] (float32 sums): a as 2 of each 4 with their places in e (PTX ISA, mma.sp.m16n8k32).
__device__ inline void mma_sp(float d[4], const unsigned a[4], const unsigned b[4], unsigned e) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,0x0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
}
