// The machine under small kernels: what it is to find is found, and said. Kernels are not in an unnamed
// namespace, so that their `memory` is the machine's.
#include "testing/cuda_on_cpu/machine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/ptx.cuh"

namespace kl::cuda {

// What a launch is refused or ended with.
template <class... Params, class... Args>
static std::string error_of(void (*kernel)(Params...), const LaunchConfig& c, Args&&... args) {
  try {
    launch(kernel, c, std::forward<Args>(args)...);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
static ::testing::AssertionResult has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "found: " << text;
}

static __global__ void barrier_kernel(int mistake, int* out) {
  extern __shared__ __align__(1024) char memory[];
  const uint32_t bar = smem_address(memory + 64);
  if (threadIdx.x == 0) mbarrier_init(bar, mistake == 1 ? 2 : 1);  // 1: nobody brings the second arrival
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive(bar);
    if (mistake == 2) mbarrier_arrive(bar), mbarrier_arrive(bar);
  }
  mbarrier_wait(bar, 0);
  if (mistake == 3 && threadIdx.x < 32) return;  // half a block less for a named barrier
  named_barrier_sync(1, 64);
  if (threadIdx.x == 63) *out = 7;
}

TEST(CudaOnCpu, SaysWhoWaitsForWhat) {
  int out = 0;
  const LaunchConfig c{.grid = 1, .block = 64, .smem = 256};
  EXPECT_EQ(error_of(barrier_kernel, c, 0, &out), "");
  EXPECT_EQ(out, 7);
  const std::string stands = error_of(barrier_kernel, c, 1, &out);
  EXPECT_TRUE(has(stands, "nothing goes on"));
  EXPECT_TRUE(has(stands, "warp 1: 32 lanes for the mbarrier at 64 (1 of 2 arrivals and 0 bytes to come)"));
  EXPECT_TRUE(has(error_of(barrier_kernel, c, 3, &out), "warp 1: 32 lanes for a barrier"));
  out = 0;
  EXPECT_EQ(error_of(barrier_kernel, c, 2, &out), "");  // three phases of one arrival each
}

static __global__ void poll_kernel(int* word, int last) {
  // The blocks take their turns from the last to the first.
  const int own = static_cast<int>(blockIdx.x);
  while (threadIdx.x == 0 && load_acquire(word) != own + 1) __nanosleep(20);
  __syncthreads();
  if (threadIdx.x == 0 && own >= last) store_release(word, own);
}

TEST(CudaOnCpu, BlocksTalkThroughMemory) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    testing::cuda_on_cpu_seed(seed);
    int word = 4;
    EXPECT_EQ(error_of(poll_kernel, {.grid = 4, .block = 64}, &word, 0), "");
    EXPECT_EQ(word, 0);
    word = 4;  // the last but one keeps its turn
    EXPECT_TRUE(
        has(error_of(poll_kernel, {.grid = 4, .block = 64}, &word, 3), "a word in memory, which is 3"));
  }
}

static __global__ void copy_kernel(const float* from, float* to, bool wait) {
  extern __shared__ __align__(1024) char memory[];
  auto* const rows = reinterpret_cast<float*>(memory);
  const uint32_t bar = smem_address(memory + 1024);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    mbarrier_arrive_expect_tx(bar, 128);
    bulk_load(smem_address(rows), from, 128, bar);
  }
  __syncthreads();
  if (wait) mbarrier_wait(bar, 0);
  to[threadIdx.x] = rows[threadIdx.x];
}

TEST(CudaOnCpu, CopiesLandLateInMemoryThatIsNaN) {
  alignas(16) float from[32], to[32];
  for (int i = 0; i < 32; ++i) from[i] = static_cast<float>(i);
  int not_there = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    testing::cuda_on_cpu_seed(seed);
    const LaunchConfig c{.grid = 1, .block = 32, .smem = 2048};
    EXPECT_EQ(error_of(copy_kernel, c, from, to, true), "");
    for (int i = 0; i < 32; ++i) EXPECT_EQ(to[i], from[i]);
    EXPECT_EQ(error_of(copy_kernel, c, from, to, false), "");
    not_there += std::isnan(to[0]);
  }
  EXPECT_GT(not_there, 10);
}

static __global__ void guard_kernel(int at) {
  extern __shared__ __align__(1024) char memory[];
  memory[at] = 1;
}

