/* What the parts of the library share. `ops.h`, which is generated for a model, defines the entries. */
#ifndef SPARSECOMP_ORT_LIBRARY_H
#define SPARSECOMP_ORT_LIBRARY_H

#include <stdatomic.h>
#include <stdint.h>

#include "abi.h"

#define WEIGHTS 4
#define MAX_RANK 32
#define LINE 64 /* bytes; generated kernels read weights and biases with aligned loads */

enum Family { ROWS, PANEL, GATHER, MASK };

/* As `sparsecomp.kernels.tir.SIGNATURE` says; serial, on the items begin to end. */
typedef void KernelFunction(const float *x, const float *bias, const float *residual, float *y, float *scratch,
                            const void *w0, const void *w1, const void *w2, const void *w3, const int32_t *dims,
                            int32_t begin, int32_t end);

typedef struct {
  int32_t number; /* vectors of tokens (rows), tokens of the register tile (panel), 0 */
  KernelFunction *function;
} Variant;

/* An operation: one kernel family with one epilogue. */
typedef struct {
  const char *name;
  enum Family family;
  int bias, residual;
  int indexed; /* whether the index and shape of the fallback are inputs too; they are not read */
  int32_t lanes; /* of the vectors */
  int32_t v;     /* rows of a panel; entries of a group (gather) */
  const Variant *variants;
  int32_t count;
} Entry;

/* A node: its sizes and its weight, checked. */
typedef struct {
  Api api;
  const Entry *entry;
  int32_t outputs, inputs;
  int32_t chunk, block; /* rows alone */
  int64_t kept;         /* multiply-adds for a token */
  const void *weights[WEIGHTS];
  int64_t lengths[WEIGHTS]; /* entries of each */
  void *owned[WEIGHTS];     /* copies on a cache line, where ORT's own do not lie on one */
  float *bias;              /* the constant bias, or zeros where there is none; NULL if it is given at each call */
  atomic_int threads;       /* most threads seen in a call, 0 before the first */
  atomic_uint calls;
} Kernel;

/* How a call is cut. */
typedef struct {
  KernelFunction *function;
  int32_t dims[8];
  int32_t items;
  int64_t scratch; /* bytes of a thread */
} Cut;

/* weights.c: NULL if every index of the packed weight is in range, else what is wrong. */
const char *check_weight(Kernel *kernel);
int weight_count(enum Family family);
int weight_type(enum Family family, int index);
const void *mask_controls(void);

/* cut.c */
Cut cut_call(const Kernel *kernel, int64_t tokens, int32_t threads);
int64_t scratch_limit(const Kernel *kernel);

#endif
