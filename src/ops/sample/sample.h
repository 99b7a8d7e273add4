// Choosing the next token from a row of logits.
//
// Order: penalties on tokens seen so far -> temperature -> top-k -> top-p -> min-p -> draw. temperature 0 is
// greedy: the largest logit after penalties, the lowest id among equals. Equals at the edge of a filter: the
// lowest ids stay. A logit that is not finite (-inf, a mask; NaN, a fault upstream) is never chosen.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/check.h"

namespace kl {

struct SampleParams {
  float temperature = 1.f;         // >= 0; 0: greedy
  int top_k = 0;                   // 0: off
  float top_p = 1.f;               // (0, 1]: smallest set of most probable tokens whose sum reaches top_p
  float min_p = 0.f;               // [0, 1]: drop tokens below min_p · (largest probability)
  float repetition_penalty = 1.f;  // > 0: seen tokens' logits are divided (if positive) or multiplied by it
  float presence_penalty = 0.f;    // subtracted once from every seen token
  float frequency_penalty = 0.f;   // subtracted once per time a token was seen
  uint64_t seed = 0;
};
void check(const SampleParams&);  // throws kl::Error naming the field, what was found and what is allowed

struct TokenProbability {
  int32_t token;
  double probability;
};

// One stream of choices: the same seed, logits and history give the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const SampleParams&);
  // A token of the prompt or of the answer so far; penalties look at these.
  void see(int32_t token);
  // `logits` [vocab]. Throws kl::Error if no finite logit is left.
  int32_t sample(std::span<const float> logits);
  // What sample() would draw from: the tokens that are left, ids ascending, probabilities of sum 1.
  std::vector<TokenProbability> distribution(std::span<const float> logits) const;

  // How often sample() has drawn from this stream (greedy choices draw nothing). A sampler with the same seed
  // that has seen the same tokens and is told this number goes on as this one would.
  uint64_t draws() const { return draws_; }
  void continue_after(uint64_t draws) { draws_ = draws; }

 private:
  bool has_penalties() const;
  std::vector<float> penalised(std::span<const float> logits) const;

  SampleParams params_;
  uint64_t draws_ = 0;
  std::unordered_map<int32_t, int> seen_;
};

}  // namespace kl
