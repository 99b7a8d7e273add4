/* One decode step of Kimi Delta Attention on the GPU through libkda, in C. Two sequences, 4 heads of 128,
 * states in a pool of 3 slots; everything is given as it comes out of a model's projections.
 *
 *   cmake --preset cuda && cmake --build build/cuda --target kda_decode_example &&
 * build/cuda/kda_decode_example */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include "kda/kda.h"

enum { N = 2, H = 4, D = 128, SLOTS = 3 };

static void* on_device(const void* host, size_t bytes) {
  void* device = NULL;
  if (cudaMalloc(&device, bytes) != cudaSuccess ||
      cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice) != cudaSuccess) {
    fprintf(stderr, "no device memory: %s\n", cudaGetErrorString(cudaGetLastError()));
    exit(1);
  }
  return device;
}

/* `count` floats around zero, as a tensor without a shape yet. */
static kda_tensor random_floats(size_t count) {
  float* x = malloc(count * sizeof *x);
  for (size_t i = 0; i < count; ++i) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
  kda_tensor t = {0};
  t.data = on_device(x, count * sizeof *x);
  t.dtype = KDA_F32;
  free(x);
  return t;
}

/* Gives a tensor a contiguous shape; sizes end with the first 0. */
static kda_tensor shaped(kda_tensor t, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  int64_t step = 1;
  for (t.rank = 0; t.rank < 4 && shape[t.rank] > 0; ++t.rank) t.shape[t.rank] = shape[t.rank];
  for (int i = t.rank - 1; i >= 0; --i) t.stride[i] = step, step *= t.shape[i];
  return t;
}

static kda_tensor indices(const int32_t* values, int64_t count) {
  kda_tensor t = {0};
  t.data = on_device(values, (size_t)count * sizeof *values);
  t.dtype = KDA_I32;
  return shaped(t, count, 0, 0, 0);
}

int main(void) {
  const int32_t rows[N + 1] = {0, 1, 2}, slots[N] = {2, 0};
  kda_args args;
  kda_args_init(&args, sizeof args);
  args.device = KDA_CUDA;
  args.q = shaped(random_floats(N * H * D), N, H, D, 0);
  args.k = shaped(random_floats(N * H * D), N, H, D, 0);
  args.v = shaped(random_floats(N * H * D), N, H, D, 0);
  args.g = shaped(random_floats(N * H * D), N, H, D, 0);
  args.beta = shaped(random_floats(N * H), N, H, 0, 0);
  args.out = shaped(random_floats(N * H * D), N, H, D, 0);
  args.state = shaped(random_floats(SLOTS * H * D * D), SLOTS, H, D, D);
  args.cu_seqlens = indices(rows, N + 1);
  args.slot = indices(slots, N);
  if (kda_decode(&args) != KDA_OK) {
    fprintf(stderr, "%s\n", kda_last_error());
    return 1;
  }
  float out[4];
  if (cudaMemcpy(out, args.out.data, sizeof out, cudaMemcpyDeviceToHost) != cudaSuccess)
    return 1; /* waits for the work */
  printf("first outputs of sequence 0, head 0: %g %g %g %g\n", out[0], out[1], out[2], out[3]);
  return 0;
}
