// Stands in for cuda/ptx.cuh where kernels are compiled for the CPU (testing/cuda_on_cpu/machine.h): the same
// names, each by the definition of its instruction.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kl::cuda {

#define KL_DEVICE inline

// ---- Fast approximate functions: here they are exact ------------------------------------------------------

KL_DEVICE float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
KL_DEVICE float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
KL_DEVICE float log2_approx(float x) { return flush(std::log2(flush(x))); }
KL_DEVICE float rcp_approx(float x) { return flush(1 / flush(x)); }
KL_DEVICE float rsqrt_approx(float x) { return flush(1 / std::sqrt(flush(x))); }
KL_DEVICE float tanh_approx(float x) { return std::tanh(x); }

// ---- Packed bf16 ------------------------------------------------------------------------------------------

KL_DEVICE uint32_t round_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
KL_DEVICE uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
KL_DEVICE float low_half(uint32_t x) { return __uint_as_float(x << 16); }
KL_DEVICE float high_half(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
KL_DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(low_half(a) * low_half(b), high_half(a) * high_half(b));
}

// ---- Addresses, identity, barriers among some warps, the optimiser ----------------------------------------

KL_DEVICE uint32_t smem_address(const void* p) { return cuda_on_cpu::shared_address(p); }
KL_DEVICE uint32_t lane_id() { return static_cast<uint32_t>(cuda_on_cpu::current->lane); }
KL_DEVICE void named_barrier_sync(int id, int threads) { cuda_on_cpu::block_barrier(id, threads); }
KL_DEVICE int64_t opaque(int64_t x) { return x; }
KL_DEVICE uint32_t opaque(uint32_t x) { return x; }
KL_DEVICE int opaque(int x) { return x; }

// ---- Matrix fragments: by the last lane that comes, for the whole warp ------------------------------------

struct MatrixRows {
  uint32_t smem;
  uint32_t r[4];
};
// Row `row` of matrix m: its address is with lane 8 m + row.
KL_DEVICE uint16_t* matrix_row(cuda_on_cpu::Meeting& w, int m, int row) {
  return reinterpret_cast<uint16_t*>(
      cuda_on_cpu::shared_memory(static_cast<MatrixRows*>(w.brought[8 * m + row])->smem));
}
template <int kCount, bool kTransposed, bool kStore>
KL_DEVICE void move_matrices(MatrixRows& own) {
  if (own.smem % 16 != 0) cuda_on_cpu::fail("a row of a matrix does not start at a multiple of 16 bytes");
  cuda_on_cpu::meet_with(0xffffffffu, kStore ? "stmatrix" : "ldmatrix", own, [](cuda_on_cpu::Meeting& w) {
    for (int m = 0; m < kCount; ++m) {
      uint16_t* rows[8];
      for (int row = 0; row < 8; ++row) rows[row] = matrix_row(w, m, row);
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t& x = static_cast<MatrixRows*>(w.brought[lane])->r[m];
        const int g = lane / 4, t = lane % 4;
        uint16_t& low = kTransposed ? rows[2 * t][g] : rows[g][2 * t];
        uint16_t& high = kTransposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
        if constexpr (kStore)
          low = static_cast<uint16_t>(x), high = static_cast<uint16_t>(x >> 16);
        else
          x = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}
template <int kCount, bool kTransposed>
KL_DEVICE void load_matrices(uint32_t (&r)[kCount], uint32_t smem) {
  MatrixRows own{smem, {}};
  move_matrices<kCount, kTransposed, false>(own);
  for (int i = 0; i < kCount; ++i) r[i] = own.r[i];
}
KL_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) { load_matrices<4, false>(r, smem); }
KL_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) { load_matrices<4, true>(r, smem); }
KL_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t smem) { load_matrices<2, false>(r, smem); }
KL_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t smem) { load_matrices<2, true>(r, smem); }
KL_DEVICE void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
  MatrixRows own{smem, {r[0], r[1], r[2], r[3]}};
  move_matrices<4, false, true>(own);
}
KL_DEVICE void stmatrix_x4_trans(uint32_t smem, const uint32_t (&r)[4]) {
  MatrixRows own{smem, {r[0], r[1], r[2], r[3]}};
  move_matrices<4, true, true>(own);
}

