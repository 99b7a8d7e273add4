// Sampling: every filter against a plain double implementation, penalties by hand, the drawn distribution,
// and that choices depend on seed, logits and history alone.
#include "ops/sample/sample.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/dtype.h"
#include "ops/sample/weight.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::Random;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> normal_logits(size_t n, double deviation, uint64_t seed) {
  Random random(seed);
  std::vector<float> logits(n);
  for (float& x : logits) x = static_cast<float>(deviation * random.normal());
  return logits;
}

std::vector<int32_t> tokens(const std::vector<TokenProbability>& distribution) {
  std::vector<int32_t> ids;
  for (const TokenProbability& p : distribution) ids.push_back(p.token);
  return ids;
}
std::vector<int32_t> kept(const std::vector<float>& logits, const SampleParams& params) {
  return tokens(Sampler(params).distribution(logits));
}

// The filters as their definition reads: sort, cut, cut, cut. `margin` is how far, in probability, the
// nearest token is from falling on the other side of an edge: below rounding errors either answer is right.
struct Naive {
  std::vector<TokenProbability> distribution;  // ids ascending
  double margin = 1;
};
Naive naive_filters(const std::vector<float>& logits, const SampleParams& params) {
  std::vector<TokenProbability> p;
  const double largest = *std::max_element(logits.begin(), logits.end());
  for (size_t i = 0; i < logits.size(); ++i)
    p.push_back({static_cast<int32_t>(i), std::exp((logits[i] - largest) / params.temperature)});
  std::sort(p.begin(), p.end(), [&](const TokenProbability& a, const TokenProbability& b) {
    const float x = logits[static_cast<size_t>(a.token)], y = logits[static_cast<size_t>(b.token)];
    return x > y || (x == y && a.token < b.token);
  });
  const auto normalise = [&] {
    double sum = 0;
    for (const TokenProbability& c : p) sum += c.probability;
    for (TokenProbability& c : p) c.probability /= sum;
  };

  Naive naive;
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < p.size())
    p.resize(static_cast<size_t>(params.top_k));
  normalise();
  if (params.top_p < 1) {
    double sum = 0;
    size_t n = 0;
    while (n < p.size() && sum < params.top_p) {
      sum += p[n++].probability;
      naive.margin = std::min(naive.margin, std::abs(sum - params.top_p));
    }
    p.resize(n);
  }
  const double threshold = params.min_p * p[0].probability;
  for (const TokenProbability& c : p)
    if (params.min_p > 0 && &c != &p[0])
      naive.margin = std::min(naive.margin, std::abs(c.probability - threshold));
  std::erase_if(p, [&](const TokenProbability& c) { return c.probability < threshold; });
  normalise();
  std::sort(p.begin(), p.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
  naive.distribution = std::move(p);
  return naive;
}

TEST(SampleWeight, IsAPowerOfTwo) {
  EXPECT_EQ(weight_at(0), kMaxWeight);
  EXPECT_EQ(weight_at(1), kMaxWeight / 2);
  EXPECT_EQ(weight_at(kWeightBits), 1u);
  EXPECT_EQ(weight_at(kWeightBits + 1), 0u);
  EXPECT_EQ(weight_at(1e300), 0u);
  EXPECT_EQ(weight_at(kInf), 0u);
  EXPECT_EQ(weight_at(kNan), 0u);
  Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const double x = i % 2 ? random.uniform(0, 46) : std::exp2(random.uniform(-60, 0));
    const double expected = std::exp2(-x) * static_cast<double>(kMaxWeight);
    // Rounding down loses less than 1, the three terms and the fixed point together less than another 0.5.
    ASSERT_NEAR(static_cast<double>(weight_at(x)), expected - 0.5, 1.0) << "x = " << x;
  }
}

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  Sampler sampler({.temperature = 0});
  EXPECT_EQ(sampler.sample(std::vector<float>{-1, 3, 2, 3}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-kInf, -5, -kInf}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{kNan, -5, kInf, -4}), 3);  // faults are never chosen
  EXPECT_EQ(kept({1, 4, 2}, {.temperature = 0}), std::vector<int32_t>{1});
}

