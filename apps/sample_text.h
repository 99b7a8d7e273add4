// Text and token ids to try a model on: made up on the spot, the same for the same seed everywhere.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/counter_random.h"
#include "text/tokenizer.h"

namespace kl::app {

// Plain English sentences about nothing in particular.
class SampleText {
 public:
  explicit SampleText(uint64_t seed) : random_(seed, "sample text") {}
  std::string sentence();  // "The old miller carried a lantern across the bridge."

 private:
  CounterRandom random_;
  uint64_t drawn_ = 0;
};

// `count` ids: of sample text, or, without a tokenizer, random ones.
std::vector<int32_t> sample_ids(const Tokenizer*, int vocab_size, int64_t count, uint64_t seed);

}  // namespace kl::app
