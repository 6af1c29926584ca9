/* A call of a convolution: x [N, I, H, W] or [N, I, L] gives [N, O, ...].
 *
 * The counting of positions is that of sparsecomp/kernels/conv_geometry.py, and the sizes that a kernel reads are those of
 * `DIMS` in sparsecomp/kernels/conv.py: with a stride, the maps are taken apart into phases first.
 */
#include <stdlib.h>
#include <string.h>

#include "library.h"
#include "ops.h"

enum { TABLE_FIELDS = 4, SPARE = 16, MOST_PHASES = 1024 };

/* Floor of a quotient, and what is left. */
static int32_t floor_div(int32_t a, int32_t b, int32_t *rest) {
  int32_t quotient = a / b - (a % b < 0);
  *rest = a - quotient * b;
  return quotient;
}

/* Which phase a tap reads, and how far it is moved: taps `tap` of an axis. */
static int32_t moved(const Window *w, int axis, int32_t tap, int32_t *phase) {
  return floor_div(tap * w->dilation[axis] - w->padding[axis], w->stride[axis], phase);
}

/* The phases of an axis that some tap reads, ascending; returns their number. */
static int32_t axis_phases(const Window *w, int axis, int32_t *phases) {
  int32_t count = 0;
  for (int32_t p = 0; p < w->stride[axis]; p++)
    for (int32_t tap = 0, phase; tap < w->kernel[axis]; tap++) {
      moved(w, axis, tap, &phase);
      if (phase == p) {
        phases[count++] = p;
        break;
      }
    }
  return count;
}

static int32_t place_of(const int32_t *phases, int32_t phase) {
  int32_t place = 0;
  while (phases[place] != phase) place++;
  return place;
}

/* Put the table of taps before the starts: plane, rows and columns moved by, number of the tap, for every column. */
const char *make_table(const Kernel *k, Packed *p) {
  const Window *w = &k->entry->window;
  int32_t taps = w->kernel[0] * w->kernel[1], rows[MOST_PHASES], columns[MOST_PHASES];
  if (w->stride[0] > MOST_PHASES || w->stride[1] > MOST_PHASES) return "the stride is too large";
  int32_t row_count = axis_phases(w, 0, rows), column_count = axis_phases(w, 1, columns);
  int64_t length = TABLE_FIELDS * (int64_t)k->inputs + p->lengths[3];
  int32_t *table = length < INT32_MAX ? aligned_alloc(LINE, (size_t)ceil_div(4 * length, LINE) * LINE) : NULL;
  if (!table) return "there is no memory for its table";
  for (int32_t column = 0; column < k->inputs; column++) {
    int32_t tap = column % taps, phase_y, phase_x, *entry = table + TABLE_FIELDS * (int64_t)column;
    entry[1] = moved(w, 0, tap / w->kernel[1], &phase_y);
    entry[2] = moved(w, 1, tap % w->kernel[1], &phase_x);
    entry[0] = column / taps * row_count * column_count + place_of(rows, phase_y) * column_count + place_of(columns, phase_x);
    entry[3] = tap;
  }
  memcpy(table + TABLE_FIELDS * (int64_t)k->inputs, p->weights[3], (size_t)p->lengths[3] * 4);
  free(p->owned[3]);
  p->weights[3] = p->owned[3] = table;
  return NULL;
}

/* How positions are counted for maps of one size. */
typedef struct {
  int64_t height, width; /* of the output */
  int64_t rows, pitch;   /* of a plane */
  int32_t phases, opened;
} Geometry;

/* The most that a tap reaches of any phase of an axis. */
static int64_t reached(const Window *w, int axis, int64_t size, int64_t outputs) {
  int64_t furthest = 1;
  for (int32_t tap = 0, phase; tap < w->kernel[axis]; tap++) {
    int64_t move = moved(w, axis, tap, &phase);
    furthest = most(furthest, least(ceil_div(most(size - phase, 0), w->stride[axis]), outputs + move));
  }
  return furthest;
}

static Geometry geometry_of(const Window *w, int64_t height, int64_t width, const int64_t *out) {
  int32_t found[MOST_PHASES];
  Geometry g = {out[0], out[1], height, width, axis_phases(w, 0, found), 0};
  g.phases *= axis_phases(w, 1, found);
  g.opened = !(w->stride[0] == 1 && w->stride[1] == 1 && out[1] <= width);
  if (g.opened) {
    g.rows = reached(w, 0, height, out[0]);
    g.pitch = most(reached(w, 1, width, out[1]), out[1]);
  }
  return g;
}

