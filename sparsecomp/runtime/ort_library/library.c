/* The custom operations of one model for a stock ONNX Runtime: `RegisterCustomOps` is what it looks up and calls.
 *
 * An operation takes x [..., I], its bias [O] and residual where its entry has them, and then the packed weight, which has
 * to be constant: it is checked once, when the kernel is created. Kernels are serial; their items run on the threads of
 * the session. Nothing tells how many those are, so that they are counted in the first calls.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "library.h"
#include "ops.h"

enum { ASSUMED_THREADS = 16, COUNTED_CALLS = 4, COUNT_AGAIN = 512, PARTS_PER_THREAD = 4 };
#define WORK_OF_A_THREAD 400000 /* multiply-adds; with fewer, waking another thread takes longer than they do */
#define MOST_VALUES ((int64_t)1 << 30) /* of x and y in one call of a kernel, whose indices are 32-bit */

static Status *fail(Api api, const char *format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return ((Status * (*)(int, const char *)) api[CREATE_STATUS])(CODE_INVALID_ARGUMENT, text);
}

static void drop(Api api, Status *status) {
  if (status) RELEASE(api, RELEASE_STATUS, status);
}

/* -- scratch ------------------------------------------------------------------------------------------------------- */

/* Blocks that no thread uses now, the last used first: it is the one that the caches hold. */
typedef struct Block {
  struct Block *next;
  size_t bytes;
  float *memory;
} Block;

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static Block *pool;
static int64_t kernels;

static void free_block(Block *block) {
  free(block->memory);
  free(block);
}

static Block *take(size_t bytes) {
  bytes = (bytes + LINE - 1) / LINE * LINE + LINE;
  pthread_mutex_lock(&pool_lock);
  Block *block = pool;
  if (block) pool = block->next;
  pthread_mutex_unlock(&pool_lock);
  if (!block) block = calloc(1, sizeof *block);
  if (block && block->bytes < bytes) {
    free(block->memory);
    block->memory = aligned_alloc(LINE, bytes);
    block->bytes = block->memory ? bytes : 0;
    if (!block->memory) free(block), block = NULL;
  }
  return block;
}

static void give(Block *block) {
  pthread_mutex_lock(&pool_lock);
  block->next = pool;
  pool = block;
  pthread_mutex_unlock(&pool_lock);
}

static void count_kernels(int change) {
  pthread_mutex_lock(&pool_lock);
  kernels += change;
  Block *unused = kernels ? NULL : pool;
  if (unused) pool = NULL;
  pthread_mutex_unlock(&pool_lock);
  while (unused) {
    Block *next = unused->next;
    free_block(unused);
    unused = next;
  }
}

/* -- tensors ------------------------------------------------------------------------------------------------------- */

static Status *shape_of(Api api, const void *value, int64_t *dims, size_t *rank, int *type) {
  void *info = NULL;
  Status *status = CALL(api, GET_TENSOR_INFO, const void *, void **)(value, &info);
  if (status) return status;
  status = CALL(api, GET_RANK, const void *, size_t *)(info, rank);
  if (!status && *rank > MAX_RANK) status = fail(api, "a tensor has %zu dimensions, more than %d", *rank, MAX_RANK);
  if (!status) status = CALL(api, GET_DIMENSIONS, const void *, int64_t *, size_t)(info, dims, *rank);
  if (!status && type) status = CALL(api, GET_ELEMENT_TYPE, const void *, int *)(info, type);
  RELEASE(api, RELEASE_TENSOR_INFO, info);
  return status;
}

static Status *data_of(Api api, const void *value, void *pointer) {
  return CALL(api, TENSOR_DATA, const void *, void *)(value, pointer);
}

static int64_t product(const int64_t *dims, size_t rank) {
  int64_t total = 1;
  for (size_t i = 0; i < rank; i++) total *= dims[i];
  return total;
}

/* Repeat `source` to the shape `dims`, to which it broadcasts; NULL without memory. */
static float *expanded(const float *source, const int64_t *shape, size_t rank, const int64_t *dims, size_t full) {
  int64_t total = product(dims, full), index[MAX_RANK] = {0}, step[MAX_RANK], stride = 1, at = 0;
  float *target = malloc(sizeof(float) * (size_t)(total ? total : 1));
  for (size_t i = full; target && i-- > 0;) {
    int64_t size = i + rank >= full ? shape[i + rank - full] : 1;
    step[i] = size == 1 ? 0 : stride;
    stride *= size;
  }
  for (int64_t n = 0; target && n < total; n++) {
    target[n] = source[at];
    for (size_t i = full; i-- > 0;) {
      at += step[i];
      if (++index[i] < dims[i]) break;
      at -= step[i] * dims[i];
      index[i] = 0;
    }
  }
  return target;
}

