#include "text/bpe.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "testing/random.h"
#include "text/test_text.h"

namespace kl {
namespace {

std::vector<int32_t> encode(const RankTable& table, std::string_view text) {
  std::vector<int32_t> ids;
  BpeScratch scratch;
  bpe_encode(table, text, ids, scratch);
  return ids;
}

// The definition, word by word.
std::vector<int32_t> encode_by_definition(const RankTable& table, const std::string& text) {
  const auto rank = [&](const std::string& bytes) { return table.find(bytes.data(), bytes.size()); };
  if (rank(text) != RankTable::kNone) return {static_cast<int32_t>(rank(text))};
  std::vector<std::string> parts;
  for (const char c : text) parts.emplace_back(1, c);
  while (true) {
    uint32_t lowest = RankTable::kNone;
    size_t where = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const uint32_t pair = rank(parts[i] + parts[i + 1]);
      if (pair < lowest) lowest = pair, where = i;
    }
    if (lowest == RankTable::kNone) break;
    parts[where] += parts[where + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
  std::vector<int32_t> ids;
  for (const std::string& part : parts) ids.push_back(static_cast<int32_t>(rank(part)));
  return ids;
}

// A vocabulary as training makes it, over an alphabet of three letters: each token joins two earlier ones, so
// that pairs compete everywhere.
RankTable random_table(uint64_t seed) {
  testing::Random random(seed);
  std::vector<std::string> tokens{"a", "b", "c"}, merged;
  for (int i = 0; i < 60; ++i) {
    const auto pick = [&] {
      return tokens[static_cast<size_t>(random.integer(0, static_cast<int64_t>(tokens.size()) - 1))];
    };
    const std::string token = pick() + pick();
    if (token.size() > 24 || std::find(tokens.begin(), tokens.end(), token) != tokens.end()) continue;
    tokens.push_back(token);
    merged.push_back(token);
  }
  return RankTable::parse(testing::rank_file(merged), "random", 1000);
}

RC_GTEST_PROP(Bpe, RandomVocabulariesAsTheDefinitionSays, ()) {
  const RankTable table = random_table(*rc::gen::arbitrary<uint32_t>());
  // Sizes on both sides of the change of method at 128 bytes.
  const auto size = *rc::gen::element<size_t>(1, 2, 3, 7, 40, 127, 128, 129, 500);
  const std::string text = *rc::gen::container<std::string>(size, rc::gen::element('a', 'b', 'c'));
  RC_ASSERT(encode(table, text) == encode_by_definition(table, text));
}

RC_GTEST_PROP(Bpe, AnyBytesAsTheDefinitionSays, ()) {
  static const RankTable table = RankTable::parse(testing::kimi_rank_file(), "kimi", testing::kKimiVocab);
  std::string bytes = *rc::gen::scale(3.0, testing::any_bytes());
  if (bytes.empty()) bytes = "x";
  RC_ASSERT(encode(table, bytes) == encode_by_definition(table, bytes));
}

TEST(Bpe, TiesGoToTheLeft) {
  const RankTable table = RankTable::parse(testing::rank_file({"aa"}), "tiny", 1000);
  EXPECT_EQ(encode(table, "aaa"), (std::vector<int32_t>{256, 'a'}));
  std::vector<int32_t> expected(100, 256);
  expected.push_back('a');
  EXPECT_EQ(encode(table, std::string(201, 'a')), expected);
}

// The short cut of taking a whole token changes nothing in the real vocabulary.
TEST(Bpe, EveryTokenMergesToItself) {
  const RankTable table = RankTable::parse(testing::kimi_rank_file(), "kimi", testing::kKimiVocab);
  for (int32_t rank = 0; rank < table.size(); ++rank)
    ASSERT_EQ(encode(table, table.bytes(rank)), std::vector<int32_t>{rank});
}

}  // namespace
}  // namespace kl
