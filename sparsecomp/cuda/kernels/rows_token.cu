// y[tokens, outputs] = act(x W^T + bias) for at most TOKENS tokens: weights whose rows keep any columns are streamed.
//
// A block computes 32 outputs, a warp 4 of them one after the other. x lies in shared memory; a lane reads four kept
// values and their columns at a time, and the lanes' sums are added at the end of a row.
// values, columns [slots]: rows are filled up to 4 slots with column `inputs`, where x has a zero
// starts [outputs + 1]: where each row begins     dynamic shared memory: TOKENS rows of padded(inputs) values
#include <device.cuh>

constexpr int WARPS = 8;
constexpr int OUTPUTS = 32;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
rows_token(Global<const value_t> values, Global<const unsigned short> columns, Global<const int> starts,
           Global<const value_t> x, Global<const sum_t> bias, Global<result_t> y, int outputs, int inputs, int tokens,
           int activation) {
    DYNAMIC_SHARED(value_t, along);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, padded = inputs / 8 * 8 + 8;
    for (int n = 0; n < TOKENS; ++n)
        fill(along + n * padded, x + (long long)n * inputs, n < tokens ? inputs : 0, padded, 32 * WARPS);
    __syncthreads();
    for (int row = blockIdx.x * OUTPUTS + warp; row < min(outputs, (int)(blockIdx.x + 1) * OUTPUTS); row += WARPS) {
        sum_t sums[TOKENS] = {};
        const int end = starts[row + 1];
#pragma unroll 4
        for (int slot = starts[row] + 4 * lane; slot < end; slot += 128) {
            sum_t weight[4];
            load_four(values + slot, weight);
            const Words<2> places = load<2>(columns + slot);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = places[i / 2] >> 16 * (i % 2) & 0xffff;
#pragma unroll
                for (int n = 0; n < TOKENS; ++n) sums[n] += weight[i] * to_sum(along[n * padded + column]);
            }
        }
        const sum_t shift = bias ? bias[row] : 0;
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
            const sum_t sum = warp_sum(sums[n]);
            if (lane == 0 && n < tokens) y[(long long)n * outputs + row] = from_sum(activate(sum + shift, activation));
        }
    }
}
