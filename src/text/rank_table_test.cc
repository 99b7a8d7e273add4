#include "text/rank_table.h"

#include <gtest/gtest.h>

#include "text/test_text.h"

namespace kl {
namespace {

using testing::error_of;
using testing::rank_file;

std::string parse_error(const std::string& file, int vocab_size = 1000) {
  return error_of([&] { RankTable::parse(file, "dir/tiktoken.model", vocab_size); });
}

TEST(RankTable, FindsEveryTokenAndNothingElse) {
  const RankTable table = RankTable::parse(testing::kimi_rank_file(), "kimi", testing::kKimiVocab);
  ASSERT_EQ(table.size(), 163584);
  for (int32_t rank = 0; rank < table.size(); ++rank) {
    const std::string token(table.bytes(rank));
    ASSERT_EQ(table.find(token.data(), token.size()), static_cast<uint32_t>(rank));
    if (token.size() == 2) {
      ASSERT_EQ(table.of_two_bytes(static_cast<uint8_t>(token[0]), static_cast<uint8_t>(token[1])),
                static_cast<uint32_t>(rank));
    }
  }
  EXPECT_EQ(table.find("qzxjw", 5), RankTable::kNone);
  EXPECT_EQ(table.find("qzxjwqzxjwqzxjw", 15), RankTable::kNone);
  const std::string long_text(10'000, 'a');
  EXPECT_EQ(table.find(long_text.data(), long_text.size()), RankTable::kNone);
}

TEST(RankTable, AnyOrderOfLinesAndAnyLineEnding) {
  std::string file = rank_file({"ab", "abc"}), reversed;
  for (size_t at = 0; at < file.size();) {
    const size_t end = file.find('\n', at);
    reversed = file.substr(at, end - at) + "\r\n" + reversed;
    at = end + 1;
  }
  const RankTable table = RankTable::parse("\n" + reversed + "\n", "tiny", 258);
  EXPECT_EQ(table.size(), 258);
  EXPECT_EQ(table.find("abc", 3), 257u);
  EXPECT_EQ(table.bytes(256), "ab");
  file.pop_back();  // no newline at the end
  EXPECT_EQ(RankTable::parse(file, "tiny", 258).find("abc", 3), 257u);
}

TEST(RankTable, SaysWhatIsWrongWhere) {
  const std::string good = rank_file({"ab"});
  EXPECT_EQ(parse_error(good), "");
  EXPECT_EQ(parse_error(good + "YWI\n"), "dir/tiktoken.model:258: expected \"base64 rank\"");
  for (const char* bad : {"YW?=", "YWI", "=", "====", "YW=j", "YWJj=", "Y===", "YWK=", "YR==", ""})
    EXPECT_EQ(parse_error(cat(good, bad, " 257\n")), "dir/tiktoken.model:258: not base64") << bad;
  for (const char* bad : {"", "x", "-1", "257 ", " 257", "257x", "1e3", "99999999999999999999"})
    EXPECT_EQ(parse_error(cat(good, "YWJj ", bad, "\n")), "dir/tiktoken.model:258: the rank is not a number")
        << bad;
  EXPECT_EQ(parse_error(good + "YWJj 258\n"),
            "dir/tiktoken.model:258: rank 258, but the 258 lines should have the ranks 0 to 257, each once");
  EXPECT_EQ(parse_error(good + "YWJj 3\n"), "dir/tiktoken.model:258: rank 3 again, first in line 4");
  EXPECT_EQ(parse_error(good + "YWI= 257\n"), "dir/tiktoken.model:258: the bytes of line 257 again");
  EXPECT_EQ(parse_error(good, 256), "dir/tiktoken.model: 257 ranks, expected at most vocab_size = 256");
  EXPECT_NE(parse_error(good, -5), "");
  EXPECT_EQ(parse_error("YQ== 0\n"),
            "dir/tiktoken.model: no line for the single byte 0, without which some texts cannot be encoded");
  EXPECT_NE(parse_error(""), "");
}

}  // namespace
}  // namespace kl
