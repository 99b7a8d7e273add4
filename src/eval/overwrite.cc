// R2: the overwrite test. Random unit keys are written once and then rewritten four times on average, in
// random order, with values drawn from a dictionary; then every key is read, and the nearest entry of the
// dictionary is the answer. An additive memory returns a sum of all that was ever written to the key, a
// decayed one prefers the recent, and the delta rule replaces.
#include <algorithm>
#include <numeric>

#include "eval/claims.h"
#include "eval/memory_case.h"
#include "ops/delta_net/delta_net.h"
#include "ops/linear_attention/linear_attention.h"

namespace kl {
namespace {

using namespace eval;

constexpr int64_t kDim = 64, kKeys = 16, kRewrites = 4, kValues = 256, kTrials = 50;
constexpr int64_t kWrites = kKeys * (1 + kRewrites), kTokens = kWrites + kKeys;

struct Trial {
  MemoryCase memory;  // the writes, then a query per key that writes nothing
  Values beta;        // [T] 1 at writes
  Values dictionary;  // [256, 64]
  std::vector<int64_t> answer;
};

Trial make_trial(uint64_t seed) {
  Random random(seed);
  const Values keys = unit_rows(normal_values(kKeys * kDim, random), kDim);
  Trial trial;
  trial.dictionary = unit_rows(normal_values(kValues * kDim, random), kDim);
  trial.answer.resize(kKeys);
  trial.beta.assign(kTokens, 0);

  MemoryCase& m = trial.memory;
  m = {.lengths = {kTokens}, .H = 1, .K = kDim, .V = kDim};
  m.q.resize(kTokens * kDim), m.k.resize(kTokens * kDim), m.v.resize(kTokens * kDim);
  m.state.resize(kDim * kDim);
  const auto copy_row = [](const Values& from, int64_t row, Values& to, int64_t to_row) {
    std::copy_n(from.begin() + row * kDim, kDim, to.begin() + to_row * kDim);
  };
  for (int64_t t = 0; t < kWrites; ++t) {
    const int64_t key = t < kKeys ? t : random.below(kKeys), value = random.below(kValues);
    copy_row(keys, key, m.k, t);
    copy_row(trial.dictionary, value, m.v, t);
    trial.beta[static_cast<size_t>(t)] = 1;
    trial.answer[static_cast<size_t>(key)] = value;
  }
  for (int64_t key = 0; key < kKeys; ++key) copy_row(keys, key, m.q, kWrites + key);
  return trial;
}

// The share of keys for which the memory answers with the last value.
double recall(const Trial& trial, const Values& out) {
  int64_t right = 0;
  for (int64_t key = 0; key < kKeys; ++key) {
    const auto row = out.begin() + (kWrites + key) * kDim;
    std::vector<double> score(kValues);
    for (int64_t i = 0; i < kValues; ++i)
      score[static_cast<size_t>(i)] =
          std::inner_product(row, row + kDim, trial.dictionary.begin() + i * kDim, 0.);
    right += std::max_element(score.begin(), score.end()) - score.begin() ==
             trial.answer[static_cast<size_t>(key)];
  }
  return static_cast<double>(right) / kKeys;
}

double additive_recall(const Trial& trial, double decay, ThreadPool* pool) {
  const OwnedTensor g = to_tensor(DType::f32, {kTokens, 1}, Values(kTokens, std::log(decay)));
  return recall(trial, run<LinearAttentionArgs>(trial.memory, kAllF32, [&](LinearAttentionArgs& args) {
                         Ctx ctx{.pool = pool};
                         args.g = g.tensor;
                         linear_attention_prefill(ctx, args);
                       }).out);
}

double delta_recall(const Trial& trial, ThreadPool* pool) {
  const OwnedTensor beta = to_tensor(DType::f32, {kTokens, 1}, trial.beta);
  return recall(trial, run<DeltaNetArgs>(trial.memory, kAllF32, [&](DeltaNetArgs& args) {
                         Ctx ctx{.pool = pool};
                         args.beta = beta.tensor, args.beta_kind = DeltaNetBeta::value;
                         delta_net_prefill(ctx, args);
                       }).out);
}

}  // namespace

std::vector<Claim> overwrite_claims(ThreadPool* pool) {
  constexpr double kDecays[] = {1, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9};
  double delta = 0, by_decay[std::size(kDecays)] = {};
  for (uint64_t seed = 0; seed < kTrials; ++seed) {
    const Trial trial = make_trial(seed);
    delta += delta_recall(trial, pool) / kTrials;
    for (size_t i = 0; i < std::size(kDecays); ++i)
      by_decay[i] += additive_recall(trial, kDecays[i], pool) / kTrials;
  }
  const double additive = by_decay[0], best = *std::max_element(std::begin(by_decay), std::end(by_decay));
  const std::string test = ", 16 keys x 4 rewrites, recall over that of ";
  return {{"R2", "recall of the delta rule, 16 keys x 4 rewrites", delta, ClaimBound::at_least, 0.99, ""},
          {"R2", "delta rule" + test + "an additive memory", delta / additive, ClaimBound::at_least, 3, ""},
          {"R2", "delta rule" + test + "the best decayed one", delta / best, ClaimBound::at_least, 1.15, ""}};
}

}  // namespace kl
