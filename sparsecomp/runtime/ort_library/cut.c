/* How a call is cut into items for the threads: the rules of targets/x86/schedules.py.
 *
 * Costs of a kept entry beside its multiply-adds, in vectors (rows) or tokens (panel), and the tokens that meet a panel
 * while it is in the L2 cache, come from there through `ops.h`.
 */
#include "library.h"
#include "ops.h"

enum { STAGE = 16, PANEL_SCRATCH = 16 };

/* Chunks whose sums wait at once. */
static int64_t rows_together(const Kernel *k, int64_t tile) {
  return most(1, SUMS_BYTES / (4 * tile * ((int64_t)k->chunk + 1)));
}

static int64_t rows_scratch(const Kernel *k, int64_t tile) {
  return (k->block + rows_together(k, tile) * ((int64_t)k->chunk + 1)) * tile + k->entry->lanes * ((int64_t)k->chunk + STAGE);
}

/* Floats of scratch of the widest variant: indices into it are 32-bit. */
int64_t scratch_limit(const Kernel *k, const Packed *p) {
  if (p->form->family != ROWS) return PANEL_SCRATCH;
  return rows_scratch(k, (int64_t)p->form->variants[p->form->count - 1].number * k->entry->lanes);
}

/* The fewest parts of the chunks that keep all threads busy; each costs another pass over the tile's activations. */
static int64_t row_splits(int64_t tiles, int64_t chunks, int64_t threads) {
  int64_t best = 1;
  double best_share = 0;
  for (int64_t splits = 1; splits <= most(1, least(chunks, threads)); splits++) {
    double share = (double)(ceil_div(tiles * splits, threads) * ceil_div(chunks, splits)) / (double)(tiles * chunks);
    if (splits == 1 || share < 0.95 * best_share) best = splits, best_share = share;
  }
  return best;
}

static Cut cut_rows(const Kernel *k, const Packed *p, int64_t tokens, int64_t threads) {
  int64_t chunks = ceil_div(k->outputs, k->chunk), splits = 1;
  const Variant *chosen = NULL;
  double least_work = 0;
  for (int32_t i = p->form->count - 1; i >= 0; i--) { /* the widest first: it wins where equal */
    const Variant *v = &p->form->variants[i];
    int64_t tiles = ceil_div(tokens, (int64_t)v->number * k->entry->lanes), parts = row_splits(tiles, chunks, threads);
    /* The largest part of one thread, in chunks of a tile; splits are whole chunks and may be of unequal size. */
    int64_t share = least(ceil_div(tiles * parts, threads) * ceil_div(chunks, parts), tiles * chunks);
    double work = (double)share * (v->number + ROW_STEP_COST);
    if (!chosen || work < least_work) chosen = v, least_work = work, splits = parts;
  }
  int64_t tile = (int64_t)chosen->number * k->entry->lanes;
  return (Cut){chosen->function, p->weights,
               {(int32_t)tokens, k->inputs, k->outputs, (int32_t)ceil_div(k->inputs, k->block),
                k->block, (int32_t)(k->block * tile), k->chunk, (int32_t)rows_together(k, tile), (int32_t)splits},
               (int32_t)(ceil_div(tokens, tile) * splits),
               4 * rows_scratch(k, tile)};
}

static Cut cut_panel(const Kernel *k, const Packed *p, int64_t tokens, int64_t threads) {
  const Variant *chosen = NULL;
  double least_work = 0;
  for (int32_t i = p->form->count - 1; i >= 0; i--) {
    const Variant *v = &p->form->variants[i];
    double work = (double)ceil_div(tokens, v->number) * (v->number + PANEL_STEP_COST);
    if (!chosen || work < least_work) chosen = v, least_work = work;
  }
  int64_t tiles = ceil_div(tokens, chosen->number), groups = most(1, ceil_div(tokens, GROUP_TOKENS));
  if (groups > 1) groups = ceil_div(groups, threads) * threads;
  int64_t group = ceil_div(tiles, groups) * chosen->number;
  groups = ceil_div(tokens, group);
  int64_t splits = groups >= threads ? 1 : least(threads, most(1, ceil_div(k->outputs, p->form->v)));
  return (Cut){chosen->function, p->weights,
               {(int32_t)tokens, k->inputs, k->outputs, (int32_t)group, (int32_t)splits},
               (int32_t)(groups * splits),
               4 * PANEL_SCRATCH};
}

Cut cut_linear(const Kernel *k, const Packed *p, int64_t tokens, int32_t threads) {
  switch (p->form->family) {
    case ROWS: return cut_rows(k, p, tokens, threads);
    case PANEL:
    case FULL: return cut_panel(k, p, tokens, threads);
    default: break;
  }
  /* One token or a few: an item is a row of the weight. */
  return (Cut){p->form->variants[0].function, p->weights, {(int32_t)tokens, k->inputs, k->outputs}, k->outputs, 0};
}
