#include "simd/gemm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::Random;

// One product with its operands; every matrix has rows longer than needed, filled with NaN where a kernel has
// no business.
struct Product {
  bool transposed;  // B is [n, k]
  int64_t m, n, k;
  OwnedTensor a, b, c;

  Product(bool nt, DType dtype, int64_t m_, int64_t n_, int64_t k_, uint64_t seed = 1)
      : transposed(nt), m(m_), n(n_), k(k_) {
    Random random(seed);
    const int64_t rows = nt ? n : k, columns = nt ? k : n;
    a = padded(DType::f32, m, k, 3, random);
    b = padded(dtype, rows, columns, 5, random);
    c = padded(DType::f32, m, n, 1, random);
  }

  // [rows, columns] random values in a matrix with `gap` columns of NaN behind them.
  static OwnedTensor padded(DType dtype, int64_t rows, int64_t columns, int64_t gap, Random& random) {
    OwnedTensor t = make_tensor(dtype, {rows, columns + gap});
    testing::fill(t.tensor, [&, i = 0](int64_t) mutable {
      return i++ % (columns + gap) < columns ? random.normal() : std::nan("");
    });
    t.tensor = t.tensor.slice(1, 0, columns);
    return t;
  }

  Gemm gemm(bool accumulate = false) const {
    return {.a = a.tensor.ptr<float>(),
            .lda = a.tensor.stride[0],
            .b = b.tensor.data,
            .b_dtype = b.tensor.dtype,
            .ldb = b.tensor.stride[0],
            .c = c.tensor.ptr<float>(),
            .ldc = c.tensor.stride[0],
            .m = m,
            .n = n,
            .k = k,
            .accumulate = accumulate};
  }
  void run(bool accumulate = false) const { call(gemm(accumulate)); }
  void call(const Gemm& g) const { transposed ? KL_ACTIVE_ISA(gemm_nt)(g) : KL_ACTIVE_ISA(gemm_nn)(g); }

  std::vector<double> expected(bool accumulate) const {
    const auto av = testing::to_doubles(a.tensor), bv = testing::to_doubles(b.tensor);
    auto result = testing::to_doubles(c.tensor);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = accumulate ? result[i * n + j] : 0;
        for (int64_t l = 0; l < k; ++l) sum += av[i * k + l] * (transposed ? bv[j * k + l] : bv[l * n + j]);
        result[i * n + j] = sum;
      }
    return result;
  }
};

class GemmTest : public ::testing::TestWithParam<std::tuple<Isa, bool, DType>> {
 protected:
  void SetUp() override {
    if (!isa_supported(isa())) GTEST_SKIP() << name_of(isa()) << " is not supported here";
    force_isa(isa());
  }
  void TearDown() override { force_isa(best_isa()); }
  Isa isa() const { return std::get<0>(GetParam()); }
  bool nt() const { return std::get<1>(GetParam()); }
  DType dtype() const { return std::get<2>(GetParam()); }

  void expect_close(int64_t m, int64_t n, int64_t k) {
    for (const bool accumulate : {false, true}) {
      const Product p(nt(), dtype(), m, n, k);
      const auto expected = p.expected(accumulate);
      if (!accumulate)
        for (int64_t i = 0; i < m; ++i) std::fill_n(p.c.tensor.at<float>(i, 0), n, NAN);
      const auto gap = [&](int64_t i) { return std::isnan(p.c.tensor.at<float>(i, 0)[n]); };
      p.run(accumulate);
      // Both sides see the same widened B. Up to 2049 terms are added one after the other, each addition
      // rounding a partial sum of at most the result's size: 2^-25 · sqrt(2049) = 1.3e-6.
      ASSERT_LE(testing::rel_rms(testing::to_doubles(p.c.tensor), expected), 1.5e-6)
          << m << " x " << n << " x " << k << " accumulate " << accumulate;
      for (int64_t i = 0; i < m; ++i) ASSERT_TRUE(gap(i)) << "wrote behind row " << i;
    }
  }
};

TEST_P(GemmTest, MatchesTheDefinitionAroundItsTiles) {
  for (int64_t m = 0; m <= 13; ++m)
    for (const int64_t n : {0, 1, 3, 4, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65}) expect_close(m, n, 37);
}

