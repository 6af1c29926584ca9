// Layers of a streaming int8 network. Every loop is pipelined with an initiation interval of one; the processes of a layer
// run at the same time. Plain C++: with the vendor's hls_stream.h where it is found, with the one in shim/ otherwise.
#pragma once

#include <cstdint>
#include <hls_stream.h>

namespace sparse {

typedef hls::stream<int8_t> Stream;

template <int N>
struct Sums {
    int32_t of[N];
};

// ((sum * factor + half) >> shift) + zero, kept within low and high. The shift of a negative number rounds down.
inline int8_t requantise(int32_t sum, uint16_t factor, int shift, int zero, int low, int high) {
#pragma HLS inline
    int64_t scaled = (int64_t(sum) * int64_t(factor) + (int64_t(1) << (shift - 1))) >> shift;
    scaled += zero;
    return int8_t(scaled < low ? low : scaled > high ? high : scaled);
}

// A vector of I values into words of WORD, padded with zeros. `Order` says where the n-th value belongs.
template <int I, int WORD, int WORDS, typename Order>
void load(Stream& in, int8_t x[WORDS][WORD]) {
    for (int n = 0; n < I; n++) {
#pragma HLS pipeline II=1
        const int at = Order::at(n);
        x[at / WORD][at % WORD] = in.read();
    }
}

struct InOrder {
    static int at(int n) { return n; }
};

// The window of output position (row, column) of a picture, channels slowest.
template <typename P, int WORD, int WORDS>
void gather(const int8_t picture[P::HEIGHT * P::WIDTH * P::CHANNELS], int row, int column, int8_t x[WORDS][WORD]) {
    int channel = 0, i = 0, j = 0;
    for (int n = 0; n < P::CHANNELS * P::KERNEL_ROWS * P::KERNEL_COLUMNS; n++) {
#pragma HLS pipeline II=1
        const int y = row * P::STRIDE_ROWS + i * P::DILATION_ROWS - P::TOP;
        const int z = column * P::STRIDE_COLUMNS + j * P::DILATION_COLUMNS - P::LEFT;
        const bool inside = y >= 0 && y < P::HEIGHT && z >= 0 && z < P::WIDTH;
        x[n / WORD][n % WORD] = inside ? picture[(y * P::WIDTH + z) * P::CHANNELS + channel] : int8_t(P::FILL);
        if (++j == P::KERNEL_COLUMNS) {
            j = 0;
            if (++i == P::KERNEL_ROWS) {
                i = 0;
                channel++;
            }
        }
    }
}

// The tile loop: L::ROWS outputs times L::LANES inputs in every trip.
template <typename L>
void multiply(const int8_t x[L::WORDS][L::WORD], hls::stream<Sums<L::ROWS> >& out) {
    Sums<L::ROWS> sums;
    bool first = true;
    for (int trip = 0; trip < L::TRIPS; trip++) {
#pragma HLS pipeline II=1
        const int word = L::word(trip);
        for (int r = 0; r < L::ROWS; r++) {
#pragma HLS unroll
            int32_t sum = first ? 0 : sums.of[r];
            for (int l = 0; l < L::LANES; l++) {
#pragma HLS unroll
                const int place = l / L::N * L::M + L::select(trip, r / L::SHARED, l);
                sum += int32_t(L::weight(trip, r, l)) * int32_t(x[word][place]);
            }
            sums.of[r] = sum;
        }
        first = L::last(trip);
        if (first) out.write(sums);
    }
}

template <typename L>
void finish(hls::stream<Sums<L::ROWS> >& in, Stream& out) {
    Sums<L::ROWS> sums;
    int r = L::ROWS;
    for (int o = 0; o < L::OUTPUTS; o++) {
#pragma HLS pipeline II=1
        if (r == L::ROWS) {
            sums = in.read();
            r = 0;
        }
        out.write(requantise(sums.of[r] + L::bias(o), L::factor(o), L::shift(o), L::ZERO, L::LOW, L::HIGH));
        r++;
    }
}

template <typename L>
void vector_of(Stream& in, Stream& out) {
#pragma HLS dataflow
    int8_t x[L::WORDS][L::WORD] = {};
#pragma HLS array_partition variable=x complete dim=2
    hls::stream<Sums<L::ROWS> > sums;
#pragma HLS stream variable=sums depth=2
    load<L::INPUTS, L::WORD, L::WORDS, typename L::Order>(in, x);
    multiply<L>(x, sums);
    finish<L>(sums, out);
}

template <typename L>
void linear(Stream& in, Stream& out) {
    for (int v = 0; v < L::VECTORS; v++) vector_of<L>(in, out);
}

template <typename L, typename P>
void position_of(const int8_t picture[P::HEIGHT * P::WIDTH * P::CHANNELS], int row, int column, Stream& out) {
#pragma HLS dataflow
    int8_t x[L::WORDS][L::WORD] = {};
#pragma HLS array_partition variable=x complete dim=2
    hls::stream<Sums<L::ROWS> > sums;
#pragma HLS stream variable=sums depth=2
    gather<P, L::WORD, L::WORDS>(picture, row, column, x);
    multiply<L>(x, sums);
    finish<L>(sums, out);
}

template <int N>
void read_picture(Stream& in, int8_t picture[N]) {
    for (int n = 0; n < N; n++) {
#pragma HLS pipeline II=1
        picture[n] = in.read();
    }
}

template <typename L, typename P>
void convolution(Stream& in, Stream& out) {
    int8_t picture[P::HEIGHT * P::WIDTH * P::CHANNELS];
    read_picture<P::HEIGHT * P::WIDTH * P::CHANNELS>(in, picture);
    for (int row = 0; row < P::OUT_ROWS; row++)
        for (int column = 0; column < P::OUT_COLUMNS; column++) position_of<L, P>(picture, row, column, out);
}

// The largest value of every window, or its requantised sum.
template <typename Q, typename P>
void pool(Stream& in, Stream& out) {
    int8_t picture[P::HEIGHT * P::WIDTH * P::CHANNELS];
    read_picture<P::HEIGHT * P::WIDTH * P::CHANNELS>(in, picture);
    for (int row = 0; row < P::OUT_ROWS; row++)
        for (int column = 0; column < P::OUT_COLUMNS; column++)
            for (int channel = 0; channel < P::CHANNELS; channel++) {
                int32_t sum = Q::BIAS, most = -128;
                for (int i = 0; i < P::KERNEL_ROWS; i++)
                    for (int j = 0; j < P::KERNEL_COLUMNS; j++) {
#pragma HLS pipeline II=1
                        const int y = row * P::STRIDE_ROWS + i * P::DILATION_ROWS - P::TOP;
                        const int z = column * P::STRIDE_COLUMNS + j * P::DILATION_COLUMNS - P::LEFT;
                        const bool inside = y >= 0 && y < P::HEIGHT && z >= 0 && z < P::WIDTH;
                        const int32_t value =
                            inside ? picture[(y * P::WIDTH + z) * P::CHANNELS + channel] : int8_t(P::FILL);
                        sum += value;
                        if (value > most) most = value;
                    }
                out.write(Q::MEAN ? requantise(sum, Q::FACTOR, Q::SHIFT, Q::ZERO, Q::LOW, Q::HIGH) : int8_t(most));
            }
}

template <int N>
void look_up(Stream& in, Stream& out, const int8_t table[256]) {
    for (int n = 0; n < N; n++) {
#pragma HLS pipeline II=1
        out.write(table[int(in.read()) + 128]);
    }
}

}  // namespace sparse
