// The tokenizer's door: reading its files, text to ids, and an id's bytes. Ids to text is detokenizer.cc.
#include "text/tokenizer.h"

#include <algorithm>
#include <charconv>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io/checkpoint.h"
#include "io/quote.h"
#include "text/bpe.h"
#include "text/json_text.h"
#include "text/long_text.h"
#include "text/pretokenizer.h"
#include "text/rank_table.h"
#include "text/special_tokens.h"

namespace kl {
namespace {

constexpr int kMaxVocab = 1 << 20;  // six times Kimi's; bounds the memory that a hostile config asks for
constexpr size_t kMaxConfigBytes = size_t{16} << 20;

struct AddedTokens {
  std::map<int32_t, std::string> names;
  std::set<int32_t> kept;  // "special": false
};

AddedTokens read_added_tokens(const std::string& path) {
  using nlohmann::json;
  const json config = parse_json(read_text_file(path, kMaxConfigBytes), path);
  KL_CHECK(config.is_object(), path, ": expected an object");
  AddedTokens added;
  const auto decoder = config.find("added_tokens_decoder");
  if (decoder == config.end()) return added;
  KL_CHECK(decoder->is_object(), path, ": added_tokens_decoder: expected an object");
  for (const auto& [key, token] : decoder->items()) {
    int32_t id = -1;
    const auto [stop, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    KL_CHECK(error == std::errc{} && stop == key.data() + key.size() && id >= 0, path,
             ": added_tokens_decoder: ", in_quotes(key), " is not an id");
    const auto content = token.is_object() ? token.find("content") : token.end();
    KL_CHECK(token.is_object() && content != token.end() && content->is_string(), path,
             ": added_tokens_decoder: ", id, ": expected an object with a string \"content\"");
    KL_CHECK(added.names.emplace(id, content->get<std::string>()).second, path,
             ": added_tokens_decoder: the id ", id, " twice");
    const auto special = token.find("special");
    KL_CHECK(special == token.end() || special->is_boolean(), path, ": added_tokens_decoder: ", id,
             ": expected true or false for \"special\"");
    if (special != token.end() && !special->get<bool>()) added.kept.insert(id);
  }
  return added;
}

RankTable read_ranks(std::string_view file, const std::string& name, int vocab_size) {
  KL_CHECK(vocab_size <= kMaxVocab, "vocab_size is ", vocab_size, ", expected at most ", kMaxVocab);
  return RankTable::parse(file, name, vocab_size);
}

}  // namespace

struct Tokenizer::Impl {
  RankTable ranks;
  SpecialTokens specials;
  int vocab_size;
  Pretokenizer pretokenizer;

  Impl(RankTable table, const AddedTokens& added, int vocab, const std::string& config_name)
      : ranks(std::move(table)),
        specials(ranks.size(), vocab, added.names, added.kept, config_name),
        vocab_size(vocab) {}

  void check(int32_t id) const {
    KL_CHECK(id >= 0 && id < vocab_size, "token id ", id, ", expected 0 to ", vocab_size - 1);
  }

  void encode_plain(std::string_view text, BpeScratch& scratch, std::vector<int32_t>& ids) const {
    LongTextCutter cutter(text);
    for (std::string_view piece = cutter.next(); !piece.empty(); piece = cutter.next()) {
      const char* const end = piece.data() + piece.size();
      for (const char* p = piece.data(); p < end;) {
        const char* const next = pretokenizer.pretoken_end(p, end);
        bpe_encode(ranks, {p, static_cast<size_t>(next - p)}, ids, scratch);
        p = next;
      }
    }
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::load(const std::string& directory, int vocab_size) {
  const std::string rank_path = directory + "/tiktoken.model";
  const std::string config_path = directory + "/tokenizer_config.json";
  RankTable ranks = read_ranks(read_text_file(rank_path), rank_path, vocab_size);
  const AddedTokens added = read_added_tokens(config_path);
  return Tokenizer(std::make_unique<Impl>(std::move(ranks), added, vocab_size, config_path));
}

Tokenizer Tokenizer::from_memory(std::string_view rank_file,
                                 const std::map<int32_t, std::string>& special_names, int vocab_size,
                                 const std::set<int32_t>& kept) {
  RankTable ranks = read_ranks(rank_file, "rank file", vocab_size);
  return Tokenizer(std::make_unique<Impl>(std::move(ranks), AddedTokens{special_names, kept}, vocab_size,
                                          "special names"));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool parse_special) const {
  std::vector<int32_t> ids;
  encode_append(text, parse_special, ids);
  return ids;
}

void Tokenizer::encode_append(std::string_view text, bool parse_special, std::vector<int32_t>& ids) const {
  BpeScratch scratch;
  size_t done = 0;
  while (parse_special) {
    const auto hit = impl_->specials.next(text, done);
    if (!hit) break;
    impl_->encode_plain(text.substr(done, hit->position - done), scratch, ids);
    ids.push_back(hit->id);
    done = hit->position + hit->length;
  }
  impl_->encode_plain(text.substr(done), scratch, ids);
}

std::string_view Tokenizer::bytes_of(int32_t id) const {
  impl_->check(id);
  return id < ranks() ? impl_->ranks.bytes(id) : std::string_view(impl_->specials.name(id));
}

bool Tokenizer::is_special(int32_t id) const {
  impl_->check(id);
  return id >= ranks();
}

bool Tokenizer::is_skipped(int32_t id) const { return is_special(id) && !impl_->specials.is_kept(id); }

std::optional<int32_t> Tokenizer::special_id(std::string_view name) const {
  return impl_->specials.find(name);
}

int Tokenizer::vocab_size() const { return impl_->vocab_size; }
int Tokenizer::ranks() const { return impl_->ranks.size(); }

}  // namespace kl
