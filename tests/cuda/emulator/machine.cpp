// The machine that machine.h tells of.
#include "machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace emu {
constexpr int LANES = 32, MOST_THREADS = 1024, STACK = 1 << 16;

struct Access {
    int launch = 0, block = 0, thread = 0, epoch = 0, warp_epoch = 0;
};
struct Cell {  // two bytes
    Access write, read;
    int readers = 0;  // 0: `read` alone counts; 1: several of its warp; 2: of its block; 3: of several blocks
    int pending = 0;  // an asynchronous copy of thread pending - 1 is on the way
    bool known = false;
};
struct Buffer {
    char* base;
    size_t bytes;
    bool shared;
    std::vector<Cell> cells;
    Buffer(char* base, size_t bytes, bool shared) : base(base), bytes(bytes), shared(shared), cells((bytes + 1) / 2) {}
};
struct Copy {
    Buffer *to, *from;
    long to_at, from_at;
    bool zeros;
};
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool begun, done;
    int turns;  // collectives so far
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Exchange {  // what the lanes of a warp hand to each other; two of them, so that nobody overwrites what another reads
    const char* what;
    int arrived;
    alignas(16) char in[LANES][64], out[LANES][64];
};
struct Warp {
    int epoch, at_barrier;
    Exchange exchange[2];
};
Index thread_index, block_index, block_size;
int me, threads, at_barrier, launch_number, block_number, epoch;
Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / LANES];
std::unique_ptr<char[]> stacks;
std::vector<int> ready;
jmp_buf main_at;
std::string message;
std::map<char*, Buffer*> global;
std::map<std::string, std::pair<std::vector<char>*, Buffer*>> block_shared;
std::set<std::string> sites;  // of barriers and waits that were reached
std::string skipped;          // one that is left out
size_t dynamic_bytes;

[[noreturn]] void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    message = text;
    _longjmp(main_at, 2);
}

void leave() {  // to whoever is next; returns when this thread is chosen again
    if (!_setjmp(fibers[me].at)) _longjmp(main_at, 1);
}

Access now() { return {launch_number, block_number, me, epoch, warps[me / LANES].epoch}; }

bool ordered(const Access& before) {  // whether it happened before what this thread does now
    if (before.launch != launch_number) return true;
    if (before.block != block_number) return false;
    if (before.thread == me || before.epoch < epoch) return true;
    return before.thread / LANES == me / LANES && before.warp_epoch < warps[me / LANES].epoch;
}

const char* place(const Buffer& buffer) { return buffer.shared ? "shared memory" : "global memory"; }

void check(const Buffer* buffer, long at, long size) {
    if (!buffer) fail("bounds: null pointer read or written");
    if (at < 0 || at + size > (long)buffer->bytes)
        fail("bounds: bytes %ld to %ld of %zu in %s", at, at + size, buffer->bytes, place(*buffer));
    if (at % size) fail("alignment: %ld bytes at %ld in %s", size, at, place(*buffer));
}

void mark_read(Buffer* buffer, long at, long size) {
    check(buffer, at, size);
    for (long i = at / 2; i < (at + size + 1) / 2; ++i) {
        Cell& cell = buffer->cells[i];
        if (cell.pending) fail("race: byte %ld of %s is read while its copy is on the way", 2 * i, place(*buffer));
        if (!ordered(cell.write)) fail("race: byte %ld of %s is read by thread %d, written by %d", 2 * i, place(*buffer), me, cell.write.thread);
        if (buffer->shared && !cell.known) fail("unknown: byte %ld of shared memory is read, and nobody wrote it", 2 * i);
        const Access& last = cell.read;
        const bool same = last.launch == launch_number && last.block == block_number && last.thread == me;
        if (!ordered(last))
            cell.readers = std::max(cell.readers, last.block != block_number ? 3 : last.thread / LANES != me / LANES ? 2 : 1);
        else if (!same || last.epoch < epoch)
            cell.readers = last.launch == launch_number && cell.readers == 3 ? 3 : 0;
        cell.read = now();
    }
}

