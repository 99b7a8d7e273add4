#include "text/special_tokens.h"

#include "base/check.h"
#include "io/quote.h"

namespace kl {
namespace {
// A search takes at most this many steps per byte of text.
constexpr size_t kLongestName = 256;
}  // namespace

SpecialTokens::SpecialTokens(int32_t first, int32_t end, const std::map<int32_t, std::string>& names,
                             const std::set<int32_t>& kept, const std::string& where)
    : first_(first), nodes_(1) {
  KL_CHECK(names.empty() || names.begin()->first >= first, where, ": ", in_quotes(names.begin()->second),
           " has the id ", names.begin()->first, ", expected one after the ", first, " ranks");
  names_.reserve(static_cast<size_t>(end - first));
  for (int32_t id = first; id < end; ++id) {
    const auto named = names.find(id);
    names_.push_back(named != names.end() ? named->second : cat("<|reserved_token_", id, "|>"));
    kept_.push_back(kept.contains(id));
    insert(names_.back(), id, where);
  }
}

void SpecialTokens::insert(const std::string& name, int32_t id, const std::string& where) {
  KL_CHECK(!name.empty() && name.size() <= kLongestName, where, ": the name of id ", id, " has ", name.size(),
           " bytes, expected 1 to ", kLongestName);
  int32_t node = 0;
  for (const char c : name) {
    int32_t next = child(node, c);
    if (next < 0) {
      next = static_cast<int32_t>(nodes_.size());
      nodes_[static_cast<size_t>(node)].children.emplace_back(c, next);
      nodes_.emplace_back();
    }
    node = next;
  }
  int32_t& owner = nodes_[static_cast<size_t>(node)].id;
  KL_CHECK(owner < 0, where, ": the ids ", owner, " and ", id, " have the same name ", in_quotes(name));
  owner = id;
  begins_[static_cast<uint8_t>(name[0])] = true;
}

int32_t SpecialTokens::child(int32_t node, char c) const {
  for (const auto& [byte, next] : nodes_[static_cast<size_t>(node)].children)
    if (byte == c) return next;
  return -1;
}

std::optional<SpecialTokens::Hit> SpecialTokens::match(std::string_view text, size_t at) const {
  std::optional<Hit> longest;
  int32_t node = 0;
  for (size_t i = at; i < text.size(); ++i) {
    node = child(node, text[i]);
    if (node < 0) break;
    const int32_t id = nodes_[static_cast<size_t>(node)].id;
    if (id >= 0) longest = {at, i + 1 - at, id};
  }
  return longest;
}

std::optional<SpecialTokens::Hit> SpecialTokens::next(std::string_view text, size_t from) const {
  for (size_t i = from; i < text.size(); ++i) {
    if (!begins_[static_cast<uint8_t>(text[i])]) continue;
    if (const auto hit = match(text, i)) return hit;
  }
  return std::nullopt;
}

std::optional<int32_t> SpecialTokens::find(std::string_view name) const {
  const auto hit = match(name, 0);
  if (!hit || hit->length != name.size()) return std::nullopt;
  return hit->id;
}

}  // namespace kl
