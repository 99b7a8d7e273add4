#include "ops/mla/mla.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "ops/mla/mla_test.h"
#include "simd/isa.h"

namespace kl {
namespace {

using testing::MlaBatch;
using testing::MlaSequence;
using testing::MlaSizes;
using testing::rel_rms;

// Scores of about 10, each a f32 sum: an error of 10 · 2^-24 = 6e-7 in the exponent of a weight.
constexpr double kTolerance = 1e-6;

class MlaTest : public ::testing::TestWithParam<std::tuple<Isa, DType, DType>> {
 protected:
  void SetUp() override {
    if (!isa_supported(isa())) GTEST_SKIP() << name_of(isa()) << " is not supported here";
    force_isa(isa());
  }
  void TearDown() override { force_isa(best_isa()); }
  Isa isa() const { return std::get<0>(GetParam()); }
  MlaSizes sizes() const {
    MlaSizes s;
    s.cache = std::get<1>(GetParam()), s.weight = std::get<2>(GetParam());
    return s;
  }
};

void expect_both_match(const MlaSizes& sizes, const std::vector<MlaSequence>& sequences) {
  MlaBatch batch(sizes, sequences);
  ThreadPool pool(2);
  const auto expected = batch.ref();
  EXPECT_LE(rel_rms(batch.prefill(&pool), expected), kTolerance);
  EXPECT_LE(rel_rms(batch.decode(&pool), expected), kTolerance);
}

TEST_P(MlaTest, MatchesTheDefinitionAroundItsBlocks) {
  for (const int64_t length : {1, 2, 47, 48, 49, 97, 127, 128, 129, 257}) {
    SCOPED_TRACE(length);
    expect_both_match(sizes(), {{0, length}});
  }
}

TEST_P(MlaTest, MatchesTheDefinitionWithContext) {
  for (const int64_t context : {1, 80, 127, 128, 129, 300})
    for (const int64_t length : {1, 3, 50}) {
      SCOPED_TRACE(::testing::Message() << context << " + " << length);
      expect_both_match(sizes(), {{context, length}});
    }
}

TEST_P(MlaTest, MatchesTheDefinitionForOtherShapes) {
  for (const auto& [A, Nk, P, R, V] : {std::tuple{1, 1, 1, 1, 1},
                                       {2, 16, 0, 32, 16},
                                       {2, 0, 8, 16, 4},
                                       {1, 7, 5, 3, 33},
                                       {7, 17, 15, 65, 31}}) {
    SCOPED_TRACE(::testing::Message() << A << " " << Nk << " " << P << " " << R << " " << V);
    MlaSizes s = sizes();
    s.A = A, s.Nk = Nk, s.P = P, s.R = R, s.V = V;
    expect_both_match(s, {{5, 60}, {0, 1}, {140, 2}});
  }
}

TEST_P(MlaTest, ASequenceHasTheSameBitsAloneAndInABatch) {
  const std::vector<MlaSequence> sequences = {{0, 130, 1}, {40, 0, 2}, {300, 1, 3}, {7, 49, 4}, {0, 1, 5}};
  MlaBatch batch(sizes(), sequences);
  const auto prefill = batch.prefill(), decode = batch.decode();
  for (size_t n = 0; n < sequences.size(); ++n) {
    MlaBatch alone(sizes(), {sequences[n]});
    EXPECT_EQ(alone.prefill(), batch.of_sequence(prefill, n)) << "prefill of sequence " << n;
    EXPECT_EQ(alone.decode(), batch.of_sequence(decode, n)) << "decode of sequence " << n;
  }
}

TEST_P(MlaTest, PageSizesAndThreadsDoNotChangeABit) {
  const std::vector<MlaSequence> sequences = {{0, 400, 1}, {290, 3, 2}};
  MlaSizes s = sizes();
  s.A = 4;  // with 400 queries, one thread gets longer spans than three
  MlaBatch first(s, sequences);
  const auto prefill = first.prefill(), decode = first.decode();
  for (const int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    EXPECT_EQ(first.prefill(&pool), prefill) << threads << " threads";
    EXPECT_EQ(first.decode(&pool), decode) << threads << " threads";
  }
  for (const int64_t page_size : {1, 7, 128, 1000}) {
    s.page_size = page_size;
    MlaBatch batch(s, sequences);
    EXPECT_EQ(batch.prefill(), prefill) << "pages of " << page_size;
    EXPECT_EQ(batch.decode(), decode) << "pages of " << page_size;
  }
}

INSTANTIATE_TEST_SUITE_P(All, MlaTest,
                         ::testing::Values(std::tuple{Isa::generic, DType::f32, DType::f32},
                                           std::tuple{Isa::generic, DType::bf16, DType::bf16},
                                           std::tuple{Isa::avx2, DType::f32, DType::f32},
                                           std::tuple{Isa::avx2, DType::bf16, DType::f16},
                                           std::tuple{Isa::avx512, DType::f32, DType::f32},
                                           std::tuple{Isa::avx512, DType::bf16, DType::bf16},
                                           std::tuple{Isa::avx512, DType::f32, DType::f16}),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_cache_" +
                                  std::string(name_of(std::get<1>(info.param))) + "_weight_" +
                                  std::string(name_of(std::get<2>(info.param)));
                         });

// On the CPU even the bits are those of the whole; the contract promises 1e-5.
RC_GTEST_PROP(Mla, APromptMaySplitAnywhere, ()) {
  const int64_t length = *rc::gen::inRange(2, 300), split = *rc::gen::inRange<int64_t>(1, length);
  MlaSizes s;
  s.cache = *rc::gen::element(DType::f32, DType::bf16);
  MlaBatch whole(s, {{0, length}}), head(s, {{0, split}}), tail(s, {{split, length - split}});
  auto parts = head.prefill();
  const auto rest = tail.prefill();
  parts.insert(parts.end(), rest.begin(), rest.end());
  RC_ASSERT(parts == whole.prefill());
}

RC_GTEST_PROP(Mla, DecodeAndPrefillAgree, ()) {
  MlaSizes s;
  s.page_size = *rc::gen::inRange(1, 70);
  std::vector<MlaSequence> sequences;
  for (int n = *rc::gen::inRange(1, 6); n > 0; --n)
    sequences.push_back({*rc::gen::inRange(0, 700), *rc::gen::inRange(0, 6), static_cast<uint64_t>(n)});
  MlaBatch batch(s, sequences);
  RC_ASSERT(rel_rms(batch.decode(), batch.prefill()) <= 1e-5);
}

TEST(Mla, LongContextsAreDecodedInParts) {
  MlaSizes s;
  s.A = 2, s.Nk = 5, s.P = 3, s.R = 6, s.V = 4, s.page_size = 64;
  std::vector<MlaSequence> sequences = {{9000, 1, 1}};                  // parts longer than the shortest
  for (uint64_t n = 2; n < 62; ++n) sequences.push_back({1500, 1, n});  // more parts than are held at once
  MlaBatch batch(s, sequences);
  ThreadPool pool(3);
  const auto y = batch.decode(&pool);
  EXPECT_LE(rel_rms(y, batch.prefill()), 1e-5);
  for (const int64_t n : {0, 1, 30, 60})
    EXPECT_EQ(MlaBatch(s, {sequences[n]}).decode(), batch.of_sequence(y, n)) << "sequence " << n;
}

TEST(Mla, HugeScoresPickTheirKey) {
  MlaSizes s;
  s.q_deviation = 300;
  MlaBatch batch(s, {{100, 60}});
  // Scores of some thousands carry errors of 1e3 · 2^-24 = 6e-5 into the exponent where two keys are close.
  EXPECT_LE(rel_rms(batch.prefill(), batch.ref()), 1e-4);
  EXPECT_LE(rel_rms(batch.decode(), batch.ref()), 1e-4);
}

TEST(Mla, ATokenThatIsNotANumberStaysWithThoseWhoSeeIt) {
  MlaBatch batch({}, {{20, 150, 1}, {10, 5, 2}});
  const auto prefill = batch.prefill(), decode = batch.decode();
  const int64_t broken = 77;
  batch.row(0, 20 + broken)[3] = NAN;
  const auto expect = [&](const std::vector<double>& y, const std::vector<double>& clean) {
    const int64_t row = batch.s.A * batch.s.V;
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
      if (i / row >= broken && i / row < 150)
        ASSERT_TRUE(std::isnan(y[i])) << "row " << i / row;
      else
        ASSERT_EQ(y[i], clean[i]) << "row " << i / row;
    }
  };
  expect(batch.prefill(), prefill);
  expect(batch.decode(), decode);
}

