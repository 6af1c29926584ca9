/* What the library uses of ONNX Runtime's C ABI, declared here since no header comes with the onnxruntime wheel.
 *
 * OrtApi is a flat table of function pointers to which new versions only append; a slot below is an index into it. Every
 * slot exists since version 17, the lowest that is asked for.
 */
#ifndef SPARSECOMP_ORT_ABI_H
#define SPARSECOMP_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ORT_VERSION 17

typedef struct Status Status;    /* NULL is success */
typedef const void *const *Api;  /* the table */
typedef struct {
  const void *const *(*get_api)(uint32_t version);
  const char *(*version)(void);
} ApiBase;

enum {
  CREATE_STATUS = 0,
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  ADD_DOMAIN = 28,
  TENSOR_DATA = 51,
  CREATE_TENSOR_INFO = 57,
  SET_ELEMENT_TYPE = 58,
  SET_DIMENSIONS = 59,
  GET_ELEMENT_TYPE = 60,
  GET_RANK = 61,
  GET_DIMENSIONS = 62,
  GET_SYMBOLS = 63,
  GET_COUNT = 64,
  GET_TENSOR_INFO = 65,
  ATTRIBUTE_INT = 86,
  CONTEXT_INPUT = 90,
  CONTEXT_OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_TENSOR_INFO = 99,
  CONSTANT_INPUT = 249,
  INFER_INPUT = 268,
  INFER_ATTRIBUTE = 269,
  INFER_SET_OUTPUT = 270,
  SET_SYMBOLS = 271,
  READ_ATTRIBUTE = 272,
  PARALLEL_FOR = 274
};

/* The function in a slot, cast to its type. */
#define CALL(api, slot, ...) (((Status * (*)(__VA_ARGS__))(api)[slot]))
#define RELEASE(api, slot, object) (((void (*)(void *))(api)[slot])(object))

enum { TYPE_FLOAT = 1, TYPE_UINT8 = 2, TYPE_UINT16 = 4, TYPE_INT32 = 6, TYPE_INT64 = 7 };
enum { CODE_FAIL = 1, CODE_INVALID_ARGUMENT = 2, OPTION_INT = 1 };
enum { REQUIRED = 0 };

typedef struct CustomOp CustomOp;
struct CustomOp {
  uint32_t version;
  void *(*create)(const CustomOp *, Api, const void *);
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  int (*input_type)(const CustomOp *, size_t);
  size_t (*input_count)(const CustomOp *);
  int (*output_type)(const CustomOp *, size_t);
  size_t (*output_count)(const CustomOp *);
  void (*compute)(void *, void *);
  void (*destroy)(void *);
  int (*input_characteristic)(const CustomOp *, size_t);
  int (*output_characteristic)(const CustomOp *, size_t);
  int (*input_memory)(const CustomOp *, size_t);
  int (*variadic_input_least)(const CustomOp *);
  int (*variadic_input_same)(const CustomOp *);
  int (*variadic_output_least)(const CustomOp *);
  int (*variadic_output_same)(const CustomOp *);
  Status *(*create_v2)(const CustomOp *, Api, const void *, void **);
  Status *(*compute_v2)(void *, void *);
  Status *(*infer_shape)(const CustomOp *, void *);
  int (*start_version)(const CustomOp *);
  int (*end_version)(const CustomOp *);
  void *later[4]; /* of newer versions, unused */
};

#endif
