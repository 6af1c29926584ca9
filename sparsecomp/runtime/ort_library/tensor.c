/* Tensors and errors of ONNX Runtime. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "library.h"

Status *fail(Api api, const char *format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return ((Status * (*)(int, const char *)) api[CREATE_STATUS])(CODE_INVALID_ARGUMENT, text);
}

void drop(Api api, Status *status) {
  if (status) RELEASE(api, RELEASE_STATUS, status);
}

Status *shape_of(Api api, const void *value, int64_t *dims, size_t *rank, int *type) {
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

Status *data_of(Api api, const void *value, void *pointer) {
  return CALL(api, TENSOR_DATA, const void *, void *)(value, pointer);
}

int64_t product(const int64_t *dims, size_t rank) {
  int64_t total = 1;
  for (size_t i = 0; i < rank; i++) total *= dims[i];
  return total;
}

/* Repeat `source` to the shape `dims`, to which it broadcasts; NULL without memory. */
float *expanded(const float *source, const int64_t *shape, size_t rank, const int64_t *dims, size_t full) {
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

Status *read_input(Kernel *k, void *context, size_t place, Tensor *t) {
  const void *value = NULL;
  Status *status = CALL(k->api, CONTEXT_INPUT, const void *, size_t, const void **)(context, place, &value);
  if (status) return status;
  if (!value) return fail(k->api, "%s: input %zu is missing", k->entry->name, place);
  if ((status = shape_of(k->api, value, t->dims, &t->rank, NULL))) return status;
  return data_of(k->api, value, &t->data);
}

void *copied(const void *source, size_t bytes) {
  void *copy = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE + LINE);
  if (copy && bytes) memcpy(copy, source, bytes);
  return copy;
}


Status *wrong_shape(Kernel *k, const char *what) {
  return fail(k->api, "%s: %s does not have the shape that the weight of %d outputs by %d inputs needs", k->entry->name,
              what, k->outputs, k->inputs);
}

/* The constant bias, or the one that this call gives. */
Status *read_bias(Kernel *k, void *context, Tensor *bias) {
  bias->data = k->bias;
  if (k->bias) return NULL;
  Status *status = read_input(k, context, 1, bias);
  if (status) return status;
  if (bias->rank != 1 || bias->dims[0] != k->outputs) return wrong_shape(k, "the bias");
  if (!is_conv(k->entry) && (uintptr_t)bias->data % LINE == 0) return NULL;
  bias->owned = aligned_alloc(LINE, (size_t)ceil_div(8 * (int64_t)k->outputs, LINE) * LINE);
  if (!bias->owned) return fail(k->api, "%s: no memory for the bias", k->entry->name);
  memcpy(bias->owned, bias->data, (size_t)k->outputs * 4);
  for (int32_t i = 0; i < k->outputs; i++) bias->owned[k->outputs + i] = 1.0f; /* the scales of a convolution */
  bias->data = bias->owned;
  return NULL;
}

Status *make_output(Kernel *k, void *context, const int64_t *dims, size_t rank, float **y) {
  void *value = NULL;
  Status *status =
      CALL(k->api, CONTEXT_OUTPUT, void *, size_t, const int64_t *, size_t, void **)(context, 0, dims, rank, &value);
  return status ? status : data_of(k->api, value, y);
}
