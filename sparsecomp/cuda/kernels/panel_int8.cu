// y[outputs, tokens] = W x + bias in int8 on the tensor cores, with int32 sums, which leave as they are; V outputs (a
// panel) share the columns of x that they read.
//
// As panel_tensor.cu, but for how x reaches the registers: these want four rows of x for one token in a word, and no
// ldmatrix transposes bytes. A lane reads four rows for four tokens and turns the 16 bytes around itself; the tokens of
// a product are therefore 4 apart, and a lane ends with four tokens of an output next to each other.
//   SPARSE 1: a row keeps 2 of each 4 of the panel's columns (mma.sp, twice the columns at a time)
//   SPARSE 0: a row keeps all of them (mma)
//   RUN: the columns lie in runs of so many neighbours (blocks); 1 for any columns
// weights [steps][STEP / DEPTH][V / 16][FRAGMENT]: the registers of the lanes, as mma takes them (panels.py)
// columns [steps][STEP / RUN]: the first column of each run, -1: padding     starts [panels + 1]: first step of each
// x [inputs, stride], y [outputs, stride]: stride is a multiple of 16, and rows begin at multiples of 16 bytes
#include <device.cuh>

constexpr int DEPTH = SPARSE ? 64 : 32;  // columns of a product
constexpr int STEP = RUN > DEPTH ? RUN : DEPTH;
constexpr int TOKENS = 64;
constexpr int ROW = TOKENS + 16;  // of x in shared memory: 16 bytes more spread the lanes over more banks
constexpr int ROW_WARPS = V == 16 ? 1 : 2;
constexpr int THREADS = 64 * ROW_WARPS;
constexpr int BLOCKS = 256 / V;  // at least, on a multiprocessor: left to itself, ptxas spills for sm_90
constexpr int TALL = V / 16 / ROW_WARPS;
constexpr int WIDE = 4;                            // products of a warp for its 32 tokens
constexpr int FRAGMENT = SPARSE ? 128 + 32 : 128;  // words of 16 outputs and DEPTH columns
constexpr int WEIGHTS = STEP / DEPTH * (V / 16) * FRAGMENT;
constexpr int CHUNKS = TOKENS / 16;

__device__ inline void stage(Shared<unsigned> weight_tile, Shared<value_t> x_tile, Global<const unsigned> weights,
                             Global<const int> columns, Global<const value_t> x, int step, int first, int inputs,
                             int stride) {
    for (int i = threadIdx.x; i < WEIGHTS / 4; i += THREADS)
        copy_async(weight_tile + 4 * i, weights + ((long long)step * WEIGHTS + 4 * i), false);
    for (int i = threadIdx.x; i < STEP * CHUNKS; i += THREADS) {
        const int k = i / CHUNKS, token = first + i % CHUNKS * 16;
        const int run = columns[step * (STEP / RUN) + k / RUN], column = run + k % RUN;
        const bool zeros = run < 0 || column >= inputs || token >= stride;
        copy_async(x_tile + (k * ROW + token - first), x + (zeros ? 0 : (long long)column * stride + token), zeros);
    }
}

// Byte n of word i becomes byte i of word n.
__device__ inline void turn(unsigned words[4]) {
    const unsigned low_first = __byte_perm(words[0], words[1], 0x5140), low_last = __byte_perm(words[2], words[3], 0x5140);
    const unsigned high_first = __byte_perm(words[0], words[1], 0x7362), high_last = __byte_perm(words[2], words[3], 0x7362);
    words[0] = __byte_perm(low_first, low_last, 0x5410), words[1] = __byte_perm(low_first, low_last, 0x7632);
    words[2] = __byte_perm(high_first, high_last, 0x5410), words[3] = __byte_perm(high_first, high_last, 0x7632);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
panel_int8(Global<const unsigned> weights, Global<const int> columns, Global<const int> starts, Global<const value_t> x,
           Global<const int> bias, Global<int> y, int outputs, int inputs, int tokens, int stride, int /* activation */) {
    SHARED(unsigned, weight_tiles, 2 * WEIGHTS);
    SHARED(value_t, x_tiles, 2 * STEP * ROW);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int panel = blockIdx.x, first = blockIdx.y * TOKENS;
    const int first_tile = warp % ROW_WARPS * TALL, first_column = warp / ROW_WARPS * WIDE * 8;
    const int begin = starts[panel], end = starts[panel + 1];
    int sums[TALL][WIDE][4] = {};
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
        for (int part = 0; part < STEP / DEPTH; ++part) {
            unsigned b[WIDE][DEPTH / 16];
#pragma unroll
            for (int quarter = 0; quarter < DEPTH / 16; ++quarter) {
                const int k = part * DEPTH + quarter * 16 + 4 * t;
                unsigned words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    words[i] = load<1>(x_tiles + ((now * STEP + k + i) * ROW + first_column + 4 * g))[0];
                turn(words);
#pragma unroll
                for (int n = 0; n < WIDE; ++n) b[n][quarter] = words[n];
            }
#pragma unroll
            for (int m = 0; m < TALL; ++m) {
                Shared<const unsigned> tile = weight_tiles + (now * WEIGHTS + (part * (V / 16) + first_tile + m) * FRAGMENT);
                const Words<4> a = load<4>(tile + lane * 4);
#if SPARSE
                const unsigned places = tile[128 + lane];
#pragma unroll
                for (int n = 0; n < WIDE; ++n) mma_sp(sums[m][n], a, b[n], places);
#else
#pragma unroll
                for (int n = 0; n < WIDE; ++n) mma(sums[m][n], a, b[n][0], b[n][1]);
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
            const int shift = bias && row < outputs ? bias[row] : 0;
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int token = first + first_column + 4 * (2 * t + side);
                Words<4> four;
#pragma unroll
                for (int n = 0; n < WIDE; ++n) four[n] = sums[m][n][2 * half + side] + shift;
                if (row < outputs && token < tokens) store<4>(y + ((long long)row * stride + token), four);
            }
        }
}
