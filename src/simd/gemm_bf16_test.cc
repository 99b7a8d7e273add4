#include "simd/gemm_bf16.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "simd/gemm_tiles.h"
#include "simd/isa.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::Random;

// A back-end of the product: its group of rows, the instruction set that it needs.
struct Backend {
  const char* name;
  int64_t group;
  Isa isa;
  void (*pack)(const float*, int64_t, int64_t, int64_t, bf16*);
  void (*multiply)(const GemmBf16&);
};
const Backend kBackends[] = {
    {"plain_tiles", kTileGroup, Isa::generic, generic::pack_tiles, generic::gemm_nt_tiles},
#if defined(__x86_64__)
    {"avx2_plain_tiles", kTileGroup, Isa::avx2, avx2::pack_tiles, avx2::gemm_nt_tiles},
#endif
    {"dots", kBf16Rows, Isa::avx512_bf16, pack_bf16, gemm_nt_bf16},
    {"tiles", kTileGroup, Isa::amx, pack_bf16, gemm_nt_bf16}};

int64_t packed_columns(const Backend& backend, int64_t k) {
  return backend.group == kTileGroup ? packed_tile_columns(k) : packed_dot_columns(k);
}

// Rows of b and c are longer than needed, with NaN where a kernel has no business.
struct Bf16Product {
  const Backend& backend;
  int64_t m, n, k;
  OwnedTensor a, b, c;
  std::vector<bf16> packed;

  Bf16Product(const Backend& b_, int64_t m_, int64_t n_, int64_t k_, uint64_t seed = 1)
      : backend(b_), m(m_), n(n_), k(k_) {
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
    const int64_t rows = (end - begin + backend.group - 1) / backend.group * backend.group;
    std::vector<bf16> p(static_cast<size_t>(rows * packed_columns(backend, k)), bf16(NAN));
    backend.pack(a.tensor.at<float>(begin), a.tensor.stride[0], end - begin, k, p.data());
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

class GemmBf16Test : public ::testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (!isa_supported(GetParam().isa)) GTEST_SKIP() << "this processor has no " << name_of(GetParam().isa);
    force_isa(GetParam().isa);
  }
  void TearDown() override { force_isa(best_isa()); }
};

void expect_close(const Backend& backend, int64_t m, int64_t n, int64_t k) {
  // Both sides see the rounded A. Dots: sixteen sums of up to 2 · 129 roundings each, of partial sums of at
  // most the result's size: 2^-25 · sqrt(258) = 4.8e-7. Tiles: one sum of k roundings.
  const double tolerance =
      backend.group == kBf16Rows ? 6e-7 : std::max(6e-7, 0x1p-25 * std::sqrt(static_cast<double>(k)));
  for (const bool accumulate : {false, true}) {
    const Bf16Product p(backend, m, n, k);
    const auto expected = p.expected(accumulate);
    const Tensor c = p.c.tensor.slice(1, 0, n);
    if (!accumulate) testing::fill_nan(p.c.tensor);
    backend.multiply(p.gemm(accumulate));
    ASSERT_LE(testing::rel_rms(testing::to_doubles(c), expected), tolerance)
        << m << " x " << n << " x " << k << " accumulate " << accumulate;
    for (int64_t i = 0; i < m; ++i)
      ASSERT_TRUE(std::isnan(*p.c.tensor.at<float>(i, n))) << "wrote behind row " << i;
  }
}

TEST_P(GemmBf16Test, MatchesTheDefinitionAroundItsTiles) {
  for (const int64_t m : {0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13})
    for (const int64_t n : {0, 1, 3, 4, 5, 6, 7, 11, 12, 13, 49}) expect_close(GetParam(), m, n, 37);
  for (const int64_t m : {15, 16, 17, 31, 32, 33, 127, 128, 129, 145})
    for (const int64_t n : {15, 16, 17, 31, 32, 33, 65}) expect_close(GetParam(), m, n, 70);
}

TEST_P(GemmBf16Test, MatchesTheDefinitionAtEveryDepth) {
  for (const int64_t m : {1, 6, 10}) {
    for (int64_t k = 0; k <= 66; ++k) expect_close(GetParam(), m, 7, k);
    for (const int64_t k : {2047, 2048, 2049, 4096, 4127}) expect_close(GetParam(), m, 7, k);
  }
  for (const int64_t k : {0, 1, 511, 512, 513, 1024, 1500}) expect_close(GetParam(), 50, 39, k);
  for (const int64_t m : {511, 512, 513, 545})
    expect_close(GetParam(), m, 227, 520);  // several blocks of all
}

TEST(GemmBf16, GroupsOfTilesLieApartByOddPages) {
  for (int64_t k = 1; k < 9999; k = k * 3 / 2 + 1) {
    EXPECT_GE(packed_tile_columns(k), k);
    EXPECT_EQ(packed_tile_columns(k) * kTileGroup * 2 % 8192, 4096);
  }
}

TEST_P(GemmBf16Test, AnElementHasTheSameBitsInEveryCompany) {
  for (const int64_t k : {29, 1024, 2100}) {
    const Bf16Product whole(GetParam(), 70, 71, k);
    GetParam().multiply(whole.gemm());
    Random random(k);
    for (int trial = 0; trial < 60; ++trial) {
      const int64_t i0 = random.integer(0, 69), i1 = random.integer(i0 + 1, 70);
      const int64_t j0 = random.integer(0, 70), j1 = random.integer(j0 + 1, 71);
      const OwnedTensor part = make_tensor(DType::f32, {i1 - i0, j1 - j0});
      testing::fill_nan(part.tensor);
      const std::vector<bf16> packed = whole.pack(i0, i1);
      GemmBf16 g = whole.gemm();
      g.a = packed.data(), g.b += j0 * g.ldb;
      g.c = part.tensor.ptr<float>(), g.ldc = j1 - j0, g.m = i1 - i0, g.n = j1 - j0;
      GetParam().multiply(g);
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j)
          ASSERT_EQ(*part.tensor.at<float>(i - i0, j - j0), *whole.c.tensor.at<float>(i, j))
              << "rows [" << i0 << ", " << i1 << ") columns [" << j0 << ", " << j1 << ") k " << k;
    }
  }
}

TEST_P(GemmBf16Test, PackingRoundsToNearestEvenAndFillsUpWithZeros) {
  const Bf16Product p(GetParam(), 6, 1, 45);
  const int64_t group = GetParam().group, rows = group == 4 ? 8 : 16,
                columns = packed_columns(GetParam(), 45);
  ASSERT_EQ(p.packed.size(), static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t l = 0; l < 64; ++l) {
      const int64_t in_group = group == 4 ? i % 4 * 32 + l % 32 : l % 32 / 2 * 32 + i * 2 + l % 2;
      const int64_t place = i / group * group * columns + l / 32 * group * 32 + in_group;
      const bf16 expected(i < 6 && l < 45 ? *p.a.tensor.at<float>(i, l) : 0.f);
      ASSERT_EQ(p.packed[place].bits, expected.bits) << "row " << i << " element " << l;
    }
}

INSTANTIATE_TEST_SUITE_P(All, GemmBf16Test, ::testing::ValuesIn(kBackends),
                         [](const auto& info) { return info.param.name; });

TEST(GemmBf16, OtherInstructionSetsSayThatTheyHaveNone) {
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
