// y[outputs, tokens] = act(W x + bias) on the tensor cores; V outputs (a panel) share the columns of x that they read.
//
// A block computes a panel for 64 tokens. It walks over the kept columns of the panel, STEP at a time: their rows of x
// and the weights are copied into shared memory while the step before is multiplied.
//   SPARSE 1: a row keeps 2 of each 4 of the panel's columns (mma.sp, twice the columns at a time)
//   SPARSE 0: a row keeps all of them (mma)
//   RUN: the columns lie in runs of so many neighbours (blocks); 1 for any columns
// weights [steps][STEP / 32][V / 16][FRAGMENT]: the registers of the lanes, as mma takes them (panels.py)
// columns [steps][STEP / RUN]: the first column of each run, -1: padding     starts [panels + 1]: first step of each
// x [inputs, stride], y [outputs, stride]: stride is a multiple of 8, and rows begin at multiples of 16 bytes
#include <device.cuh>

constexpr int STEP = RUN > 32 ? RUN : 32;
constexpr int TOKENS = 64;
constexpr int ROW = TOKENS + 8;  // of x in shared memory: 16 bytes more spread the rows of ldmatrix over all banks
constexpr int THREADS = 128;
constexpr int ROW_WARPS = V == 16 ? 1 : 2, TOKEN_WARPS = 4 / ROW_WARPS;
constexpr int TALL = V / 16 / ROW_WARPS, WIDE = TOKENS / 8 / TOKEN_WARPS;  // products of a warp for 32 columns
constexpr int FRAGMENT = SPARSE ? 128 + 16 : 256;                          // words of 16 outputs and 32 columns
constexpr int WEIGHTS = STEP / 32 * (V / 16) * FRAGMENT;
constexpr int CHUNKS = TOKENS / 8;

__device__ inline void stage(Shared<unsigned> weight_tile, Shared<value_t> x_tile, Global<const unsigned> weights,
                             Global<const int> columns, Global<const value_t> x, int step, int first, int inputs,
                             int stride) {
    for (int i = threadIdx.x; i < WEIGHTS / 4; i += THREADS)
        copy_async(weight_tile + 4 * i, weights + ((long long)step * WEIGHTS + 4 * i), false);
    for (int i = threadIdx.x; i < STEP * CHUNKS; i += THREADS) {
        const int k = i / CHUNKS, token = first + i % CHUNKS * 8;
        const int run = columns[step * (STEP / RUN) + k / RUN], column = run + k % RUN;
        const bool zeros = run < 0 || column >= inputs || token >= stride;
        copy_async(x_tile + (k * ROW + token - first), x + (zeros ? 0 : (long long)column * stride + token), zeros);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
panel_tensor(Global<const unsigned> weights, Global<const int> columns, Global<const int> starts,
             Global<const value_t> x, Global<const float> bias, Global<value_t> y, int outputs, int inputs, int tokens,
             int stride, int activation) {
    SHARED(unsigned, weight_tiles, 2 * WEIGHTS);
    SHARED(value_t, x_tiles, 2 * STEP * ROW);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int panel = blockIdx.x, first = blockIdx.y * TOKENS;
    const int first_tile = warp % ROW_WARPS * TALL, first_column = warp / ROW_WARPS * WIDE * 8;
    const int begin = starts[panel], end = starts[panel + 1];
    float sums[TALL][WIDE][4] = {};
    if (begin < end) stage(weight_tiles, x_tiles, weights, columns, x, begin, first, inputs, stride);
    copy_commit();
    for (int step = begin; step < end; ++step) {
        const int now = (step - begin) % 2, next = 1 - now;
        if (step + 1 < end)
            stage(weight_tiles + next * WEIGHTS, x_tiles + next * STEP * ROW, weights, columns, x, step + 1, first,
                  inputs, stride);
        copy_commit();
        copy_wait<1>();
        __syncthreads();  // the copies of all threads for this step are there
#pragma unroll
        for (int part = 0; part < STEP / 32; ++part) {
            unsigned b[WIDE][4];
#pragma unroll
            for (int n = 0; n < WIDE; ++n)
                ldmatrix_trans(b[n], x_tiles + ((now * STEP + part * 32 + lane) * ROW + first_column + n * 8));
#pragma unroll
            for (int m = 0; m < TALL; ++m) {
                Shared<const unsigned> tile = weight_tiles + (now * WEIGHTS + (part * (V / 16) + first_tile + m) * FRAGMENT);
                const Words<4> a = load<4>(tile + lane * 4);
#if SPARSE
                const unsigned places = t < 2 ? tile[128 + g * 2 + t] : 0;
#pragma unroll
                for (int n = 0; n < WIDE; ++n) mma_sp(sums[m][n], a, b[n], places);
#else
                const Words<4> later = load<4>(tile + (128 + lane * 4));
#pragma unroll
                for (int n = 0; n < WIDE; ++n) {
                    mma(sums[m][n], a, b[n][0], b[n][1]);
                    mma(sums[m][n], later, b[n][2], b[n][3]);
                }
#endif
            }
        }
        __syncthreads();  // nobody reads this step any more when the next but one is copied over it
    }
#pragma unroll
    for (int m = 0; m < TALL; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = panel * V + (first_tile + m) * 16 + g + 8 * half;
            const float shift = bias && row < outputs ? bias[row] : 0;
#pragma unroll
            for (int n = 0; n < WIDE; ++n) {
                const int token = first + first_column + n * 8 + 2 * t;
                if (row < outputs && token < tokens)
                    store_pair(y + ((long long)row * stride + token), activate(sums[m][n][2 * half] + shift, activation),
                               activate(sums[m][n][2 * half + 1] + shift, activation));
            }
        }
}
