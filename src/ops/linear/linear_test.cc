#include "ops/linear/linear.h"

#include <gtest/gtest.h>

#include <cstring>

#include "simd/isa.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::Random;

// x and out are column ranges of wider matrices, as the layers of a model pass them.
struct Layer {
  OwnedTensor wide_x, w, wide_out;
  LinearArgs args;

  Layer(int64_t T, int64_t in, int64_t out, DType dtype, uint64_t seed = 1) {
    Random random(seed);
    wide_x = testing::random_normal(DType::f32, {T, in + 5}, random);
    w = testing::random_normal(dtype, {out, in}, random, 0.1);
    wide_out = testing::random_normal(DType::f32, {T, out + 3}, random);
    args = {
        .x = wide_x.tensor.slice(1, 2, in + 2), .w = w.tensor, .out = wide_out.tensor.slice(1, 1, out + 1)};
  }
  // What `f` computes, in memory of its own; outside of the result it must not write.
  template <class F>
  OwnedTensor result(bool accumulate, F&& f) const {
    OwnedTensor copy = make_tensor(DType::f32, {wide_out.tensor.size(0), wide_out.tensor.size(1)});
    if (accumulate)
      std::memcpy(copy.tensor.data, wide_out.tensor.data, static_cast<size_t>(copy.tensor.bytes()));
    else
      testing::fill_nan(copy.tensor);
    const OwnedTensor before = clone(copy.tensor);
    LinearArgs a = args;
    a.accumulate = accumulate;
    a.out = copy.tensor.slice(1, 1, copy.tensor.size(1) - 2);
    f(a);
    for (int64_t t = 0; t < copy.tensor.size(0); ++t)
      for (const int64_t column : {int64_t{0}, copy.tensor.size(1) - 2, copy.tensor.size(1) - 1})
        EXPECT_EQ(
            std::memcmp(copy.tensor.at<float>(t, column), before.tensor.at<float>(t, column), sizeof(float)),
            0)
            << "wrote outside of out, row " << t << " column " << column;
    copy.tensor = a.out;
    return copy;
  }
  static OwnedTensor clone(const Tensor& t) {
    OwnedTensor copy = make_tensor(DType::f32, {t.size(0), t.size(1)});
    std::memcpy(copy.tensor.data, t.data, static_cast<size_t>(t.bytes()));
    return copy;
  }
};

