// An FFN of one token that reads of its second and third weight only what the first lets through:
//   g = act(gate x + gate_bias);  units with |g| > threshold survive;  h = g (up x + up_bias), or g where up is null
//   y = down h + bias
//
// ffn_hidden: a block computes g of 32 units, puts the numbers of the survivors one behind the other, and then h of
// those alone. ffn_down: a block sums the columns of the survivors for 32 outputs; there are few such blocks, so that
// each has as many warps as it may, and each warp asks for 8 columns at once.
// gate, up [hidden, stride], down [hidden, outputs] (its columns as rows); stride: inputs rounded up to 128, zeros there
// places, hidden_values [32 units of each block of ffn_hidden], counts [blocks]: survivors of each
#include <device.cuh>

constexpr int WARPS = 8;
constexpr int DOWN_WARPS = 32;
constexpr int UNITS = 32;
constexpr int OUTPUTS = 32;

__device__ inline float dot(Global<const value_t> row, Shared<const value_t> along, int stride, int lane) {
    float sum = 0;
#pragma unroll 4
    for (int i = 4 * lane; i < stride; i += 128) {
        float weight[4], other[4];
        load_four(row + i, weight);
        load_four(along + i, other);
        for (int k = 0; k < 4; ++k) sum += weight[k] * other[k];
    }
    return warp_sum(sum);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
ffn_hidden(Global<const value_t> gate, Global<const value_t> up, Global<const float> gate_bias,
           Global<const float> up_bias, Global<const float> threshold, Global<const value_t> x, Global<int> places,
           Global<float> hidden_values, Global<int> counts, int hidden, int inputs, int stride, int activation) {
    DYNAMIC_SHARED(value_t, along);
    SHARED(float, gates, UNITS);
    SHARED(int, survivors, UNITS);
    SHARED(int, survivor_count, 1);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * UNITS;
    for (int i = threadIdx.x; i < stride; i += 32 * WARPS) along[i] = i < inputs ? x[i] : from_float(0);
    __syncthreads();  // x is there
    for (int unit = warp; unit < UNITS; unit += WARPS) {
        float value = 0;
        if (first + unit < hidden) {
            value = dot(gate + (long long)(first + unit) * stride, along, stride, lane);
            value = activate(value + (gate_bias ? gate_bias[first + unit] : 0), activation);
        }
        if (lane == 0) gates[unit] = value;
    }
    __syncthreads();  // all of g is there
    if (warp == 0) {
        int count = 0;
        for (int unit = lane; unit < UNITS; unit += 32) {
            const bool survives = first + unit < hidden && fabsf(gates[unit]) > threshold[first + unit];
            const unsigned mask = __ballot_sync(ALL_LANES, survives);
            if (survives) survivors[count + __popc(mask & ((1u << lane) - 1))] = unit;
            count += __popc(mask);
        }
        if (lane == 0) survivor_count[0] = count, counts[blockIdx.x] = count;
    }
    __syncthreads();  // the survivors are known
    const int count = survivor_count[0];
    for (int i = warp; i < count; i += WARPS) {
        const int unit = first + survivors[i];
        float value = gates[survivors[i]];
        if (up) value *= dot(up + (long long)unit * stride, along, stride, lane) + (up_bias ? up_bias[unit] : 0);
        if (lane == 0) places[first + i] = unit, hidden_values[first + i] = value;
    }
}

extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS)
ffn_down(Global<const value_t> down, Global<const float> bias, Global<const int> places,
         Global<const float> hidden_values, Global<const int> counts, Global<value_t> y, int hidden, int outputs) {
    SHARED(float, parts, DOWN_WARPS * OUTPUTS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, output = blockIdx.x * OUTPUTS + lane;
    float sum = 0;
    for (int first = warp * UNITS; first < hidden; first += DOWN_WARPS * UNITS) {
        const int count = counts[first / UNITS];
#pragma unroll 8
        for (int i = first; i < first + count; ++i)
            if (output < outputs)
                sum += hidden_values[i] * to_float(down[(long long)places[i] * outputs + output]);
    }
    parts[warp * OUTPUTS + lane] = sum;
    __syncthreads();
    if (warp == 0 && output < outputs) {
        float total = bias ? bias[output] : 0;
        for (int i = 0; i < DOWN_WARPS; ++i) total += parts[i * OUTPUTS + lane];
        y[output] = from_float(total);
    }
}
