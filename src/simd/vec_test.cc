// The vector functions as this file's own instruction set; operators' tests see them under the others.
#define KL_ISA vec_test
#include "simd/vec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "testing/random.h"

namespace kl::vec_test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
std::vector<T> every_pattern() {
  std::vector<T> all(0x10000);
  for (size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<uint16_t>(i);
  return all;
}

// Widening is exact, down to the payload of a NaN.
template <class T>
void expect_widening_of_every_pattern() {
  const std::vector<T> all = every_pattern<T>();
  for (size_t i = 0; i < all.size(); i += kLanes) {
    const Vec v = load(&all[i]);
    for (int lane = 0; lane < kLanes; ++lane)
      ASSERT_EQ(std::bit_cast<uint32_t>(v[lane]), std::bit_cast<uint32_t>(static_cast<float>(all[i + lane])))
          << "pattern " << i + lane;
  }
}
TEST(Vec, WidensEveryBf16) { expect_widening_of_every_pattern<bf16>(); }
TEST(Vec, WidensEveryF16) { expect_widening_of_every_pattern<f16>(); }

TEST(Vec, PartialLoadsAndStoresTouchNothingElse) {
  std::vector<float> in(kLanes, kNan), out(kLanes);
  for (int n = 0; n < kLanes; ++n) {
    std::iota(in.begin(), in.begin() + n, 1.f);
    std::fill(out.begin(), out.end(), -1.f);
    const Vec v = load_part(in.data(), n);
    store_part(out.data(), v, n);
    const Vec filled = load_part(in.data(), n, 7.f);
    for (int i = 0; i < kLanes; ++i) {
      EXPECT_EQ(v[i], i < n ? i + 1.f : 0.f);
      EXPECT_EQ(filled[i], i < n ? i + 1.f : 7.f);
      EXPECT_EQ(out[i], i < n ? i + 1.f : -1.f);
    }
  }
}

TEST(Vec, SumAndMaxSeeEveryLane) {
  for (int lane = 0; lane < kLanes; ++lane) {
    Vec v = broadcast(1.f);
    v[lane] = 5.f;
    EXPECT_EQ(sum(v), kLanes + 4.f);
    EXPECT_EQ(max(v), 5.f);
    EXPECT_EQ(max(-v), -1.f);
  }
}

TEST(Vec, FourSumsAtOnceHaveTheBitsOfEach) {
  testing::Random random(1);
  for (int trial = 0; trial < 1000; ++trial) {
    Vec v[4];
    for (Vec& each : v)
      for (int lane = 0; lane < kLanes; ++lane) each[lane] = static_cast<float>(random.normal());
    const Quad sums = sum(v[0], v[1], v[2], v[3]);
    for (int i = 0; i < 4; ++i) ASSERT_EQ(sums[i], sum(v[i]));
  }
}

TEST(Vec, ExpIsWithinTwoUlp) {
  for (double x = -87.3; x < 88.3; x += 0.00037) {
    const float in = static_cast<float>(x);
    const double expected = std::exp(static_cast<double>(in));
    const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
    ASSERT_LE(std::abs(exp(broadcast(in))[0] - expected), 2 * ulp) << "x = " << in;
  }
}

TEST(Vec, ExpAtItsEnds) {
  EXPECT_EQ(exp(broadcast(0.f))[0], 1.f);
  EXPECT_EQ(exp(broadcast(-0.f))[0], 1.f);
  EXPECT_EQ(exp(broadcast(-88.f))[0], 0.f);
  EXPECT_EQ(exp(broadcast(-1e30f))[0], 0.f);
  EXPECT_EQ(exp(broadcast(-kInf))[0], 0.f);
  EXPECT_EQ(exp(broadcast(89.f))[0], kInf);
  EXPECT_EQ(exp(broadcast(kInf))[0], kInf);
  for (const uint32_t nan : {0x7fc00000u, 0x7fc00001u, 0xffffffffu})
    EXPECT_TRUE(std::isnan(exp(broadcast(std::bit_cast<float>(nan)))[0]));
}

TEST(Vec, SiluAtItsEnds) {
  EXPECT_EQ(silu(broadcast(0.f))[0], 0.f);
  EXPECT_EQ(silu(broadcast(100.f))[0], 100.f);
  EXPECT_EQ(silu(broadcast(-100.f))[0], 0.f);  // -100 e^-100 is below the smallest float
  EXPECT_NEAR(silu(broadcast(1.f))[0], 0.7310585786300049, 1e-7);
  EXPECT_NEAR(silu(broadcast(-2.f))[0], -0.2384058440442351, 1e-7);
}

}  // namespace
}  // namespace kl::vec_test
