// Sums over cooperating threads; the name says which. Every participant gets the result, and the order of the
// additions is fixed, so results repeat bit by bit.
#pragma once

#include "cuda/ptx.cuh"

namespace kl::cuda {

// Over the lanes that differ in the bits of kMask: 31 for the whole warp, 7 for groups of eight neighbours,
// 28 for the eight lanes that agree modulo 4.
template <int kMask>
KL_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1)
    if (kMask & bit) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}
KL_DEVICE float warp_sum(float x) { return lanes_sum<31>(x); }

// Over a block of kThreads threads (a multiple of 32). `partial` is kThreads / 32 floats of shared memory
// that nobody else touches until the next barrier.
template <int kThreads>
KL_DEVICE float block_sum(float x, float* partial) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  x = warp_sum(x);
  if constexpr (kThreads == 32) return x;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();  // the partial sums become visible to every thread
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += partial[w];
  return sum;
}

}  // namespace kl::cuda
