// Errors. A door (an operator's entry, a file reader, a command) checks what it is given with KL_CHECK and
// throws kl::Error whose message says what was found and what was expected. Nothing under src/ exits, aborts
// or prints.
#pragma once

#include <charconv>
#include <concepts>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace kl {

// What went wrong, in words for the user. Programs catch it at their outermost level.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}
};

namespace detail {
inline void append(std::string& out, std::string_view text) { out += text; }
inline void append(std::string& out, char c) { out += c; }
// Exactly bool: a string literal would rather become a bool than a string_view.
template <std::same_as<bool> T>
void append(std::string& out, T b) {
  out += b ? "true" : "false";
}
template <class T>
concept Number = std::is_arithmetic_v<T> && !std::is_same_v<T, bool> && !std::is_same_v<T, char>;
template <Number T>
void append(std::string& out, T number) {
  char digits[64];
  const auto end = std::to_chars(digits, digits + sizeof digits, number).ptr;
  out.append(digits, end);
}
[[noreturn]] void fail(const std::string& message);
}  // namespace detail

// cat("layer ", 3, ": ", 0.5) == "layer 3: 0.5"
template <class... Parts>
std::string cat(const Parts&... parts) {
  std::string out;
  (detail::append(out, parts), ...);
  return out;
}

}  // namespace kl

// KL_CHECK(condition, parts of the message...)
#define KL_CHECK(condition, ...)                  \
  do {                                            \
    if (!(condition)) [[unlikely]]                \
      ::kl::detail::fail(::kl::cat(__VA_ARGS__)); \
  } while (false)
