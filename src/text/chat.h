// Kimi's chat format: messages -> prompt ids, and the model's text -> content and tool calls.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "text/tokenizer.h"

namespace kl {

struct ToolCall {
  std::string id;  // "functions.{name}:{index}"; empty: built when rendering
  std::string name;
  std::string arguments;  // JSON text, as is
};

struct ChatMessage {
  std::string role;  // "system", "user", "assistant", "tool", ...
  std::string content;
  std::string name;                  // optional
  std::vector<ToolCall> tool_calls;  // of an assistant message
  std::string tool_call_id;          // of a tool message
};

// A piece of a rendered prompt. Only control pieces may become special ids; text never does, whatever it
// spells.
struct ChatPiece {
  std::string text;
  bool control;
};

struct ChatOptions {
  bool add_generation_prompt = true;
  bool compact_tools_json = true;  // "," and ":" rather than ", " and ": "
};

// `tools` is the OpenAI "tools" array as JSON text, or empty. Throws kl::Error naming the message and what is
// wrong.
std::vector<ChatPiece> render_chat(const std::vector<ChatMessage>& messages, std::string_view tools = {},
                                   const ChatOptions& = {});
std::vector<int32_t> encode_chat(const Tokenizer&, const std::vector<ChatPiece>&);
std::string to_text(const std::vector<ChatPiece>&);

// Splits what the model writes into content and tool calls as it arrives, whatever way the markers are cut.
class ToolCallParser {
 public:
  struct Event {
    enum class Kind { content, call_begin, call_arguments, call_end } kind;
    int index = 0;     // which call
    std::string text;  // content: text; call_begin: the id as written; call_arguments: a piece of them
  };
  std::vector<Event> push(std::string_view text);
  std::vector<Event> finish();  // the rest; an unfinished section ends here
  const std::vector<ToolCall>& calls() const {
    return calls_;
  }  // complete so far (unfinished ones after finish())

 private:
  enum class State { content, section, id, arguments };
  void take(std::vector<Event>& events, bool final);
  State state_ = State::content;
  std::string pending_;
  std::vector<ToolCall> calls_;
};

// Name of the function in a call id: "functions.get_weather:0" -> "get_weather".
std::string_view tool_name_of_id(std::string_view id);

// Tokens that end an answer: <|im_end|>, [EOS], [EOT] (those that the vocabulary has).
std::vector<int32_t> stop_tokens(const Tokenizer&);

}  // namespace kl