TEST(Sampler, NothingToChooseFromIsAnError) {
  for (const float temperature : {0.f, 1.f}) {
    Sampler sampler({.temperature = temperature});
    EXPECT_THROW(sampler.sample(std::vector<float>{}), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{-kInf, kNan, kInf}), Error);
    EXPECT_EQ(sampler.sample(std::vector<float>{-kInf, -1e30f}), 1);
  }
}

TEST(Sampler, MasksAndFaultsAreNeverDrawn) {
  const std::vector<float> logits = {0, -kInf, 0, kNan, 0, kInf};
  for (const SampleParams& p : {SampleParams{}, SampleParams{.top_k = 5}, SampleParams{.top_p = 0.99f},
                                SampleParams{.min_p = 0.5f}, SampleParams{.temperature = 1e30f}})
    EXPECT_EQ(kept(logits, p), (std::vector<int32_t>{0, 2, 4}));
}

// x' = 2 / 1.5 for a positive logit, -2 · 1.5 for a negative one, then - 0.25 once - 0.5 a time.
TEST(Sampler, PenaltiesByHand) {
  Sampler sampler({.repetition_penalty = 1.5f, .presence_penalty = 0.25f, .frequency_penalty = 0.5f});
  for (const int32_t token : {0, 1, 1, 1, 2, 9}) sampler.see(token);  // 9 is beyond these logits
  const auto d = sampler.distribution(std::vector<float>{2, -2, 0, 2});
  const double expected[] = {2 / 1.5 - 0.25 - 0.5, -2 * 1.5 - 0.25 - 1.5, -0.25 - 0.5, 2};
  ASSERT_EQ(d.size(), 4u);
  for (int i = 0; i < 4; ++i)  // the penalised logit is a float again: 2^-24 of 4.75
    EXPECT_NEAR(std::log(d[i].probability / d[3].probability), expected[i] - 2, 1e-6) << i;
}

TEST(Sampler, PenaltiesSteerGreedyAndLeaveMasksAlone) {
  const std::vector<float> logits = {5, 4.9f, -kInf, 1};
  Sampler sampler({.temperature = 0, .frequency_penalty = 0.06f});
  std::vector<int32_t> chosen;
  for (int i = 0; i < 5; ++i) {
    chosen.push_back(sampler.sample(logits));
    sampler.see(chosen.back());
  }
  EXPECT_EQ(chosen, (std::vector<int32_t>{0, 0, 1, 0, 1}));

  Sampler favours({.temperature = 0, .presence_penalty = -100});
  favours.see(2);
  EXPECT_EQ(favours.sample(logits), 0);
  favours.see(3);
  EXPECT_EQ(favours.sample(logits), 3);

  // A penalty may not turn a finite logit into a mask.
  Sampler extreme({.temperature = 0, .repetition_penalty = 1e30f});
  extreme.see(0);
  EXPECT_EQ(extreme.sample(std::vector<float>{-1e20f, -kInf}), 0);
}

