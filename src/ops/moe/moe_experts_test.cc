#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "ops/moe/moe.h"
#include "simd/isa.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::Random;

// E experts and T tokens that chose top_k of them; x and out are column ranges of wider matrices.
struct Mixture {
  int64_t T, D, I, E, top_k;
  std::vector<OwnedTensor> matrices;
  std::vector<ExpertWeights> experts;
  OwnedTensor wide_x, wide_out, choices, weights;
  MoeExpertsArgs args;

  Mixture(int64_t T_, int64_t D_, int64_t I_, int64_t E_, int64_t top_k_, DType dtype, uint64_t seed = 1)
      : T(T_), D(D_), I(I_), E(E_), top_k(top_k_) {
    Random random(seed);
    const auto matrix = [&](int64_t rows, int64_t columns) {
      matrices.push_back(testing::random_normal(dtype, {rows, columns}, random, 1 / std::sqrt(columns)));
      return matrices.back().tensor;
    };
    for (int64_t e = 0; e < E; ++e) {
      const Tensor w1 = matrix(I, D), w3 = matrix(I, D);
      experts.push_back({.w1 = w1, .w3 = w3, .w2 = matrix(D, I)});
    }
    wide_x = testing::random_normal(DType::f32, {T, D + 3}, random, 2);
    wide_out = testing::random_normal(DType::f32, {T, D + 5}, random);
    choices = make_tensor(DType::i32, {T, top_k});
    weights = testing::random_normal(DType::f32, {T, top_k}, random);
    for (int64_t i = 0; i < T * top_k; ++i)
      choices.tensor.ptr<int32_t>()[i] = static_cast<int32_t>(random.integer(0, E - 1));
    args = {.x = wide_x.tensor.slice(1, 1, D + 1),
            .experts = choices.tensor,
            .weights = weights.tensor,
            .weights_of = experts,
            .out = wide_out.tensor.slice(1, 2, D + 2)};
  }
  // out after f, which starts from the same out each time.
  template <class F>
  std::vector<double> result(F&& f) const {
    OwnedTensor copy = make_tensor(DType::f32, {T, D + 5});
    std::memcpy(copy.tensor.data, wide_out.tensor.data, static_cast<size_t>(copy.tensor.bytes()));
    MoeExpertsArgs a = args;
    a.out = copy.tensor.slice(1, 2, D + 2);
    f(a);
    for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 2}, {D + 2, D + 5}})
      EXPECT_EQ(testing::to_doubles(copy.tensor.slice(1, begin, end)),
                testing::to_doubles(wide_out.tensor.slice(1, begin, end)))
          << "wrote beside out";
    return testing::to_doubles(a.out);
  }
  std::vector<double> result(Precision precision = Precision::exact) const {
    return result([&](const MoeExpertsArgs& a) {
      Ctx ctx{.precision = precision};
      moe_experts(ctx, a);
    });
  }
};