TEST_P(GemmTest, MatchesTheDefinitionAtEveryDepth) {
  for (int64_t k = 0; k <= 66; ++k) expect_close(7, 5, k);
  for (const int64_t k : {1023, 1024, 1025, 2047, 2048, 2049})
    for (const int64_t m : {1, 7, 25}) expect_close(m, 17, k);
}

TEST_P(GemmTest, MatchesTheDefinitionWithManyRows) {
  for (const int64_t m : {kGemmPanelRows - 1, kGemmPanelRows, kGemmPanelRows + 1, kGemmPanelBlock,
                          kGemmPanelBlock + 1, 2 * kGemmPanelBlock + 5})
    for (const int64_t n : {1, 16, 17})
      for (const int64_t k : {0, 1, 8, 61}) expect_close(m, n, k);
  for (const int64_t k : {1023, 1024, 1025}) expect_close(kGemmPanelRows, 19, k);
}

TEST_P(GemmTest, ARowHasTheSameBitsAmongManyAndFew) {
  for (const int64_t k : {5, 29, 1024, 2100}) {
    const Product whole(nt(), dtype(), kGemmPanelBlock + 30, 35, k);
    whole.run();
    for (int64_t i = 0; i < whole.m; i += 13) {
      const OwnedTensor row = make_tensor(DType::f32, {1, whole.n});
      Gemm g = whole.gemm();
      g.a += i * g.lda, g.c = row.tensor.ptr<float>(), g.m = 1;
      whole.call(g);
      ASSERT_EQ(std::memcmp(g.c, whole.c.tensor.at<float>(i, 0), sizeof(float) * whole.n), 0)
          << "row " << i << " k " << k;
    }
  }
}

TEST_P(GemmTest, AnElementHasTheSameBitsInEveryCompany) {
  for (const int64_t k : {29, 1024, 2100}) {
    const Product whole(nt(), dtype(), 40, 71, k);
    whole.run();
    Random random(k);
    for (int trial = 0; trial < 40; ++trial) {
      const int64_t i0 = random.integer(0, 39), i1 = random.integer(i0 + 1, 40);
      const int64_t j0 = random.integer(0, 70), j1 = random.integer(j0 + 1, 71);
      const OwnedTensor part = make_tensor(DType::f32, {i1 - i0, j1 - j0});
      testing::fill_nan(part.tensor);
      Gemm g = whole.gemm();
      g.a += i0 * g.lda;
      g.b = static_cast<const char*>(g.b) + j0 * (nt() ? g.ldb : 1) * size_of(g.b_dtype);
      g.c = part.tensor.ptr<float>(), g.ldc = j1 - j0, g.m = i1 - i0, g.n = j1 - j0;
      whole.call(g);
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j)
          ASSERT_EQ(*part.tensor.at<float>(i - i0, j - j0), *whole.c.tensor.at<float>(i, j))
              << "rows [" << i0 << ", " << i1 << ") columns [" << j0 << ", " << j1 << ") k " << k;
    }
  }
}

TEST(Gemm, TasksAreWorthAThread) {
  EXPECT_EQ(gemm_task_rows(1), 1);
  EXPECT_EQ(gemm_task_rows(kGemmPanelRows - 1), 60);
  EXPECT_EQ(gemm_task_rows(2 * kGemmPanelBlock), active_isa() == Isa::avx2 ? kGemmPanelBlock : 60);
  EXPECT_EQ(gemm_task_columns(60, 4096), 64);  // never fewer
  EXPECT_EQ(gemm_task_columns(1, 4096), 64);
  EXPECT_EQ(gemm_task_columns(1, 128), 2048);
  EXPECT_EQ(gemm_task_columns(1, 0), kGemmTask);
}

INSTANTIATE_TEST_SUITE_P(All, GemmTest,
                         ::testing::Combine(::testing::ValuesIn(kIsas), ::testing::Bool(),
                                            ::testing::Values(DType::f32, DType::bf16, DType::f16)),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) +
                                  (std::get<1>(info.param) ? "_nt_" : "_nn_") +
                                  std::string(name_of(std::get<2>(info.param)));
                         });

}  // namespace
}  // namespace kl
