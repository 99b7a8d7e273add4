// From logits to the tokens that may be drawn: temperature, top-k, top-p and min-p.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/sample/sample.h"
#include "ops/sample/weight.h"

namespace kl {

struct Candidate {
  int32_t token;
  uint64_t weight;  // in proportion to the probability; the most probable token has kMaxWeight
};
uint64_t total_weight(const std::vector<Candidate>&);

// Index of the largest finite logit, the first among equals; logits.size() if none is finite.
size_t most_probable(std::span<const float> logits);

// What is left after all filters, ids ascending, at least one. Throws kl::Error if no logit is finite.
// params.temperature > 0.
std::vector<Candidate> find_candidates(std::span<const float> logits, const SampleParams& params);

}  // namespace kl
