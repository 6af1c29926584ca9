/* Calls a kernel through the launcher of native.c, once: arguments and arrays come from files of the working folder. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define PARAMETERS                                                                                                     \
  const float *x, const float *bias, const float *residual, float *y, float *scratch, const void *w0, const void *w1,  \
      const void *w2, const void *w3, const int32_t *dims, int32_t begin, int32_t end
typedef void (*kernel)(PARAMETERS);
extern void KERNEL(PARAMETERS);
typedef struct {
  kernel kernel;
  const void *const *weights;
  const int32_t *dims;
  int64_t bytes;
  int32_t items, threads;
} prepared;
extern int32_t sparsecomp_call(const prepared *launch, const float *x, const float *bias, const float *residual, float *y);

/* The content of a file on a cache line; null for a file that is not there. */
static void *load(const char *name) {
  FILE *file = fopen(name, "rb");
  long size;
  void *content;
  if (!file) return 0;
  fseek(file, 0, SEEK_END);
  size = ftell(file);
  rewind(file);
  content = aligned_alloc(64, ((size_t)size + 127) / 64 * 64);
  if (!content || fread(content, 1, (size_t)size, file) != (size_t)size) exit(2);
  fclose(file);
  return content;
}

int main(int argc, char **argv) {
  const void *weights[4] = {load("w0"), load("w1"), load("w2"), load("w3")};
  size_t bytes;
  float *y;
  FILE *file;
  if (argc != 5) return 3;
  bytes = 4 * (size_t)atoll(argv[1]);
  y = aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (!y) return 4;
  const prepared launch = {KERNEL, weights, load("dims"), atoll(argv[4]), atoi(argv[2]), atoi(argv[3])};
  if (sparsecomp_call(&launch, load("x"), load("bias"), load("residual"), y)) return 5;
  file = fopen("y", "wb");
  return !file || fwrite(y, 1, bytes, file) != bytes || fclose(file) ? 6 : 0;
}