TEST(CudaOnCpu, FindsWritesBehindSharedMemory) {
  EXPECT_EQ(error_of(guard_kernel, {.grid = 1, .block = 1, .smem = 64}, 63), "");
  EXPECT_TRUE(has(error_of(guard_kernel, {.grid = 1, .block = 1, .smem = 64}, 64), "byte 0 behind"));
}

static __global__ void write_kernel(float* to) { to[threadIdx.x] = 1; }

TEST(CudaOnCpu, FindsWritesOutsideOfDeviceMemory) {
  const DeviceBuffer memory(32 * sizeof(float));
  auto* const data = static_cast<float*>(memory.data());
  EXPECT_EQ(error_of(write_kernel, {.grid = 1, .block = 32}, data), "");
  EXPECT_TRUE(
      has(error_of(write_kernel, {.grid = 1, .block = 33}, data), "byte 0 behind an allocation of 128"));
}

static __global__ void lost_kernel(const int* from) {
  if (threadIdx.x == 5) *const_cast<volatile int*>(from) = 1;
}

TEST(CudaOnCpu, LosesALaunchButNotTheProgram) {
  EXPECT_TRUE(has(error_of(lost_kernel, {.grid = 2, .block = 32}, nullptr), "memory that is not there"));
  int x = 0;
  EXPECT_EQ(error_of(lost_kernel, {.grid = 2, .block = 32}, &x), "");
  EXPECT_EQ(x, 1);
}

static __global__ void unaligned_kernel(int at) {
  extern __shared__ __align__(1024) char memory[];
  *reinterpret_cast<float4*>(memory + at) = {};
}

TEST(CudaOnCpu, FindsAccessesThatAreNotAligned) {
  EXPECT_EQ(error_of(unaligned_kernel, {.grid = 1, .block = 1, .smem = 64}, 16), "");
  EXPECT_TRUE(
      has(error_of(unaligned_kernel, {.grid = 1, .block = 1, .smem = 64}, 8), "not aligned to its type"));
}

static __global__ void apart_kernel() {
  if (threadIdx.x == 3)
    __syncwarp();
  else
    __shfl_sync(0xffffffffu, 0, 0);
}

TEST(CudaOnCpu, FindsLanesThatComeApart) {
  EXPECT_TRUE(has(error_of(apart_kernel, {.grid = 1, .block = 32}), "lanes of a warp meet at"));
}

// d = a · b of 64 x 16 and 16 x 64, b with its columns contiguous and swizzled; without waiting d is not
// there.
static __global__ void product_kernel(const float* a, const float* b, float* d, bool wait) {
  extern __shared__ __align__(1024) char memory[];
  for (unsigned i = threadIdx.x; i < 16 * 64; i += 128) {
    const unsigned k = i / 64, n = i % 64, at = k * 128 + n * 2;
    *reinterpret_cast<uint16_t*>(memory + (at ^ (at >> 7 & 7) << 4)) =
        static_cast<uint16_t>(pack_bf16(b[i], 0));
  }
  __syncthreads();
  const unsigned warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t left[4];
  for (unsigned i = 0; i < 4; ++i) {
    const float* two = a + (16 * warp + g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    left[i] = pack_bf16(two[0], two[1]);
  }
  float sum[32] = {};
  wgmma_fence();
  wgmma_m64n64k16<1>(sum, left, wgmma_matrix(smem_address(memory), 2048, 1024, WgmmaLayout::swizzle_128));
  wgmma_commit();
  if (wait) wgmma_wait<0>();
  for (unsigned c = 0; c < 8; ++c)
    for (unsigned e = 0; e < 4; ++e)
      d[(16 * warp + g + e / 2 * 8) * 64 + 8 * c + 2 * t + e % 2] = sum[4 * c + e];
  wgmma_wait<0>();
}

TEST(CudaOnCpu, WgmmaByItsDefinition) {
  std::vector<float> a(64 * 16), b(16 * 64), d(64 * 64);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 7 % 13) - 6;  // bf16 holds them
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 5 % 17) - 8;
  const LaunchConfig c{.grid = 1, .block = 128, .smem = 2048};
  EXPECT_EQ(error_of(product_kernel, c, a.data(), b.data(), d.data(), true), "");
  for (size_t row = 0; row < 64; ++row)
    for (size_t n = 0; n < 64; ++n) {
      float sum = 0;
      for (size_t k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 64 + n];
      ASSERT_EQ(d[row * 64 + n], sum) << row << ", " << n;
    }
  EXPECT_EQ(error_of(product_kernel, c, a.data(), b.data(), d.data(), false), "");
  EXPECT_TRUE(std::isnan(d[0]));
}

}  // namespace kl::cuda
