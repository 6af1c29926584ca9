/* A call of a linear: x [..., I] gives [..., O]. */
#include <stdlib.h>
#include <string.h>

#include "library.h"

/* The form of the weight that is best for so many tokens. */
static const Packed *packed_for(const Kernel *k, int64_t tokens) {
  int64_t range = 0;
  while (range < k->ranges - 1 && tokens > k->choice[2 * range]) range++;
  return &k->packed[k->ranges ? k->choice[2 * range + 1] : 0];
}

/* Run with at most so many tokens at a time that 32-bit indices reach them. */
static Status *run_slices(Kernel *k, void *context, int64_t tokens, const float *x, const float *bias,
                          const float *residual, float *y) {
  int64_t widest = k->inputs > k->outputs ? k->inputs : k->outputs, slice = MOST_VALUES / widest;
  if (slice < 1) slice = 1;
  const Packed *packed = packed_for(k, tokens);
  Status *status = NULL;
  for (int64_t first = 0; first < tokens && !status; first += slice) {
    int64_t count = tokens - first < slice ? tokens - first : slice;
    int32_t threads = threads_for(k, count * packed->kept);
    Cut cut = cut_linear(k, packed, count, threads);
    status = launch(k, context, &cut, threads, x + first * k->inputs, bias,
                    residual ? residual + first * k->outputs : NULL, y + first * k->outputs);
  }
  return status;
}

/* Bring product and residual to one shape where they differ: the graph may add a tensor that broadcasts. */
static Status *match_residual(Kernel *k, Tensor *x, Tensor *residual, int64_t *out, size_t *rank) {
  if (*rank == residual->rank && !memcmp(out, residual->dims, sizeof(int64_t) * *rank)) return NULL;
  size_t full = *rank > residual->rank ? *rank : residual->rank;
  int64_t dims[MAX_RANK];
  for (size_t i = 0; i < full; i++) {
    int64_t a = i + *rank >= full ? out[i + *rank - full] : 1;
    int64_t b = i + residual->rank >= full ? residual->dims[i + residual->rank - full] : 1;
    if (a != b && a != 1 && b != 1) return wrong_shape(k, "the residual");
    dims[i] = a == 1 ? b : a;
  }
  if (dims[full - 1] != k->outputs) return wrong_shape(k, "the residual");
  residual->owned = expanded(residual->data, residual->dims, residual->rank, dims, full);
  int64_t last = x->dims[x->rank - 1];
  memcpy(out, dims, sizeof(int64_t) * full);
  *rank = full;
  dims[full - 1] = last;
  x->owned = expanded(x->data, x->dims, x->rank, dims, full);
  if (!residual->owned || !x->owned) return fail(k->api, "%s: no memory to broadcast the residual", k->entry->name);
  residual->data = residual->owned;
  x->data = x->owned;
  return NULL;
}

Status *compute_linear(Kernel *k, void *context, Tensor *x, Tensor *bias, Tensor *residual) {
  Status *status;
  if ((status = read_input(k, context, 0, x))) return status;
  if (x->rank < 1 || x->dims[x->rank - 1] != k->inputs) return wrong_shape(k, "the first input");
  if ((status = read_bias(k, context, bias))) return status;
  int64_t out[MAX_RANK];
  size_t rank = x->rank;
  memcpy(out, x->dims, sizeof(int64_t) * rank);
  out[rank - 1] = k->outputs;
  if (k->entry->residual) {
    if ((status = read_input(k, context, 1 + (size_t)k->entry->bias, residual))) return status;
    if ((status = match_residual(k, x, residual, out, &rank))) return status;
  }
  float *y = NULL;
  if ((status = make_output(k, context, out, rank, &y))) return status;
  return run_slices(k, context, product(out, rank - 1), x->data, bias->data, k->entry->residual ? residual->data : NULL, y);
}