class MoeExpertsTest : public ::testing::TestWithParam<std::tuple<Isa, DType>> {
 protected:
  void SetUp() override {
    if (!isa_supported(isa())) GTEST_SKIP() << name_of(isa()) << " is not supported here";
    force_isa(isa());
  }
  void TearDown() override { force_isa(best_isa()); }
  Isa isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(MoeExpertsTest, MatchesTheDefinition) {
  ThreadPool pool(2);
  for (const auto& [T, D, I, E, top_k] : {std::tuple{0, 16, 8, 2, 1},
                                          {1, 1, 1, 1, 1},
                                          {1, 65, 129, 5, 3},
                                          {7, 64, 63, 3, 2},
                                          {49, 31, 65, 1, 1},
                                          {97, 33, 47, 4, 4}}) {
    const Mixture m(T, D, I, E, top_k, dtype());
    const auto y = m.result([&](const MoeExpertsArgs& a) {
      Ctx ctx{.pool = &pool};
      moe_experts(ctx, a);
    });
    // Both see the same weights. Three f32 sums of up to 129 terms (2^-25 · sqrt(129) = 3e-7 each) and an
    // exponential of 2 ulp.
    EXPECT_LE(testing::rel_rms(y, m.result(moe_experts_ref)), 1e-6) << T << " x " << D << ", " << I;
  }
}

TEST_P(MoeExpertsTest, SurvivesGatesThatSaturate) {
  Mixture m(20, 32, 16, 2, 1, dtype());
  for (int64_t t = 0; t < m.T; ++t)
    for (int64_t d = 0; d < m.D; ++d) *m.args.x.at<float>(t, d) *= 100;  // gates far beyond ±88
  EXPECT_LE(testing::rel_rms(m.result(), m.result(moe_experts_ref)), 1e-6);
}

TEST_P(MoeExpertsTest, RoundedActivationsStayWithinTheirBudget) {
  for (const auto& [T, D, I, E, top_k] : {std::tuple{0, 16, 8, 2, 1},
                                          {1, 65, 129, 5, 3},
                                          {7, 64, 63, 3, 2},
                                          {150, 200, 300, 1, 1},
                                          {97, 133, 47, 4, 4}}) {
    Mixture m(T, D, I, E, top_k, dtype());
    testing::fill(m.wide_out.tensor, [](int64_t) { return 0; });  // the error is that of the sum alone
    const auto y = m.result(Precision::bf16);
    // The contract: x rounded enters gate and up, the hidden values are rounded again, 1.6e-3 each.
    EXPECT_LE(testing::rel_rms(y, m.result(moe_experts_ref)), 4e-3) << T << " x " << D << ", " << I;
    if (dtype() == DType::bf16 && isa() >= Isa::avx512_bf16) continue;
    EXPECT_EQ(y, m.result()) << "rounded for nothing";
  }
}

TEST_P(MoeExpertsTest, ATokenHasTheSameBitsAloneAndInABatch) {
  const Mixture m(400, 70, 90, 3, 2, dtype());
  for (const Precision precision : {Precision::exact, Precision::bf16}) {
    const auto batch = m.result(precision);
    for (const int64_t t : {0, 1, 47, 48, 119, 399}) {
      const auto alone = m.result([&](MoeExpertsArgs a) {
        a.x = a.x.slice(0, t, t + 1), a.out = a.out.slice(0, t, t + 1);
        a.experts = a.experts.slice(0, t, t + 1), a.weights = a.weights.slice(0, t, t + 1);
        Ctx ctx{.precision = precision};
        moe_experts(ctx, a);
      });
      for (int64_t d = 0; d < m.D; ++d) ASSERT_EQ(alone[t * m.D + d], batch[t * m.D + d]) << t << ", " << d;
    }
  }
}

TEST_P(MoeExpertsTest, ThreadsAndScratchDoNotChangeABit) {
  const Mixture m(150, 100, 150, 6, 3, dtype());
  for (const Precision precision : {Precision::exact, Precision::bf16}) {
    const auto expected = m.result(precision);
    for (const int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      Arena arena;
      const auto y = m.result([&](const MoeExpertsArgs& a) {
        Ctx ctx{.pool = &pool, .scratch = &arena, .precision = precision};
        moe_experts(ctx, a);
      });
      EXPECT_EQ(y, expected) << threads << " threads";
      EXPECT_EQ(arena.used(), 0u);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, MoeExpertsTest,
                         ::testing::Combine(::testing::ValuesIn(kIsas),
                                            ::testing::Values(DType::f32, DType::bf16, DType::f16)),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_" +
                                  std::string(name_of(std::get<1>(info.param)));
                         });

TEST(MoeExperts, MoreTokensThanAreSortedAtOnce) {
  const Mixture m(2500, 9, 5, 4, 2, DType::f32);
  EXPECT_LE(testing::rel_rms(m.result(), m.result(moe_experts_ref)), 1e-6);  // as above
}

TEST(MoeExperts, AnExpertThatNobodyChoseIsNotLookedAt) {
  Mixture m(5, 16, 8, 3, 2, DType::f32);
  for (int64_t i = 0; i < 10; ++i) m.choices.tensor.ptr<int32_t>()[i] = i % 2 ? 0 : 2;
  const auto expected = m.result();
  m.experts[1] = {};
  EXPECT_EQ(m.result(), expected);
}

TEST(MoeExperts, ReportsItsWork) {
  Mixture m(5, 16, 8, 3, 2, DType::bf16);
  for (int64_t i = 0; i < 10; ++i) m.choices.tensor.ptr<int32_t>()[i] = i % 2 ? 0 : 2;
  Trace trace;
  Ctx ctx{.trace = &trace};
  moe_experts(ctx, m.args);
  EXPECT_EQ(trace.entries().at("moe_experts").flops, 2.0 * 5 * 2 * 3 * 16 * 8);
  EXPECT_EQ(trace.entries().at("moe_experts").bytes, 2 * 3 * 16 * 8 * 2 + 3.0 * 5 * 16 * 4);
}

Mixture any_mixture() {
  return Mixture(*rc::gen::inRange(1, 60), *rc::gen::inRange(1, 40), *rc::gen::inRange(1, 40),
                 *rc::gen::inRange(1, 7), *rc::gen::inRange(1, 5), DType::bf16,
                 *rc::gen::arbitrary<uint64_t>());
}

RC_GTEST_PROP(MoeExperts, NamesOfExpertsDoNotMatter, ()) {
  Mixture m = any_mixture();
  const auto expected = m.result();
  std::vector<int32_t> name(m.E);
  std::iota(name.begin(), name.end(), 0);
  Random random(*rc::gen::arbitrary<uint64_t>());
  for (size_t i = name.size(); i > 1; --i) std::swap(name[i - 1], name[random.integer(0, i - 1)]);
  const auto before = m.experts;
  for (int64_t e = 0; e < m.E; ++e) m.experts[name[e]] = before[e];
  for (int64_t i = 0; i < m.T * m.top_k; ++i) {
    int32_t& e = m.choices.tensor.ptr<int32_t>()[i];
    e = name[e];
  }
  RC_ASSERT(m.result() == expected);
}

RC_GTEST_PROP(MoeExperts, WeightsOfZeroLeaveTheResidualStreamAlone, ()) {
  Mixture m = any_mixture();
  testing::fill(m.weights.tensor, [](int64_t) { return 0; });
  RC_ASSERT(m.result() == testing::to_doubles(m.args.out));
}

RC_GTEST_PROP(MoeExperts, ExpertsAddUp, ()) {
  const Mixture m = any_mixture();
  // All choices at once against one choice after the other; the order of the sum is the only difference.
  const auto one_by_one = m.result([&](const MoeExpertsArgs& a) {
    Ctx ctx;
    for (int64_t j = 0; j < m.top_k; ++j) {
      MoeExpertsArgs choice = a;
      choice.experts = a.experts.slice(1, j, j + 1), choice.weights = a.weights.slice(1, j, j + 1);
      moe_experts(ctx, choice);
    }
  });
  RC_ASSERT(testing::rel_rms(m.result(), one_by_one) <= 1e-6);
}

std::string error_of(const MoeExpertsArgs& a) {
  try {
    Ctx ctx;
    moe_experts(ctx, a);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(MoeExperts, ErrorsSayWhatWasFoundAndExpected) {
  Mixture m(3, 16, 8, 2, 2, DType::bf16);
  m.choices.tensor.ptr<int32_t>()[3] = 2;
  EXPECT_EQ(error_of(m.args), "moe_experts: experts[1, 1]: expected 0 to 1, found 2");
  m.choices.tensor.ptr<int32_t>()[3] = -1;
  EXPECT_EQ(error_of(m.args), "moe_experts: experts[1, 1]: expected 0 to 1, found -1");
  for (int i = 0; i < 6; ++i) m.choices.tensor.ptr<int32_t>()[i] = 1;
  const Tensor w2 = m.experts[1].w2;
  m.experts[1].w2 = m.experts[1].w1;
  EXPECT_EQ(error_of(m.args), "moe_experts: expert 1: w2: expected shape [16, 8], found [8, 16]");
  m.experts[1].w2 = w2;
  m.experts[1].w3.dtype = DType::i8;
  EXPECT_EQ(error_of(m.args), "moe_experts: expert 1: w3: expected F32 or BF16 or F16, found I8");
  MoeExpertsArgs a = m.args;
  a.weights = a.weights.slice(1, 0, 1);
  EXPECT_EQ(error_of(a), "moe_experts: weights: expected shape [3, 2], found [3, 1]");
}

}  // namespace
}  // namespace kl