/* -- creation ------------------------------------------------------------------------------------------------------ */

typedef struct {
  CustomOp op;
  const Entry *entry;
} Op;

static void destroy(void *kernel) {
  Kernel *k = kernel;
  for (int i = 0; i < WEIGHTS; i++) free(k->owned[i]);
  free(k->bias);
  free(k);
  count_kernels(-1);
}

static Status *read_size(Kernel *k, const void *info, const char *name, int64_t limit, int32_t *target) {
  int64_t value = 0;
  Status *status = CALL(k->api, ATTRIBUTE_INT, const void *, const char *, int64_t *)(info, name, &value);
  if (status) return status;
  if (value < 1 || value > limit) return fail(k->api, "%s: attribute %s is out of range", k->entry->name, name);
  *target = (int32_t)value;
  return NULL;
}

static void *copied(const void *source, size_t bytes) {
  void *copy = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE + LINE);
  if (copy && bytes) memcpy(copy, source, bytes);
  return copy;
}

static Status *read_weight(Kernel *k, const void *info, int index, size_t place) {
  static const size_t SIZES[] = {[TYPE_FLOAT] = 4, [TYPE_UINT16] = 2, [TYPE_INT32] = 4};
  int constant = 0, type = 0, wanted = weight_type(k->entry->family, index);
  const void *value = NULL, *data = NULL;
  int64_t dims[MAX_RANK];
  size_t rank = 0;
  Status *status =
      CALL(k->api, CONSTANT_INPUT, const void *, size_t, int *, const void **)(info, place, &constant, &value);
  if (status) return status;
  if (!constant || !value)
    return fail(k->api, "%s: input %zu, a part of the packed weight, must be a constant initializer", k->entry->name, place);
  if ((status = shape_of(k->api, value, dims, &rank, &type)) || (status = data_of(k->api, value, &data))) return status;
  if (type != wanted) return fail(k->api, "%s: input %zu has another type than expected", k->entry->name, place);
  k->lengths[index] = product(dims, rank);
  if (k->lengths[index] > INT32_MAX) return fail(k->api, "%s: input %zu is too large", k->entry->name, place);
  if (!k->lengths[index] || (uintptr_t)data % LINE) {
    k->owned[index] = copied(data, (size_t)k->lengths[index] * SIZES[type]);
    if (!k->owned[index]) return fail(k->api, "%s: no memory for the packed weight", k->entry->name);
    data = k->owned[index];
  }
  k->weights[index] = data;
  return NULL;
}

static Status *read_bias(Kernel *k, const void *info) {
  if (!k->entry->bias) {
    k->bias = aligned_alloc(LINE, ((size_t)k->outputs * 4 + LINE - 1) / LINE * LINE);
    if (k->bias) memset(k->bias, 0, (size_t)k->outputs * 4);
    return k->bias ? NULL : fail(k->api, "%s: no memory for %d zeros", k->entry->name, k->outputs);
  }
  int constant = 0, type = 0;
  const void *value = NULL, *data = NULL;
  int64_t dims[MAX_RANK];
  size_t rank = 0;
  Status *status =
      CALL(k->api, CONSTANT_INPUT, const void *, size_t, int *, const void **)(info, 1, &constant, &value);
  if (status || !constant || !value) return status; /* it is given at each call */
  if ((status = shape_of(k->api, value, dims, &rank, &type)) || (status = data_of(k->api, value, &data))) return status;
  if (type != TYPE_FLOAT || rank != 1 || dims[0] != k->outputs)
    return fail(k->api, "%s: the bias must be %d float32 values", k->entry->name, k->outputs);
  k->bias = copied(data, (size_t)k->outputs * 4);
  return k->bias ? NULL : fail(k->api, "%s: no memory for the bias", k->entry->name);
}

