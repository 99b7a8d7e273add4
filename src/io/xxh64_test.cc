// XXH64 against values of the published implementation, and in pieces.
#include "io/xxh64.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <string>

namespace kl {
namespace {

std::string pattern(int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(i * 7);
  return text;
}

TEST(Xxh64, PublishedValues) {
  const struct {
    int bytes;
    uint64_t hash;
  } cases[] = {{0, 0xef46db3751d8e999u},  {1, 0xe934a84adb052768u},  {3, 0x9ff70a635a6209abu},
               {31, 0xf187c62b1e722b7u},  {32, 0x91b0cb0931a8c629u}, {33, 0x931b043cf8d65b94u},
               {100, 0x8e2272c08247d5dbu}};
  for (const auto& c : cases) {
    const std::string text = pattern(c.bytes);
    EXPECT_EQ(xxh64(text.data(), text.size()), c.hash) << c.bytes;
  }
}

RC_GTEST_PROP(Xxh64, PiecesMakeTheWhole, (const std::vector<std::string>& pieces)) {
  Xxh64 hash;
  std::string whole;
  for (const std::string& piece : pieces) hash.update(piece), whole += piece;
  RC_ASSERT(hash.digest() == xxh64(whole.data(), whole.size()));
}

}  // namespace
}  // namespace kl