struct MmaOperands {
  float d[4];
  uint32_t a[4], b[2];
};
// kTwos: elements of a register, bf16; without it one of tf32, whose last 13 bits do not count.
template <bool kTwos>
KL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands own{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  cuda_on_cpu::meet_with(0xffffffffu, kTwos ? "mma bf16" : "mma tf32", own, [](cuda_on_cpu::Meeting& w) {
    constexpr int kPer = kTwos ? 2 : 1, kDepth = 8 * kPer;
    const auto element = [](uint32_t x, int e) {
      if (kTwos) return e == 0 ? low_half(x) : high_half(x);
      return __uint_as_float(x & 0xffffe000u);
    };
    float A[16][kDepth], B[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& o = *static_cast<const MmaOperands*>(w.brought[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < kPer; ++e) A[g + i % 2 * 8][kPer * t + i / 2 * 4 * kPer + e] = element(o.a[i], e);
      for (int i = 0; i < 2; ++i)
        for (int e = 0; e < kPer; ++e) B[kPer * t + i * 4 * kPer + e][g] = element(o.b[i], e);
    }
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};
      for (int k = 0; k < kDepth; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += A[row][k] * B[k][n];
      for (int n = 0; n < 8; ++n)
        static_cast<MmaOperands*>(w.brought[row % 8 * 4 + n / 2])->d[row / 8 * 2 + n % 2] += sum[n];
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = own.d[i];
}
KL_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<true>(d, a, b0, b1);
}
KL_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<false>(d, a, b0, b1);
}

// ---- Kernels run one after the other ----------------------------------------------------------------------

KL_DEVICE void follow_previous_kernel() {}
KL_DEVICE void wait_for_previous_kernel() {}
KL_DEVICE void release_next_kernel() {}

// ---- Words between blocks ---------------------------------------------------------------------------------

KL_DEVICE int load_acquire(const int* p) { return cuda_on_cpu::load_word(p); }
KL_DEVICE void store_relaxed(int* p, int x) { *p = x; }
KL_DEVICE void add_relaxed(int* p, int x) { *p += x; }
KL_DEVICE void store_release(int* p, int x) { *p = x; }
KL_DEVICE void add_release(int* p, int x) { *p += x; }
KL_DEVICE int compare_and_swap(int* p, int expected, int x) {
  const int old = *p;
  if (old == expected) *p = x;
  return old;
}

// ---- mbarrier ---------------------------------------------------------------------------------------------

KL_DEVICE void mbarrier_init(uint32_t bar, uint32_t arrivals) { cuda_on_cpu::mbarrier_init(bar, arrivals); }
KL_DEVICE void fence_barrier_init() {}
KL_DEVICE void mbarrier_arrive(uint32_t bar) { cuda_on_cpu::mbarrier_arrive(bar); }
constexpr uint32_t kWarpArrivals = 1;
KL_DEVICE void mbarrier_arrive_warp(uint32_t bar, uint32_t lane = threadIdx.x % 32) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(bar);
}
KL_DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  cuda_on_cpu::mbarrier_arrive(bar, bytes);
}
KL_DEVICE bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  return cuda_on_cpu::mbarrier_try_wait(bar, parity);
}
KL_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}

// ---- Clusters ---------------------------------------------------------------------------------------------

KL_DEVICE void cluster_arrive_relaxed() { cuda_on_cpu::cluster_arrive(); }
KL_DEVICE void cluster_wait() { cuda_on_cpu::cluster_wait(); }
KL_DEVICE void store_in_cluster(uint32_t smem, uint32_t bar, uint32_t rank, float x) {
  std::memcpy(cuda_on_cpu::shared_memory(smem, rank), &x, sizeof x);
  cuda_on_cpu::mbarrier_complete(cuda_on_cpu::shared_memory(bar, rank), sizeof x);
}

// ---- Bulk copies ------------------------------------------------------------------------------------------

KL_DEVICE void fence_proxy_async() {}
KL_DEVICE void fence_proxy_async_all() {}
KL_DEVICE bool elected() {
  cuda_on_cpu::meet(0xffffffffu, "elect", nullptr, nullptr);
  return cuda_on_cpu::current->lane == 0;
}
KL_DEVICE void bulk_load(uint32_t smem, const void* global, uint32_t bytes, uint32_t bar) {
  cuda_on_cpu::bulk_load(smem, global, bytes, bar);
}
KL_DEVICE void box_load(uint32_t smem, const void* map, int x, int y, int z, uint32_t bar) {
  cuda_on_cpu::box_load(smem, map, x, y, z, bar);
}
KL_DEVICE void prefetch_tensor_map(const void*) {}
KL_DEVICE void bulk_store(void* global, uint32_t smem, uint32_t bytes) {
  cuda_on_cpu::bulk_store(global, smem, bytes);
}
KL_DEVICE void bulk_commit() { cuda_on_cpu::bulk_commit(); }
template <int kPending>
KL_DEVICE void bulk_wait_read() {
  cuda_on_cpu::bulk_wait(kPending);
}
template <int kPending>
KL_DEVICE void bulk_wait() {
  cuda_on_cpu::bulk_wait(kPending);
}

// ---- Registers of a warpgroup, wgmma ----------------------------------------------------------------------

template <int kRegisters>
KL_DEVICE void registers_increase() {}
template <int kRegisters>
KL_DEVICE void registers_decrease() {}

enum class WgmmaLayout : uint64_t { plain = 0, swizzle_128 = 1 };
KL_DEVICE uint64_t wgmma_matrix(uint32_t smem, uint32_t leading, uint32_t stride, WgmmaLayout layout) {
  return static_cast<uint64_t>((smem & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(layout) << 62;
}
KL_DEVICE uint64_t wgmma_behind(uint64_t matrix, uint32_t bytes) {
  return (matrix >> 32 << 32) | (static_cast<uint32_t>(matrix) + bytes / 16);
}
KL_DEVICE void wgmma_fence() {}
KL_DEVICE void wgmma_commit() { cuda_on_cpu::wgmma_commit(); }
template <int kPending>
KL_DEVICE void wgmma_wait() {
  cuda_on_cpu::wgmma_wait(kPending);
}
template <int kCount>
KL_DEVICE void wgmma_pin(float*) {}
template <int kTransposedB>
KL_DEVICE void wgmma_m64n32k16(float* d, const uint32_t (&a)[4], uint64_t b) {
  cuda_on_cpu::wgmma(d, 32, a, b, kTransposedB);
}
template <int kTransposedB>
KL_DEVICE void wgmma_m64n64k16(float* d, const uint32_t (&a)[4], uint64_t b) {
  cuda_on_cpu::wgmma(d, 64, a, b, kTransposedB);
}
template <int kTransposedB>
KL_DEVICE void wgmma_m64n128k16(float* d, const uint32_t (&a)[4], uint64_t b) {
  cuda_on_cpu::wgmma(d, 128, a, b, kTransposedB);
}

}  // namespace kl::cuda