static Status *fill(Kernel *k, const void *info) {
  Status *status;
  if ((status = read_size(k, info, "outputs", INT32_MAX, &k->outputs))) return status;
  if ((status = read_size(k, info, "inputs", INT32_MAX, &k->inputs))) return status;
  if (k->entry->family == ROWS) {
    if ((status = read_size(k, info, "chunk", 65536, &k->chunk))) return status;
    if ((status = read_size(k, info, "block", 65536, &k->block))) return status;
  }
  size_t first = 1 + (size_t)k->entry->bias + (size_t)k->entry->residual;
  for (int i = 0; i < weight_count(k->entry->family); i++)
    if ((status = read_weight(k, info, i, first + (size_t)i))) return status;
  const char *wrong = scratch_limit(k) > MOST_VALUES ? "the inputs are too many" : check_weight(k);
  if (wrong) return fail(k->api, "%s: malformed packed weight: %s", k->entry->name, wrong);
  if (k->entry->family == MASK) k->weights[3] = mask_controls();
  return read_bias(k, info);
}

static Status *create(const CustomOp *op, Api api, const void *info, void **result) {
  Kernel *k = calloc(1, sizeof *k);
  if (!k) return fail(api, "no memory for a kernel");
  count_kernels(1);
  k->api = api;
  k->entry = ((const Op *)op)->entry;
  Status *status = fill(k, info);
  if (status) {
    destroy(k);
    return status;
  }
  *result = k;
  return NULL;
}

/* -- a call -------------------------------------------------------------------------------------------------------- */

typedef struct {
  const Kernel *k;
  const Cut *cut;
  const float *x, *bias, *residual;
  float *y;
  int64_t parts;
  uint64_t number; /* of the call, so that a thread knows whether it was counted */
  atomic_int threads, failed;
} Job;

static atomic_ullong next_job = 1;

static void run_part(void *data, size_t part) {
  static _Thread_local uint64_t counted;
  Job *job = data;
  if (counted != job->number) {
    counted = job->number;
    atomic_fetch_add_explicit(&job->threads, 1, memory_order_relaxed);
  }
  Block *scratch = take((size_t)job->cut->scratch);
  if (!scratch) {
    atomic_store(&job->failed, 1);
    return;
  }
  const void *const *w = job->k->weights;
  int64_t items = job->cut->items;
  job->cut->function(job->x, job->bias, job->residual, job->y, scratch->memory, w[0], w[1], w[2], w[3], job->cut->dims,
                     (int32_t)(items * (int64_t)part / job->parts), (int32_t)(items * ((int64_t)part + 1) / job->parts));
  give(scratch);
}

static Status *run(Kernel *k, void *context, int64_t tokens, const float *x, const float *bias, const float *residual,
                   float *y) {
  int known = atomic_load_explicit(&k->threads, memory_order_relaxed);
  unsigned calls = atomic_fetch_add_explicit(&k->calls, 1, memory_order_relaxed);
  int counting = calls < COUNTED_CALLS || (known == 1 && calls % COUNT_AGAIN == 0);
  int64_t threads = counting ? ASSUMED_THREADS : known, useful = 1 + tokens * k->kept / WORK_OF_A_THREAD;
  if (threads > useful) threads = useful;
  Cut cut = cut_call(k, tokens, (int32_t)threads);
  Job job = {.k = k, .cut = &cut, .x = x, .bias = bias, .residual = residual, .y = y, .parts = 1};
  if (threads > 1) job.parts = cut.items < PARTS_PER_THREAD * threads ? cut.items : PARTS_PER_THREAD * threads;
  job.number = atomic_fetch_add_explicit(&next_job, 1, memory_order_relaxed);
  if (job.parts <= 1) {
    job.parts = 1;
    run_part(&job, 0);
    /* Too little work to count threads with: this call does not count. */
    if (counting) atomic_fetch_sub_explicit(&k->calls, 1, memory_order_relaxed);
  } else {
    Status *status = CALL(k->api, PARALLEL_FOR, const void *, void (*)(void *, size_t), size_t, size_t, void *)(
        context, run_part, (size_t)job.parts, 0, &job);
    if (status) return status;
    int seen = atomic_load(&job.threads);
    if (seen > known) atomic_store_explicit(&k->threads, seen, memory_order_relaxed);
  }
  if (atomic_load(&job.failed)) return fail(k->api, "%s: no memory for %lld bytes of scratch", k->entry->name, (long long)cut.scratch);
  return NULL;
}

/* Run with at most so many tokens at a time that 32-bit indices reach them. */
static Status *run_slices(Kernel *k, void *context, int64_t tokens, const float *x, const float *bias,
                          const float *residual, float *y) {
  int64_t widest = k->inputs > k->outputs ? k->inputs : k->outputs, slice = MOST_VALUES / widest;
  if (slice < 1) slice = 1;
  Status *status = NULL;
  for (int64_t first = 0; first < tokens && !status; first += slice) {
    int64_t count = tokens - first < slice ? tokens - first : slice;
    status = run(k, context, count, x + first * k->inputs, bias, residual ? residual + first * k->outputs : NULL,
                 y + first * k->outputs);
  }
  return status;
}

