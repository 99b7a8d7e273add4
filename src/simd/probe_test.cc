// The roofline's loops do what they count.
#include "simd/probe.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/buffer.h"

namespace kl {
namespace {

TEST(Probe, ReadsEveryWord) {
  const Buffer memory = Buffer::host(4096);
  auto* words = reinterpret_cast<uint64_t*>(memory.data());
  uint64_t expected = 0;
  for (uint64_t i = 0; i < 512; ++i) expected += words[i] = i * i * 0x9e3779b97f4a7c15u;
  EXPECT_EQ(KL_ACTIVE_ISA(probe_read)(memory.data(), 4096), expected);
  EXPECT_EQ(KL_ACTIVE_ISA(probe_read)(memory.data(), 0), 0u);
}

TEST(Probe, CountsItsOperationsAndDoesThem) {
  float keep = 0;
  EXPECT_EQ(KL_ACTIVE_ISA(probe_flops)(0, &keep), 0);
  EXPECT_EQ(keep, 66);  // 0 + 1 + ... + 11, not changed
  const double one = KL_ACTIVE_ISA(probe_flops)(1, &keep);
  EXPECT_GE(one, 12 * 8);  // twelve sums of at least four lanes, two operations each
  EXPECT_NE(keep, 66);
  EXPECT_EQ(KL_ACTIVE_ISA(probe_flops)(1000, &keep), 1000 * one);
}

TEST(Probe, CountsItsProductsOfTilesAndDoesThem) {
  float keep = 0;
  EXPECT_EQ(generic::probe_tile_flops(3, &keep), 3 * 4 * 16 * 16 * 32 * 2);
  EXPECT_EQ(keep, 3 * 32);
  if (!isa_supported(Isa::amx)) GTEST_SKIP() << "this processor has no tiles: tried in plain code only";
  EXPECT_EQ(KL_ACTIVE_ISA(probe_tile_flops)(5, &keep), 5 * 4 * 16 * 16 * 32 * 2);
  EXPECT_EQ(keep, 5 * 32);
}

// Any machine reads more than 100 MB/s and does more than 100 million operations; none reaches the upper
// bounds.
TEST(Probe, MeasuresSomethingPlausible) {
  ThreadPool pool(2);
  const Roofline r = measure_roofline(pool, 0.05);
  EXPECT_GT(r.bytes_per_second, 1e8);
  EXPECT_LT(r.bytes_per_second, 1e13);
  EXPECT_GT(r.flops_per_second, 1e8);
  EXPECT_LT(r.flops_per_second, 1e15);
}

}  // namespace
}  // namespace kl
