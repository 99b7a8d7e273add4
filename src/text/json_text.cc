#include "text/json_text.h"

#include <charconv>
#include <cmath>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io/quote.h"

namespace kl {
namespace {

constexpr int kDeepest = 100;

// repr(float): the shortest digits that read back as the same number, and an exponent only below 1e-4 and
// from 1e16 on.
void append_float(std::string& out, double value) {
  const double size = std::abs(value);
  const bool plain = size == 0 || (size >= 1e-4 && size < 1e16);
  char digits[32];  // 17 digits, sign, point and exponent, or up to 4 zeros before them
  const auto end = std::to_chars(digits, digits + sizeof digits, value,
                                 plain ? std::chars_format::fixed : std::chars_format::scientific)
                       .ptr;
  const std::string_view text(digits, static_cast<size_t>(end - digits));
  out += text;
  if (plain && text.find('.') == std::string_view::npos) out += ".0";
}

void append_json(std::string& out, const nlohmann::json& value, bool compact) {
  using nlohmann::json;
  if (value.is_number_float()) return append_float(out, value.get<double>());
  if (!value.is_structured()) {
    out += value.dump(-1, ' ', false, json::error_handler_t::replace);
    return;
  }
  const char* const comma = compact ? "," : ", ";
  const char* const colon = compact ? ":" : ": ";
  const char* separator = "";
  out += value.is_object() ? '{' : '[';
  for (const auto& [key, item] : value.items()) {  // json keeps objects sorted by key
    out += separator;
    if (value.is_object()) append_json(out, json(key), compact), out += colon;
    append_json(out, item, compact);
    separator = comma;
  }
  out += value.is_object() ? '}' : ']';
}

}  // namespace

nlohmann::json parse_json(std::string_view text, std::string_view what) {
  using nlohmann::json;
  const auto bounded = [what](int outer, json::parse_event_t event, json&) {
    const bool begins =
        event == json::parse_event_t::array_start || event == json::parse_event_t::object_start;
    KL_CHECK(!begins || outer < kDeepest, what, ": nested deeper than ", kDeepest, " levels");
    return true;
  };
  try {
    return json::parse(text, bounded);
  } catch (const json::exception& error) {
    throw Error(cat(what, ": not JSON: ", printable(error.what())));
  }
}

std::string python_json(const nlohmann::json& value, bool compact) {
  std::string out;
  append_json(out, value, compact);
  return out;
}

}  // namespace kl
