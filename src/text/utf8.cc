#include "text/utf8.h"

namespace kl {

size_t append_readable(std::string& out, std::string_view bytes, bool final) {
  const char* const end = bytes.data() + bytes.size();
  const char* copied = bytes.data();  // everything before is in `out`
  const char* p = copied;
  while (p < end) {
    const Utf8Char c = utf8_char(p, end);
    if (c.kind == Utf8Char::Kind::unfinished && !final) break;
    if (c.kind != Utf8Char::Kind::well_formed) {
      out.append(copied, p).append("\xEF\xBF\xBD");
      copied = p + c.length;
    }
    p += c.length;
  }
  out.append(copied, p);
  return static_cast<size_t>(p - bytes.data());
}

void append_utf8(std::string& out, char32_t code) {
  const auto tail = [code](int shift) { return static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += tail(6), out += tail(0);
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += tail(12), out += tail(6), out += tail(0);
  }
}

}  // namespace kl
