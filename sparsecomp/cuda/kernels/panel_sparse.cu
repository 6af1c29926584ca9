// y[rows, tokens] = W x: W keeps the same columns in 16 rows (a panel) and 2 of each 4 of the kept ones.
// One warp per (panel, 8 tokens); a step is one mma.sp of 16 x 8 x 32 over 32 kept columns.
#include <device.cuh>
extern "C" __global__ void panel_sparse(const unsigned short* values, const unsigned* meta, const int* columns,
                                   const int* starts, const unsigned short* x, float* y, int rows, int tokens) {
    SHARED(unsigned short, tile, 32 * 8);  // [kept column][token]
    const int lane = threadIdx.x, g = lane >> 2, t = lane & 3, panel = blockIdx.x, first = blockIdx.y * 8;
    float acc[4] = {0, 0, 0, 0};
    for (int step = starts[panel]; step < starts[panel + 1]; ++step) {
        const int column = columns[step * 32 + lane];  // -1: padding
        for (int n = 0; n < 8; ++n)
            tile[lane * 8 + n] = column >= 0 && first + n < tokens ? x[(long long)column * tokens + first + n] : 0;
        __syncthreads();
        unsigned a[4], b[4];
        for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i & 1), col = 2 * t + 8 * (i >> 1);
            const unsigned short* v = values + (step * 16 + row) * 16 + col;
            a[i] = v[0] | (unsigned)v[1] << 16;
            const int k = 2 * t + 8 * i;
            b[i] = tile[k * 8 + g] | (unsigned)tile[(k + 1) * 8 + g] << 16;
        }
        mma_sp(acc, a, b, t < 2 ? meta[step * 16 + g * 2 + t] : 0);
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) {
        const int row = panel * 16 + g + 8 * (i >> 1), n = first + 2 * t + (i & 1);
        if (row < rows && n < tokens) y[(long long)row * tokens + n] = acc[i];
    }
}
