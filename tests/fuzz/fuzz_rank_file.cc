// The tokenizer's files: a rank file ("base64 rank" lines), or, if the input begins with a brace,
// tokenizer_config.json. What is accepted can encode any bytes, and gives them back.
#include <vector>

#include "fuzz.h"
#include "testing/files.h"
#include "text/bpe.h"
#include "text/rank_table.h"
#include "text/tokenizer.h"

namespace kl::fuzz {
namespace {

constexpr int kVocab = 2000;

// Lines for the 256 bytes. Few mutations of a file that needs them all would leave it acceptable, so that
// inputs are also read as what follows them.
const std::string& single_bytes() {
  static const std::string lines = [] {
    constexpr char kAlphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    for (unsigned byte = 0; byte < 256; ++byte) {
      text += kAlphabet[byte >> 2];
      text += kAlphabet[(byte & 3) << 4];
      text += cat("== ", byte, "\n");
    }
    return text;
  }();
  return lines;
}

void check_table(const RankTable& table, std::string_view text) {
  FUZZ_REQUIRE(table.size() >= 256 && table.size() <= kVocab);
  for (int32_t rank = 0; rank < table.size(); ++rank) {
    const std::string_view bytes = table.bytes(rank);
    FUZZ_REQUIRE(!bytes.empty() && table.find(bytes.data(), bytes.size()) == static_cast<uint32_t>(rank),
                 "rank ", rank);
  }
  if (text.empty()) return;
  std::vector<int32_t> ids;
  BpeScratch scratch;
  bpe_encode(table, text, ids, scratch);
  std::string joined;
  for (const int32_t id : ids) {
    FUZZ_REQUIRE(id >= 0 && id < table.size());
    joined += table.bytes(id);
  }
  FUZZ_REQUIRE(joined == text);
}

void check_tokenizer_config(std::string_view json) {
  static const testing::TempDir folder;
  static const bool written = (testing::write_file(folder / "tiktoken.model", single_bytes()), true);
  FUZZ_REQUIRE(written);
  testing::write_file(folder / "tokenizer_config.json", std::string(json));
  accepted([&] {
    const Tokenizer tokenizer = Tokenizer::load(folder.path(), 300);
    FUZZ_REQUIRE(tokenizer.ranks() == 256 && tokenizer.vocab_size() == 300);
    for (int32_t id = 256; id < 300; ++id) {
      FUZZ_REQUIRE(tokenizer.special_id(tokenizer.bytes_of(id)) == id, "id ", id);
      FUZZ_REQUIRE(tokenizer.encode(tokenizer.bytes_of(id), true) == std::vector<int32_t>{id}, "id ", id);
    }
    std::string joined;
    for (const int32_t id : tokenizer.encode(json, true)) joined += tokenizer.bytes_of(id);
    FUZZ_REQUIRE(joined == json);
  });
}

}  // namespace
}  // namespace kl::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kl;
  using namespace kl::fuzz;
  const std::string_view text = as_text(data, size);
  if (text.starts_with('{')) {
    check_tokenizer_config(text);
    return 0;
  }
  const std::string more = single_bytes() + std::string(text);
  accepted([&] { check_table(RankTable::parse(more, "rank file", kVocab), text); });
  accepted([&] { check_table(RankTable::parse(text, "rank file", kVocab), text); });
  return 0;
}
