// y[tokens, outputs] = act(x W^T + bias) for at most TOKENS tokens: weights with 2 of each 4 columns are streamed.
//
// A block computes 32 outputs, a warp 4 of them one after the other. x lies in shared memory; a lane reads 8 kept
// values (16 columns) and their places at a time, and picks two of each four x as bytes of two registers.
// values [outputs, padded / 2]     places [outputs, padded / 16]: two bits for each value, as in the metadata of mma.sp
// padded: inputs rounded up to 16     dynamic shared memory: TOKENS rows of padded values
#include <device.cuh>

constexpr int WARPS = 8;
constexpr int OUTPUTS = 32;
constexpr int BLOCKS = TOKENS == 1 ? 6 : 5;  // at least, on a multiprocessor: left to itself, ptxas spills for sm_90

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
two_four_token(Global<const value_t> values, Global<const unsigned short> places, Global<const value_t> x,
               Global<const sum_t> bias, Global<result_t> y, int outputs, int inputs, int tokens, int activation) {
    DYNAMIC_SHARED(value_t, along);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = (inputs + 15) / 16, padded = 16 * units;
    for (int n = 0; n < TOKENS; ++n)
        fill(along + n * padded, x + (long long)n * inputs, n < tokens ? inputs : 0, padded, 32 * WARPS);
    __syncthreads();
    for (int row = blockIdx.x * OUTPUTS + warp; row < min(outputs, (int)(blockIdx.x + 1) * OUTPUTS); row += WARPS) {
        sum_t sums[TOKENS] = {};
#pragma unroll 2
        for (int unit = lane; unit < units; unit += 32) {
            const Words<2 * sizeof(value_t)> kept = load<2 * sizeof(value_t)>(values + ((long long)row * units + unit) * 8);
            const unsigned bits = places[(long long)row * units + unit];
#if defined(INT8)
#pragma unroll
            for (int n = 0; n < TOKENS; ++n) {
                const Words<4> fours = load<4>(along + (n * padded + unit * 16));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const unsigned one = bits >> 8 * half, other = bits >> (8 * half + 4);
                    const unsigned chosen = __byte_perm(fours[2 * half], fours[2 * half + 1],
                                                        (one & 3) | (one & 12) << 2 | (other & 3) << 8 |
                                                            (other & 12) << 10 | 0x4400);
                    sums[n] = __dp4a((int)kept[half], (int)chosen, sums[n]);
                }
            }
#else
#pragma unroll
            for (int n = 0; n < TOKENS; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Words<4> four = load<4>(along + (n * padded + unit * 16 + half * 8));
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const unsigned group = bits >> (8 * half + 4 * i), one = group & 3, other = group >> 2 & 3;
                        // value v of four is bytes 2 v and 2 v + 1: a nibble of the selector for each
                        const unsigned pair = __byte_perm(four[2 * i], four[2 * i + 1],
                                                          (one * 0x22 + 0x10) | (other * 0x22 + 0x10) << 8);
                        const unsigned weight = kept[2 * half + i];
                        sums[n] += low(weight) * low(pair) + high(weight) * high(pair);
                    }
                }
#endif
        }
        const sum_t shift = bias ? bias[row] : 0;
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
            const sum_t sum = warp_sum(sums[n]);
            if (lane == 0 && n < tokens) y[(long long)n * outputs + row] = from_sum(activate(sum + shift, activation));
        }
    }
}