static Status *wrong_shape(Kernel *k, const char *what) {
  return fail(k->api, "%s: %s does not have the shape that the weight of %d outputs by %d inputs needs", k->entry->name,
              what, k->outputs, k->inputs);
}

typedef struct {
  const float *data;
  int64_t dims[MAX_RANK];
  size_t rank;
  float *owned;
} Tensor;

static Status *read_input(Kernel *k, void *context, size_t place, Tensor *t) {
  const void *value = NULL;
  Status *status = CALL(k->api, CONTEXT_INPUT, const void *, size_t, const void **)(context, place, &value);
  if (status) return status;
  if (!value) return fail(k->api, "%s: input %zu is missing", k->entry->name, place);
  if ((status = shape_of(k->api, value, t->dims, &t->rank, NULL))) return status;
  return data_of(k->api, value, &t->data);
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

static Status *compute_all(Kernel *k, void *context, Tensor *x, Tensor *bias, Tensor *residual) {
  Status *status;
  if ((status = read_input(k, context, 0, x))) return status;
  if (x->rank < 1 || x->dims[x->rank - 1] != k->inputs) return wrong_shape(k, "the first input");
  bias->data = k->bias;
  if (!k->bias) {
    if ((status = read_input(k, context, 1, bias))) return status;
    if (bias->rank != 1 || bias->dims[0] != k->outputs) return wrong_shape(k, "the bias");
    if ((uintptr_t)bias->data % LINE) {
      bias->owned = copied(bias->data, (size_t)k->outputs * 4);
      if (!bias->owned) return fail(k->api, "%s: no memory for the bias", k->entry->name);
      bias->data = bias->owned;
    }
  }
  int64_t out[MAX_RANK];
  size_t rank = x->rank;
  memcpy(out, x->dims, sizeof(int64_t) * rank);
  out[rank - 1] = k->outputs;
  if (k->entry->residual) {
    if ((status = read_input(k, context, 1 + (size_t)k->entry->bias, residual))) return status;
    if ((status = match_residual(k, x, residual, out, &rank))) return status;
  }
  void *value = NULL;
  float *y = NULL;
  status = CALL(k->api, CONTEXT_OUTPUT, void *, size_t, const int64_t *, size_t, void **)(context, 0, out, rank, &value);
  if (status || (status = data_of(k->api, value, &y))) return status;
  return run_slices(k, context, product(out, rank - 1), x->data, bias->data, k->entry->residual ? residual->data : NULL, y);
}

static Status *compute(void *kernel, void *context) {
  Tensor x, bias, residual;
  x.owned = bias.owned = residual.owned = NULL;
  Status *status = compute_all(kernel, context, &x, &bias, &residual);
  free(x.owned);
  free(bias.owned);
  free(residual.owned);
  return status;
}

/* -- what ORT asks ------------------------------------------------------------------------------------------------- */

static const Entry *entry_of(const CustomOp *op) { return ((const Op *)op)->entry; }
static const char *name(const CustomOp *op) { return entry_of(op)->name; }
static const char *on_cpu(const CustomOp *op) { return (void)op, NULL; }
static size_t input_count(const CustomOp *op) {
  const Entry *e = entry_of(op);
  return 1 + (size_t)e->bias + (size_t)e->residual + (size_t)weight_count(e->family) + (e->indexed ? 2 : 0);
}
static int input_type(const CustomOp *op, size_t i) {
  const Entry *e = entry_of(op);
  size_t first = 1 + (size_t)e->bias + (size_t)e->residual, last = first + (size_t)weight_count(e->family);
  if (i >= last) return i == last ? TYPE_INT32 : TYPE_INT64;
  return i < first ? TYPE_FLOAT : weight_type(e->family, (int)(i - first));
}
static int output_type(const CustomOp *op, size_t i) { return (void)op, (void)i, TYPE_FLOAT; }
static size_t one_output(const CustomOp *op) { return (void)op, 1; }
static int required(const CustomOp *op, size_t i) { return (void)op, (void)i, REQUIRED; }
static int on_default(const CustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const CustomOp *op) { return (void)op, 1; }
static int last_version(const CustomOp *op) { return (void)op, INT32_MAX; }

static Api inference_api; /* an inference context comes without its table */

/* The output has the shape of x but for the last dimension; what is not known stays unknown. */
static Status *infer_shape(const CustomOp *op, void *context) {
  static atomic_uint unnamed;
  Api api = inference_api;
  (void)op;
  void *info = NULL, *result = NULL;
  const void *attribute = NULL;
  int64_t dims[MAX_RANK], outputs = 0;
  const char *symbols[MAX_RANK] = {0};
  char names[MAX_RANK][24];
  size_t rank = 0, size = 0;
  Status *status = CALL(api, INFER_INPUT, const void *, size_t, void **)(context, 0, &info);
  if (!status) status = CALL(api, GET_RANK, const void *, size_t *)(info, &rank);
  if (status || rank < 1 || rank > MAX_RANK) return drop(api, status), NULL;
  status = CALL(api, GET_DIMENSIONS, const void *, int64_t *, size_t)(info, dims, rank);
  if (!status) status = CALL(api, GET_SYMBOLS, const void *, const char **, size_t)(info, symbols, rank);
  if (!status) status = CALL(api, INFER_ATTRIBUTE, const void *, const char *, const void **)(context, "outputs", &attribute);
  if (!status)
    status = CALL(api, READ_ATTRIBUTE, const void *, int, void *, size_t, size_t *)(attribute, OPTION_INT, &outputs,
                                                                                     sizeof outputs, &size);
  if (status) return drop(api, status), NULL;
  dims[rank - 1] = outputs;
  symbols[rank - 1] = NULL;
  for (size_t i = 0; i < rank; i++)
    /* An unknown dimension without a name would be stored as the size -1. */
    if (dims[i] < 0 && (!symbols[i] || !*symbols[i])) {
      snprintf(names[i], sizeof names[i], "_sparsecomp%u", atomic_fetch_add(&unnamed, 1));
      symbols[i] = names[i];
    }
  if ((status = CALL(api, CREATE_TENSOR_INFO, void **)(&result))) return drop(api, status), NULL;
  status = CALL(api, SET_ELEMENT_TYPE, void *, int)(result, TYPE_FLOAT);
  if (!status) status = CALL(api, SET_DIMENSIONS, void *, const int64_t *, size_t)(result, dims, rank);
  if (!status) status = CALL(api, SET_SYMBOLS, void *, const char **, size_t)(result, symbols, rank);
  if (!status) status = CALL(api, INFER_SET_OUTPUT, const void *, size_t, const void *)(context, 0, result);
  RELEASE(api, RELEASE_TENSOR_INFO, result);
  return drop(api, status), NULL;
}

static Op operations[sizeof ENTRIES / sizeof *ENTRIES];
static void *domain;
static pthread_mutex_t domain_lock = PTHREAD_MUTEX_INITIALIZER;

static Status *make_domain(Api api) {
  Status *status = domain ? NULL : CALL(api, CREATE_DOMAIN, const char *, void **)(DOMAIN, &domain);
  static int added;
  for (int count = (int)(sizeof ENTRIES / sizeof *ENTRIES); !status && added < count; added++) {
    operations[added] = (Op){
        {.version = ORT_VERSION, .name = name, .provider = on_cpu, .input_type = input_type, .input_count = input_count,
         .output_type = output_type, .output_count = one_output, .destroy = destroy, .input_characteristic = required,
         .output_characteristic = required, .input_memory = on_default, .variadic_input_least = one,
         .variadic_input_same = one, .variadic_output_least = one, .variadic_output_same = one, .create_v2 = create,
         .compute_v2 = compute, .infer_shape = infer_shape, .start_version = one, .end_version = last_version},
        &ENTRIES[added]};
    status = CALL(api, DOMAIN_ADD, void *, const CustomOp *)(domain, &operations[added].op);
    if (status) break;
  }
  return status;
}

__attribute__((visibility("default"))) Status *RegisterCustomOps(void *options, const ApiBase *base) {
  Api api = base->get_api(ORT_VERSION);
  if (!api)
    return fail((Api)base->get_api(1), "this library needs ONNX Runtime 1.17 or newer, this is %s", base->version());
  const char *missing = NULL;
  CHECK_CPU(missing);
  if (missing)
    return fail(api, "this library was built for %s; this CPU has no %s. Build it for this machine, or load the model without it", TARGET, missing);
  inference_api = api;
  pthread_mutex_lock(&domain_lock);
  Status *status = make_domain(api);
  pthread_mutex_unlock(&domain_lock);
  return status ? status : CALL(api, ADD_DOMAIN, void *, void *)(options, domain);
}
