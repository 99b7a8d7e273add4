#include "sample_text.h"

#include <iterator>

namespace kl::app {

namespace {

// A sentence is one of each, in this order.
constexpr const char* kOpenings[] = {"",
                                     "In the morning, ",
                                     "Later that day, ",
                                     "As the rain began, ",
                                     "Without a word, ",
                                     "Before supper, ",
                                     "On the way home, ",
                                     "When the bells rang, ",
                                     "After a long silence, "};
constexpr const char* kQualities[] = {"old",  "young", "patient", "careful", "tired",    "cheerful",
                                      "tall", "quiet", "curious", "honest",  "forgetful"};
constexpr const char* kPeople[] = {"miller",    "teacher",  "sailor", "gardener", "clerk",
                                   "widow",     "baker",    "doctor", "fiddler",  "carpenter",
                                   "neighbour", "stranger", "boy"};
constexpr const char* kActions[] = {"carried",  "repaired", "painted", "forgot",     "described", "followed",
                                    "borrowed", "admired",  "counted", "looked for", "put away",  "sold"};
constexpr const char* kThings[] = {"a lantern", "the wooden chest", "an empty basket", "the broken clock",
                                   "a letter",  "the garden gate",  "a pair of boots", "the blue cart",
                                   "a map",     "the last apple",   "two candles",     "a silver spoon"};
constexpr const char* kPlaces[] = {"across the bridge", "behind the church", "near the river",
                                   "in the kitchen",    "at the market",     "beside the old road",
                                   "under the elms",    "on the hill",       "by the window"};

}  // namespace

std::string SampleText::sentence() {
  const auto pick = [&](const auto& words) -> std::string {
    return words[random_.below(drawn_++, static_cast<uint32_t>(std::size(words)))];
  };
  std::string s = pick(kOpenings);
  s += s.empty() ? "The " : "the ";
  s += pick(kQualities) + " ", s += pick(kPeople) + " ", s += pick(kActions) + " ", s += pick(kThings) + " ";
  return s + pick(kPlaces) + ".";
}

std::vector<int32_t> sample_ids(const Tokenizer* tokenizer, int vocab_size, int64_t count, uint64_t seed) {
  std::vector<int32_t> ids;
  const CounterRandom random(seed, "sample ids");
  SampleText text(seed);
  while (static_cast<int64_t>(ids.size()) < count) {
    if (tokenizer) {
      tokenizer->encode_append(text.sentence() + " ", false, ids);
    } else {
      ids.push_back(static_cast<int32_t>(random.below(ids.size(), static_cast<uint32_t>(vocab_size))));
    }
  }
  ids.resize(static_cast<size_t>(count));
  return ids;
}

}  // namespace kl::app
