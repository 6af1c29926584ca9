/* Checks of packed weights: a model file is untrusted, and a kernel follows its indices without looking.
 *
 * The layouts are those of sparsecomp/patterns (quads.py, panel.py, gathered.py). Every check is one pass over the arrays.
 */
#include <stddef.h>

#include "library.h"

static const int TYPES[][WEIGHTS] = {
    [ROWS] = {TYPE_FLOAT, TYPE_UINT8, TYPE_INT32, TYPE_INT32},  /* values, columns, quads, starts */
    [PANEL] = {TYPE_FLOAT, TYPE_INT32, TYPE_INT32, 0},          /* values, columns, ptr */
    [GATHER] = {TYPE_FLOAT, TYPE_UINT16, TYPE_INT32, 0},        /* values, columns, ptr */
    [MASK] = {TYPE_FLOAT, TYPE_UINT16, TYPE_INT32, 0},          /* values, masks, ptr */
    [CONV] = {TYPE_FLOAT, TYPE_UINT8, TYPE_INT32, TYPE_INT32},  /* values, columns, quads, starts */
    [FULL] = {TYPE_FLOAT, 0, 0, 0},                             /* values */
};
enum { MASK_BITS = 16, QUAD = 4, QUAD_FIELDS = 8, MOST_COLUMNS = 256, WORD = 8, WORDS_AHEAD = 2 };

int weight_type(enum Family family, int index) { return TYPES[family][index]; }

int weight_count(enum Family family) {
  int count = 0;
  while (count < WEIGHTS && TYPES[family][count]) count++;
  return count;
}

/* ptr of `parts + 1` entries, ascending from 0 up to at most `end`. */
static const char *check_ptr(const int32_t *ptr, int64_t length, int64_t parts, int64_t end) {
  if (length != parts + 1 || ptr[0] != 0) return "ptr must begin with 0 and have one entry more than there are parts";
  for (int64_t part = 0; part < parts; part++)
    if (ptr[part + 1] < ptr[part] || ptr[part + 1] > end) return "ptr must ascend and stay within the columns";
  return NULL;
}

static const char *check_panel(const Kernel *k, Packed *p) {
  const int32_t *columns = p->weights[1];
  int64_t count = p->lengths[1];
  if (p->lengths[0] != count * p->form->v) return "there must be one value for every column and row of a panel";
  const char *wrong = check_ptr(p->weights[2], p->lengths[2], ceil_div(k->outputs, p->form->v), count);
  if (wrong) return wrong;
  for (int64_t i = 0; i < count; i++)
    if (columns[i] < 0 || columns[i] >= k->inputs) return "a column lies outside of the inputs";
  p->kept = count * p->form->v;
  return NULL;
}

static const char *check_gather(const Kernel *k, Packed *p) {
  const uint16_t *columns = p->weights[1];
  int64_t count = p->lengths[1];
  if (p->lengths[0] != count || count % p->form->v) return "values and columns must be whole groups, one for each other";
  const char *wrong = check_ptr(p->weights[2], p->lengths[2], k->outputs, count / p->form->v);
  if (wrong) return wrong;
  for (int64_t i = 0; i < count; i++)
    if (columns[i] >= k->inputs) return "a column lies outside of the inputs";
  p->kept = count;
  return NULL;
}

static const char *check_mask(const Kernel *k, Packed *p) {
  const uint16_t *masks = p->weights[1];
  const int32_t *ptr = p->weights[2];
  int64_t words = ceil_div(k->inputs, MASK_BITS);
  if (p->lengths[1] != words * k->outputs || p->lengths[2] != k->outputs) return "masks and ptr must have a row for every output";
  for (int64_t row = 0; row < k->outputs; row++) {
    int64_t bits = 0;
    for (int64_t w = 0; w < words; w++) bits += __builtin_popcount(masks[row * words + w]);
    if (k->inputs % MASK_BITS && masks[(row + 1) * words - 1] >> k->inputs % MASK_BITS) return "a mask has bits behind the inputs";
    /* A whole vector is read at the last kept entry. */
    if (ptr[row] < 0 || ptr[row] + bits + MASK_BITS > p->lengths[0]) return "a row reads behind the values";
    p->kept += bits;
  }
  return NULL;
}

