/* Kimi Delta Attention on the CPU through libkda, in C: what a server does with two requests.
 *
 * Their prompts, of 37 and 100 tokens, are prefilled together into a pool of states; then both go on token by
 * token with kda_decode(). At the end the same tokens are prefilled at once into other slots of the pool, and
 * outputs and states are compared. Exits with 0 if they agree.
 *
 *   cc kda_prefill.c $(pkg-config --cflags --libs kda) -o kda_prefill && ./kda_prefill
 *
 * Every token's inputs are numbers from a formula, where a model would have the results of its projections.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kda/kda.h"

enum { N = 2, H = 2, D = 64, STEPS = 3, SLOTS = 4 };
static const int32_t prompt[N] = {37, 100};

/* Uniform in [-1, 1): a linear congruential generator, the same on every machine. */
static float next_random(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / 8388608.f - 1.f;
}

static void* allocate(size_t count, size_t size) {
  void* memory = calloc(count, size);
  if (memory == NULL) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  return memory;
}

/* A contiguous tensor over `data`; sizes end with the first 0. */
static kda_tensor tensor(void* data, kda_dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  kda_tensor t = {0};
  int64_t step = 1;
  t.data = data;
  t.dtype = dtype;
  while (t.rank < 4 && shape[t.rank] > 0) {
    t.shape[t.rank] = shape[t.rank];
    ++t.rank;
  }
  for (int i = t.rank - 1; i >= 0; --i) {
    t.stride[i] = step;
    step *= t.shape[i];
  }
  return t;
}

/* The rows of a call: `tokens` of them, in memory of their own. */
typedef struct rows {
  int64_t tokens;
  float *q, *k, *v, *g, *beta, *out;
} rows;

static rows make_rows(int64_t tokens) {
  rows r = {0};
  r.tokens = tokens;
  float** const wide[] = {&r.q, &r.k, &r.v, &r.g, &r.out};
  for (size_t i = 0; i < sizeof wide / sizeof *wide; ++i)
    *wide[i] = allocate((size_t)tokens * H * D, sizeof(float));
  r.beta = allocate((size_t)tokens * H, sizeof(float));
  return r;
}

static void free_rows(rows* r) {
  free(r->q), free(r->k), free(r->v), free(r->g), free(r->beta), free(r->out);
}

/* Token `position` of sequence `n`, into row `row`. */
static void fill_row(rows* r, int64_t row, int n, int position) {
  uint32_t state = (uint32_t)(1 + n) * 2654435761u + (uint32_t)position * 40503u;
  for (int i = 0; i < H * D; ++i) {
    r->q[row * H * D + i] = next_random(&state);
    r->k[row * H * D + i] = next_random(&state);
    r->v[row * H * D + i] = next_random(&state);
    r->g[row * H * D + i] = next_random(&state) - 2.f; /* softplus of this: a mild decay */
  }
  for (int h = 0; h < H; ++h) r->beta[row * H + h] = next_random(&state); /* a logit */
}

/* Runs `op` over the rows; sequence n owns rows [cu[n], cu[n + 1]) and the state at slot[n] of the pool. */
static void call(kda_status (*op)(const kda_args*), const char* name, const rows* r, int32_t* cu,
                 int32_t* slot, float* pool) {
  kda_args args;
  kda_args_init(&args, sizeof args); /* CPU, softplus gate, beta a logit, q and k normalised */
  args.threads = 2;
  args.q = tensor(r->q, KDA_F32, r->tokens, H, D, 0);
  args.k = tensor(r->k, KDA_F32, r->tokens, H, D, 0);
  args.v = tensor(r->v, KDA_F32, r->tokens, H, D, 0);
  args.g = tensor(r->g, KDA_F32, r->tokens, H, D, 0);
  args.beta = tensor(r->beta, KDA_F32, r->tokens, H, 0, 0);
  args.out = tensor(r->out, KDA_F32, r->tokens, H, D, 0);
  args.cu_seqlens = tensor(cu, KDA_I32, N + 1, 0, 0, 0);
  args.slot = tensor(slot, KDA_I32, N, 0, 0, 0);
  args.state = tensor(pool, KDA_F32, SLOTS, H, D, D);
  if (op(&args) != KDA_OK) {
    fprintf(stderr, "%s: %s\n", name, kda_last_error());
    exit(1);
  }
}

static float largest_difference(const float* a, const float* b, int64_t count, float so_far) {
  for (int64_t i = 0; i < count; ++i) {
    const float d = fabsf(a[i] - b[i]);
    if (!(d <= so_far)) so_far = d; /* also if d is not a number */
  }
  return so_far;
}

int main(void) {
  const uint32_t version = kda_abi_version();
  if (version >> 16 != KDA_ABI_MAJOR) {
    fprintf(stderr, "libkda: interface %u of the library, %u of the header\n", version >> 16, KDA_ABI_MAJOR);
    return 1;
  }
  float* pool = allocate((size_t)SLOTS * H * D * D, sizeof(float)); /* zero: where sequences start */
  const int64_t row = H * D, state = H * D * D;

  /* The prompts together: sequence 0 in slot 2, sequence 1 in slot 0. */
  int32_t slots[N] = {2, 0}, prompts[N + 1] = {0, prompt[0], prompt[0] + prompt[1]};
  rows begin = make_rows(prompts[N]);
  for (int n = 0; n < N; ++n)
    for (int t = 0; t < prompt[n]; ++t) fill_row(&begin, prompts[n] + t, n, t);
  call(kda_prefill, "prefill", &begin, prompts, slots, pool);

  /* The same and what follows, at once, in slots 1 and 3: what the steps below have to agree with. */
  int32_t others[N] = {1, 3}, all[N + 1] = {0, prompt[0] + STEPS, prompts[N] + N * STEPS};
  rows whole = make_rows(all[N]);
  for (int n = 0; n < N; ++n)
    for (int t = 0; t < prompt[n] + STEPS; ++t) fill_row(&whole, all[n] + t, n, t);
  call(kda_prefill, "prefill of all", &whole, all, others, pool);

  float outputs = 0, states = 0;
  for (int n = 0; n < N; ++n)
    outputs =
        largest_difference(begin.out + prompts[n] * row, whole.out + all[n] * row, prompt[n] * row, outputs);
  int32_t one_each[N + 1] = {0, 1, 2};
  rows step = make_rows(N);
  for (int t = 0; t < STEPS; ++t) {
    for (int n = 0; n < N; ++n) fill_row(&step, n, n, prompt[n] + t);
    call(kda_decode, "decode", &step, one_each, slots, pool);
    for (int n = 0; n < N; ++n)
      outputs =
          largest_difference(step.out + n * row, whole.out + (all[n] + prompt[n] + t) * row, row, outputs);
  }
  for (int n = 0; n < N; ++n)
    states = largest_difference(pool + slots[n] * state, pool + others[n] * state, state, states);

  printf("last output of sequence 0: %.4f %.4f %.4f ...\n", step.out[0], step.out[1], step.out[2]);
  printf("last output of sequence 1: %.4f %.4f %.4f ...\n", step.out[row], step.out[row + 1],
         step.out[row + 2]);
  printf("prefill and %d steps against prefill of all: outputs differ by %.1e, states by %.1e\n", STEPS,
         outputs, states);
  free_rows(&begin), free_rows(&whole), free_rows(&step), free(pool);
  /* Values are around 1 and the two forms round differently: some units of 1e-7 are right, 1e-5 is wrong. */
  const int good = outputs < 1e-5f && states < 1e-5f;
  printf("%s\n", good ? "they agree" : "they do NOT agree");
  return good ? 0 : 1;
}
