// The copy kernel that benchmarks measure a device's bandwidth with.
#include "testing/cuda_bench.h"

namespace kl::testing {
namespace {

constexpr int kThreads = 512, kUnroll = 4;

__global__ void __launch_bounds__(kThreads)
    copy_kernel(uint4* __restrict__ to, const uint4* __restrict__ from, size_t n) {
  const size_t first = static_cast<size_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  uint4 x[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (first + i * kThreads < n) x[i] = from[first + i * kThreads];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (first + i * kThreads < n) to[first + i * kThreads] = x[i];
}

}  // namespace

void copy_on_device(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  const size_t n = bytes / 16, per_block = kThreads * kUnroll;
  cuda::launch(copy_kernel,
               {.grid = dim3(static_cast<unsigned>((n + per_block - 1) / per_block)),
                .block = dim3(kThreads),
                .stream = stream},
               static_cast<uint4*>(to), static_cast<const uint4*>(from), n);
}

}  // namespace kl::testing