/* One block of one chunk: its quads begin to end. */
static const char *check_quads(const Kernel *k, Packed *p, int64_t begin, int64_t end, int64_t members, int64_t width) {
  const uint8_t *columns = p->weights[1];
  for (int64_t q = begin; q < end; q++) {
    const int32_t *quad = (const int32_t *)p->weights[2] + q * QUAD_FIELDS;
    for (int f = 0; f < QUAD_FIELDS; f++)
      if (quad[f] < 0) return "a quad has a negative field";
    int64_t shared = ceil_div(quad[2], 2), words = shared + ceil_div(quad[3], 2), values = 2 * QUAD * (int64_t)quad[2] + QUAD * (int64_t)quad[3];
    if (quad[0] + values > p->lengths[0]) return "a quad reads behind the values";
    if (WORD * (quad[1] + words + WORDS_AHEAD) > p->lengths[1]) return "a quad reads behind the columns";
    for (int64_t c = WORD * (int64_t)quad[1]; c < WORD * (quad[1] + words); c++)
      if (columns[c] >= width) return "a column lies outside of its block";
    for (int m = 0; m < QUAD; m++) {
      int32_t row = quad[QUAD_FIELDS - QUAD + m];
      if (row >= members && row != k->chunk) return "a row lies outside of its chunk";
    }
    p->kept += values;
    if (p->kept > p->lengths[0]) return "quads share their values";
  }
  return NULL;
}

/* Quads of rows over blocks of columns, chunk by chunk in so many groups of rows. */
static const char *check_rows(const Kernel *k, Packed *p, int64_t groups) {
  if (k->chunk < QUAD || k->chunk % QUAD || k->chunk > 65536) return "attribute chunk must be a multiple of 4 up to 65536";
  if (k->block < 1 || k->block > MOST_COLUMNS) return "attribute block must be from 1 to 256";
  if (p->lengths[2] % QUAD_FIELDS || p->lengths[1] % WORD) return "the quads must be rows of 8, and the columns of 8";
  int64_t rows = k->outputs / groups, chunks = ceil_div(rows, k->chunk), blocks = ceil_div(k->inputs, k->block);
  const int32_t *starts = p->weights[3];
  const char *wrong = check_ptr(starts, p->lengths[3], groups * chunks * blocks, p->lengths[2] / QUAD_FIELDS);
  for (int64_t cell = 0; !wrong && cell < groups * chunks * blocks; cell++) {
    int64_t members = least(k->chunk, rows - cell / blocks % chunks * k->chunk);
    int64_t width = least(k->block, k->inputs - cell % blocks * k->block);
    wrong = check_quads(k, p, starts[cell], starts[cell + 1], members, width);
  }
  return wrong;
}

static const char *check_conv(const Kernel *k, Packed *p) {
  const Window *w = &k->entry->window;
  if (k->outputs % w->groups || k->inputs % (w->kernel[0] * w->kernel[1])) return "the sizes do not fit the window";
  const char *wrong = check_rows(k, p, w->groups);
  return wrong ? wrong : make_table(k, p);
}

/* The dense weight as panels that keep every column: the columns are made here. */
static const char *check_full(const Kernel *k, Packed *p) {
  int64_t panels = ceil_div(k->outputs, p->form->v), count = panels * k->inputs;
  if (p->lengths[0] / p->form->v != count || p->lengths[0] % p->form->v) return "there must be one value for every entry";
  int32_t *columns = p->owned[1] = aligned_alloc(LINE, (size_t)ceil_div(4 * count, LINE) * LINE);
  int32_t *ptr = p->owned[2] = aligned_alloc(LINE, (size_t)ceil_div(4 * (panels + 1), LINE) * LINE);
  if (!columns || !ptr) return "there is no memory for its columns";
  for (int64_t panel = 0; panel <= panels; panel++) ptr[panel] = (int32_t)(panel * k->inputs);
  for (int64_t panel = 0; panel < panels; panel++)
    for (int32_t column = 0; column < k->inputs; column++) columns[panel * k->inputs + column] = column;
  p->weights[1] = columns;
  p->weights[2] = ptr;
  p->kept = p->lengths[0];
  return NULL;
}

const char *check_weight(Kernel *k, Packed *p) {
  switch (p->form->family) {
    case ROWS: return check_rows(k, p, 1);
    case PANEL: return check_panel(k, p);
    case GATHER: return check_gather(k, p);
    case MASK: return check_mask(k, p);
    case CONV: return check_conv(k, p);
    case FULL: return check_full(k, p);
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
