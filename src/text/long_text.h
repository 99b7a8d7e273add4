// Long texts are encoded in pieces, as Kimi's tokenizer does: blocks of 400,000 characters, and within a
// block a cut before the character that would make a run of whitespace, or of anything else, 25,001 long. So
// no pre-token is longer than 25,000 characters. Ill-formed bytes count as one character per maximal subpart.
// What is cut is the text between special tokens, each stretch counted from its own beginning, so that no
// special token is ever cut apart.
#pragma once

#include <cstdint>
#include <string_view>

namespace kl {

class LongTextCutter {
 public:
  explicit LongTextCutter(std::string_view text);
  // The next piece, not empty; empty when the text is used up.
  std::string_view next();

 private:
  const char* p_;
  const char* end_;
  const uint8_t* classes_;
  int block_left_;          // characters until the block ends
  int run_ = 0;             // length of the run before p_
  bool run_space_ = false;  // the run is whitespace
};

}  // namespace kl