class LinearTest : public ::testing::TestWithParam<std::tuple<Isa, DType>> {
 protected:
  void SetUp() override {
    if (!isa_supported(isa())) GTEST_SKIP() << name_of(isa()) << " is not supported here";
    force_isa(isa());
  }
  void TearDown() override { force_isa(best_isa()); }
  Isa isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(LinearTest, MatchesTheDefinition) {
  ThreadPool pool(2);
  Ctx ctx{.pool = &pool};
  for (const int64_t T : {0, 1, 2, 5, 6, 7, 95, 96, 97, 193})
    for (const auto& [in, out] : {std::pair{1, 1}, {33, 63}, {200, 65}, {1025, 129}})
      for (const bool accumulate : {false, true}) {
        const Layer layer(T, in, out, dtype());
        const auto y = layer.result(accumulate, [&](const LinearArgs& a) { linear(ctx, a); });
        const auto expected = layer.result(accumulate, linear_ref);
        // f32 sums of up to 1025 terms, each addition rounding a partial sum of at most the result's size:
        // 2^-25 · sqrt(1025) = 9.5e-7 if they were added one after the other.
        EXPECT_LE(testing::rel_rms(y.tensor, expected.tensor), 1e-6)
            << T << " x " << in << " -> " << out << " accumulate " << accumulate;
      }
}

TEST_P(LinearTest, RoundedActivationsStayWithinTheirBudget) {
  ThreadPool pool(2);
  Ctx exact{.pool = &pool}, rounded{.pool = &pool, .precision = Precision::bf16};
  for (const int64_t T : {0, 1, 2, 5, 8, 9, 130, 257})
    for (const auto& [in, out] : {std::pair{33, 63}, {200, 65}, {1025, 129}})
      for (const bool accumulate : {false, true}) {
        const Layer layer(T, in, out, dtype());
        const auto y = layer.result(accumulate, [&](const LinearArgs& a) { linear(rounded, a); });
        const auto expected = layer.result(accumulate, linear_ref);
        // The contract: a bf16 has 8 significant bits, an error of 1.6e-3 in the root mean square.
        EXPECT_LE(testing::rel_rms(y.tensor, expected.tensor), 4e-3)
            << T << " x " << in << " -> " << out << " accumulate " << accumulate;
        if (dtype() == DType::bf16 && isa() >= Isa::avx512_bf16) continue;
        const auto same = layer.result(accumulate, [&](const LinearArgs& a) { linear(exact, a); });
        EXPECT_EQ(testing::to_doubles(y.tensor), testing::to_doubles(same.tensor)) << "rounded for nothing";
      }
}

TEST_P(LinearTest, ARowHasTheSameBitsAloneAndInABatch) {
  const Layer layer(131, 2100, 150, dtype());
  for (const Precision precision : {Precision::exact, Precision::bf16}) {
    Ctx ctx{.precision = precision};
    const auto rows = [&](int64_t begin, int64_t end) {
      return layer.result(false, [&](LinearArgs a) {
        a.x = a.x.slice(0, begin, end), a.out = a.out.slice(0, begin, end);
        linear(ctx, a);
      });
    };
    const auto batch = rows(0, 131);
    const auto expect_same = [&](int64_t begin, int64_t end) {
      const auto part = rows(begin, end);
      for (int64_t t = begin; t < end; ++t)
        EXPECT_EQ(std::memcmp(part.tensor.at<float>(t), batch.tensor.at<float>(t), 150 * sizeof(float)), 0)
            << "row " << t << " of [" << begin << ", " << end << ")";
    };
    for (const int64_t t : {0, 1, 5, 95, 96, 127, 128, 130}) expect_same(t, t + 1);
    for (const int64_t T : {2, 4, 6, 8, 9, 40}) expect_same(3, 3 + T);
  }
}

TEST_P(LinearTest, TheNumberOfThreadsDoesNotChangeABit) {
  const Layer layer(100, 300, 700, dtype());
  for (const Precision precision : {Precision::exact, Precision::bf16}) {
    const auto run = [&](int threads) {
      ThreadPool pool(threads);
      Ctx ctx{.pool = &pool, .precision = precision};
      return layer.result(true, [&](const LinearArgs& a) { linear(ctx, a); });
    };
    const auto one = run(1);
    for (const int threads : {2, 3})
      EXPECT_EQ(testing::to_doubles(run(threads).tensor), testing::to_doubles(one.tensor)) << threads;
  }
}

INSTANTIATE_TEST_SUITE_P(All, LinearTest,
                         ::testing::Combine(::testing::ValuesIn(kIsas),
                                            ::testing::Values(DType::f32, DType::bf16, DType::f16)),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_" +
                                  std::string(name_of(std::get<1>(info.param)));
                         });

TEST(Linear, AnInputOfNoWidthGivesZeros) {
  const Layer layer(3, 0, 4, DType::f32);
  Ctx ctx;
  const auto y = layer.result(false, [&](const LinearArgs& a) { linear(ctx, a); });
  EXPECT_EQ(testing::to_doubles(y.tensor), std::vector<double>(12, 0.0));
}

TEST(Linear, ReportsItsWork) {
  const Layer layer(3, 8, 4, DType::bf16);
  Trace trace;
  Ctx ctx{.trace = &trace};
  linear(ctx, layer.args);
  EXPECT_EQ(trace.entries().at("linear").flops, 2.0 * 3 * 8 * 4);
  EXPECT_EQ(trace.entries().at("linear").bytes, 4.0 * 3 * 8 + 2.0 * 4 * 8 + 4.0 * 3 * 4);
}

std::string error_of(const LinearArgs& a) {
  try {
    Ctx ctx;
    linear(ctx, a);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Linear, ErrorsSayWhatWasFoundAndExpected) {
  const Layer layer(3, 8, 4, DType::bf16);
  LinearArgs a = layer.args;
  a.w = layer.w.tensor.slice(1, 0, 7);
  EXPECT_EQ(error_of(a), "linear: w: expected shape [any, 8], found [4, 7]");
  a = layer.args;
  a.x = layer.args.x.slice(1, 0, 7), a.w = layer.w.tensor.slice(1, 0, 7);
  EXPECT_EQ(error_of(a), "linear: w: expected a contiguous tensor, found strides 8, 1");
  a = layer.args;
  a.out = a.out.slice(0, 0, 2);
  EXPECT_EQ(error_of(a), "linear: out: expected shape [3, 4], found [2, 4]");
  a = layer.args;
  a.w.dtype = DType::f8_e4m3;
  EXPECT_EQ(error_of(a), "linear: w: expected F32 or BF16 or F16, found F8_E4M3");
  a = layer.args;
  a.x.device = Device::cuda;
  EXPECT_EQ(error_of(a), "linear: x: expected a tensor on cpu, found one on cuda");
}

}  // namespace
}  // namespace kl
