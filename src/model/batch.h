// What one forward pass computes: T new tokens of N sequences, packed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kl {

struct Batch {
  std::vector<int32_t> ids;         // [T]
  std::vector<int32_t> cu_seqlens;  // [N + 1]: sequence n owns rows [cu_seqlens[n], cu_seqlens[n + 1])
  std::vector<int32_t> slots;       // [N], distinct: where each sequence's state is
  std::vector<int32_t> logit_rows;  // rows of the batch whose logits are wanted, any order

  int64_t tokens() const { return static_cast<int64_t>(ids.size()); }
  int64_t sequences() const { return static_cast<int64_t>(slots.size()); }

  // Appends a sequence; logits of its last row (if it has one) or of all its rows.
  enum class Logits { none, last, all };
  void add(int slot, std::span<const int32_t> tokens, Logits logits) {
    if (cu_seqlens.empty()) cu_seqlens.push_back(0);
    const auto first = static_cast<int32_t>(ids.size());
    ids.insert(ids.end(), tokens.begin(), tokens.end());
    const auto end = static_cast<int32_t>(ids.size());
    cu_seqlens.push_back(end);
    slots.push_back(slot);
    if (end == first || logits == Logits::none) return;
    for (int32_t row = logits == Logits::all ? first : end - 1; row < end; ++row) logit_rows.push_back(row);
  }
};

}  // namespace kl
