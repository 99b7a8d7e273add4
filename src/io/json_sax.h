// What this folder's two readers of JSON share. Both are SAX handlers: a checkpoint has tens of thousands of
// names, and a tree of JSON values for them would cost more than all the rest of opening it. Handlers say
// what is wrong by throwing; their events always return true.
#pragma once

#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/check.h"
#include "io/quote.h"

namespace kl {

class JsonHandler {
 public:
  explicit JsonHandler(const std::string& file) : file_(file) {}

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& e) {
    detail::fail(cat(file_, ": not valid JSON at byte ", position, " of the text: ", printable(e.what())));
  }
  bool binary(nlohmann::json::binary_t&) {
    return true;
  }  // part of the interface; JSON text has no such value

 protected:
  const std::string& file_;  // opens every message
};

// Walks the whole of `text`, to which `handler` belongs. Refuses bytes behind the closing brace.
template <class Handler>
void walk_json(std::string_view text, Handler& handler, const std::string& file) {
  // The parser takes a zero byte for the end of its input and would not look at what follows.
  KL_CHECK(text.empty() || !std::memchr(text.data(), 0, text.size()), file,
           ": not valid JSON: the text contains a zero byte");
  nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &handler);
}

}  // namespace kl
