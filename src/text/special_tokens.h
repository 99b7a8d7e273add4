// The special ids of a vocabulary, their names, and where these names stand in a text.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kl {

class SpecialTokens {
 public:
  // The ids [first, end); the ones without a name are "<|reserved_token_{id}|>". Names of ids from `end` on
  // are left out: Kimi's tokenizer has two more ids than its embedding has rows. `kept`: see is_kept.
  // `where` begins the messages of errors.
  SpecialTokens(int32_t first, int32_t end, const std::map<int32_t, std::string>& names,
                const std::set<int32_t>& kept, const std::string& where);

  const std::string& name(int32_t id) const { return names_[static_cast<size_t>(id - first_)]; }
  std::optional<int32_t> find(std::string_view name) const;
  // Flagged "special": false, as Kimi's tool tokens are: they stay in a text without special tokens.
  bool is_kept(int32_t id) const { return kept_[static_cast<size_t>(id - first_)]; }

  struct Hit {
    size_t position, length;
    int32_t id;
  };
  // The first name in `text` at or after `from`, the longest one there.
  std::optional<Hit> next(std::string_view text, size_t from) const;

 private:
  // A trie of the names. `id` is that of the name that ends here, or -1.
  struct Node {
    int32_t id = -1;
    std::vector<std::pair<char, int32_t>> children;
  };
  int32_t child(int32_t node, char c) const;  // -1: none
  void insert(const std::string& name, int32_t id, const std::string& where);
  std::optional<Hit> match(std::string_view text, size_t at) const;

  int32_t first_;
  std::vector<std::string> names_;  // of first_, first_ + 1, ...
  std::vector<bool> kept_;
  std::vector<Node> nodes_;
  std::array<bool, 256> begins_{};  // bytes that begin a name
};

}  // namespace kl