void mark_write(Buffer* buffer, long at, long size, bool copy = false) {
    check(buffer, at, size);
    for (long i = at / 2; i < (at + size + 1) / 2; ++i) {
        Cell& cell = buffer->cells[i];
        const Access& last = cell.read;
        bool free = ordered(last);
        if (last.launch == launch_number && cell.readers) {
            const bool later = last.block == block_number && last.epoch < epoch;
            const bool in_warp = cell.readers == 1 && last.block == block_number && last.thread / LANES == me / LANES && last.warp_epoch < warps[me / LANES].epoch;
            free = cell.readers < 3 && (later || in_warp);
        }
        if (cell.pending) fail("race: byte %ld of %s is written while a copy to it is on the way", 2 * i, place(*buffer));
        if (!free) fail("race: byte %ld of %s is written by thread %d, read by %d", 2 * i, place(*buffer), me, last.thread);
        if (!ordered(cell.write)) fail("race: byte %ld of %s is written by threads %d and %d", 2 * i, place(*buffer), me, cell.write.thread);
        if (copy) {
            cell.pending = me + 1;
            continue;
        }
        cell.write = now();
        cell.known = true;
    }
}

void read(Buffer* buffer, long at, long size, void* to) {
    mark_read(buffer, at, size);
    memcpy(to, buffer->base + at, size);
}

void write(Buffer* buffer, long at, long size, const void* from) {
    mark_write(buffer, at, size);
    memcpy(buffer->base + at, from, size);
}

bool left_out(const char* file, int line, const char* what) {
    const char* name = strrchr(file, '/');
    const std::string site = std::string(name ? name + 1 : file) + ":" + std::to_string(line) + ":" + what;
    sites.insert(site);
    return site == skipped;
}

void wake(int first, int count) {
    for (int i = first; i < first + count; ++i) ready.push_back(i);
}

void sync_block(const char* file, int line) {
    if (left_out(file, line, "__syncthreads")) return;
    if (++at_barrier == threads) {
        at_barrier = 0;
        ++epoch;
        wake(0, threads);
    }
    leave();
}

void sync_warp(const char* file, int line) {
    if (left_out(file, line, "__syncwarp")) return;
    Warp& warp = warps[me / LANES];
    if (++warp.at_barrier == LANES) {
        warp.at_barrier = 0;
        ++warp.epoch;
        wake(me / LANES * LANES, LANES);
    }
    leave();
}

void begin_copy(Buffer* to, long to_at, Buffer* from, long from_at, bool zeros) {
    if (!to || !to->shared || (from && from->shared)) fail("copy: it must go from global to shared memory");
    mark_write(to, to_at, 16, true);
    if (!zeros) check(from, from_at, 16);
    fibers[me].open.push_back({to, from, to_at, from_at, zeros});
}

void commit_copies() {
    fibers[me].groups.push_back(fibers[me].open);
    fibers[me].open.clear();
}

// What a copy reads and writes happens when it is waited for: before that, nobody may touch where it goes.
void wait_copies(const char* file, int line, int left) {
    if (left_out(file, line, "copy_wait")) return;
    auto& groups = fibers[me].groups;
    for (; (int)groups.size() > left; groups.erase(groups.begin()))
        for (const Copy& copy : groups.front()) {
            for (long i = copy.to_at / 2; i < copy.to_at / 2 + 8; ++i) copy.to->cells[i].pending = 0;
            char values[16] = {};
            if (!copy.zeros) read(copy.from, copy.from_at, 16, values);
            write(copy.to, copy.to_at, 16, values);
        }
}

void together(const char* what, const void* in, size_t in_bytes, void* out, size_t out_bytes,
              void (*compute)(const void* const*, void* const*)) {
    Exchange& exchange = warps[me / LANES].exchange[fibers[me].turns++ % 2];
    const int lane = me % LANES;
    if (exchange.arrived == 0) exchange.what = what;
    if (strcmp(exchange.what, what)) fail("divergence: lanes of a warp are at %s and %s", exchange.what, what);
    memcpy(exchange.in[lane], in, in_bytes);
    if (++exchange.arrived == LANES) {
        exchange.arrived = 0;
        const void* all_in[LANES];
        void* all_out[LANES];
        for (int i = 0; i < LANES; ++i) all_in[i] = exchange.in[i], all_out[i] = exchange.out[i];
        compute(all_in, all_out);
        wake(me - lane, LANES);
    }
    leave();
    memcpy(out, exchange.out[lane], out_bytes);
}

