// Byte pair encoding of one pre-token: start from single bytes, then merge the adjacent pair whose bytes have
// the lowest rank, leftmost on ties, until no pair has one.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text/rank_table.h"

namespace kl {

// Memory of the merges of long pre-tokens, kept between calls.
struct BpeScratch {
  struct Part {
    uint32_t start;           // its first byte
    uint32_t id;              // of its bytes
    uint32_t pair;            // rank of it and the next part together, or kNone
    uint32_t previous, next;  // part numbers
  };
  std::vector<Part> parts;
  std::vector<uint64_t> heap;  // pair << 32 | part
};

// Appends the ids of `pretoken` (not empty). n log n in its length.
void bpe_encode(const RankTable&, std::string_view pretoken, std::vector<int32_t>& ids, BpeScratch&);

}  // namespace kl
