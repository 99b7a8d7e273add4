#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "ops/moe/moe.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Logits of T tokens and room for the result.
struct Routing {
  int64_t T, E, top_k;
  std::vector<float> logits, bias, weights;
  std::vector<int32_t> experts;
  MoeRouteArgs args;

  Routing(int64_t top, std::vector<float> row) : Routing(top, row, 1, static_cast<int64_t>(row.size())) {}
  Routing(int64_t top, std::vector<float> values, int64_t tokens, int64_t width)
      : T(tokens), E(width), top_k(top), logits(std::move(values)) {
    weights.assign(T * top_k, kNan);
    experts.assign(T * top_k, -1);
    args.logits = Tensor(logits.data(), DType::f32, {T, E});
    args.experts = Tensor(experts.data(), DType::i32, {T, top_k});
    args.weights = Tensor(weights.data(), DType::f32, {T, top_k});
  }
  Routing& with_bias(std::vector<float> values) {
    bias = std::move(values);
    args.bias = Tensor(bias.data(), DType::f32, {E});
    return *this;
  }
  Routing& with_groups(int n_group, int topk_group) {
    args.n_group = n_group, args.topk_group = topk_group;
    return *this;
  }
  // Runs the operator and expects the definition to agree, bit for bit.
  Routing& run(ThreadPool* pool = nullptr) {
    moe_route_ref(args);
    const auto expected_experts = experts;
    const auto expected_weights = weights;
    std::fill(experts.begin(), experts.end(), -1);
    std::fill(weights.begin(), weights.end(), kNan);
    Ctx ctx{.pool = pool};
    moe_route(ctx, args);
    EXPECT_EQ(experts, expected_experts);
    EXPECT_EQ(weights, expected_weights);
    return *this;
  }
};

using Experts = std::vector<int32_t>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

TEST(MoeRoute, TakesTheBestAndNormalisesTheirWeights) {
  Routing r(2, {0, 2, 1, -1});
  r.args.scaling = 2.5f;
  r.run();
  EXPECT_EQ(r.experts, (Experts{1, 2}));
  const double sum = sigmoid(2) + sigmoid(1);
  EXPECT_FLOAT_EQ(r.weights[0], 2.5 * sigmoid(2) / sum);
  EXPECT_FLOAT_EQ(r.weights[1], 2.5 * sigmoid(1) / sum);
}

TEST(MoeRoute, WithoutNormalisationTheScoresAreScaled) {
  Routing r(2, {0, 2, 1, -1});
  r.args.renormalize = false, r.args.scaling = 0.5f;
  r.run();
  EXPECT_FLOAT_EQ(r.weights[0], 0.5 * sigmoid(2));
  EXPECT_FLOAT_EQ(r.weights[1], 0.5 * sigmoid(1));
}

TEST(MoeRoute, TheBiasChoosesButDoesNotWeigh) {
  Routing r(2, {0, 2, 1, -1});
  r.args.renormalize = false;
  r.with_bias({0, 0, 0, 1}).run();
  EXPECT_EQ(r.experts, (Experts{3, 1}));  // 0.27 + 1 is more than 0.88
  EXPECT_FLOAT_EQ(r.weights[0], sigmoid(-1));
  r.args.bias_in_weights = true;
  r.run();
  EXPECT_EQ(r.experts, (Experts{3, 1}));
  EXPECT_FLOAT_EQ(r.weights[0], sigmoid(-1) + 1);
  EXPECT_FLOAT_EQ(r.weights[1], sigmoid(2));
}

TEST(MoeRoute, AmongEqualsTheLowerIndexComesFirst) {
  EXPECT_EQ(Routing(3, {1, 1, 1, 1, 1}).run().experts, (Experts{0, 1, 2}));
  EXPECT_EQ(Routing(3, {0, 1, 0, 1, 0}).run().experts, (Experts{1, 3, 0}));
  EXPECT_EQ(Routing(2, {100, 200, 300}).run().experts, (Experts{0, 1}));  // all scores are 1 in f32
}

TEST(MoeRoute, OnlyTheBestGroupsStay) {
  // Sums of the two best of {.9 .1 .1} {.6 .6 .1} {.5 .5 .5} in logits of these probabilities: 1.0, 1.2, 1.0.
  const auto logit = [](double p) { return static_cast<float>(std::log(p / (1 - p))); };
  std::vector<float> l;
  for (const double p : {.9, .1, .1, .6, .6, .1, .5, .5, .45}) l.push_back(logit(p));
  EXPECT_EQ(Routing(3, l).with_groups(3, 1).run().experts, (Experts{3, 4, 5}));
  EXPECT_EQ(Routing(3, l).with_groups(3, 3).run().experts, (Experts{0, 3, 4}));
  l[0] = logit(.91);  // the first group is now ahead of the third
  EXPECT_EQ(Routing(3, l).with_groups(3, 2).run().experts, (Experts{0, 3, 4}));
  l[0] = logit(.89);  // and now behind
  EXPECT_EQ(Routing(4, l).with_groups(3, 2).run().experts, (Experts{3, 4, 6, 7}));
}

TEST(MoeRoute, AmongEqualGroupsTheLowerIndexComesFirst) {
  EXPECT_EQ(Routing(2, {0, 1, 1, 0, 1, 0}).with_groups(3, 1).run().experts, (Experts{1, 0}));
}