static int64_t splits_for(int64_t tiles, int64_t chunks, int64_t threads, int64_t fewest) {
  int64_t best = fewest;
  double best_share = -1;
  for (int64_t splits = fewest; splits <= most(fewest, least(chunks, threads)); splits++) {
    double share = (double)(ceil_div(tiles * splits, threads) * ceil_div(chunks, splits)) / (double)(tiles * chunks);
    if (best_share < 0 || share < 0.95 * best_share) best = splits, best_share = share;
  }
  return best;
}

/* Whether whole tiles of so many floats use the maps where they lie: `reads_in_place` of the same rules. */
static int reads_in_place(const Kernel *k, const Geometry *g, int64_t vectors, int64_t tile) {
  const Window *w = &k->entry->window;
  int64_t plane = g->rows * g->pitch, apart = L1_SETS, lines = ceil_div(tile, L1_LINE);
  int64_t padding = w->padding[0] | w->padding[1] | w->extra[0] | w->extra[1];
  if (w->kernel[0] * w->kernel[1] > 1 || padding || g->rows < g->height || plane % k->entry->lanes) return 0;
  if (k->packed[0].kept >= USES_TO_PACK * vectors * k->inputs * w->groups) return 0;
  if (plane % L1_LINE == 0)
    while (apart > 1 && plane / L1_LINE * (apart / 2) % L1_SETS == 0) apart /= 2;
  return k->block * lines <= L1_WAYS * least(L1_SETS, apart * lines);
}

/* A variant on a call, or on a part of it: the tiles of an image that it computes, and the positions before them. */
typedef struct {
  const Variant *variant; /* NULL for nothing */
  int64_t image_tiles, skip, splits, items;
  double work;
} Part;

static Part part_of(const Kernel *k, const Geometry *g, const Variant *v, int64_t images, int64_t threads, int64_t skip,
                    int64_t image_tiles) {
  int64_t groups = k->entry->window.groups, group_rows = k->outputs / groups, chunks = ceil_div(group_rows, k->chunk);
  int64_t tile = (int64_t)v->number * k->entry->lanes, length = g->height * g->pitch;
  int64_t tiles = v->whole ? images * image_tiles : ceil_div(images * length, tile);
  int64_t fewest = least(chunks, ceil_div(4 * tile * group_rows, SUMS_BYTES));
  Part part = {v, image_tiles, skip, splits_for(tiles * groups, chunks, threads, most(fewest, 1)), 0, 0};
  part.items = tiles * groups * part.splits;
  double share = (double)ceil_div(part.items, threads) / (double)part.items;
  part.work = share * (double)tiles * (v->number + CONV_STEP_COST) * (v->whole ? 1.0 : CONV_RUNS_COST);
  return part;
}

static int may_take(const Kernel *k, const Geometry *g, const Variant *v) {
  int64_t tile = (int64_t)v->number * k->entry->lanes;
  if (v->number > k->vectors || (v->whole && (g->pitch != g->width || tile > g->height * g->pitch))) return 0;
  return !v->direct || reads_in_place(k, g, v->number, tile);
}

/* What computes the rest of each image after its whole tiles of a variant, if the library has a kernel for it. */
static Part tail_of(const Kernel *k, const Geometry *g, const Variant *v, int64_t images, int64_t threads) {
  const Form *form = k->packed[0].form;
  int64_t tile = (int64_t)v->number * k->entry->lanes, length = g->height * g->pitch, rest = length % tile;
  Part found = {0};
  for (int32_t i = form->count - 1; i >= 0 && v->whole && rest; i--) {
    const Variant *narrow = &form->variants[i];
    if (narrow->number != ceil_div(rest, k->entry->lanes) || !narrow->whole || !may_take(k, g, narrow)) continue;
    Part part = part_of(k, g, narrow, images, threads, length - rest, 1);
    if (!found.variant || part.work < found.work) found = part;
  }
  return found;
}

