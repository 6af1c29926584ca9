// y[outputs, tokens] = act(W x + bias) for weights whose rows keep any columns (compressed rows).
//
// A warp computes one output for 64 tokens, two in each lane. It reads 32 kept values and their columns at a time, a
// lane each, and hands them round; a row of x is then read by the whole warp at once.
// values, columns [kept]     starts [outputs + 1]: where each row begins     x [inputs, stride], y [outputs, stride]
#include <device.cuh>

constexpr int WARPS = 8;
constexpr int TOKENS = 64;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
rows(Global<const value_t> values, Global<const int> columns, Global<const int> starts, Global<const value_t> x,
     Global<const sum_t> bias, Global<result_t> y, int outputs, int inputs, int tokens, int stride, int activation) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
    const int token = blockIdx.y * TOKENS + 2 * lane;
    if (row >= outputs) return;
    sum_t sums[2] = {};
    const int end = starts[row + 1];
    for (int begin = starts[row]; begin < end; begin += 32) {
        const bool mine = begin + lane < end;
        const sum_t value = mine ? to_sum(values[begin + lane]) : 0;
        const int column = mine ? columns[begin + lane] : 0;
        const int count = min(32, end - begin);
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
            const sum_t weight = __shfl_sync(ALL_LANES, value, i);
            const int from = __shfl_sync(ALL_LANES, column, i);
            if (token < tokens) {
                sum_t along[2];
                load_pair(x + ((long long)from * stride + token), along);
                for (int n = 0; n < 2; ++n) sums[n] += weight * along[n];
            }
        }
    }
    const sum_t shift = bias ? bias[row] : 0;
    if (token < tokens)
        store_pair(y + ((long long)row * stride + token), activate(sums[0] + shift, activation),
                   activate(sums[1] + shift, activation));
}
