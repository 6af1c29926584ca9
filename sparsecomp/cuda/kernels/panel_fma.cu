// y[outputs, tokens] = act(W x + bias) in float32; V outputs (a panel) share the columns of x that they read.
//
// A block computes a panel for 64 tokens, a thread V / 8 outputs for 4 tokens. The kept columns are walked over STEP at
// a time: their rows of x and the weights are copied into shared memory while the step before is multiplied.
// weights [steps][STEP][V]     columns [steps][STEP], -1: padding     starts [panels + 1]: first step of each
// x [inputs, stride], y [outputs, stride]: stride is a multiple of 4, and rows begin at multiples of 16 bytes
#include <device.cuh>

constexpr int STEP = 16;
constexpr int TOKENS = 64;
constexpr int THREADS = 128;
constexpr int TALL = V / 8;
constexpr int CHUNKS = TOKENS / 4;

__device__ inline void stage(Shared<float> weight_tile, Shared<float> x_tile, Global<const float> weights,
                             Global<const int> columns, Global<const float> x, int step, int first, int stride) {
    for (int i = threadIdx.x; i < STEP * V / 4; i += THREADS)
        copy_async(weight_tile + 4 * i, weights + ((long long)step * (STEP * V) + 4 * i), false);
    for (int i = threadIdx.x; i < STEP * CHUNKS; i += THREADS) {
        const int k = i / CHUNKS, token = first + i % CHUNKS * 4, column = columns[step * STEP + k];
        const bool zeros = column < 0 || token >= stride;
        copy_async(x_tile + (k * TOKENS + token - first), x + (zeros ? 0 : (long long)column * stride + token), zeros);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
panel_fma(Global<const float> weights, Global<const int> columns, Global<const int> starts, Global<const float> x,
          Global<const float> bias, Global<float> y, int outputs, int inputs, int tokens, int stride, int activation) {
    SHARED(float, weight_tiles, 2 * STEP * V);
    SHARED(float, x_tiles, 2 * STEP * TOKENS);
    const int panel = blockIdx.x, first = blockIdx.y * TOKENS;
    const int first_row = threadIdx.x / 16 * TALL, first_token = threadIdx.x % 16 * 4;
    const int begin = starts[panel], end = starts[panel + 1];
    float sums[TALL][4] = {};
    if (begin < end) stage(weight_tiles, x_tiles, weights, columns, x, begin, first, stride);
    copy_commit();
    for (int step = begin; step < end; ++step) {
        const int now = (step - begin) % 2, next = 1 - now;
        if (step + 1 < end)
            stage(weight_tiles + next * STEP * V, x_tiles + next * STEP * TOKENS, weights, columns, x, step + 1, first,
                  stride);
        copy_commit();
        copy_wait<1>();
        __syncthreads();  // the copies of all threads for this step are there
#pragma unroll
        for (int k = 0; k < STEP; ++k) {
            float along[4], weight[TALL];
            load_four(x_tiles + ((now * STEP + k) * TOKENS + first_token), along);
#pragma unroll
            for (int m = 0; m < TALL; m += 2)
                load_pair(weight_tiles + ((now * STEP + k) * V + first_row + m), weight + m);
#pragma unroll
            for (int m = 0; m < TALL; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) sums[m][n] += weight[m] * along[n];
        }
        __syncthreads();  // nobody reads this step any more when the next but one is copied over it
    }
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
        const int row = panel * V + first_row + m;
        const float shift = bias && row < outputs ? bias[row] : 0;
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const int token = first + first_token + n;
            if (row < outputs && token < tokens)
                store_pair(y + ((long long)row * stride + token), activate(sums[m][n] + shift, activation),
                           activate(sums[m][n + 1] + shift, activation));
        }
    }
}
