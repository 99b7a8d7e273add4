// JSON as text: reading what may be hostile, and writing it the way Python's json.dumps does, which is what
// the model saw in training.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace kl {

// Throws kl::Error that begins with `what` ("the tools") if `text` is not JSON or is nested deeper than 100.
nlohmann::json parse_json(std::string_view text, std::string_view what);

// json.dumps(value, sort_keys=True, ensure_ascii=False): on one line, keys sorted at every depth. Separators
// are "," and ":" if `compact`, else ", " and ": ". Integers beyond 64 bits come out as floating point.
std::string python_json(const nlohmann::json& value, bool compact);

}  // namespace kl
