#include "text/chat.h"

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io/quote.h"
#include "text/json_text.h"

namespace kl {
namespace {

class Renderer {
 public:
  void control(const char* name) { pieces_.push_back({name, true}); }
  void text(std::string text) {
    if (!text.empty()) pieces_.push_back({std::move(text), false});
  }
  // All of a message up to its content. Roles that are not the user's or the model's are the system's.
  void begin(const std::string& role, const std::string& name) {
    control(role == "user" ? "<|im_user|>" : role == "assistant" ? "<|im_assistant|>" : "<|im_system|>");
    text(name.empty() ? role : name);
    control("<|im_middle|>");
  }
  void end() { control("<|im_end|>"); }

  void tools(std::string_view tools, bool compact) {
    const nlohmann::json declared = parse_json(tools, "tools");
    KL_CHECK(declared.is_array(), "tools: found ", declared.type_name(), ", expected an array");
    if (declared.empty()) return;
    begin("system", "tool_declare");
    text(python_json(declared, compact));
    end();
  }

  void message(const ChatMessage& message, size_t number) {
    const std::string where = cat("message ", number, " (", printable(message.role, 60), ")");
    KL_CHECK(!message.role.empty(), "message ", number, ": no role");
    KL_CHECK(message.tool_calls.empty() || message.role == "assistant", where,
             ": tool calls belong to an assistant message");
    begin(message.role, message.name);
    if (message.role == "tool") {
      KL_CHECK(!message.tool_call_id.empty(), where, ": no tool_call_id");
      text(cat("## Return of ", message.tool_call_id, "\n"));
    }
    text(message.content);
    if (!message.tool_calls.empty()) calls(message.tool_calls, where);
    end();
  }

  std::vector<ChatPiece> take() { return std::move(pieces_); }

 private:
  void calls(const std::vector<ToolCall>& calls, const std::string& where) {
    control("<|tool_calls_section_begin|>");
    for (const ToolCall& call : calls) {
      KL_CHECK(!call.id.empty() || !call.name.empty(), where, ": a tool call with neither id nor name");
      control("<|tool_call_begin|>");
      text(call.id.empty() ? cat("functions.", call.name, ":", next_call_) : call.id);
      ++next_call_;
      control("<|tool_call_argument_begin|>");
      text(call.arguments);
      control("<|tool_call_end|>");
    }
    control("<|tool_calls_section_end|>");
  }

  std::vector<ChatPiece> pieces_;
  int next_call_ = 0;  // counts over the whole conversation
};

}  // namespace

std::vector<ChatPiece> render_chat(const std::vector<ChatMessage>& messages, std::string_view tools,
                                   const ChatOptions& options) {
  Renderer renderer;
  if (!tools.empty()) renderer.tools(tools, options.compact_tools_json);
  for (size_t i = 0; i < messages.size(); ++i) renderer.message(messages[i], i);
  if (options.add_generation_prompt) renderer.begin("assistant", "");
  return renderer.take();
}

std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const std::vector<ChatPiece>& pieces) {
  std::vector<int32_t> ids;
  std::string text;  // of the text pieces since the last control piece
  const auto encode_text = [&] {
    tokenizer.encode_append(text, false, ids);
    text.clear();
  };
  for (const ChatPiece& piece : pieces) {
    if (!piece.control) {
      text += piece.text;
      continue;
    }
    encode_text();
    const auto id = tokenizer.special_id(piece.text);
    KL_CHECK(id, "the vocabulary has no special token \"", piece.text, "\", which the chat format needs");
    ids.push_back(*id);
  }
  encode_text();
  return ids;
}

std::string to_text(const std::vector<ChatPiece>& pieces) {
  std::string text;
  for (const ChatPiece& piece : pieces) text += piece.text;
  return text;
}

std::vector<int32_t> stop_tokens(const Tokenizer& tokenizer) {
  std::vector<int32_t> ids;
  for (const char* name : {"<|im_end|>", "[EOS]", "[EOT]"})
    if (const auto id = tokenizer.special_id(name)) ids.push_back(*id);
  return ids;
}

}  // namespace kl
