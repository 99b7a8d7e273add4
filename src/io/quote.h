// Text of a hostile file inside an error message: bounded in length, and without bytes that a terminal obeys.
#pragma once

#include <string>
#include <string_view>

namespace kl {

// Everything outside printable ASCII as \xNN; cut after `limit` bytes.
inline std::string printable(std::string_view text, size_t limit = 200) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += "\\x", out += kHex[byte >> 4], out += kHex[byte & 15];
    }
  }
  return text.size() > limit ? out + "..." : out;
}

inline std::string in_quotes(std::string_view text) { return '"' + printable(text) + '"'; }

}  // namespace kl
