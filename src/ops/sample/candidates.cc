// The filters. Each finds the edge of what it keeps by partial selection (nothing is sorted) and then drops
// what lies beyond in one pass, so candidates stay in the order of their ids and the result does not depend
// on how a standard library partitions.
#include "ops/sample/candidates.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>

namespace kl {
namespace {

struct Ranked {
  float logit = -std::numeric_limits<float>::infinity();  // after every finite one
  int32_t token = 0;
};
bool before(const Ranked& a, const Ranked& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// The last of the k best, or one after all if there are no k. Holds 2k at most, so a small k costs one
// comparison a logit.
Ranked last_of_top_k(std::span<const float> logits, size_t k) {
  std::vector<Ranked> best;
  best.reserve(std::min(2 * k, logits.size()));
  Ranked bar;
  const auto keep_k = [&] {
    std::nth_element(best.begin(), best.begin() + static_cast<int64_t>(k - 1), best.end(), before);
    best.resize(k);
    bar = best.back();
  };
  for (size_t i = 0; i < logits.size(); ++i) {
    // An equal of the bar has a higher id: it comes after.
    if (!(logits[i] > bar.logit) || !std::isfinite(logits[i])) continue;
    best.push_back({logits[i], static_cast<int32_t>(i)});
    if (best.size() == 2 * k) keep_k();
  }
  if (best.size() < k) return {};
  keep_k();
  return bar;
}

// All finite logits up to `last` with their weights, as far as these are not 0.
std::vector<Candidate> weigh(std::span<const float> logits, float largest, const Ranked& last,
                             float temperature) {
  const double octaves_per_logit = std::numbers::log2e / temperature;
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    const int32_t token = static_cast<int32_t>(i);
    if (!std::isfinite(logits[i]) || before(last, {logits[i], token})) continue;
    const double below = static_cast<double>(largest) - static_cast<double>(logits[i]);
    const uint64_t weight = weight_at(below * octaves_per_logit);
    if (weight > 0) candidates.push_back({token, weight});
  }
  return candidates;
}

// The nucleus ends at a certain weight, found digit by digit from the top: sums of the weights by their next
// digit say in which one the running sum reaches the target. Four passes, whatever the weights are.
// (Selection by comparisons took 5 ms where 163,840 chances are equal, this takes 1.)
void keep_top_p(std::vector<Candidate>& candidates, float top_p) {
  constexpr int kDigitBits = 12, kTopDigit = 36;  // the position of the first of four digits
  constexpr uint64_t kDigits = uint64_t{1} << kDigitBits;
  static_assert(kMaxWeight >> kTopDigit < kDigits);
  const double share = std::ceil(static_cast<double>(top_p) * static_cast<double>(total_weight(candidates)));
  uint64_t target = std::max(uint64_t{1}, static_cast<uint64_t>(share));  // what is still to be reached
  uint64_t edge = 0;                                                      // the digits found so far
  for (int position = kTopDigit; position >= 0; position -= kDigitBits) {
    std::array<uint64_t, kDigits> sums{};
    for (const Candidate& c : candidates) {
      const uint64_t digits = c.weight >> position;
      sums[digits % kDigits] += digits >> kDigitBits == edge ? c.weight : 0;  // no branch to guess wrong
    }
    uint64_t digit = kDigits - 1;
    for (; digit > 0 && sums[digit] < target; --digit) target -= sums[digit];
    edge = edge << kDigitBits | digit;
  }
  uint64_t equals = (target + edge - 1) / edge;  // of the candidates at the edge, as many as the target needs
  std::erase_if(candidates, [&](const Candidate& c) {
    if (c.weight != edge) return c.weight < edge;
    if (equals == 0) return true;
    --equals;
    return false;
  });
}

}  // namespace

uint64_t total_weight(const std::vector<Candidate>& candidates) {
  uint64_t total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  return total;
}

size_t most_probable(std::span<const float> logits) {
  size_t best = logits.size();
  float largest = -std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] > largest && logits[i] < std::numeric_limits<float>::infinity()) largest = logits[best = i];
  return best;
}

std::vector<Candidate> find_candidates(std::span<const float> logits, const SampleParams& params) {
  KL_CHECK(logits.size() <= kMaxVocab, "sampling: expected at most ", kMaxVocab, " logits, found ",
           logits.size());
  const size_t best = most_probable(logits);
  KL_CHECK(best < logits.size(), "sampling: expected a finite logit, found none among ", logits.size());
  const size_t k = static_cast<size_t>(params.top_k);
  const Ranked last = k > 0 && k < logits.size() ? last_of_top_k(logits, k) : Ranked{};
  std::vector<Candidate> candidates = weigh(logits, logits[best], last, params.temperature);
  if (params.top_p < 1) keep_top_p(candidates, params.top_p);
  // min_p has 24 bits and kMaxWeight is a power of two: the product is exact.
  const double threshold = static_cast<double>(params.min_p) * static_cast<double>(kMaxWeight);
  if (params.min_p > 0)
    std::erase_if(candidates, [&](const Candidate& c) { return static_cast<double>(c.weight) < threshold; });
  return candidates;
}

}  // namespace kl
