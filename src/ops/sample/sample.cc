// Sampler: the stream of choices. The filters between logits and weights are in candidates.cc.
#include "ops/sample/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/sample/candidates.h"

namespace kl {
namespace {

// splitmix64's finaliser: every bit of the result depends on every bit of x.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// 64 random bits for draw number `index`. The seed is mixed first: seeds of 1 and 2 are unrelated streams.
uint64_t random_bits(uint64_t seed, uint64_t index) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  return mix(mix(seed + kGolden) + (index + 1) * kGolden);
}

// In double every step before the last is exact or a single operation, so that no compiler can fuse it into
// another result. A finite logit stays finite.
float penalised(float logit, const SampleParams& p, int times) {
  if (!std::isfinite(logit)) return logit;
  double x = logit;
  x = x > 0 ? x / p.repetition_penalty : x * p.repetition_penalty;
  x -= p.presence_penalty;
  x -= static_cast<double>(p.frequency_penalty) * times;
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(x, -kLargest, kLargest));
}

int32_t greedy(std::span<const float> logits) {
  const size_t best = most_probable(logits);
  KL_CHECK(best < logits.size(), "sampling: expected a finite logit, found none among ", logits.size());
  return static_cast<int32_t>(best);
}

// The candidate that owns the point `random` / 2^64 of the line on which the weights lie side by side.
int32_t draw(const std::vector<Candidate>& candidates, uint64_t random) {
  uint64_t point = multiply_high(random, total_weight(candidates));
  for (const Candidate& c : candidates) {
    if (point < c.weight) return c.token;
    point -= c.weight;
  }
  return candidates.back().token;  // not reached: the point is less than the sum
}

}  // namespace

void check(const SampleParams& p) {
  const auto finite = [](const char* name, float value) {
    KL_CHECK(std::isfinite(value), name, ": expected a finite number, found ", value);
  };
  finite("temperature", p.temperature);
  KL_CHECK(p.temperature >= 0, "temperature: expected a number of at least 0, found ", p.temperature);
  KL_CHECK(p.top_k >= 0, "top_k: expected a number of at least 0 (0: off), found ", p.top_k);
  KL_CHECK(p.top_p > 0 && p.top_p <= 1, "top_p: expected a number above 0 and up to 1, found ", p.top_p);
  KL_CHECK(p.min_p >= 0 && p.min_p <= 1, "min_p: expected a number from 0 to 1, found ", p.min_p);
  finite("repetition_penalty", p.repetition_penalty);
  KL_CHECK(p.repetition_penalty > 0, "repetition_penalty: expected a number above 0, found ",
           p.repetition_penalty);
  finite("presence_penalty", p.presence_penalty);
  finite("frequency_penalty", p.frequency_penalty);
}

Sampler::Sampler(const SampleParams& params) : params_(params) { check(params_); }

void Sampler::see(int32_t token) {
  KL_CHECK(token >= 0, "sampling: expected a token id of at least 0, found ", token);
  ++seen_[token];
}

bool Sampler::has_penalties() const {
  const SampleParams& p = params_;
  return !seen_.empty() && (p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0);
}

std::vector<float> Sampler::penalised(std::span<const float> logits) const {
  std::vector<float> result(logits.begin(), logits.end());
  for (const auto& [token, times] : seen_) {
    const size_t i = static_cast<size_t>(token);
    if (i < result.size()) result[i] = kl::penalised(result[i], params_, times);
  }
  return result;
}

int32_t Sampler::sample(std::span<const float> logits) {
  std::vector<float> changed;
  if (has_penalties()) logits = changed = penalised(logits);
  if (params_.temperature == 0) return greedy(logits);
  const std::vector<Candidate> candidates = find_candidates(logits, params_);
  return draw(candidates, random_bits(params_.seed, draws_++));
}

std::vector<TokenProbability> Sampler::distribution(std::span<const float> logits) const {
  std::vector<float> changed;
  if (has_penalties()) logits = changed = penalised(logits);
  if (params_.temperature == 0) return {{greedy(logits), 1.}};
  const std::vector<Candidate> candidates = find_candidates(logits, params_);
  const double total = static_cast<double>(total_weight(candidates));
  std::vector<TokenProbability> result;
  result.reserve(candidates.size());
  for (const Candidate& c : candidates) result.push_back({c.token, static_cast<double>(c.weight) / total});
  return result;
}

}  // namespace kl
