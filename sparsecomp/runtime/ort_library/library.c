/* The custom operations of one model for a stock ONNX Runtime: `RegisterCustomOps` is what it looks up and calls.
 *
 * An operation takes x [..., I], its bias [O] and residual where its entry has them, with several forms of the weight the
 * table that chooses among them, and then the packed weight, all of which has to be constant: it is checked once, when the
 * kernel is created. Kernels are serial; their items run on the threads of the session.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "library.h"
#include "ops.h"

#define MOST_RANGES 1024

/* -- creation ------------------------------------------------------------------------------------------------------ */

typedef struct {
  CustomOp op;
  const Entry *entry;
} Op;

static void destroy(void *kernel) {
  Kernel *k = kernel;
  for (int form = 0; form < MOST_FORMS; form++)
    for (int i = 0; i < WEIGHTS; i++) free(k->packed[form].owned[i]);
  free(k->choice);
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

/* A constant input of a type: where its data lie, and how many entries there are. */
static Status *read_constant(Kernel *k, const void *info, size_t place, int wanted, const void **data, int64_t *length) {
  int constant = 0, type = 0;
  const void *value = NULL;
  int64_t dims[MAX_RANK];
  size_t rank = 0;
  Status *status =
      CALL(k->api, CONSTANT_INPUT, const void *, size_t, int *, const void **)(info, place, &constant, &value);
  if (status) return status;
  if (!constant || !value)
    return fail(k->api, "%s: input %zu, a part of the packed weight, must be a constant initializer", k->entry->name, place);
  if ((status = shape_of(k->api, value, dims, &rank, &type)) || (status = data_of(k->api, value, data))) return status;
  if (type != wanted) return fail(k->api, "%s: input %zu has another type than expected", k->entry->name, place);
  *length = product(dims, rank);
  if (*length > INT32_MAX) return fail(k->api, "%s: input %zu is too large", k->entry->name, place);
  return NULL;
}

static Status *read_weight(Kernel *k, const void *info, Packed *p, int index, size_t place) {
  static const size_t SIZES[] = {[TYPE_FLOAT] = 4, [TYPE_UINT8] = 1, [TYPE_UINT16] = 2, [TYPE_INT32] = 4};
  int type = weight_type(p->form->family, index);
  const void *data = NULL;
  Status *status = read_constant(k, info, place, type, &data, &p->lengths[index]);
  if (status) return status;
  if (!p->lengths[index] || (uintptr_t)data % LINE) {
    p->owned[index] = copied(data, (size_t)p->lengths[index] * SIZES[type]);
    if (!p->owned[index]) return fail(k->api, "%s: no memory for the packed weight", k->entry->name);
    data = p->owned[index];
  }
  p->weights[index] = data;
  return NULL;
}

/* Which form to use up to which number of tokens; the last is for all that are more. */
static Status *read_choice(Kernel *k, const void *info, size_t place) {
  const void *data = NULL;
  int64_t length = 0;
  Status *status = read_constant(k, info, place, TYPE_INT32, &data, &length);
  if (status) return status;
  if (length < 2 || length % 2 || length > MOST_RANGES) return fail(k->api, "%s: input %zu must have two numbers for each range", k->entry->name, place);
  k->choice = copied(data, (size_t)length * 4);
  if (!k->choice) return fail(k->api, "%s: no memory for the choice", k->entry->name);
  k->ranges = length / 2;
  for (int64_t i = 0; i < k->ranges; i++)
    if (k->choice[2 * i + 1] < 0 || k->choice[2 * i + 1] >= k->entry->count || (i && k->choice[2 * i] <= k->choice[2 * i - 2]))
      return fail(k->api, "%s: the choice must ascend and name forms that there are", k->entry->name);
  return NULL;
}

/* The bias, if it is constant or there is none. A convolution reads what is added to its sums and then their scales. */
static Status *read_constant_bias(Kernel *k, const void *info) {
  size_t count = (size_t)k->outputs * (is_conv(k->entry) ? 2 : 1);
  const void *value = NULL, *data = NULL;
  if (k->entry->bias) {
    int constant = 0, type = 0;
    int64_t dims[MAX_RANK];
    size_t rank = 0;
    Status *status =
        CALL(k->api, CONSTANT_INPUT, const void *, size_t, int *, const void **)(info, 1, &constant, &value);
    if (status || !constant || !value) return status; /* it is given at each call */
    if ((status = shape_of(k->api, value, dims, &rank, &type)) || (status = data_of(k->api, value, &data)))
      return status;
    if (type != TYPE_FLOAT || rank != 1 || dims[0] != k->outputs) return wrong_shape(k, "the bias");
  }
  k->bias = aligned_alloc(LINE, ceil_div((int64_t)count * 4, LINE) * LINE);
  if (!k->bias) return fail(k->api, "%s: no memory for the bias", k->entry->name);
  for (size_t i = 0; i < count; i++) k->bias[i] = i < (size_t)k->outputs ? 0.0f : 1.0f;
  if (data) memcpy(k->bias, data, (size_t)k->outputs * 4);
  return NULL;
}

static Status *fill(Kernel *k, const void *info) {
  const Entry *e = k->entry;
  Status *status;
  if ((status = read_size(k, info, "outputs", INT32_MAX, &k->outputs))) return status;
  if ((status = read_size(k, info, "inputs", INT32_MAX, &k->inputs))) return status;
  size_t place = 1 + (size_t)e->bias + (size_t)e->residual;
  if (e->count > 1 && (status = read_choice(k, info, place++))) return status;
  if (is_conv(e) && (status = read_size(k, info, "vectors", 64, &k->vectors))) return status;
  for (int form = 0; form < e->count; form++) {
    Packed *p = &k->packed[form];
    p->form = &e->forms[form];
    if (p->form->family == ROWS || p->form->family == CONV) {
      if ((status = read_size(k, info, "chunk", 65536, &k->chunk))) return status;
      if ((status = read_size(k, info, "block", 256, &k->block))) return status;
    }
    for (int i = 0; i < weight_count(p->form->family); i++)
      if ((status = read_weight(k, info, p, i, place++))) return status;
    const char *wrong = scratch_limit(k, p) > MOST_VALUES ? "the inputs are too many" : check_weight(k, p);
    if (wrong) return fail(k->api, "%s: malformed packed weight: %s", e->name, wrong);
    if (p->form->family == MASK) p->weights[3] = mask_controls();
  }
  return read_constant_bias(k, info);
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

static Status *compute(void *kernel, void *context) {
  Tensor x, bias, residual;
  x.owned = bias.owned = residual.owned = NULL;
  Status *status = (is_conv(((Kernel *)kernel)->entry) ? compute_conv : compute_linear)(kernel, context, &x, &bias, &residual);
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
  size_t count = 1 + (size_t)e->bias + (size_t)e->residual + (e->count > 1) + (e->indexed ? 2 : 0);
  for (int form = 0; form < e->count; form++) count += (size_t)weight_count(e->forms[form].family);
  return count;
}
static int input_type(const CustomOp *op, size_t i) {
  const Entry *e = entry_of(op);
  size_t first = 1 + (size_t)e->bias + (size_t)e->residual;
  if (i < first) return TYPE_FLOAT;
  if (e->count > 1 && i == first++) return TYPE_INT32;
  for (int form = 0; form < e->count; form++) {
    size_t count = (size_t)weight_count(e->forms[form].family);
    if (i - first < count) return weight_type(e->forms[form].family, (int)(i - first));
    first += count;
  }
  return i == first ? TYPE_INT32 : TYPE_INT64;
}
static int output_type(const CustomOp *op, size_t i) { return (void)op, (void)i, TYPE_FLOAT; }
static size_t one_output(const CustomOp *op) { return (void)op, 1; }
static int required(const CustomOp *op, size_t i) { return (void)op, (void)i, REQUIRED; }
static int on_default(const CustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const CustomOp *op) { return (void)op, 1; }
static int last_version(const CustomOp *op) { return (void)op, INT32_MAX; }

static Api inference_api; /* an inference context comes without its table */

/* The output has the shape of x but for the last dimension, or that of a convolution; what is not known stays so. */
static Status *infer_shape(const CustomOp *op, void *context) {
  static atomic_uint unnamed;
  Api api = inference_api;
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
  const Window *w = &entry_of(op)->window;
  if (is_conv(entry_of(op))) {
    if (rank != (size_t)w->rank + 2) return NULL;
    dims[1] = outputs;
    symbols[1] = "";
    for (size_t i = 2; i < rank; i++) {
      size_t axis = i - rank + 2;
      int64_t reach = (int64_t)w->dilation[axis] * (w->kernel[axis] - 1) + 1;
      int64_t size = dims[i] < 0 ? -1 : (dims[i] + 2 * w->padding[axis] + w->extra[axis] - reach) / w->stride[axis] + 1;
      dims[i] = size < 0 ? -1 : size;
      symbols[i] = "";
    }
  } else {
    dims[rank - 1] = outputs;
    symbols[rank - 1] = "";
  }
  for (size_t i = 0; i < rank; i++) {
    if (!symbols[i]) symbols[i] = ""; /* old versions make a string of every one */
    /* An unknown dimension without a name would be stored as the size -1. */
    if (dims[i] < 0 && !*symbols[i]) {
      snprintf(names[i], sizeof names[i], "_sparsecomp%u", atomic_fetch_add(&unnamed, 1));
      symbols[i] = names[i];
    }
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
