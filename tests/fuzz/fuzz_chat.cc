// Chat and tool text, both ways. The input is what a model might write; and, cut into fields at the byte
// 0x1f, a conversation that somebody might send.
#include <algorithm>
#include <map>
#include <vector>

#include <nlohmann/json.hpp>

#include "fuzz.h"
#include "text/chat.h"
#include "text/json_text.h"

namespace kl::fuzz {
namespace {

using Event = ToolCallParser::Event;

const Tokenizer& tokenizer() {
  static const Tokenizer t = [] {
    constexpr char kAlphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string ranks;
    for (unsigned byte = 0; byte < 256; ++byte) {
      ranks += kAlphabet[byte >> 2];
      ranks += kAlphabet[(byte & 3) << 4];
      ranks += cat("== ", byte, "\n");
    }
    ranks += "IHQ= 256\naGU= 257\nPHw= 258\nfD4= 259\nw6k= 260\n8J+Y 261\n4oI= 262\n";  // " t" "he" "<|" "|>"
                                                                                        // é ...
    const std::map<int32_t, std::string> names = {{263, "[BOS]"},
                                                  {264, "[EOS]"},
                                                  {265, "[EOT]"},
                                                  {266, "<|im_end|>"},
                                                  {267, "<|im_user|>"},
                                                  {268, "<|im_assistant|>"},
                                                  {269, "<|im_system|>"},
                                                  {270, "<|im_middle|>"},
                                                  {271, "<|tool_calls_section_begin|>"},
                                                  {272, "<|tool_calls_section_end|>"},
                                                  {273, "<|tool_call_begin|>"},
                                                  {274, "<|tool_call_argument_begin|>"},
                                                  {275, "<|tool_call_end|>"}};
    return Tokenizer::from_memory(ranks, names, 280, {271, 272, 273, 274, 275});
  }();
  return t;
}

// Neighbouring pieces of one text joined, as whoever reads the stream does.
void append(std::vector<Event>& story, const std::vector<Event>& events) {
  for (const Event& e : events) {
    const bool text = e.kind == Event::Kind::content || e.kind == Event::Kind::call_arguments;
    if (text && !story.empty() && story.back().kind == e.kind && story.back().index == e.index) {
      story.back().text += e.text;
    } else {
      story.push_back(e);
    }
  }
}

bool same(const std::vector<Event>& a, const std::vector<Event>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Event& x, const Event& y) {
    return x.kind == y.kind && x.index == y.index && x.text == y.text;
  });
}

struct Read {
  std::vector<Event> story;
  std::vector<ToolCall> calls;
};

// `cuts` chooses the pieces: 0 gives one byte at a time.
Read read_in_pieces(std::string_view text, uint64_t cuts) {
  ToolCallParser parser;
  Read r;
  while (!text.empty()) {
    const std::string_view piece = text.substr(0, 1 + cuts % 37);
    append(r.story, parser.push(piece));
    text.remove_prefix(piece.size());
    cuts = cuts * 6364136223846793005u >> 7;
  }
  append(r.story, parser.finish());
  r.calls = parser.calls();
  return r;
}

void check_tool_calls(std::string_view text) {
  ToolCallParser parser;
  Read whole;
  append(whole.story, parser.push(text));
  append(whole.story, parser.finish());
  whole.calls = parser.calls();
  // The events tell of the same calls as calls(), each begun and ended in turn.
  size_t begun = 0, ended = 0, bytes = 0;
  std::string arguments;
  for (const Event& e : whole.story) {
    bytes += e.text.size();
    switch (e.kind) {
      case Event::Kind::content: FUZZ_REQUIRE(begun == ended && !e.text.empty()); break;
      case Event::Kind::call_begin:
        FUZZ_REQUIRE(begun == ended && e.index == static_cast<int>(begun) && begun < whole.calls.size());
        FUZZ_REQUIRE(whole.calls[begun].id == e.text && whole.calls[begun].name == tool_name_of_id(e.text));
        ++begun, arguments.clear();
        break;
      case Event::Kind::call_arguments:
        FUZZ_REQUIRE(begun == ended + 1 && e.index == static_cast<int>(ended));
        arguments += e.text;
        break;
      case Event::Kind::call_end:
        FUZZ_REQUIRE(begun == ended + 1 && e.index == static_cast<int>(ended));
        FUZZ_REQUIRE(whole.calls[ended].arguments == arguments);
        ++ended;
    }
  }
  FUZZ_REQUIRE(begun == ended && ended == whole.calls.size() && bytes <= text.size());
  for (const uint64_t cuts : {uint64_t{0}, xxh64(text.data(), text.size())}) {
    const Read r = read_in_pieces(text, cuts);
    FUZZ_REQUIRE(same(r.story, whole.story), "cut ", cuts);
    FUZZ_REQUIRE(r.calls.size() == whole.calls.size(), "cut ", cuts);
  }
}