TEST(Mla, AnEmptySequenceNeedsNoPages) {
  MlaBatch batch({}, {{30, 4, 1}, {9, 0, 2}, {0, 3, 3}});
  const auto prefill = batch.prefill(), decode = batch.decode();
  std::fill_n(batch.cache().page_table.at<int32_t>(1), batch.cache().page_table.size(1), 12345);
  EXPECT_EQ(batch.prefill(), prefill);
  EXPECT_EQ(batch.decode(), decode);
  MlaBatch nothing({}, {{30, 0}});
  EXPECT_TRUE(nothing.prefill().empty());
  EXPECT_TRUE(nothing.decode().empty());
  MlaBatch nobody({}, {});
  EXPECT_TRUE(nobody.prefill().empty());
  EXPECT_TRUE(nobody.decode().empty());
}

TEST(Mla, TheArenaIsGivenBack) {
  MlaBatch batch({}, {{30, 4}});
  Arena arena;
  Ctx ctx{.scratch = &arena};
  const auto prefill = batch.prefill(), decode = batch.decode();
  EXPECT_EQ(batch.result([&](const MlaArgs& a) { mla_prefill(ctx, a); }), prefill);
  EXPECT_EQ(batch.result([&](const MlaArgs& a) { mla_decode(ctx, a); }), decode);
  EXPECT_GT(arena.peak(), 0u);
  EXPECT_EQ(arena.used(), 0u);
}

TEST(Mla, ReportsItsWork) {
  MlaBatch batch({}, {{30, 4}});  // A 3, Nk 24, P 8, R 40, V 20
  Trace trace;
  Ctx ctx{.trace = &trace};
  mla_prefill(ctx, batch.args());
  mla_decode(ctx, batch.args());
  const double pairs = 31 + 32 + 33 + 34;
  EXPECT_EQ(trace.entries().at("mla_prefill").flops, 3 * (34 * 2 * 40 * 44 + pairs * 2 * 52));
  EXPECT_EQ(trace.entries().at("mla_decode").flops, 3 * (4 * 2 * 40 * 44 + pairs * 2 * 88));
  const double bytes = 4 * (4 * 3 * 32 + 3 * 44 * 40 + 4 * 3 * 20 + 34 * 48);
  EXPECT_EQ(trace.entries().at("mla_prefill").bytes, bytes);
  EXPECT_EQ(trace.entries().at("mla_decode").bytes, bytes);
}

}  // namespace
}  // namespace kl