TEST(MoeRoute, ADroppedGroupDoesNotComeBackWhenAllScoresAreNegative) {
  Routing r(2, {0, 0.1f, 3, 4, 0, 0});
  r.with_bias({-2, -2, -2, -2, -2, -2}).with_groups(3, 1).run();
  EXPECT_EQ(r.experts, (Experts{3, 2}));
}

TEST(MoeRoute, GroupsOfOneExpertScoreByIt) {
  EXPECT_EQ(Routing(2, {1, 3, 0, 2}).with_groups(4, 2).run().experts, (Experts{1, 3}));
}

TEST(MoeRoute, Softmax) {
  Routing r(2, {1000, 1001, 999});  // e^1000 is no number
  r.args.score = MoeScore::softmax, r.args.renormalize = false;
  r.run();
  const double sum = std::exp(-1) + 1 + std::exp(-2);
  EXPECT_EQ(r.experts, (Experts{1, 0}));
  EXPECT_FLOAT_EQ(r.weights[0], 1 / sum);
  EXPECT_FLOAT_EQ(r.weights[1], std::exp(-1) / sum);
}

TEST(MoeRoute, StridedRows) {
  std::vector<float> wide = {9, 0, 2, 1, 9, 9, 1, 0, 2, 9};
  Routing r(1, {0, 0, 0, 0, 0, 0}, 2, 3);
  r.args.logits = Tensor(wide.data(), DType::f32, {2, 5}).slice(1, 1, 4);
  EXPECT_EQ(r.run().experts, (Experts{1, 2}));
}

// Few distinct values, so that ties of experts and of groups are common.
RC_GTEST_PROP(MoeRoute, AgreesWithTheDefinitionAndKeepsItsPromises, ()) {
  const int n_group = *rc::gen::inRange(1, 6), topk_group = *rc::gen::inRange(1, n_group + 1);
  const int size = *rc::gen::inRange(1, 7), E = n_group * size, T = *rc::gen::inRange(0, 70);
  const int top_k = *rc::gen::inRange(1, topk_group * size + 1);
  testing::Random random(*rc::gen::arbitrary<uint64_t>());
  const int64_t values = *rc::gen::element<int64_t>(2, 5, 1000000);
  std::vector<float> logits(static_cast<size_t>(T) * E), bias(E);
  for (float& x : logits) x = 4.f * random.integer(-values, values) / values;
  for (float& x : bias) x = 1.f * random.integer(-values, values) / values;

  Routing r(top_k, logits, T, E);
  r.with_bias(bias).with_groups(n_group, topk_group);
  r.args.score = *rc::gen::element(MoeScore::sigmoid, MoeScore::softmax);
  r.args.renormalize = *rc::gen::arbitrary<bool>();
  r.args.bias_in_weights = *rc::gen::arbitrary<bool>();
  ThreadPool pool(3);
  r.run(&pool);

  for (int64_t t = 0; t < r.T; ++t) {
    std::set<int32_t> experts, groups;
    double sum = 0;
    for (int j = 0; j < top_k; ++j) {
      const int32_t e = r.experts[t * top_k + j];
      RC_ASSERT(e >= 0 && e < E);
      experts.insert(e), groups.insert(e / size);
      sum += r.weights[t * top_k + j];
    }
    RC_ASSERT(experts.size() == static_cast<size_t>(top_k));
    RC_ASSERT(groups.size() <= static_cast<size_t>(topk_group));
    if (r.args.renormalize && !r.args.bias_in_weights) RC_ASSERT(std::abs(sum - 1) < 1e-5);
  }
}

std::string error_of(const MoeRouteArgs& a) {
  try {
    Ctx ctx;
    moe_route(ctx, a);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(MoeRoute, NotANumberNamesTheRow) {
  Routing r(1, {0, 1, 0, kNan, 1, 0}, 3, 2);
  EXPECT_EQ(error_of(r.args), "moe_route: row 1: the score of expert 1 is NaN (logit nan)");
  Routing infinite(1, {0, INFINITY});
  EXPECT_EQ(error_of(infinite.args), "no error");
  EXPECT_EQ(infinite.experts, (Experts{1}));
  infinite.args.score = MoeScore::softmax;  // divided by infinity
  EXPECT_EQ(error_of(infinite.args), "moe_route: row 0: the score of expert 0 is NaN (logit 0)");
}

TEST(MoeRoute, ErrorsSayWhatWasFoundAndExpected) {
  Routing r(2, {0, 1, 2, 3, 4, 5});
  MoeRouteArgs a = r.args;
  a.n_group = 4;
  EXPECT_EQ(error_of(a), "moe_route: expected n_group to divide 6 experts, found 4");
  a.n_group = 3, a.topk_group = 4;
  EXPECT_EQ(error_of(a), "moe_route: expected topk_group from 1 to 3, found 4");
  a.n_group = 6, a.topk_group = 1;
  EXPECT_EQ(error_of(a), "moe_route: expected top_k from 1 to 1 (the experts of 1 of 6 groups), found 2");
  a = r.args;
  a.weights = Tensor(r.weights.data(), DType::f32, {1, 1});
  EXPECT_EQ(error_of(a), "moe_route: weights: expected shape [1, 2], found [1, 1]");
  a = r.args;
  a.bias = Tensor(r.logits.data(), DType::f32, {5});
  EXPECT_EQ(error_of(a), "moe_route: bias: expected shape [6], found [5]");
  a = r.args;
  a.experts.dtype = DType::i64;
  EXPECT_EQ(error_of(a), "moe_route: experts: expected I32, found I64");
}

}  // namespace
}  // namespace kl
