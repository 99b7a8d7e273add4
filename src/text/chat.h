// Kimi's chat format: messages -> prompt ids, and the model's text -> content and tool calls.
//
//   <|im_user|>user<|im_middle|>{content}<|im_end|>   and so on for every message, no BOS, no newlines, no
//   system prompt of our own; the tools, if any, come first as a system message named tool_declare; the end
//   is <|im_assistant|>assistant<|im_middle|>, after which the model writes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

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
// Text pieces next to each other are encoded as one. Throws if the vocabulary lacks a control piece.
std::vector<int32_t> encode_chat(const Tokenizer&, const std::vector<ChatPiece>&);
std::string to_text(const std::vector<ChatPiece>&);

// Splits what the model writes into content and tool calls as it arrives, whatever way the markers are cut:
//
//   {content}<|tool_calls_section_begin|>
//     <|tool_call_begin|>{id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|> ...
//   <|tool_calls_section_end|>{content}
//
// (shown on lines; the model writes none). Any text is accepted: a call also ends where the next one begins
// or the section ends, other text between calls is dropped, and so is at the end a call that was cut off
// inside its id. Arguments are passed on as written, JSON or not.
class ToolCallParser {
 public:
  struct Event {
    enum class Kind { content, call_begin, call_arguments, call_end } kind;
    int index = 0;     // which call
    std::string text;  // content: text; call_begin: the id, spaces stripped; call_arguments: a piece of them
  };
  std::vector<Event> push(std::string_view text);
  std::vector<Event> finish();  // the rest; an unfinished section ends here
  const std::vector<ToolCall>& calls() const {
    return calls_;
  }  // complete so far (unfinished ones after finish())

 private:
  enum class State { content, section, id, arguments };
  std::span<const std::string_view> markers() const;
  void take(std::vector<Event>& events, bool final);
  void take_text(std::string_view text, std::vector<Event>& events);
  void take_marker(std::string_view marker, std::vector<Event>& events);
  void begin_call(std::vector<Event>& events);
  void end_call(std::vector<Event>& events);
  State state_ = State::content;
  std::string pending_;  // what could be the start of a marker
  ToolCall call_;        // the one being read
  std::vector<ToolCall> calls_;
};

// Name of the function in a call id: "functions.get_weather:0" -> "get_weather".
std::string_view tool_name_of_id(std::string_view id);

// Tokens that end an answer: <|im_end|>, [EOS], [EOT] (those that the vocabulary has).
std::vector<int32_t> stop_tokens(const Tokenizer&);

}  // namespace kl
