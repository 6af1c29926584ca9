/* What the parts of the library share. `ops.h`, which is generated for a model, defines the entries. */
#ifndef SPARSECOMP_ORT_LIBRARY_H
#define SPARSECOMP_ORT_LIBRARY_H

#include <stdatomic.h>
#include <stdint.h>

#include "abi.h"

#define WEIGHTS 4
#define MOST_FORMS 3 /* of one weight */
#define MAX_RANK 32
#define LINE 64 /* bytes; generated kernels read weights and biases with aligned loads */
#define MOST_VALUES ((int64_t)1 << 30) /* of a tensor in one call of a kernel, whose indices are 32-bit */

enum Family { ROWS, PANEL, GATHER, MASK, CONV, FULL };

/* As `sparsecomp.kernels.tir.SIGNATURE` says; serial, on the items begin to end. */
typedef void KernelFunction(const float *x, const float *bias, const float *residual, float *y, float *scratch,
                            const void *w0, const void *w1, const void *w2, const void *w3, const int32_t *dims,
                            int32_t begin, int32_t end);

typedef struct {
  int32_t number; /* vectors of a tile (rows, convolutions), tokens of the register tile (panel), 0 */
  int32_t whole;  /* of a convolution: whether a tile lies within one image */
  int32_t direct; /* and whether the maps are used where they lie */
  KernelFunction *function;
} Variant;

/* Of a convolution, two numbers each; one over [N, I, L] has maps of height 1. */
typedef struct {
  int32_t rank; /* of its maps: 1 or 2 */
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t extra[2]; /* more zeros below and on the right */
  int32_t groups;
} Window;

/* A packed form of a weight and the kernels that take it. */
typedef struct {
  enum Family family;
  int32_t v; /* rows of a panel; entries of a group (gather) */
  const Variant *variants;
  int32_t count;
} Form;

/* An operation: one weight in one or more forms, and one epilogue. */
typedef struct {
  const char *name;
  int bias, residual;
  int indexed; /* whether the index and shape of the fallback are inputs too; they are not read */
  int32_t lanes; /* of the vectors */
  const Form *forms;
  int32_t count;
  Window window;        /* of a convolution, which has one form */
  KernelFunction *open; /* takes its maps apart, where its stride asks for that */
} Entry;

/* A weight in one of its forms. */
typedef struct {
  const Form *form;
  int64_t kept; /* multiply-adds for a token or a position */
  const void *weights[WEIGHTS];
  int64_t lengths[WEIGHTS]; /* entries of each */
  void *owned[WEIGHTS];     /* copies on a cache line, where ORT's own do not lie on one, and what is made of them */
} Packed;

/* A node: its sizes and its weight, checked. */
typedef struct {
  Api api;
  const Entry *entry;
  int32_t outputs, inputs;
  int32_t chunk, block; /* rows and convolutions */
  int32_t vectors;      /* of a convolution: the most that its weight was packed for */
  Packed packed[MOST_FORMS];
  int32_t *choice;      /* with several forms: up to so many tokens, the number of the form; ascending */
  int64_t ranges;       /* of it */
  float *bias;          /* the constant bias, or zeros where there is none; NULL if it is given at each call */
  atomic_int threads;   /* most threads seen in a call, 0 before the first */
  atomic_uint calls;
} Kernel;

/* How a call is cut. */
typedef struct {
  KernelFunction *function;
  const void *const *weights;
  int32_t dims[24];
  int32_t items;
  int64_t scratch; /* bytes of a thread */
} Cut;

typedef struct {
  const float *data;
  int64_t dims[MAX_RANK];
  size_t rank;
  float *owned;
} Tensor;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int is_conv(const Entry *e) { return e->forms[0].family == CONV; }

/* tensor.c */
Status *fail(Api api, const char *format, ...) __attribute__((format(printf, 2, 3)));
void drop(Api api, Status *status);
Status *shape_of(Api api, const void *value, int64_t *dims, size_t *rank, int *type);
Status *data_of(Api api, const void *value, void *pointer);
int64_t product(const int64_t *dims, size_t rank);
float *expanded(const float *source, const int64_t *shape, size_t rank, const int64_t *dims, size_t full);
void *copied(const void *source, size_t bytes);
Status *read_input(Kernel *k, void *context, size_t place, Tensor *t);
Status *read_bias(Kernel *k, void *context, Tensor *bias);
Status *make_output(Kernel *k, void *context, const int64_t *dims, size_t rank, float **y);
Status *wrong_shape(Kernel *k, const char *what);

/* weights.c: NULL if every index of a form is in range, else what is wrong. */
const char *check_weight(Kernel *kernel, Packed *packed);
int weight_count(enum Family family);
int weight_type(enum Family family, int index);
const void *mask_controls(void);

/* launch.c */
typedef struct Block Block;
Block *take_block(size_t bytes);
void give_block(Block *block);
float *memory_of(const Block *block);
void count_kernels(int change);
int32_t threads_for(Kernel *k, int64_t work);
Status *launch(Kernel *k, void *context, const Cut *cut, int32_t threads, const float *x, const float *bias,
               const float *residual, float *y);

/* cut.c */
Cut cut_linear(const Kernel *kernel, const Packed *packed, int64_t tokens, int32_t threads);
int64_t scratch_limit(const Kernel *kernel, const Packed *packed);

/* linear.c, conv.c */
Status *compute_linear(Kernel *k, void *context, Tensor *x, Tensor *bias, Tensor *residual);
Status *compute_conv(Kernel *k, void *context, Tensor *x, Tensor *bias, Tensor *residual);
const char *make_table(const Kernel *k, Packed *p);

#endif