TEST(Sampler, TiesAtAnEdgeKeepTheLowestIds) {
  const std::vector<float> equal(10, 1.5f);
  EXPECT_EQ(kept(equal, {.top_k = 3}), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(kept(equal, {.top_p = 0.35f}), (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(kept(equal, {.min_p = 1}).size(), 10u);
  EXPECT_EQ(kept({1, 2, 1, 2, 1, 3}, {.top_k = 4}), (std::vector<int32_t>{0, 1, 3, 5}));
}

TEST(Sampler, EdgesOfTheFilters) {
  const std::vector<float> logits = {0, 1, 2, 3};
  EXPECT_EQ(kept(logits, {.top_k = 1}), std::vector<int32_t>{3});
  EXPECT_EQ(kept(logits, {.top_k = 4}).size(), 4u);
  EXPECT_EQ(kept(logits, {.top_k = 1 << 30}).size(), 4u);
  EXPECT_EQ(kept(logits, {.top_p = 1e-30f}), std::vector<int32_t>{3});
  EXPECT_EQ(kept(logits, {.min_p = 1}), std::vector<int32_t>{3});
  EXPECT_EQ(kept(logits, {.temperature = 1e-30f}), std::vector<int32_t>{3});
  EXPECT_EQ(kept(logits, {.temperature = 1e30f, .top_p = 0.5f}).size(), 2u);
}

// top-p counts what top-k has left: of 0.4, 0.3, 0.2, 0.1 the best three are 0.44, 0.33, 0.22.
TEST(Sampler, FiltersWorkInOrder) {
  std::vector<float> logits;
  for (const double p : {0.1, 0.4, 0.2, 0.3}) logits.push_back(static_cast<float>(std::log(p)));
  EXPECT_EQ(kept(logits, {.top_p = 0.75f}), (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(kept(logits, {.top_k = 3, .top_p = 0.75f}), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(kept(logits, {.min_p = 0.6f}), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(kept(logits, {.top_k = 3, .min_p = 0.3f}), (std::vector<int32_t>{1, 2, 3}));
}

RC_GTEST_PROP(Sampler, FiltersMatchANaiveImplementation, ()) {
  const size_t vocab = static_cast<size_t>(*rc::gen::inRange(1, 400));
  std::vector<float> logits = normal_logits(vocab, *rc::gen::inRange(0, 7), *rc::gen::arbitrary<uint64_t>());
  if (*rc::gen::arbitrary<bool>())  // ties, as logits of a bf16 product have them
    for (float& x : logits) x = static_cast<float>(bf16(x));
  const auto percent = [](int low, int high) {
    return static_cast<float>(*rc::gen::inRange(low, high)) / 100;
  };
  const SampleParams params = {.temperature = percent(5, 300),
                               .top_k = *rc::gen::arbitrary<bool>() ? *rc::gen::inRange(0, 420) : 0,
                               .top_p = *rc::gen::arbitrary<bool>() ? percent(1, 101) : 1,
                               .min_p = *rc::gen::arbitrary<bool>() ? percent(0, 101) : 0};
  const Naive naive = naive_filters(logits, params);
  RC_PRE(naive.margin > 1e-9);
  const auto found = Sampler(params).distribution(logits);
  size_t n = 0;
  for (const TokenProbability& expected : naive.distribution) {
    if (n < found.size() && found[n].token == expected.token) {
      // Each weight is rounded down by up to 2^-44 of the largest, and so is their sum, once per token.
      RC_ASSERT(std::abs(found[n++].probability - expected.probability) <
                static_cast<double>(vocab) * 0x1p-43);
    } else {
      RC_ASSERT(expected.probability < 1e-13);  // too improbable to have a weight
    }
  }
  RC_ASSERT(n == found.size());
}

RC_GTEST_PROP(Sampler, DrawsWhatTheDistributionHolds, ()) {
  const auto logits = normal_logits(50, 3, *rc::gen::arbitrary<uint64_t>());
  Sampler sampler({.temperature = 0.8f, .top_k = 20, .top_p = 0.9f, .seed = *rc::gen::arbitrary<uint64_t>()});
  const auto ids = tokens(sampler.distribution(logits));
  for (int i = 0; i < 20; ++i) RC_ASSERT(std::ranges::binary_search(ids, sampler.sample(logits)));
}

// Pearson's statistic of 200,000 draws over 20 tokens has 19 degrees of freedom: mean 19, deviation 6.2;
// above 43.8 with probability 0.001. The seed is fixed, so this does not come and go.
TEST(Sampler, DrawsFollowTheSoftmax) {
  const std::vector<float> logits = normal_logits(20, 1, 7);
  for (const uint64_t seed : {0u, 1u, 2u}) {
    Sampler sampler({.temperature = 0.9f, .seed = seed});
    constexpr int kDraws = 200000;
    std::vector<int> counts(logits.size());
    for (int i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(sampler.sample(logits))];
    double statistic = 0, sum = 0;
    std::vector<double> p;
    for (const float x : logits) sum += p.emplace_back(std::exp(x / 0.9f));
    for (size_t i = 0; i < p.size(); ++i) {
      const double expected = kDraws * p[i] / sum;
      statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    EXPECT_LT(statistic, 43.8) << "seed " << seed;
    EXPECT_GT(statistic, 5) << "seed " << seed << ": too even to be random";  // probability 0.001
  }
}

std::vector<int32_t> stream(const SampleParams& params, int n) {
  Sampler sampler(params);
  std::vector<int32_t> ids;
  for (int i = 0; i < n; ++i) ids.push_back(sampler.sample(normal_logits(1000, 2, static_cast<uint64_t>(i))));
  return ids;
}

TEST(Sampler, SameSeedSameTokens) {
  const SampleParams params = {.temperature = 0.7f, .top_p = 0.95f, .seed = 12345};
  EXPECT_EQ(stream(params, 50), stream(params, 50));
  SampleParams other = params;
  other.seed = 12346;
  EXPECT_NE(stream(params, 50), stream(other, 50));
  // The same on every machine. These numbers were also found by a program of another language in f64.
  std::vector<float> logits(64);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 37 % 11) / 2;
  Sampler sampler({.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.01f, .seed = 42});
  std::vector<int32_t> ids;
  for (int i = 0; i < 12; ++i) ids.push_back(sampler.sample(logits));
  EXPECT_EQ(ids, (std::vector<int32_t>{21, 63, 30, 5, 43, 5, 13, 49, 8, 49, 41, 13}));
}

TEST(Sampler, NeighbouringSeedsAreUnrelated) {
  const std::vector<float> flat(1024, 0.f);
  int equal = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    Sampler a({.seed = seed}), b({.seed = seed + 1});
    for (int i = 0; i < 3; ++i) equal += a.sample(flat) == b.sample(flat);
  }
  EXPECT_LT(equal, 25);  // 6000 pairs, expected 5.9 equal ones
}

TEST(Sampler, VocabularyHasALimit) {
  const std::vector<float> most(static_cast<size_t>(kMaxVocab), 0.f), more(most.size() + 1, 0.f);
  EXPECT_NO_THROW(Sampler({.top_p = 0.999f}).sample(most));
  EXPECT_THROW(Sampler({}).sample(more), Error);
}

TEST(SampleParams, ChecksNameTheField) {
  const auto message = [](const SampleParams& p) {
    try {
      check(p);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(message({}), "");
  EXPECT_EQ(message({.temperature = 0, .top_k = 1, .top_p = 1e-20f, .min_p = 1, .presence_penalty = -2}), "");
  EXPECT_EQ(message({.temperature = -1}), "temperature: expected a number of at least 0, found -1");
  EXPECT_EQ(message({.top_k = -5}), "top_k: expected a number of at least 0 (0: off), found -5");
  EXPECT_EQ(message({.top_p = 0}), "top_p: expected a number above 0 and up to 1, found 0");
  EXPECT_EQ(message({.repetition_penalty = 0}), "repetition_penalty: expected a number above 0, found 0");
  for (const float bad : {kNan, kInf, -kInf}) {
    EXPECT_NE(message({.temperature = bad}).find("temperature"), std::string::npos) << bad;
    EXPECT_NE(message({.top_p = bad}).find("top_p"), std::string::npos) << bad;
    EXPECT_NE(message({.min_p = bad}).find("min_p"), std::string::npos) << bad;
    EXPECT_NE(message({.repetition_penalty = bad}).find("repetition_penalty"), std::string::npos) << bad;
    EXPECT_NE(message({.presence_penalty = bad}).find("presence_penalty"), std::string::npos) << bad;
    EXPECT_NE(message({.frequency_penalty = bad}).find("frequency_penalty"), std::string::npos) << bad;
  }
  EXPECT_THROW(Sampler({.min_p = 1.5f}), Error);
  EXPECT_THROW(Sampler({}).see(-1), Error);
}

}  // namespace
}  // namespace kl
