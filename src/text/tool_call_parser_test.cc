#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "text/chat.h"
#include "text/test_text.h"

namespace kl {
namespace {

const std::string kSection = "<|tool_calls_section_begin|>", kSectionEnd = "<|tool_calls_section_end|>";
const std::string kCall = "<|tool_call_begin|>", kArguments = "<|tool_call_argument_begin|>";
const std::string kCallEnd = "<|tool_call_end|>";

// Events as one line each; neighbouring pieces of one text are joined, as a client sees them.
std::string story(const std::vector<ToolCallParser::Event>& events) {
  using Kind = ToolCallParser::Event::Kind;
  std::string out;
  const ToolCallParser::Event* last = nullptr;
  for (const auto& e : events) {
    const bool text = e.kind == Kind::content || e.kind == Kind::call_arguments;
    if (!(text && last && last->kind == e.kind && last->index == e.index)) {
      if (last) out += "\n";
      out += e.kind == Kind::content          ? "content "
             : e.kind == Kind::call_begin     ? cat("begin ", e.index, " ")
             : e.kind == Kind::call_arguments ? cat("arguments ", e.index, " ")
                                              : cat("end ", e.index);
    }
    out += e.text;
    last = &e;
  }
  return out;
}

struct Parsed {
  std::string events, calls;
  friend bool operator==(const Parsed&, const Parsed&) = default;
};

Parsed parse(const std::vector<std::string>& pieces) {
  ToolCallParser parser;
  std::vector<ToolCallParser::Event> events;
  for (const std::string& piece : pieces)
    for (const auto& e : parser.push(piece)) events.push_back(e);
  for (const auto& e : parser.finish()) events.push_back(e);
  std::string calls;
  for (const ToolCall& call : parser.calls())
    calls += cat(call.id, "|", call.name, "|", call.arguments, "\n");
  return {story(events), calls};
}

TEST(ToolCallParser, PlainContent) {
  EXPECT_EQ(parse({"Hello ", "", "world <|im"}), (Parsed{"content Hello world <|im", ""}));
  EXPECT_EQ(parse({}), (Parsed{"", ""}));
  // Markers that belong inside a section are text outside of one.
  EXPECT_EQ(parse({"a" + kCall + kArguments + kCallEnd + kSectionEnd}),
            (Parsed{"content a" + kCall + kArguments + kCallEnd + kSectionEnd, ""}));
}

TEST(ToolCallParser, CallsBetweenContent) {
  const Parsed expected{
      "content Let me see.\nbegin 0 functions.get_weather:0\narguments 0 {\"city\": \"Oslo\"}\nend 0\n"
      "begin 1 functions.now:1\nend 1\ncontent  done",
      "functions.get_weather:0|get_weather|{\"city\": \"Oslo\"}\nfunctions.now:1|now|\n"};
  const std::string text = "Let me see." + kSection + " " + kCall + " functions.get_weather:0 " + kArguments +
                           "{\"city\": \"Oslo\"}" + kCallEnd + "\n" + kCall + "functions.now:1" + kArguments +
                           kCallEnd + kSectionEnd + " done";
  EXPECT_EQ(parse({text}), expected);
}

TEST(ToolCallParser, TextIsPassedOnAtOnce) {
  ToolCallParser parser;
  EXPECT_EQ(story(parser.push("a < b")), "content a < b");
  EXPECT_EQ(story(parser.push(" <|tool")), "content  ");
  EXPECT_EQ(story(parser.push("s|>")), "content <|tools|>");
  EXPECT_EQ(story(parser.push("<|tool_calls_section_begin|")), "");
  EXPECT_EQ(story(parser.push(">" + kCall + "functions.f:0")), "");
  EXPECT_EQ(story(parser.push(kArguments + "{\"a\":<|tool_call")),
            "begin 0 functions.f:0\narguments 0 {\"a\":");
  EXPECT_TRUE(parser.calls().empty());
  EXPECT_EQ(story(parser.push("_end|>")), "end 0");
  ASSERT_EQ(parser.calls().size(), 1u);
  EXPECT_EQ(parser.calls()[0].arguments, "{\"a\":");
}

TEST(ToolCallParser, CutOff) {
  const std::string begin = kSection + kCall + "functions.f:0" + kArguments;
  const std::string call = "begin 0 functions.f:0\narguments 0 {\"a\nend 0";
  EXPECT_EQ(parse({begin + "{\"a"}), (Parsed{call, "functions.f:0|f|{\"a\n"}));
  EXPECT_EQ(parse({begin + "{\"a" + kCallEnd}), (Parsed{call, "functions.f:0|f|{\"a\n"}));
  EXPECT_EQ(parse({begin + "{\"a" + kCallEnd + "<|tool_calls_sec"}),
            (Parsed{call, "functions.f:0|f|{\"a\n"}));
  EXPECT_EQ(parse({begin}), (Parsed{"begin 0 functions.f:0\nend 0", "functions.f:0|f|\n"}));
  EXPECT_EQ(parse({begin + "{<|tool"}),
            (Parsed{"begin 0 functions.f:0\narguments 0 {<|tool\nend 0", "functions.f:0|f|{<|tool\n"}));
  EXPECT_EQ(parse({kSection + kCall + "functions.get_w"}), (Parsed{"", ""}));  // no name to call
  EXPECT_EQ(parse({kSection}), (Parsed{"", ""}));
}

// What a model may leave out or add.
TEST(ToolCallParser, MissingMarkers) {
  const Parsed two{"begin 0 a.f:0\narguments 0 1\nend 0\nbegin 1 a.g:1\narguments 1 2\nend 1",
                   "a.f:0|f|1\na.g:1|g|2\n"};
  EXPECT_EQ(parse({kSection + kCall + "a.f:0" + kArguments + "1" + kCall + "a.g:1" + kArguments + "2" +
                   kSectionEnd}),
            two);
  EXPECT_EQ(parse({kSection + "junk" + kCall + "a.f:0" + kArguments + "1" + kCallEnd + "junk" + kCall +
                   "a.g:1" + kArguments + "2" + kCallEnd + kSectionEnd}),
            two);
  EXPECT_EQ(parse({kSection + kCall + "a.f:0" + kCall + "a.g:1" + kSectionEnd + "x"}),
            (Parsed{"begin 0 a.f:0\nend 0\nbegin 1 a.g:1\nend 1\ncontent x", "a.f:0|f|\na.g:1|g|\n"}));
  EXPECT_EQ(parse({kSection + kCall + "a.f:0" + kCallEnd + kSectionEnd}),
            (Parsed{"begin 0 a.f:0\nend 0", "a.f:0|f|\n"}));
  EXPECT_EQ(parse({kSection + kSectionEnd + kSection + kCall + kArguments + "1" + kCallEnd}),
            (Parsed{"begin 0 \narguments 0 1\nend 0", "||1\n"}));
}

TEST(ToolCallParser, NamesOfIds) {
  EXPECT_EQ(tool_name_of_id("functions.get_weather:0"), "get_weather");
  EXPECT_EQ(tool_name_of_id(" functions. get_weather : 0"), "get_weather");
  EXPECT_EQ(tool_name_of_id("get_weather:0"), "get_weather");
  EXPECT_EQ(tool_name_of_id("functions.get_weather"), "get_weather");
  EXPECT_EQ(tool_name_of_id("functions.a.b:12"), "b");
  EXPECT_EQ(tool_name_of_id("functions.f:1.5"), "f");
  EXPECT_EQ(tool_name_of_id(""), "");
  EXPECT_EQ(tool_name_of_id(":"), "");
  EXPECT_EQ(tool_name_of_id("."), "");
}

RC_GTEST_PROP(ToolCallParser, AnyCutTellsTheSame, ()) {
  const std::vector<std::string> parts{kSection,
                                       kSectionEnd,
                                       kCall,
                                       kArguments,
                                       kCallEnd,
                                       "functions.f:0",
                                       " ",
                                       "{\"a\": 1}",
                                       "<",
                                       "<|",
                                       "<|tool_call",
                                       "_begin|>",
                                       "s_",
                                       "é",
                                       "|>",
                                       "\n",
                                       kSection + kCall + "a.g:1" + kArguments};
  const auto part = rc::gen::elementOf(parts);
  std::string text;
  for (const std::string& p : *rc::gen::container<std::vector<std::string>>(part)) text += p;
  std::vector<std::string> pieces;
  for (size_t at = 0; at < text.size();) {
    const auto size = static_cast<size_t>(*rc::gen::inRange(1, 20));
    pieces.push_back(text.substr(at, size));
    at += pieces.back().size();
  }
  std::vector<std::string> bytes;
  for (const char c : text) bytes.emplace_back(1, c);
  const Parsed whole = parse({text});
  RC_ASSERT(parse(pieces) == whole);
  RC_ASSERT(parse(bytes) == whole);
}

// A conversation's calls, rendered, are read back as they were.
RC_GTEST_PROP(ToolCallParser, ReadsWhatIsRendered, ()) {
  const auto plain = rc::gen::map(testing::mixed_text(), [](std::string s) {
    std::erase(s, '<');
    return s;
  });
  ChatMessage message;
  message.role = "assistant";
  message.content = *plain;
  std::string calls;
  for (int i = 0, n = *rc::gen::inRange(0, 4); i < n; ++i) {
    const std::string name = *rc::gen::element<std::string>("f", "get_weather", "a-b");
    message.tool_calls.push_back({"", name, *plain});
    calls += cat("functions.", name, ":", i, "|", name, "|", message.tool_calls.back().arguments, "\n");
  }
  std::string text = to_text(render_chat({message}, {}, {.add_generation_prompt = false}));
  const std::string head = "<|im_assistant|>assistant<|im_middle|>", end = "<|im_end|>";
  text = text.substr(head.size(), text.size() - head.size() - end.size());
  RC_ASSERT(parse({text}).calls == calls);
  if (!message.content.empty()) RC_ASSERT(parse({text}).events.starts_with("content " + message.content));
}

// Hostile text: no state lets the parser look at the same bytes again and again.
TEST(ToolCallParser, LinearTime) {
  for (const std::string& begin :
       {std::string(), kSection, kSection + kCall, kSection + kCall + kArguments}) {
    for (const char* unit : {"a", "<", "<|tool_call", " "}) {
      ToolCallParser parser;
      const double start = testing::cpu_seconds();
      parser.push(begin);
      for (int i = 0; i < 200'000; ++i) parser.push(unit);
      parser.finish();
      EXPECT_LT(testing::cpu_seconds() - start, 5.0)
          << begin << unit;  // some 0.02 s; minutes if it were quadratic
    }
  }
}

}  // namespace
}  // namespace kl
