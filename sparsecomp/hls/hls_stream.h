// A queue with the interface of the vendor's hls::stream, for C simulation without their tool.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <deque>

namespace hls {

template <typename T>
class stream {
  public:
    void write(const T& value) { values.push_back(value); }

    T read() {
        if (values.empty()) {
            std::fprintf(stderr, "a stream was read that holds nothing\n");
            std::abort();
        }
        T value = values.front();
        values.pop_front();
        return value;
    }

    bool empty() const { return values.empty(); }

  private:
    std::deque<T> values;
};

}  // namespace hls
