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

/* Scratch of one thread, kept for its next call: a kernel must not pay for fresh pages each time. */
static __thread float *scratch;
static __thread size_t scratch_bytes;

static float *reserve(size_t bytes) {
  if (bytes < 64) bytes = 64;
  if (bytes > scratch_bytes) {
    free(scratch);
    bytes = (bytes + 63) / 64 * 64;
    scratch = aligned_alloc(64, bytes);
    scratch_bytes = scratch ? bytes : 0;
  }
  return scratch;
}

/* Returns 0, or 1 when memory for scratch is missing (then nothing useful is in y). */
int32_t sparsecomp_launch(sparsecomp_kernel kernel, const float *x, const float *bias, const float *residual, float *y,
                          const void *const *weights, const int32_t *dims, int32_t items, int32_t threads,
                          int64_t bytes) {
  int32_t failed = 0;
  if (threads > items) threads = items;
  if (threads <= 1) {
    float *own = reserve((size_t)bytes);
    if (!own) return 1;
    kernel(x, bias, residual, y, own, weights[0], weights[1], weights[2], weights[3], dims, 0, items);
    return 0;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    float *own = reserve((size_t)bytes);
    if (own)
      kernel(x, bias, residual, y, own, weights[0], weights[1], weights[2], weights[3], dims,
             (int32_t)(items * me / team), (int32_t)(items * (me + 1) / team));
    else
#pragma omp atomic write
      failed = 1;
  }
  return failed;
}
