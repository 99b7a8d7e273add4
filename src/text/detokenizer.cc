// Ids to text. A character may be spread over several ids, so text exists only where it is complete.
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace kl {

std::string Tokenizer::decode(const std::vector<int32_t>& ids, bool skip_special) const {
  std::string bytes, text;
  for (const int32_t id : ids) {
    const std::string_view token = bytes_of(id);
    if (!(skip_special && is_skipped(id))) bytes += token;
  }
  append_readable(text, bytes, true);
  return text;
}

std::string Detokenizer::push(int32_t id) {
  const std::string_view token = tokenizer_->bytes_of(id);
  std::string text;
  if (skip_special_ && tokenizer_->is_skipped(id)) return text;
  pending_ += token;
  pending_.erase(0, append_readable(text, pending_, false));
  return text;
}

std::string Detokenizer::finish() {
  std::string text;
  append_readable(text, pending_, true);
  pending_.clear();
  return text;
}

}  // namespace kl
