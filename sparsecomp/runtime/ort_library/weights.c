/* Checks of packed weights: a model file is untrusted, and a kernel follows its indices without looking.
 *
 * The layouts are those of sparsecomp/patterns (rows.py, panel.py, gathered.py). Every check is one pass over the arrays.
 */
#include <stddef.h>

#include "library.h"

static const int TYPES[][WEIGHTS] = {
    [ROWS] = {TYPE_FLOAT, TYPE_UINT16, TYPE_INT32, TYPE_INT32}, /* values, columns, pairs, rows */
    [PANEL] = {TYPE_FLOAT, TYPE_INT32, TYPE_INT32, 0},          /* values, columns, ptr */
    [GATHER] = {TYPE_FLOAT, TYPE_UINT16, TYPE_INT32, 0},        /* values, columns, ptr */
    [MASK] = {TYPE_FLOAT, TYPE_UINT16, TYPE_INT32, 0},          /* values, masks, ptr */
    [CONV] = {TYPE_FLOAT, TYPE_UINT16, TYPE_INT32, TYPE_INT32}, /* values, columns, quads, starts */
};
enum { PAIR_FIELDS = 5, MASK_BITS = 16, QUAD = 4, QUAD_FIELDS = 8 };

int weight_type(enum Family family, int index) { return TYPES[family][index]; }

int weight_count(enum Family family) {
  int count = 0;
  while (count < WEIGHTS && TYPES[family][count]) count++;
  return count;
}


static const char *check_rows(Kernel *k) {
  const uint16_t *columns = k->weights[1];
  const int32_t *pairs = k->weights[2], *rows = k->weights[3];
  int64_t values = k->lengths[0], entries = k->lengths[1];
  if (k->chunk < 2 || k->chunk % 2 || k->chunk > 65536) return "attribute chunk must be even, from 2 to 65536";
  if (k->block < 1 || k->block > 65536) return "attribute block must be from 1 to 65536";
  if (k->lengths[2] % PAIR_FIELDS) return "the pairs must be rows of 5";
  int64_t count = k->lengths[2] / PAIR_FIELDS, pair = 0;
  if (k->lengths[3] != 2 * count) return "there must be two rows for every pair";
  for (int64_t row = 0; row < k->outputs; row += k->chunk) {
    int64_t members = least(k->chunk, k->outputs - row), here = ceil_div(members, 2);
    for (int64_t column = 0; column < k->inputs; column += k->block) {
      int64_t width = least(k->block, k->inputs - column);
      if (here > count - pair) return "there are fewer pairs than the rows and columns need";
      for (int64_t i = 0; i < here; i++, pair++) {
        const int32_t *p = pairs + pair * PAIR_FIELDS;
        for (int f = 0; f < PAIR_FIELDS; f++)
          if (p[f] < 0) return "a pair has a negative field";
        int64_t both = p[2], turns = 2 * (int64_t)p[3], left = p[4], length = both + turns + left;
        if (p[0] + both + length > values) return "a pair reads behind the values";
        if (p[1] + length > entries) return "a pair reads behind the columns";
        k->kept += both + length;
        for (int64_t e = 0; e < length; e++)
          if (columns[p[1] + e] >= width) return "a column lies outside of its block";
        for (int m = 0; m < 2; m++) {
          int32_t r = rows[2 * pair + m];
          if (r < 0 || (r >= members && r != k->chunk)) return "a row lies outside of its chunk";
        }
        /* Every value belongs to one pair; pairs that share them could make a small file run for ever. */
        if (k->kept > values) return "pairs share their values";
      }
    }
  }
  return pair == count ? NULL : "there are more pairs than the rows and columns need";
}

/* ptr of `parts + 1` entries, ascending from 0 up to at most `end`. */
static const char *check_ptr(const int32_t *ptr, int64_t length, int64_t parts, int64_t end) {
  if (length != parts + 1 || ptr[0] != 0) return "ptr must begin with 0 and have one entry more than there are parts";
  for (int64_t p = 0; p < parts; p++)
    if (ptr[p + 1] < ptr[p] || ptr[p + 1] > end) return "ptr must ascend and stay within the columns";
  return NULL;
}

static const char *check_panel(Kernel *k) {
  const int32_t *columns = k->weights[1];
  int64_t count = k->lengths[1];
  if (k->lengths[0] != count * k->entry->v) return "there must be one value for every column and row of a panel";
  const char *wrong = check_ptr(k->weights[2], k->lengths[2], ceil_div(k->outputs, k->entry->v), count);
  if (wrong) return wrong;
  for (int64_t i = 0; i < count; i++)
    if (columns[i] < 0 || columns[i] >= k->inputs) return "a column lies outside of the inputs";
  k->kept = count * k->entry->v;
  return NULL;
}

