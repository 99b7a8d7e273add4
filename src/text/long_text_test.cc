#include "text/long_text.h"

#include <gtest/gtest.h>

#include "text/test_text.h"

namespace kl {
namespace {

std::vector<size_t> piece_sizes(std::string_view text) {
  std::vector<size_t> sizes;
  std::string joined;
  LongTextCutter cutter(text);
  for (std::string_view piece = cutter.next(); !piece.empty(); piece = cutter.next()) {
    sizes.push_back(piece.size());
    joined += piece;
  }
  EXPECT_TRUE(joined == text);
  return sizes;
}

std::string repeated(std::string_view unit, size_t times) {
  std::string text;
  for (size_t i = 0; i < times; ++i) text += unit;
  return text;
}

using Sizes = std::vector<size_t>;

TEST(LongText, ShortTextsAreWhole) {
  EXPECT_EQ(piece_sizes(""), Sizes{});
  EXPECT_EQ(piece_sizes("a"), Sizes{1});
  EXPECT_EQ(piece_sizes(std::string(25'000, 'a')), Sizes{25'000});
  EXPECT_EQ(piece_sizes(std::string(25'000, 'a') + std::string(25'000, ' ')), Sizes{50'000});
  EXPECT_EQ(piece_sizes(repeated("ab ", 100'000)), Sizes{300'000});
}

TEST(LongText, RunsAreCut) {
  EXPECT_EQ(piece_sizes(std::string(25'001, 'a')), (Sizes{25'000, 1}));
  EXPECT_EQ(piece_sizes(std::string(25'001, ' ')), (Sizes{25'000, 1}));
  EXPECT_EQ(piece_sizes("x " + std::string(60'000, 'a')), (Sizes{25'002, 25'000, 10'000}));
  EXPECT_EQ(piece_sizes(std::string(25'001, 'a') + " a"), (Sizes{25'000, 3}));
}

TEST(LongText, BlocksAreCutAndBeginARunAnew) {
  EXPECT_EQ(piece_sizes(repeated("ab ", 200'000)), (Sizes{400'000, 200'000}));
  // The block ends 10 characters into the run of b, which then may be 25,000 long again.
  const std::string text = repeated("a ", 199'995) + std::string(25'010, 'b');
  EXPECT_EQ(piece_sizes(text), (Sizes{400'000, 25'000}));
  EXPECT_EQ(piece_sizes(text + "b"), (Sizes{400'000, 25'000, 1}));
  // Cuts of runs do not move the ends of blocks: 16 runs of 25,000 are one.
  EXPECT_EQ(piece_sizes("a" + std::string(399'999, ' ') + "bc"),
            (Sizes{25'001, 25'000, 25'000, 25'000, 25'000, 25'000, 25'000, 25'000, 25'000, 25'000, 25'000,
                   25'000, 25'000, 25'000, 25'000, 24'999, 2}));
}

TEST(LongText, CountsCharactersNotBytes) {
  EXPECT_EQ(piece_sizes(repeated("漢", 25'001)), (Sizes{75'000, 3}));
  EXPECT_EQ(piece_sizes(repeated("\u3000", 25'001)), (Sizes{75'000, 3}));
  EXPECT_EQ(piece_sizes(repeated("\xE2\x82", 25'001)), (Sizes{50'000, 2}));  // ill-formed parts
  EXPECT_EQ(piece_sizes(repeated("\xFF", 25'001)), (Sizes{25'000, 1}));
  EXPECT_EQ(piece_sizes(repeated("é ", 200'001)), (Sizes{600'000, 3}));
}

// str.isspace(), not \s: U+001C is a space here.
TEST(LongText, SpacesArePythons) {
  EXPECT_EQ(piece_sizes(std::string(20'000, 'a') + "\x1C" + std::string(20'000, 'a')), Sizes{40'001});
  EXPECT_EQ(piece_sizes(std::string(20'000, 'a') + "\u180E" + std::string(20'000, 'a')),
            (Sizes{25'002, 15'001}));
}

}  // namespace
}  // namespace kl
