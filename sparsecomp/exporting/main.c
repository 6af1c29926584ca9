/* Runs, times and checks a model.
 *
 *   model_main WEIGHTS INPUT [--sizes N,N..] [--expect FILE] [--output FILE] [--rounds N] [--results FILE]
 *
 * WEIGHTS is weights.bin, INPUT the inputs one after the other as they lie in memory. --sizes gives the sizes that change
 * from run to run, in the order of model.h; without it they are the largest. --expect compares the outputs with
 * a file of the same form and ends with status 2 where an output of floats is further off than MODEL_TOLERANCE of its
 * largest value, or any other differs.
 * --results writes what each step took at the largest sizes, for `sparsecomp calibrate --from`.
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model.h"

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

static void *reserve(size_t bytes) {
  void *memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (!memory) {
    fprintf(stderr, "error: no memory for %zu bytes\n", bytes);
    exit(1);
  }
  memset(memory, 0, (bytes + 127) / 64 * 64);
  return memory;
}

/* Reads a file of exactly so many bytes. */
static unsigned char *read_file(const char *path, size_t bytes) {
  FILE *file = fopen(path, "rb");
  unsigned char *content = reserve(bytes);
  if (!file) {
    fprintf(stderr, "error: %s cannot be opened\n", path);
    exit(1);
  }
  size_t got = fread(content, 1, bytes, file);
  int more = fgetc(file) != EOF;
  fclose(file);
  if (got != bytes || more) {
    fprintf(stderr, "error: %s has %s than the %zu bytes that are expected\n", path, more ? "more" : "fewer", bytes);
    exit(1);
  }
  return content;
}

/* A value of an array of float32 (4 bytes) or float16 (2 bytes). */
static double value_of(const void *values, size_t i, int bytes) {
  if (bytes == 4) return ((const float *)values)[i];
  int half = ((const uint16_t *)values)[i], exponent = half >> 10 & 31, fraction = half & 1023;
  double value = exponent == 31 ? (fraction ? (double)NAN : HUGE_VAL)
                 : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                : ldexp(fraction, -24);
  return half >> 15 ? -value : value;
}

static double largest_difference(const void *given, const void *expected, size_t count, int bytes) {
  double most = 0, scale = 0;
  for (size_t i = 0; i < count; i++) {
    double wanted = value_of(expected, i, bytes), difference = fabs(value_of(given, i, bytes) - wanted);
    if (isnan(difference)) return HUGE_VAL;
    if (difference > most) most = difference;
    if (fabs(wanted) > scale) scale = fabs(wanted);
  }
  return scale > 0 ? most / scale : most;
}

static void write_string(FILE *file, const char *text) {
  fputc('"', file);
  for (; *text; text++) {
    if (*text == '"' || *text == '\\') fputc('\\', file);
    fputc(*text, file);
  }
  fputc('"', file);
}

static void write_results(const char *path, const struct model *m, const int32_t *sizes, void *const *inputs,
                          void *const *outputs, int rounds) {
  static double best[MODEL_STEPS + 1];
  FILE *file = fopen(path, "w");
  if (!file) {
    fprintf(stderr, "error: %s cannot be written\n", path);
    exit(1);
  }
  for (int step = 0; step < MODEL_STEPS; step++) best[step] = 1e30;
  for (int round = 0; round < rounds; round++)
    for (int step = 0; step < MODEL_STEPS; step++) {
      double start = now_us();
      model_step(m, sizes, inputs, outputs, step);
      double taken = now_us() - start;
      if (taken < best[step]) best[step] = taken;
    }
  fprintf(file, "{\"format\": \"sparsecomp-arm-results\", \"version\": 1, \"cpu\": ");
  write_string(file, model_cpu);
  fprintf(file, ", \"threads\": %d, \"steps\": [\n", MODEL_THREADS);
  for (int step = 0; step < MODEL_STEPS; step++) {
    fprintf(file, " {\"name\": ");
    write_string(file, model_step_names[step]);
    fprintf(file, ", \"kernel\": ");
    write_string(file, model_step_kernels[step]);
    fprintf(file, ", \"predicted_us\": %.3f, \"us\": %.3f}%s\n", model_step_predicted_us[step], best[step],
            step + 1 < MODEL_STEPS ? "," : "");
  }
  fprintf(file, "]}\n");
  if (fclose(file)) {
    fprintf(stderr, "error: %s cannot be written\n", path);
    exit(1);
  }
}

/* Reads "N,N.." for as many sizes as the model has, each within its bounds. */
static void read_sizes(const char *text, int32_t *sizes) {
  for (int i = 0; i < MODEL_SIZES; i++) {
    char *end = NULL;
    long size = strtol(text, &end, 10);
    if (end == text || *end != (i + 1 < MODEL_SIZES ? ',' : 0) || size < model_size_least[i] ||
        size > model_size_most[i]) {
      fprintf(stderr, "error: --sizes at \"%s\": expected %s, from %ld to %ld; the model has %d sizes, with commas between\n",
              text, model_size_names[i], (long)model_size_least[i], (long)model_size_most[i], MODEL_SIZES);
      exit(1);
    }
    sizes[i] = (int32_t)size;
    text = end + 1;
  }
}

