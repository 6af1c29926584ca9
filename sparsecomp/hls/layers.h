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

// A value that BITS hold: what they are is all that a synthesiser then keeps.
template <int BITS>
int32_t narrow(int32_t value) {
#pragma HLS inline
    return int32_t(uint32_t(value) << (32 - BITS)) >> (32 - BITS);
}

// ((sum * factor + half) >> shift) + zero, kept within low and high. The shift of a negative number rounds down.
inline int8_t requantise(int64_t product, int shift, int zero, int low, int high) {
#pragma HLS inline
    int64_t scaled = (product + (int64_t(1) << (shift - 1))) >> shift;
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

// The windows of a picture that streams by: all taps of one channel in a cycle, channel after channel. Memories delay the
// rows above and the columns to the left; each is read and written at the same place. Padding runs through as FILL.
template <typename P>
struct Chunk {
    int8_t of[P::KERNEL_ROWS * P::KERNEL_COLUMNS];
};

template <typename P>
void windows(Stream& in, hls::stream<Chunk<P> >& out) {
    enum {
        ROWS = P::TOP + P::HEIGHT + P::BOTTOM,
        COLUMNS = P::LEFT + P::WIDTH + P::RIGHT,
        ABOVE = (P::KERNEL_ROWS - 1) * P::DILATION_ROWS,
        BEFORE = (P::KERNEL_COLUMNS - 1) * P::DILATION_COLUMNS,
        LINE = COLUMNS * P::CHANNELS,
        COLUMN = P::DILATION_COLUMNS * P::CHANNELS
    };
    int8_t lines[LINE][ABOVE + 1] = {};
    int8_t columns[COLUMN][P::KERNEL_ROWS][P::KERNEL_COLUMNS] = {};
#pragma HLS array_reshape variable=lines complete dim=2
#pragma HLS array_reshape variable=columns complete dim=2
#pragma HLS array_reshape variable=columns complete dim=3
#pragma HLS dependence variable=lines inter false
    int back = 0;
    for (int y = 0; y < ROWS; y++)
        for (int place = 0; place < LINE; place++) {
#pragma HLS pipeline II=1
            const int x = place / P::CHANNELS;
            const bool inside = y >= P::TOP && y < P::TOP + P::HEIGHT && x >= P::LEFT && x < P::LEFT + P::WIDTH;
            // The value of every row of the window, the newest first.
            int8_t now[ABOVE + 1];
            now[0] = inside ? in.read() : int8_t(P::FILL);
            for (int k = 0; k < ABOVE; k++) {
#pragma HLS unroll
                now[k + 1] = lines[place][k];
                lines[place][k] = now[k];
            }
            Chunk<P> chunk;
            for (int i = 0; i < P::KERNEL_ROWS; i++) {
#pragma HLS unroll
                int8_t value = now[(P::KERNEL_ROWS - 1 - i) * P::DILATION_ROWS];
                for (int j = P::KERNEL_COLUMNS - 1; j >= 0; j--) {
#pragma HLS unroll
                    chunk.of[i * P::KERNEL_COLUMNS + j] = value;
                    const int8_t older = columns[back][i][j];
                    columns[back][i][j] = value;
                    value = older;
                }
            }
            back = back == COLUMN - 1 ? 0 : back + 1;
            if (y >= ABOVE && (y - ABOVE) % P::STRIDE_ROWS == 0 && x >= BEFORE && (x - BEFORE) % P::STRIDE_COLUMNS == 0)
                out.write(chunk);
        }
}

// A window into words of WORD.
template <typename P, int WORD, int WORDS>
void load_window(hls::stream<Chunk<P> >& in, int8_t x[WORDS][WORD]) {
    enum { TAPS = P::KERNEL_ROWS * P::KERNEL_COLUMNS };
    for (int channel = 0; channel < P::CHANNELS; channel++) {
#pragma HLS pipeline II=1
        const Chunk<P> chunk = in.read();
        for (int tap = 0; tap < TAPS; tap++) {
#pragma HLS unroll
            x[(channel * TAPS + tap) / WORD][(channel * TAPS + tap) % WORD] = chunk.of[tap];
        }
    }
}

// The words of a vector of which a value lies more than MOST from ZERO, without ZERO, and which words they are. One word of
// zeros where none does: sums must be given.
template <typename L>
void keep(Stream& in, int16_t x[L::WORDS][L::WORD], int16_t places[L::WORDS], int& kept) {
    int slot = 0;
    bool any = false;
    for (int n = 0; n < L::INPUTS; n++) {
#pragma HLS pipeline II=1
        const int value = in.read() - L::ZERO_IN;
        const bool far = value > L::MOST || value < -L::MOST;
        x[slot][n % L::WORD] = int16_t(far ? value : 0);
        any = any || far;
        if (n % L::WORD == L::WORD - 1 || n == L::INPUTS - 1) {
            places[slot] = int16_t(n / L::WORD);
            if (any) slot++;
            any = false;
        }
    }
    kept = slot > 0 ? slot : 1;
}

// One trip: L::ROWS outputs times L::LANES inputs.
template <typename L, typename Value>
void step(const Value word[L::WORD], int trip, bool first, Sums<L::ROWS>& sums) {
#pragma HLS inline
    for (int r = 0; r < L::ROWS; r++) {
#pragma HLS unroll
        int32_t sum = first ? 0 : sums.of[r];
        for (int l = 0; l < L::LANES; l++) {
#pragma HLS unroll
            const int place = l / L::N * L::M + L::select(trip, r / L::SHARED, l);
            sum += int32_t(L::weight(trip, r, l)) * int32_t(word[place]);
        }
        sums.of[r] = narrow<L::SUM_BITS>(sum);
    }
}

// The tile loop.
template <typename L>
void multiply(const int8_t x[L::WORDS][L::WORD], hls::stream<Sums<L::ROWS> >& out) {
    Sums<L::ROWS> sums;
    bool first = true;
    for (int trip = 0; trip < L::TRIPS; trip++) {
#pragma HLS pipeline II=1
        step<L>(x[L::word(trip)], trip, first, sums);
        first = L::last(trip);
        if (first) out.write(sums);
    }
}

// The tile loop of a queue: every group of rows goes through the words that were kept.
template <typename L>
void multiply_kept(
    const int16_t x[L::WORDS][L::WORD], const int16_t places[L::WORDS], int kept, hls::stream<Sums<L::ROWS> >& out) {
    Sums<L::ROWS> sums;
    for (int group = 0; group < L::TRIPS / L::WORDS; group++)
        for (int slot = 0; slot < kept; slot++) {
#pragma HLS loop_tripcount max=L::WORDS
#pragma HLS pipeline II=1
            step<L>(x[slot], group * L::WORDS + places[slot], slot == 0, sums);
            if (slot == kept - 1) out.write(sums);
        }
}

// One value in a cycle; or, SERIAL, in the 16 cycles of a factor's bits, without a multiplier.
template <typename L>
void finish(hls::stream<Sums<L::ROWS> >& in, Stream& out) {
    enum { BITS = L::SERIAL ? 16 : 1 };
    Sums<L::ROWS> sums;
    int r = L::ROWS;
    int64_t product = 0;
    for (int n = 0; n < L::OUTPUTS * BITS; n++) {
#pragma HLS pipeline II=1
        const int o = n / BITS, bit = n % BITS;
        if (r == L::ROWS) {
            sums = in.read();
            r = 0;
        }
        const int32_t total = narrow<L::SUM_BITS>(sums.of[r] + L::bias(o));
        const uint16_t factor = uint16_t(L::factor(o));
        if (L::SERIAL)
            product = (bit ? product : 0) + (factor >> bit & 1 ? int64_t(total) * (int64_t(1) << bit) : 0);
        else
            product = int64_t(total) * int64_t(factor);
        if (bit == BITS - 1) {
            out.write(requantise(product, L::shift(o), L::ZERO, L::LOW, L::HIGH));
            r++;
        }
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

template <typename L>
void queue_of(Stream& in, Stream& out) {
#pragma HLS dataflow
    int16_t x[L::WORDS][L::WORD] = {};
    int16_t places[L::WORDS];
    int kept;
#pragma HLS array_partition variable=x complete dim=2
    hls::stream<Sums<L::ROWS> > sums;
#pragma HLS stream variable=sums depth=2
    keep<L>(in, x, places, kept);
    multiply_kept<L>(x, places, kept, sums);
    finish<L>(sums, out);
}

template <typename L>
void queued(Stream& in, Stream& out) {
    for (int v = 0; v < L::VECTORS; v++) queue_of<L>(in, out);
}

template <typename L, typename P>
void position_of(hls::stream<Chunk<P> >& in, Stream& out) {
#pragma HLS dataflow
    int8_t x[L::WORDS][L::WORD] = {};
#pragma HLS array_partition variable=x complete dim=0
    hls::stream<Sums<L::ROWS> > sums;
#pragma HLS stream variable=sums depth=2
    load_window<P, L::WORD, L::WORDS>(in, x);
    multiply<L>(x, sums);
    finish<L>(sums, out);
}

template <typename L, typename P>
void positions(hls::stream<Chunk<P> >& in, Stream& out) {
    for (int v = 0; v < L::VECTORS; v++) position_of<L, P>(in, out);
}

template <typename L, typename P>
void convolution(Stream& in, Stream& out) {
#pragma HLS dataflow
    hls::stream<Chunk<P> > chunks;
#pragma HLS stream variable=chunks depth=P::ROW
    windows<P>(in, chunks);
    positions<L, P>(chunks, out);
}

// The largest value of every window, or its requantised sum.
template <typename Q, typename P>
void reduce(hls::stream<Chunk<P> >& in, Stream& out) {
    for (int n = 0; n < Q::VALUES; n++) {
#pragma HLS pipeline II=1
        const Chunk<P> chunk = in.read();
        int32_t sum = Q::BIAS, most = -128;
        for (int tap = 0; tap < P::KERNEL_ROWS * P::KERNEL_COLUMNS; tap++) {
#pragma HLS unroll
            sum += chunk.of[tap];
            if (chunk.of[tap] > most) most = chunk.of[tap];
        }
        sum = narrow<Q::SUM_BITS>(sum);
        out.write(
            Q::MEAN ? requantise(int64_t(sum) * Q::FACTOR, Q::SHIFT, Q::ZERO, Q::LOW, Q::HIGH) : int8_t(most));
    }
}

template <typename Q, typename P>
void pool(Stream& in, Stream& out) {
#pragma HLS dataflow
    hls::stream<Chunk<P> > chunks;
#pragma HLS stream variable=chunks depth=2
    windows<P>(in, chunks);
    reduce<Q, P>(chunks, out);
}

template <int N>
void look_up(Stream& in, Stream& out, const int8_t table[256]) {
    for (int n = 0; n < N; n++) {
#pragma HLS pipeline II=1
        out.write(table[int(in.read()) + 128]);
    }
}

}  // namespace sparse
