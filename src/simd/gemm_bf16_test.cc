#include "simd/gemm_bf16.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "simd/isa.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::Random;

// Rows of b and c are longer than needed, with NaN where a kernel has no business.
struct Product {
  int64_t m, n, k;
  OwnedTensor a, b, c;
  std::vector<bf16> packed;

  Product(int64_t m_, int64_t n_, int64_t k_, uint64_t seed = 1) : m(m_), n(n_), k(k_) {
    Random random(seed);
    a = testing::random_normal(DType::f32, {m, k + 3}, random);
    a.tensor = a.tensor.slice(1, 1, k + 1);
    b = make_tensor(DType::bf16, {n, k + 5});
    testing::fill(b.tensor, [&](int64_t i) { return i % (k + 5) < k ? random.normal() : std::nan(""); });
    c = testing::random_normal(DType::f32, {m, n + 1}, random);
    for (int64_t i = 0; i < m; ++i) *c.tensor.at<float>(i, n) = NAN;
    packed = pack(0, m);
  }
  std::vector<bf16> pack(int64_t begin, int64_t end) const {
    std::vector<bf16> p(static_cast<size_t>(packed_bf16_size(end - begin, k)), bf16(NAN));
    pack_bf16(a.tensor.at<float>(begin), a.tensor.stride[0], end - begin, k, p.data());
    return p;
  }
  GemmBf16 gemm(bool accumulate = false) const {
    return {.a = packed.data(),
            .b = b.tensor.ptr<bf16>(),
            .ldb = k + 5,
            .c = c.tensor.ptr<float>(),
            .ldc = n + 1,
            .m = m,
            .n = n,
            .k = k,
            .accumulate = accumulate};
  }
  std::vector<double> expected(bool accumulate) const {
    std::vector<double> result;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = accumulate ? *c.tensor.at<float>(i, j) : 0;
        for (int64_t l = 0; l < k; ++l)
          sum += static_cast<double>(static_cast<float>(bf16(*a.tensor.at<float>(i, l)))) *
                 static_cast<double>(static_cast<float>(*b.tensor.at<bf16>(j, l)));
        result.push_back(sum);
      }
    return result;
  }
};

class GemmBf16Test : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_gemm_bf16()) GTEST_SKIP() << "this processor has no product of bf16";
  }
};

void expect_close(int64_t m, int64_t n, int64_t k) {
  for (const bool accumulate : {false, true}) {
    const Product p(m, n, k);
    const auto expected = p.expected(accumulate);
    const Tensor c = p.c.tensor.slice(1, 0, n);
    if (!accumulate) testing::fill_nan(p.c.tensor);
    gemm_nt_bf16(p.gemm(accumulate));
    // Both sides see the rounded A. Sixteen sums of up to 2 · 129 roundings each, of partial sums of at most
    // the result's size: 2^-25 · sqrt(258) = 4.8e-7.
    ASSERT_LE(testing::rel_rms(testing::to_doubles(c), expected), 6e-7)
        << m << " x " << n << " x " << k << " accumulate " << accumulate;
    for (int64_t i = 0; i < m; ++i)
      ASSERT_TRUE(std::isnan(*p.c.tensor.at<float>(i, n))) << "wrote behind row " << i;
  }
}

TEST_F(GemmBf16Test, MatchesTheDefinitionAroundItsTiles) {
  for (const int64_t m : {0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13})
    for (const int64_t n : {0, 1, 3, 4, 5, 6, 7, 11, 12, 13, 49}) expect_close(m, n, 37);
}

TEST_F(GemmBf16Test, MatchesTheDefinitionAtEveryDepth) {
  for (const int64_t m : {1, 6, 10}) {
    for (int64_t k = 0; k <= 66; ++k) expect_close(m, 7, k);
    for (const int64_t k : {2047, 2048, 2049, 4096, 4127}) expect_close(m, 7, k);
  }
}

TEST_F(GemmBf16Test, AnElementHasTheSameBitsInEveryCompany) {
  for (const int64_t k : {29, 1024, 2100}) {
    const Product whole(22, 71, k);
    gemm_nt_bf16(whole.gemm());
    Random random(k);
    for (int trial = 0; trial < 60; ++trial) {
      const int64_t i0 = random.integer(0, 21), i1 = random.integer(i0 + 1, 22);
      const int64_t j0 = random.integer(0, 70), j1 = random.integer(j0 + 1, 71);
      const OwnedTensor part = make_tensor(DType::f32, {i1 - i0, j1 - j0});
      testing::fill_nan(part.tensor);
      const std::vector<bf16> packed = whole.pack(i0, i1);
      GemmBf16 g = whole.gemm();
      g.a = packed.data(), g.b += j0 * g.ldb;
      g.c = part.tensor.ptr<float>(), g.ldc = j1 - j0, g.m = i1 - i0, g.n = j1 - j0;
      gemm_nt_bf16(g);
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j)
          ASSERT_EQ(*part.tensor.at<float>(i - i0, j - j0), *whole.c.tensor.at<float>(i, j))
              << "rows [" << i0 << ", " << i1 << ") columns [" << j0 << ", " << j1 << ") k " << k;
    }
  }
}

TEST_F(GemmBf16Test, PackingRoundsToNearestEvenAndFillsUpWithZeros) {
  const Product p(6, 1, 45);
  ASSERT_EQ(p.packed.size(), 8u * 64);
  for (int64_t i = 0; i < 8; ++i)
    for (int64_t l = 0; l < 64; ++l) {
      const int64_t place = i / 4 * 4 * 64 + l / 32 * 4 * 32 + i % 4 * 32 + l % 32;
      const bf16 expected(i < 6 && l < 45 ? *p.a.tensor.at<float>(i, l) : 0.f);
      ASSERT_EQ(p.packed[place].bits, expected.bits) << "row " << i << " element " << l;
    }
}

TEST_F(GemmBf16Test, OtherInstructionSetsSayThatTheyHaveNone) {
  force_isa(Isa::generic);
  EXPECT_FALSE(has_gemm_bf16());
  EXPECT_THROW(gemm_nt_bf16({}), Error);
  EXPECT_THROW(pack_bf16(nullptr, 0, 0, 0, nullptr), Error);
  force_isa(best_isa());
}

TEST(GemmBf16, TasksAreWholeTilesAndWorthAThread) {
  EXPECT_EQ(gemm_bf16_task_columns(128, 4096), 192);
  EXPECT_EQ(gemm_bf16_task_columns(128, 9216), 192);
  EXPECT_EQ(gemm_bf16_task_columns(1, 4096), 48);
  EXPECT_EQ(gemm_bf16_task_columns(1, 1 << 20), 48);  // never fewer
  EXPECT_EQ(gemm_bf16_task_columns(1, 0) % 48, 0);
}

}  // namespace
}  // namespace kl