static int usage(const char *name) {
  fprintf(stderr,
          "usage: %s WEIGHTS INPUT [--sizes N,N..] [--expect FILE] [--output FILE] [--rounds N] [--results FILE]\n",
          name);
  return 1;
}

int main(int argc, char **argv) {
  const char *expect = NULL, *output = NULL, *results = NULL;
  int rounds = 5, status = 0;
  int32_t sizes[MODEL_SIZES + 1] = {0};
  memcpy(sizes, model_size_most, sizeof sizes);
  if (argc < 3 || argc % 2 == 0) return usage(argv[0]);
  for (int i = 3; i < argc; i += 2) {
    if (!strcmp(argv[i], "--expect")) expect = argv[i + 1];
    else if (!strcmp(argv[i], "--output")) output = argv[i + 1];
    else if (!strcmp(argv[i], "--results")) results = argv[i + 1];
    else if (!strcmp(argv[i], "--rounds")) rounds = atoi(argv[i + 1]);
    else if (MODEL_SIZES > 0 && !strcmp(argv[i], "--sizes")) read_sizes(argv[i + 1], sizes);
    else return usage(argv[0]);
  }
  if (rounds < 1) return usage(argv[0]);
  if (results && memcmp(sizes, model_size_most, sizeof sizes)) {
    fprintf(stderr, "error: --results is for the largest sizes, since the predictions are: leave --sizes away\n");
    return 1;
  }

  struct model m;
  unsigned char *weights = read_file(argv[1], MODEL_WEIGHTS_BYTES), *arena = reserve(MODEL_ARENA_BYTES);
  int failed = model_init(&m, weights, MODEL_WEIGHTS_BYTES, arena, MODEL_ARENA_BYTES);
  if (failed) {
    fprintf(stderr, "error: %s is not the weights.bin of this package (code %d)\n", argv[1], failed);
    return 1;
  }

  size_t input_bytes = 0, output_bytes = 0;
  for (int i = 0; i < MODEL_INPUTS; i++) input_bytes += model_input_bytes(i, sizes);
  for (int i = 0; i < MODEL_OUTPUTS; i++) output_bytes += model_output_bytes(i, sizes);
  unsigned char *content = read_file(argv[2], input_bytes), *at = content;
  void *inputs[MODEL_INPUTS + 1], *outputs[MODEL_OUTPUTS + 1];
  for (int i = 0; i < MODEL_INPUTS; i++) {
    size_t bytes = model_input_bytes(i, sizes);
    inputs[i] = reserve(bytes);
    memcpy(inputs[i], at, bytes);
    at += bytes;
  }
  for (int i = 0; i < MODEL_OUTPUTS; i++) outputs[i] = reserve(model_output_bytes(i, sizes));

  double best = 1e30, total = 0;
  for (int round = 0; round < rounds; round++) {
    double start = now_us();
    for (int step = 0; step < MODEL_STEPS; step++) model_step(&m, sizes, inputs, outputs, step);
    double taken = now_us() - start;
    total += taken;
    if (taken < best) best = taken;
  }
  printf("%d runs: best %.3f ms, mean %.3f ms\n", rounds, best / 1e3, total / rounds / 1e3);

  if (output) {
    FILE *file = fopen(output, "wb");
    int written = file != NULL;
    for (int i = 0; written && i < MODEL_OUTPUTS; i++)
      written = fwrite(outputs[i], 1, model_output_bytes(i, sizes), file) == model_output_bytes(i, sizes);
    if (file && fclose(file)) written = 0;
    if (!written) {
      fprintf(stderr, "error: %s cannot be written\n", output);
      return 1;
    }
  }
  if (expect) {
    unsigned char *wanted = read_file(expect, output_bytes), *next = wanted;
    for (int i = 0; i < MODEL_OUTPUTS; i++) {
      size_t bytes = model_output_bytes(i, sizes);
      void *own = reserve(bytes);
      memcpy(own, next, bytes);
      next += bytes;
      int each = model_output_float_bytes[i];
      double difference = each ? largest_difference(outputs[i], own, bytes / (size_t)each, each)
                               : (double)(memcmp(outputs[i], own, bytes) != 0);
      printf("output %d: largest difference %.2e of the largest value\n", i, difference);
      if (!(difference <= MODEL_TOLERANCE)) status = 2;
      free(own);
    }
    free(wanted);
  }
  if (results) write_results(results, &m, sizes, inputs, outputs, rounds);
  for (int i = 0; i < MODEL_INPUTS; i++) free(inputs[i]);
  for (int i = 0; i < MODEL_OUTPUTS; i++) free(outputs[i]);
  free(content);
  free(arena);
  free(weights);
  return status;
}
