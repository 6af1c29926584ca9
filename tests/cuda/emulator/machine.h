// A card on the CPU: the threads of a block are fibers that run in a random order between the points where they wait,
// and every two bytes of shared and global memory know who read and wrote them, so that a missing barrier, an access
// out of bounds, a value that nobody wrote and threads that wait for ever are failures.
//
// Two accesses to the same bytes, one of them a write, are a race unless the same thread makes both, or a barrier of
// the block lies between, or the threads are of one warp and a barrier of the warp lies between (CUDA C++ Programming
// Guide: __syncthreads and __syncwarp order memory, shuffles and warp-wide products do not). Blocks are never ordered.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace emu {
struct Buffer;
struct Index {
    int x, y, z;
};
extern Index thread_index, block_index;
extern int me;  // number of the running thread in its block
extern size_t dynamic_bytes;

[[noreturn]] void fail(const char* format, ...);
Buffer* shared_buffer(const char* name, size_t bytes);
Buffer* global_buffer(const void* address, long* at);
bool is_shared(const Buffer* buffer);
void read(Buffer* buffer, long at, long size, void* to);
void write(Buffer* buffer, long at, long size, const void* from);
void begin_copy(Buffer* to, long to_at, Buffer* from, long from_at, bool zeros);
void commit_copies();
// A barrier or wait at a place of the source; `emu_launch` can leave one out.
void sync_block(const char* file, int line);
void sync_warp(const char* file, int line);
void wait_copies(const char* file, int line, int left);
// What a warp does together: the last lane to arrive computes for all.
void together(const char* what, const void* in, size_t in_bytes, void* out, size_t out_bytes,
              void (*compute)(const void* const* in, void* const* out));
bool run_grid(Index grid, Index block, size_t shared, unsigned seed, const char* left_out, void (*call)());

// A pointer that knows its buffer. Reads of constants give values; what may be written gives a reference.
template <class T>
struct Pointer;
template <class T>
struct Reference {
    Buffer* buffer;
    long at;
    operator T() const {
        T value;
        read(buffer, at, sizeof(T), &value);
        return value;
    }
    void operator=(T value) const { write(buffer, at, sizeof(T), &value); }
    void operator=(const Reference& other) const { *this = (T)other; }
};
template <class T>
struct Element {
    using type = Reference<T>;
};
template <class T>
struct Element<const T> {
    using type = T;
};
template <class T>
struct Pointer {
    Buffer* buffer = nullptr;
    long at = 0;
    operator Pointer<const T>() const { return {buffer, at}; }
    explicit operator bool() const { return buffer != nullptr; }
    Pointer operator+(long long n) const { return {buffer, at + (long)n * (long)sizeof(T)}; }
    typename Element<T>::type operator[](long long n) const {
        return Reference<std::remove_const_t<T>>{buffer, at + (long)n * (long)sizeof(T)};
    }
};

struct Site {
    const char* file;
    int line;
    template <int N>
    void copy_wait() const {
        wait_copies(file, line, N);
    }
};
}  // namespace emu
