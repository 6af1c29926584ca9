/* Runs a kernel on the threads of the session, with scratch for each of them.
 *
 * Nothing tells how many threads a session has, so that they are counted in the first calls of every kernel.
 */
#include <pthread.h>
#include <stdlib.h>

#include "library.h"

enum { ASSUMED_THREADS = 16, COUNTED_CALLS = 4, COUNT_AGAIN = 512, PARTS_PER_THREAD = 4 };
#define WORK_OF_A_THREAD 400000 /* multiply-adds; with fewer, waking another thread takes longer than they do */

/* Blocks that no thread uses now, the last used first: it is the one that the caches hold. */
struct Block {
  Block *next;
  size_t bytes;
  float *memory;
};

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static Block *pool;
static int64_t kernels;

static void free_block(Block *block) {
  free(block->memory);
  free(block);
}

Block *take_block(size_t bytes) {
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

void give_block(Block *block) {
  pthread_mutex_lock(&pool_lock);
  block->next = pool;
  pool = block;
  pthread_mutex_unlock(&pool_lock);
}

void count_kernels(int change) {
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

float *memory_of(const Block *block) { return block->memory; }

typedef struct {
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
  Block *scratch = take_block((size_t)job->cut->scratch);
  if (!scratch) {
    atomic_store(&job->failed, 1);
    return;
  }
  const void *const *w = job->cut->weights;
  int64_t items = job->cut->items;
  job->cut->function(job->x, job->bias, job->residual, job->y, scratch->memory, w[0], w[1], w[2], w[3], job->cut->dims,
                     (int32_t)(items * (int64_t)part / job->parts), (int32_t)(items * ((int64_t)part + 1) / job->parts));
  give_block(scratch);
}

static int is_counting(const Kernel *k, unsigned calls) {
  return calls < COUNTED_CALLS || (atomic_load_explicit(&k->threads, memory_order_relaxed) == 1 && calls % COUNT_AGAIN == 0);
}

int32_t threads_for(Kernel *k, int64_t work) {
  unsigned calls = atomic_load_explicit(&k->calls, memory_order_relaxed);
  int64_t threads = is_counting(k, calls) ? ASSUMED_THREADS : atomic_load_explicit(&k->threads, memory_order_relaxed);
  int64_t useful = 1 + work / WORK_OF_A_THREAD;
  return (int32_t)(threads < useful ? threads : useful);
}

Status *launch(Kernel *k, void *context, const Cut *cut, int32_t threads, const float *x, const float *bias,
               const float *residual, float *y) {
  Job job = {.cut = cut, .x = x, .bias = bias, .residual = residual, .y = y, .parts = 1};
  if (threads > 1) job.parts = cut->items < PARTS_PER_THREAD * threads ? cut->items : PARTS_PER_THREAD * threads;
  job.number = atomic_fetch_add_explicit(&next_job, 1, memory_order_relaxed);
  if (job.parts <= 1) {
    job.parts = 1;
    run_part(&job, 0);
    /* With so little work threads cannot be counted. */
    if (!is_counting(k, atomic_load_explicit(&k->calls, memory_order_relaxed)))
      atomic_fetch_add_explicit(&k->calls, 1, memory_order_relaxed);
  } else {
    atomic_fetch_add_explicit(&k->calls, 1, memory_order_relaxed);
    Status *status = CALL(k->api, PARALLEL_FOR, const void *, void (*)(void *, size_t), size_t, size_t, void *)(
        context, run_part, (size_t)job.parts, 0, &job);
    if (status) return status;
    int seen = atomic_load(&job.threads);
    if (seen > atomic_load_explicit(&k->threads, memory_order_relaxed))
      atomic_store_explicit(&k->threads, seen, memory_order_relaxed);
  }
  if (atomic_load(&job.failed))
    return fail(k->api, "%s: no memory for %lld bytes of scratch", k->entry->name, (long long)cut->scratch);
  return NULL;
}
