/* Runs a kernel on the OpenMP threads that PyTorch already uses.
 *
 * A second pool of threads beside PyTorch's would spin against it, so this links to the same OpenMP run time and asks for
 * as many threads as torch.get_num_threads() says. A kernel is serial: every thread takes an equal range of the items.
 */
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef void (*sparsecomp_kernel)(const float *x, const float *bias, const float *residual, float *y, float *scratch,
                                  const void *w0, const void *w1, const void *w2, const void *w3, const int32_t *dims,
                                  int32_t begin, int32_t end);

/* Memory of one thread, kept for its next call: a kernel must not pay for fresh pages each time. */
typedef struct {
  void *start;
  size_t bytes;
} sparsecomp_memory;
static __thread sparsecomp_memory scratch;   /* of a kernel */
static __thread sparsecomp_memory workspace; /* what the steps of one call hand to each other; of the thread that calls */

static void *reserve(sparsecomp_memory *memory, size_t bytes) {
  if (bytes < 64) bytes = 64;
  if (bytes > memory->bytes) {
    free(memory->start);
    bytes = (bytes + 63) / 64 * 64;
    memory->start = aligned_alloc(64, bytes);
    memory->bytes = memory->start ? bytes : 0;
  }
  return memory->start;
}

/* What of a launch is the same from call to call, in one place: handing over an address takes the host less time than ten
 * arguments. */
typedef struct {
  sparsecomp_kernel kernel;
  const void *const *weights;
  const int32_t *dims;
  int64_t bytes; /* of scratch */
  int32_t items, threads;
} sparsecomp_prepared;

/* Returns 0, or 1 when memory for scratch is missing (then nothing useful is in y). */
int32_t sparsecomp_call(const sparsecomp_prepared *launch, const float *x, const float *bias, const float *residual,
                        float *y) {
  const void *const *weights = launch->weights;
  size_t bytes = (size_t)launch->bytes;
  int32_t failed = 0, items = launch->items, threads = launch->threads;
  if (threads > items) threads = items;
  if (threads <= 1) {
    float *own = reserve(&scratch, bytes);
    if (!own) return 1;
    launch->kernel(x, bias, residual, y, own, weights[0], weights[1], weights[2], weights[3], launch->dims, 0, items);
    return 0;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    float *own = reserve(&scratch, bytes);
    if (own)
      launch->kernel(x, bias, residual, y, own, weights[0], weights[1], weights[2], weights[3], launch->dims,
                     (int32_t)(items * me / team), (int32_t)(items * (me + 1) / team));
    else
#pragma omp atomic write
      failed = 1;
  }
  return failed;
}

/* One kernel call of a sequence. An operand is a fixed address, or lies at an offset from a base that the call gives:
 * base 0 is the workspace, base i the i-th address of the call. */
#define SPARSECOMP_OPERANDS 8
typedef struct {
  sparsecomp_kernel kernel;
  const void *fixed[SPARSECOMP_OPERANDS]; /* x, bias, residual, y, w0..w3; null where a base is used */
  int64_t offset[SPARSECOMP_OPERANDS];    /* in bytes */
  int32_t base[SPARSECOMP_OPERANDS];      /* -1 for a fixed address */
  const int32_t *dims;
  int32_t items;
  int32_t waits; /* whether it reads what steps before it wrote */
} sparsecomp_step;

static void run_step(const sparsecomp_step *step, const void *const *bases, float *own, int64_t me, int64_t team) {
  const void *at[SPARSECOMP_OPERANDS];
  for (int i = 0; i < SPARSECOMP_OPERANDS; i++) {
    const char *base = step->base[i] < 0 ? 0 : bases[step->base[i]];
    at[i] = step->base[i] < 0 ? step->fixed[i] : base ? base + step->offset[i] : 0;
  }
  int32_t begin = (int32_t)(step->items * me / team), end = (int32_t)(step->items * (me + 1) / team);
  if (begin < end)
    step->kernel(at[0], at[1], at[2], (float *)at[3], own, at[4], at[5], at[6], at[7], step->dims, begin, end);
}

/* Runs steps one after the other on the same team of threads, with a barrier before each that waits.
 * Returns 0, or 1 when memory is missing (then nothing useful is in the output). */
int32_t sparsecomp_run(const sparsecomp_step *steps, int32_t count, int32_t threads, int64_t work_bytes,
                       int64_t scratch_bytes, const void *x, const void *y, const void *bias0, const void *bias1,
                       const void *bias2, const void *residual) {
  const void *bases[] = {reserve(&workspace, (size_t)work_bytes), x, y, bias0, bias1, bias2, residual};
  int32_t failed = 0;
  if (!bases[0]) return 1;
  if (threads <= 1) {
    float *own = reserve(&scratch, (size_t)scratch_bytes);
    if (!own) return 1;
    for (int32_t i = 0; i < count; i++) run_step(&steps[i], bases, own, 0, 1);
    return 0;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    float *own = reserve(&scratch, (size_t)scratch_bytes);
    if (!own)
#pragma omp atomic write
      failed = 1;
#pragma omp barrier
    for (int32_t i = 0; i < count && !failed; i++) {
      if (steps[i].waits) {
#pragma omp barrier
      }
      run_step(&steps[i], bases, own, me, team);
    }
  }
  return failed;
}