bool is_utf8(std::string_view text) {
  for (const char *p = text.data(), *end = p + text.size(); p < end;) {
    const Utf8Char c = utf8_char(p, end);
    if (c.kind != Utf8Char::Kind::well_formed) return false;
    p += c.length;
  }
  return true;
}

// Pairs of bytes as ids, some of them out of range.
void check_stream(std::string_view bytes) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
    ids.push_back((static_cast<uint8_t>(bytes[i]) << 8 | static_cast<uint8_t>(bytes[i + 1])) % 281);
  }
  for (const bool skip : {false, true}) {
    std::string whole, streamed;
    const bool good = accepted([&] { whole = tokenizer().decode(ids, skip); });
    const bool good_stream = accepted([&] {
      Detokenizer stream(tokenizer(), skip);
      for (const int32_t id : ids) {
        const std::string piece = stream.push(id);
        FUZZ_REQUIRE(is_utf8(piece), "a piece that ends inside a character");
        streamed += piece;
      }
      streamed += stream.finish();
    });
    FUZZ_REQUIRE(good == good_stream && good == (std::count(ids.begin(), ids.end(), 280) == 0));
    FUZZ_REQUIRE(!good || (is_utf8(whole) && whole == streamed));
  }
}

// Encoded bytes, joined, are the text.
void check_encoding(std::string_view text) {
  for (const bool special : {false, true}) {
    std::string joined;
    for (const int32_t id : tokenizer().encode(text, special)) {
      FUZZ_REQUIRE(special || !tokenizer().is_special(id), "text became the special id ", id);
      joined += tokenizer().bytes_of(id);
    }
    FUZZ_REQUIRE(joined == text);
  }
}

std::vector<std::string> fields(std::string_view text) {
  std::vector<std::string> all(1);
  for (const char c : text) {
    if (c == '\x1f') {
      all.emplace_back();
    } else {
      all.back() += c;
    }
  }
  return all;
}

// tools, then five fields a message; a role that begins with '+' makes the message a tool call of the last
// one.
std::vector<ChatMessage> messages_of(const std::vector<std::string>& f) {
  constexpr size_t kFields = 5;
  std::vector<ChatMessage> messages;
  for (size_t i = 1; i < f.size() && messages.size() < 64; i += kFields) {
    const auto field = [&](size_t k) { return i + k < f.size() ? f[i + k] : std::string(); };
    if (field(0).starts_with('+') && !messages.empty()) {
      messages.back().tool_calls.push_back({field(1), field(2), field(3)});
    } else {
      messages.push_back({field(0), field(1), field(2), {}, field(3)});
    }
  }
  return messages;
}

// The prompt holds the messages' text as it is, and no special id but the template's own.
void check_prompt(const std::vector<ChatMessage>& messages, const std::string& tools,
                  const ChatOptions& options) {
  std::vector<ChatPiece> pieces;
  if (!accepted([&] { pieces = render_chat(messages, tools, options); })) return;
  size_t control = 0;
  for (const ChatPiece& p : pieces) control += p.control;
  const std::vector<int32_t> ids = encode_chat(tokenizer(), pieces);  // must not throw
  std::string joined;
  size_t special = 0;
  for (const int32_t id : ids) {
    joined += tokenizer().bytes_of(id);
    special += tokenizer().is_special(id);
  }
  FUZZ_REQUIRE(joined == to_text(pieces));
  FUZZ_REQUIRE(special == control, special, " special ids from ", control, " control pieces");
  for (const ChatMessage& m : messages) FUZZ_REQUIRE(joined.find(m.content) != std::string::npos, m.content);
}

void check_tools(const std::string& text) {
  nlohmann::json value;
  if (!accepted([&] { value = parse_json(text, "tools"); })) return;
  for (const bool compact : {false, true}) {
    const std::string written = python_json(value, compact);
    FUZZ_REQUIRE(is_utf8(written) && written.find('\n') == std::string::npos, written);
    const nlohmann::json again = parse_json(written, "again");  // must not throw
    FUZZ_REQUIRE(again == value && python_json(again, compact) == written, written);
  }
}

}  // namespace
}  // namespace kl::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kl::fuzz;
  const std::string_view text = as_text(data, size);
  check_tool_calls(text);
  check_stream(text);
  check_encoding(text);
  const std::vector<std::string> f = fields(text);
  check_tools(f[0]);
  for (const bool flag : {false, true}) {
    check_prompt(messages_of(f), f[0], {.add_generation_prompt = flag, .compact_tools_json = flag});
  }
  return 0;
}