static Cut cut_of(const Kernel *k, const Geometry *g, int64_t images, const Part *part) {
  const Window *w = &k->entry->window;
  const Packed *p = &k->packed[0];
  int64_t tile = (int64_t)part->variant->number * k->entry->lanes, taps = (int64_t)w->kernel[0] * w->kernel[1];
  int64_t group_rows = k->outputs / w->groups, chunks = ceil_div(group_rows, k->chunk), length = g->height * g->pitch;
  int64_t channels = k->inputs / taps * w->groups, planes = channels * g->phases, plane = g->rows * g->pitch;
  int64_t area = g->height * g->width, dense = g->pitch == g->width, blocks = ceil_div(k->inputs, k->block);
  int64_t sums = ceil_div(chunks, part->splits) * (k->chunk + 1) * tile;
  const int64_t dims[] = {planes, plane, g->rows, g->pitch, length, dense ? area : g->width, dense ? area : g->pitch,
                          dense ? 1 : g->height, images, k->outputs, images * planes * plane, k->inputs, k->block,
                          k->block * tile, blocks, k->chunk, chunks, group_rows, planes / w->groups, taps, part->splits,
                          part->splits * w->groups, part->image_tiles, part->skip};
  Cut cut = {.function = part->variant->function, .weights = p->weights, .items = (int32_t)part->items,
             .scratch = 4 * (k->block * tile + SPARE + sums + (2 + taps) * (tile + SPARE))};
  for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) cut.dims[i] = (int32_t)dims[i];
  return cut;
}

/* The variants with the least work for the busiest thread: the rules of targets/cpu/conv_schedules.py. Returns how many
 * cuts the call has: none, one, or two with a tail. */
static int cut_conv(const Kernel *k, const Geometry *g, int64_t images, int64_t threads, Cut cuts[2]) {
  const Form *form = k->packed[0].form;
  Part chosen[2] = {{0}};
  double least_work = 0;
  for (int32_t i = form->count - 1; i >= 0; i--) {
    const Variant *v = &form->variants[i];
    int64_t tile = (int64_t)v->number * k->entry->lanes, length = g->height * g->pitch;
    if (!may_take(k, g, v)) continue;
    Part whole = part_of(k, g, v, images, threads, 0, ceil_div(length, tile)), tail = tail_of(k, g, v, images, threads);
    if (!chosen[0].variant || whole.work < least_work) chosen[0] = whole, chosen[1] = (Part){0}, least_work = whole.work;
    if (!tail.variant) continue;
    Part full = part_of(k, g, v, images, threads, 0, length / tile);
    double work = CONV_TAIL_COST * (full.work + tail.work);
    if (work < least_work) chosen[0] = full, chosen[1] = tail, least_work = work;
  }
  int count = 0;
  for (; count < 2 && chosen[count].variant; count++) cuts[count] = cut_of(k, g, images, &chosen[count]);
  return count;
}

static Status *open_maps(Kernel *k, void *context, const Geometry *g, int64_t images, const int64_t *size, const float *x,
                         float *opened) {
  const Window *w = &k->entry->window;
  int32_t rows[MOST_PHASES], columns[MOST_PHASES], row_count = axis_phases(w, 0, rows), column_count = axis_phases(w, 1, columns);
  int32_t *phases = aligned_alloc(LINE, (size_t)ceil_div(8 * (int64_t)g->phases, LINE) * LINE);
  if (!phases) return fail(k->api, "%s: no memory for the phases", k->entry->name);
  for (int32_t p = 0; p < row_count * column_count; p++) {
    phases[2 * p] = rows[p / column_count];
    phases[2 * p + 1] = columns[p % column_count];
  }
  const void *weights[WEIGHTS] = {phases, phases, phases, phases};
  int64_t channels = k->inputs / (w->kernel[0] * w->kernel[1]) * w->groups;
  Cut cut = {k->entry->open, weights, {(int32_t)size[0], (int32_t)size[1], w->stride[0], w->stride[1], g->phases,
             (int32_t)g->rows, (int32_t)g->pitch}, (int32_t)(images * channels), 0};
  int32_t threads = images * channels * g->rows * g->pitch * g->phases > 100000 ? threads_for(k, g->height * g->width * images * k->packed[0].kept) : 1;
  Status *status = launch(k, context, &cut, threads, x, NULL, NULL, opened);
  free(phases);
  return status;
}