static const char *check_gather(Kernel *k) {
  const uint16_t *columns = k->weights[1];
  int64_t count = k->lengths[1];
  if (k->lengths[0] != count || count % k->entry->v) return "values and columns must be whole groups, one for each other";
  const char *wrong = check_ptr(k->weights[2], k->lengths[2], k->outputs, count / k->entry->v);
  if (wrong) return wrong;
  for (int64_t i = 0; i < count; i++)
    if (columns[i] >= k->inputs) return "a column lies outside of the inputs";
  k->kept = count;
  return NULL;
}

static const char *check_mask(Kernel *k) {
  const uint16_t *masks = k->weights[1];
  const int32_t *ptr = k->weights[2];
  int64_t words = ceil_div(k->inputs, MASK_BITS);
  if (k->lengths[1] != words * k->outputs || k->lengths[2] != k->outputs) return "masks and ptr must have a row for every output";
  for (int64_t row = 0; row < k->outputs; row++) {
    int64_t bits = 0;
    for (int64_t w = 0; w < words; w++) bits += __builtin_popcount(masks[row * words + w]);
    if (k->inputs % MASK_BITS && masks[(row + 1) * words - 1] >> k->inputs % MASK_BITS) return "a mask has bits behind the inputs";
    /* A whole vector is read at the last kept entry. */
    if (ptr[row] < 0 || ptr[row] + bits + MASK_BITS > k->lengths[0]) return "a row reads behind the values";
    k->kept += bits;
  }
  return NULL;
}

/* One block of one chunk: its quads begin to end. */
static const char *check_quads(Kernel *k, int64_t begin, int64_t end, int64_t members, int64_t width) {
  const uint16_t *columns = k->weights[1];
  for (int64_t q = begin; q < end; q++) {
    const int32_t *quad = (const int32_t *)k->weights[2] + q * QUAD_FIELDS;
    for (int f = 0; f < QUAD_FIELDS; f++)
      if (quad[f] < 0) return "a quad has a negative field";
    int64_t words = (int64_t)quad[2] + quad[3], values = 2 * QUAD * (int64_t)quad[2] + QUAD * (int64_t)quad[3];
    if (quad[0] + values > k->lengths[0]) return "a quad reads behind the values";
    if (QUAD * (quad[1] + words) > k->lengths[1]) return "a quad reads behind the columns";
    for (int64_t c = QUAD * (int64_t)quad[1]; c < QUAD * (quad[1] + words); c++)
      if (columns[c] >= width) return "a column lies outside of its block";
    for (int m = 0; m < QUAD; m++) {
      int32_t row = quad[QUAD_FIELDS - QUAD + m];
      if (row >= members && row != k->chunk) return "a row lies outside of its chunk";
    }
    k->kept += values;
    if (k->kept > k->lengths[0]) return "quads share their values";
  }
  return NULL;
}

static const char *check_conv(Kernel *k) {
  const Window *w = &k->entry->window;
  if (k->chunk < QUAD || k->chunk % QUAD) return "attribute chunk must be a multiple of 4";
  if (k->outputs % w->groups || k->inputs % (w->kernel[0] * w->kernel[1])) return "the sizes do not fit the window";
  if (k->lengths[2] % QUAD_FIELDS || k->lengths[1] % QUAD) return "the quads must be rows of 8, and the columns of 4";
  int64_t rows = k->outputs / w->groups, chunks = ceil_div(rows, k->chunk), blocks = ceil_div(k->inputs, k->block);
  const int32_t *starts = k->weights[3];
  const char *wrong = check_ptr(starts, k->lengths[3], w->groups * chunks * blocks, k->lengths[2] / QUAD_FIELDS);
  for (int64_t cell = 0; !wrong && cell < w->groups * chunks * blocks; cell++) {
    int64_t members = least(k->chunk, rows - cell / blocks % chunks * k->chunk);
    int64_t width = least(k->block, k->inputs - cell % blocks * k->block);
    wrong = check_quads(k, starts[cell], starts[cell + 1], members, width);
  }
  return wrong ? wrong : make_table(k);
}

const char *check_weight(Kernel *k) {
  switch (k->entry->family) {
    case ROWS: return check_rows(k);
    case PANEL: return check_panel(k);
    case GATHER: return check_gather(k);
    case MASK: return check_mask(k);
    case CONV: return check_conv(k);
  }
  return "unknown family";
}

/* For every 4-bit mask the `pshufb` control that moves the next packed floats to the kept lanes; the high bit gives 0. */
const void *mask_controls(void) {
  static _Alignas(LINE) uint8_t controls[16][16];
  static atomic_int ready;
  if (!atomic_load(&ready)) {
    for (int mask = 0; mask < 16; mask++)
      for (int lane = 0, next = 0; lane < 4; lane++) {
        int kept = mask >> lane & 1;
        for (int byte = 0; byte < 4; byte++) controls[mask][4 * lane + byte] = kept ? (uint8_t)(4 * next + byte) : 0x80;
        next += kept;
      }
    atomic_store(&ready, 1); /* another thread may write the same bytes meanwhile */
  }
  return controls;
}
