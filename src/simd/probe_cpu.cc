// Loops that do nothing but read, or nothing but multiply and add.
#include "simd/probe.h"

#include "simd/tiles.h"
#include "simd/vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace kl::KL_ISA {

namespace {
// Independent sums: two units with a latency of up to six need no more.
constexpr int kSums = 12;
}  // namespace

uint64_t probe_read(const void* data, int64_t bytes) {
  typedef uint64_t Words __attribute__((vector_size(64)));
  Words sums[8] = {};
  for (const char *p = static_cast<const char*>(data), *end = p + bytes; p < end; p += sizeof sums) {
    for (int i = 0; i < 8; ++i) sums[i] += *reinterpret_cast<const Words*>(p + i * 64);
  }
  Words all = sums[0];
  for (int i = 1; i < 8; ++i) all += sums[i];
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += all[i];
  return total;
}

double probe_flops(int64_t rounds, float* keep) {
#if defined(__AVX512BF16__)
  typedef __m512 Sum;
  constexpr int kFlops = 64;  // 16 lanes, two products each
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x3f00);
#else
  typedef Vec Sum;
  constexpr int kFlops = 2 * kLanes;
  Vec x = broadcast(0.999f), y = broadcast(0.001f);
  asm volatile("" : "+x"(x), "+x"(y));  // the compiler shall not know them
#endif
  Sum sums[kSums];
  for (int i = 0; i < kSums; ++i)
    sums[i] = Sum{} + static_cast<float>(i);  // equal ones would be computed once
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kSums; ++i) {
#if defined(__AVX512BF16__)
      sums[i] = _mm512_dpbf16_ps(sums[i], x, y);
#else
      sums[i] = sums[i] * x + y;
#endif
    }
  }
  Sum all = sums[0];
  for (int i = 1; i < kSums; ++i) all += sums[i];
  *keep = all[0];
  return static_cast<double>(rounds) * kSums * kFlops;
}

double probe_tile_flops(int64_t rounds, float* keep) {
  constexpr int kFlops = 16 * 16 * 32 * 2;  // of a product of tiles
  alignas(64) bf16 factor[kTileRows * 2 * kTilePairs];
  alignas(64) float sums[kTileRows * 16];
  for (bf16& x : factor) x.bits = 0x3f80;  // 1
  tile_begin();
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_load<4>(factor, 64), tile_load<5>(factor, 64), tile_load<6>(factor, 64), tile_load<7>(factor, 64);
  for (int64_t r = 0; r < rounds; ++r) {
    tile_multiply<0, 4, 6>(), tile_multiply<1, 5, 6>();
    tile_multiply<2, 4, 7>(), tile_multiply<3, 5, 7>();
  }
  tile_store<3>(sums);
  tile_end();
  *keep = sums[0];
  return static_cast<double>(rounds) * 4 * kFlops;
}

}  // namespace kl::KL_ISA