static Status *run_images(Kernel *k, void *context, const Geometry *g, int64_t images, const int64_t *size, const float *x,
                          const float *bias, const float *residual, float *y) {
  Block *opened = NULL;
  Status *status = NULL;
  if (g->opened) {
    int64_t planes = k->inputs / (k->entry->window.kernel[0] * k->entry->window.kernel[1]) * k->entry->window.groups * g->phases;
    opened = take_block((size_t)(4 * images * planes * g->rows * g->pitch));
    if (!opened) return fail(k->api, "%s: no memory to take maps apart", k->entry->name);
    status = open_maps(k, context, g, images, size, x, memory_of(opened));
    x = memory_of(opened);
  }
  if (!status) {
    int32_t threads = threads_for(k, images * g->height * g->width * k->packed[0].kept);
    Cut cuts[2];
    int count = cut_conv(k, g, images, threads, cuts);
    if (!count) status = fail(k->api, "%s: no kernel of the library takes a weight of these sizes", k->entry->name);
    for (int i = 0; i < count && !status; i++)
      if (cuts[i].scratch > 4 * MOST_VALUES)
        status = fail(k->api, "%s: no kernel of the library takes a weight of these sizes", k->entry->name);
    for (int i = 0; i < count && !status; i++) status = launch(k, context, &cuts[i], threads, x, bias, residual, y);
  }
  if (opened) give_block(opened);
  return status;
}

static Status *run_all(Kernel *k, void *context, const int64_t *in, const int64_t *out, const float *x, const float *bias,
                       const float *residual, float *y) {
  const Window *w = &k->entry->window;
  Geometry g = geometry_of(w, in[2], in[3], out + 2);
  int64_t channels = in[1], from = channels * in[2] * in[3], to = k->outputs * out[2] * out[3];
  int64_t values = most(most(channels * g.phases * g.rows * g.pitch, from), most(to, k->outputs * g.height * g.pitch));
  if (values > MOST_VALUES) return fail(k->api, "%s: a map of %lld values is too large", k->entry->name, (long long)values);
  int64_t slice = MOST_VALUES / values;
  Status *status = NULL;
  for (int64_t first = 0; first < in[0] && !status; first += slice)
    status = run_images(k, context, &g, least(slice, in[0] - first), in + 2, x + first * from, bias,
                        residual ? residual + first * to : NULL, y + first * to);
  return status;
}

Status *compute_conv(Kernel *k, void *context, Tensor *x, Tensor *bias, Tensor *residual) {
  const Window *w = &k->entry->window;
  Status *status;
  if ((status = read_input(k, context, 0, x)) || (status = read_bias(k, context, bias))) return status;
  int64_t channels = (int64_t)k->inputs / (w->kernel[0] * w->kernel[1]) * w->groups, flat = w->rank == 1;
  if (x->rank != (size_t)w->rank + 2 || x->dims[1] != channels) return wrong_shape(k, "the first input");
  int64_t in[4] = {x->dims[0], channels, flat ? 1 : x->dims[2], x->dims[x->rank - 1]}, out[4] = {in[0], k->outputs};
  for (int axis = 0; axis < 2; axis++) {
    int64_t reach = (int64_t)w->dilation[axis] * (w->kernel[axis] - 1) + 1, room = in[2 + axis] + 2 * w->padding[axis] + w->extra[axis] - reach;
    if (room < 0) return fail(k->api, "%s: the window is larger than the map", k->entry->name);
    out[2 + axis] = room / w->stride[axis] + 1;
  }
  int64_t dims[4] = {out[0], out[1], out[flat ? 3 : 2], out[3]};
  if (k->entry->residual) {
    if ((status = read_input(k, context, 1 + (size_t)k->entry->bias, residual))) return status;
    if (residual->rank > x->rank) return wrong_shape(k, "the residual");
    int same = residual->rank == x->rank;
    for (size_t i = 0; i < residual->rank; i++) {
      int64_t size = residual->dims[residual->rank - 1 - i], wanted = dims[x->rank - 1 - i];
      if (size != wanted && size != 1) return wrong_shape(k, "the residual");
      same &= size == wanted;
    }
    if (!same) {
      residual->owned = expanded(residual->data, residual->dims, residual->rank, dims, x->rank);
      if (!residual->owned) return fail(k->api, "%s: no memory to broadcast the residual", k->entry->name);
      residual->data = residual->owned;
    }
  }
  float *y = NULL;
  if ((status = make_output(k, context, dims, x->rank, &y))) return status;
  if (!product(dims, x->rank)) return NULL;
  return run_all(k, context, in, out, x->data, bias->data, k->entry->residual ? residual->data : NULL, y);
}
