// A card on the CPU: one warp per block as fibers in random order between the points where they wait; each word of
// shared memory knows who read and wrote it since the last barrier, so that a missing barrier is a failure.
#include <ucontext.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <random>
#define __global__
struct D3 { int x, y, z; };
static D3 threadIdx, blockIdx;
static int emu_now, emu_epoch, emu_waiting, emu_failed;
static ucontext_t emu_main, emu_ctx[32]; static int emu_state[32];  // 0 ready, 1 waiting, 2 done
static void emu_fail(const char* s) { emu_failed = s[0]; }
static void emu_wait() { int me = emu_now; emu_state[me] = 1; swapcontext(&emu_ctx[me], &emu_main); }
static void __syncthreads() { emu_wait(); }
struct Word { int writer = -1, wepoch = -1, reader = -1, repoch = -1; bool many = false; };
template <class T> struct Shared { std::vector<T> v; std::vector<Word> w; Shared(int n) : v(n), w(n) {}
  struct Ref { Shared& s; int i;
    operator T() const { Word& w = s.w[i]; if (w.wepoch == emu_epoch && w.writer != emu_now) emu_fail("race");
        if (w.repoch == emu_epoch && w.reader != emu_now) w.many = true; else if (w.repoch != emu_epoch) w.many = false;
        w.reader = emu_now; w.repoch = emu_epoch; return s.v[i]; }
    void operator=(T x) { Word& w = s.w[i]; if ((w.wepoch == emu_epoch && w.writer != emu_now) || (w.repoch == emu_epoch && (w.many || w.reader != emu_now))) emu_fail("race");
        w.writer = emu_now; w.wepoch = emu_epoch; s.v[i] = x; } };
  Ref operator[](long i) { if (i < 0 || i >= (long)v.size()) { emu_fail("bounds"); i = 0; } return Ref{*this, (int)i}; } };
static void* emu_block_shared;
#define SHARED(type, name, n) if (!emu_block_shared) emu_block_shared = new Shared<type>(n); Shared<type>& name = *(Shared<type>*)emu_block_shared
static float h(unsigned short u) {
#ifdef BFLOAT16
    unsigned w = (unsigned)u << 16; float b; std::memcpy(&b, &w, 4); return b;
#endif
    _Float16 f; std::memcpy(&f, &u, 2); return (float)f; }
static unsigned emu_a[32][4], emu_b[32][4], emu_e[32];
// a warp's product waits for its 32 lanes but orders no memory: the epoch is kept
static bool emu_collective;
static void mma_sp(float d[4], const unsigned* a, const unsigned* b, unsigned e) {
    int me = emu_now; std::memcpy(emu_a[me], a, 16); std::memcpy(emu_b[me], b, 16); emu_e[me] = e;
    emu_collective = true; emu_wait();
    for (int i = 0; i < 4; ++i) { int row = (me >> 2) + 8 * (i >> 1), col = 2 * (me & 3) + (i & 1); float s = 0;
        for (int p = 0; p < 16; ++p) {  // p: place of the compressed row
            int la = (row & 7) * 4 + (p & 7) / 2; unsigned av = emu_a[la][(row >> 3) + 2 * (p >> 3)] >> 16 * (p & 1);
            unsigned m = emu_e[(row & 7) * 4 + (p >> 3)] >> (16 * (row >> 3) + 2 * (p & 7)) & 3; int k = p / 2 * 4 + m;
            unsigned bv = emu_b[col * 4 + (k & 7) / 2][k >> 3] >> 16 * (k & 1);
            s += h((unsigned short)av) * h((unsigned short)bv); }
        d[i] += s; }
    emu_collective = true; emu_wait();
}
static void (*emu_call)();
static void emu_entry() { emu_call(); emu_state[emu_now] = 2; swapcontext(&emu_ctx[emu_now], &emu_main); }
static int emu_run(int gx, int gy, unsigned seed, void (*call)()) {
    emu_call = call; emu_failed = 0; std::mt19937 rng(seed); static char stacks[32][65536];
    for (int by = 0; by < gy; ++by) for (int bx = 0; bx < gx; ++bx) {
        blockIdx = {bx, by, 0}; emu_block_shared = nullptr; emu_epoch = 0;
        for (int i = 0; i < 32; ++i) { getcontext(&emu_ctx[i]); emu_ctx[i].uc_stack.ss_sp = stacks[i]; emu_ctx[i].uc_stack.ss_size = 65536;
            emu_ctx[i].uc_link = 0; makecontext(&emu_ctx[i], emu_entry, 0); emu_state[i] = 0; }
        for (;;) { std::vector<int> ready; int waiting = 0; for (int i = 0; i < 32; ++i) { if (emu_state[i] == 0) ready.push_back(i); waiting += emu_state[i] == 1; }
            if (ready.empty()) { if (!waiting) break; if (waiting < 32) return 'd'; if (!emu_collective) ++emu_epoch; emu_collective = false;
                for (int& s : emu_state) s = 0; continue; }
            emu_now = ready[rng() % ready.size()]; threadIdx = {emu_now, 0, 0}; swapcontext(&emu_main, &emu_ctx[emu_now]); } }
    return emu_failed; }
