// What the fuzz targets share. A target hands the bytes to the library's real door; kl::Error is the only
// exception that may come out of it, and whatever else goes wrong (a sanitizer's report, another exception, a
// broken invariant) ends the program, which libFuzzer reports together with the input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/check.h"
#include "io/xxh64.h"
#include "text/utf8.h"

// An invariant. Says what is broken before it ends the program.
#define FUZZ_REQUIRE(condition, ...)                                                  \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: not so: %s\n%s\n", __FILE__, __LINE__, #condition, \
                   ::kl::cat(__VA_ARGS__).c_str());                                   \
      std::abort();                                                                   \
    }                                                                                 \
  } while (false)

namespace kl::fuzz {

// Messages quote hostile input. They have to stay short, UTF-8, and free of bytes that a terminal obeys.
inline void check_message(std::string_view message) {
  FUZZ_REQUIRE(!message.empty());
  FUZZ_REQUIRE(message.size() <= 64 << 10, message.size(), " bytes");
  const char* const end = message.data() + message.size();
  for (const char* p = message.data(); p < end;) {
    const Utf8Char c = utf8_char(p, end);
    const bool control = c.code < 0x20 || (c.code >= 0x7f && c.code < 0xa0);
    FUZZ_REQUIRE(c.kind == Utf8Char::Kind::well_formed && (!control || c.code == '\n'), "byte ",
                 p - message.data(), " of the message: ", message);
    p += c.length;
  }
}

// Whether `action` ended without a kl::Error.
template <class Action>
bool accepted(Action&& action) {
  try {
    action();
    return true;
  } catch (const Error& error) {
    check_message(error.what());
    return false;
  }
}

// For what is too slow to do for every input: true for one in `n`, always the same ones.
inline bool one_in(uint64_t n, const uint8_t* data, size_t size) { return xxh64(data, size) % n == 0; }

inline std::string_view as_text(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace kl::fuzz
