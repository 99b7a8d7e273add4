#include "text/long_text.h"

#include <algorithm>

#include "text/unicode_class.h"
#include "text/utf8.h"

namespace kl {
namespace {
constexpr int kBlock = 400'000;
constexpr int kRun = 25'000;
}  // namespace

LongTextCutter::LongTextCutter(std::string_view text)
    : p_(text.data()), end_(text.data() + text.size()), classes_(unicode_classes()), block_left_(kBlock) {}

std::string_view LongTextCutter::next() {
  const char* const begin = p_;
  if (run_ == 0 && end_ - p_ <= std::min(kRun, block_left_)) p_ = end_;  // too short for any cut
  while (p_ < end_) {
    if (block_left_ == 0) {
      block_left_ = kBlock, run_ = 0;
      break;
    }
    const Utf8Char c = utf8_char(p_, end_);
    const bool space = classes_[c.code] & kPythonSpace;
    if (space != run_space_) {
      run_space_ = space, run_ = 0;
    } else if (run_ == kRun) {
      run_ = 0;
      break;
    }
    ++run_;
    --block_left_;
    p_ += c.length;
  }
  return {begin, static_cast<size_t>(p_ - begin)};
}

}  // namespace kl
