// What the tests of this folder share: Kimi's real vocabulary, a tiny one, and texts that are hard to cut.
#pragma once

#include <ctime>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <rapidcheck.h>

#include "base/check.h"
#include "testing/golden.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace kl::testing {

constexpr int kKimiVocab = 163840;

inline const std::string& kimi_rank_file() {
  static const std::string file = read_text_file(golden_path("kimi-vocab/kimi_k2.tiktoken"));
  return file;
}

// Some of the names of Kimi's tokenizer_config.json, with the two ids beyond the embedding.
inline const Tokenizer& kimi_tokenizer() {
  static const Tokenizer tokenizer =
      Tokenizer::from_memory(kimi_rank_file(),
                             {{163584, "[BOS]"},
                              {163585, "[EOS]"},
                              {163586, "<|im_end|>"},
                              {163587, "<|im_user|>"},
                              {163588, "<|im_assistant|>"},
                              {163593, "[EOT]"},
                              {163594, "<|im_system|>"},
                              {163595, "<|tool_calls_section_begin|>"},
                              {163596, "<|tool_calls_section_end|>"},
                              {163597, "<|tool_call_begin|>"},
                              {163598, "<|tool_call_argument_begin|>"},
                              {163599, "<|tool_call_end|>"},
                              {163601, "<|im_middle|>"},
                              {163838, "[UNK]"},
                              {163839, "[PAD]"},
                              {163840, "<|reserved_token_163840|>"},
                              {163841, "<|reserved_token_163841|>"}},
                             kKimiVocab, {163595, 163596, 163597, 163598, 163599});
  return tokenizer;
}

inline std::string base64(std::string_view bytes) {
  constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t bits = 0;
    for (size_t k = 0; k < 3; ++k)
      bits = bits << 8 | (i + k < bytes.size() ? static_cast<uint8_t>(bytes[i + k]) : 0u);
    for (size_t k = 0; k < 4; ++k) out += i + k <= bytes.size() ? kAlphabet[bits >> (18 - 6 * k) & 63] : '=';
  }
  return out;
}

// A rank file: the 256 bytes, then `tokens`.
inline std::string rank_file(const std::vector<std::string>& tokens) {
  std::string file;
  for (int byte = 0; byte < 256; ++byte)
    file += cat(base64(std::string(1, static_cast<char>(byte))), " ", byte, "\n");
  for (size_t i = 0; i < tokens.size(); ++i) file += cat(base64(tokens[i]), " ", 256 + i, "\n");
  return file;
}

// Text of every kind of character that the split pattern tells apart, well-formed.
inline rc::Gen<std::string> mixed_text() {
  const auto piece = rc::gen::element<std::string>(
      " ", " ", "  ", "\t", "\n", "\r\n", "\u00A0", "\u2003", "\u0085", "\u180E", "\x1C", "a", "bc", "The",
      "HTTP", "Q", "\u00E9", "\u0421\u0442", "\u0130", "\u01C5", "\u02B0", "\u00AA", "\u3042", "\u30AB",
      "\u30FC", "\uD55C", "\u0E01", "\u0301", "\u093E", "\u6F22", "\u5B57", "\u3005", "\u3007", "\u3021",
      "\u2E80", "\u3002", "1", "23", "4567", "\u00B2", "\u0664", "\u2167", "!", "/", "...", "<|", "|>", "\"",
      "'", "'s", "'S", "'\u017F", "'ll", "'lL", "'rE", "'x", "\U0001F60A", "\u200D", "\uFFFD", "\uE000",
      "[BOS]", "<|im_end|>");
  return rc::gen::map(rc::gen::container<std::vector<std::string>>(piece),
                      [](const std::vector<std::string>& pieces) {
                        std::string text;
                        for (const std::string& p : pieces) text += p;
                        return text;
                      });
}

// Any bytes, many of them parts of UTF-8 sequences.
inline rc::Gen<std::string> any_bytes() {
  const auto byte =
      rc::gen::oneOf(rc::gen::arbitrary<char>(),
                     rc::gen::element('\xE2', '\x82', '\xAC', '\xF0', '\x9F', '\x98', '\x8A', '\xC3', '\xA9',
                                      '\xED', '\xA0', '\xF4', '\x90', ' ', 'a', '\n'));
  return rc::gen::container<std::string>(byte);
}

// Of this process: what others do on the machine does not count.
inline double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

// The message of the kl::Error that f throws, or "".
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

}  // namespace kl::testing