bool is_shared(const Buffer* buffer) { return buffer && buffer->shared; }

Buffer* global_buffer(const void* address, long* at) {
    char* given = static_cast<char*>(const_cast<void*>(address));
    auto found = global.upper_bound(given);
    if (!given || found == global.begin()) return nullptr;
    *at = given - (--found)->first;
    return found->second;
}

Buffer* shared_buffer(const char* name, size_t bytes) {
    auto& [memory, buffer] = block_shared[name];
    if (!buffer) {
        memory = new std::vector<char>(bytes);
        buffer = new Buffer(memory->data(), bytes, true);
    }
    return buffer;
}

void forget_shared() {
    for (auto& [name, entry] : block_shared) delete entry.first, delete entry.second;
    block_shared.clear();
}

void (*body)();

void enter() {
    body();
    fibers[me].done = true;
    _longjmp(main_at, 1);
}

void run_block(std::mt19937& random) {
    forget_shared();
    epoch = at_barrier = 0;
    ready.clear();
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.begun = fiber.done = false, fiber.turns = 0;
        fiber.groups.clear(), fiber.open.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks.get() + (size_t)i * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
        ready.push_back(i);
    }
    for (int i = 0; i < threads / LANES; ++i) warps[i].epoch = warps[i].at_barrier = warps[i].exchange[0].arrived = warps[i].exchange[1].arrived = 0;
    while (!ready.empty()) {
        const size_t chosen = random() % ready.size();
        me = ready[chosen];
        ready[chosen] = ready.back();
        ready.pop_back();
        thread_index = {me % block_size.x, me / block_size.x % block_size.y, me / block_size.x / block_size.y};
        const int came = _setjmp(main_at);
        if (came == 2) return;
        if (came == 0) {
            if (fibers[me].begun) _longjmp(fibers[me].at, 1);
            fibers[me].begun = true;
            setcontext(&fibers[me].start);
        }
    }
    for (int i = 0; i < threads; ++i)
        if (!fibers[i].done) {
            message = "deadlock: thread " + std::to_string(i) + " waits for ever";
            return;
        }
}

bool run_grid(Index grid, Index block, size_t shared, unsigned seed, const char* left_out, void (*call)()) {
    message.clear();
    skipped = left_out;
    body = call;
    block_size = block;
    threads = block.x * block.y * block.z;
    dynamic_bytes = shared;
    if (threads < 1 || threads > MOST_THREADS || threads % LANES) {
        message = "launch: " + std::to_string(threads) + " threads in a block";
        return false;
    }
    stacks.reset(new char[(size_t)threads * STACK]);  // not a vector, which would touch all of it
    std::mt19937 random(seed);
    ++launch_number;
    block_number = 0;
    for (int i = 0; i < grid.x * grid.y * grid.z && message.empty(); ++i) {
        block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        ++block_number;
        run_block(random);
    }
    forget_shared();
    stacks.reset();
    return message.empty();
}
}  // namespace emu

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A buffer of global memory, as an allocation of the driver.
EXPORTED void emu_memory(void* base, size_t bytes) {
    emu::Buffer*& buffer = emu::global[static_cast<char*>(base)];
    delete buffer;
    buffer = new emu::Buffer(static_cast<char*>(base), bytes, false);
}

EXPORTED void emu_clear() {
    for (auto& [base, buffer] : emu::global) delete buffer;
    emu::global.clear();
}

// What failed in the last launch.
EXPORTED const char* emu_message() { return emu::message.c_str(); }

// Barriers and waits that launches have reached, one a line.
EXPORTED const char* emu_sites() {
    static std::string text;
    text.clear();
    for (const std::string& site : emu::sites) text += site + "\n";
    return text.c_str();
}
