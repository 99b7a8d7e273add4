// Strings <-> token ids: Kimi's rank file, its split pattern and its special tokens.
//
// A text is any bytes. Where they are not UTF-8 they are encoded as they are, so that the bytes of encode()'s
// ids, joined, are always the text; decode() then shows U+FFFD in their place. How the well-formed rest is
// cut does not change, except that an ill-formed part counts as a symbol.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace kl {

class Tokenizer {
 public:
  // Reads tiktoken.model and tokenizer_config.json of a checkpoint directory. Ids 0 .. n-1 are the n ranks, n
  // .. vocab_size-1 the special ids: named by added_tokens_decoder, otherwise "<|reserved_token_{id}|>".
  // Throws kl::Error naming the file and line. Names of ids from vocab_size on are ignored: Kimi's file has
  // two that the embedding has no rows for.
  static Tokenizer load(const std::string& directory, int vocab_size);
  // The same from memory: the rank file's text, names of special ids, and which of these are flagged
  // "special": false.
  static Tokenizer from_memory(std::string_view rank_file,
                               const std::map<int32_t, std::string>& special_names, int vocab_size,
                               const std::set<int32_t>& kept = {});

  // Special strings in `text` become their ids only with `parse_special`; otherwise they are ordinary text.
  // Any thread may encode and decode at any time.
  std::vector<int32_t> encode(std::string_view text, bool parse_special = false) const;
  void encode_append(std::string_view text, bool parse_special, std::vector<int32_t>& ids) const;

  // Bytes of the ids joined, then UTF-8 with one U+FFFD for each maximal ill-formed part. Throws for an id
  // out of range.
  std::string decode(const std::vector<int32_t>& ids, bool skip_special = false) const;
  // Bytes of one id; a special id gives its name.
  std::string_view bytes_of(int32_t id) const;

  bool is_special(int32_t id) const;  // not a rank
  // What skip_special leaves out: the special ids but those flagged "special": false (Kimi's tool tokens),
  // which whoever reads the text needs to see.
  bool is_skipped(int32_t id) const;
  std::optional<int32_t> special_id(std::string_view name) const;  // "[BOS]", "<|im_end|>", ...
  int vocab_size() const;
  int ranks() const;

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl>);
  std::unique_ptr<Impl> impl_;
};

// Turns a stream of ids into text that never ends inside a character: bytes of an unfinished character are
// held back.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special = false)
      : tokenizer_(&tokenizer), skip_special_(skip_special) {}
  std::string push(int32_t id);  // the text that is complete now, maybe ""
  std::string finish();          // what is left; an unfinished character becomes U+FFFD

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;  // at most 3 bytes: the start of a character
};

}  // namespace kl
