// The model's text -> content and tool calls (ToolCallParser of chat.h).
#include "text/chat.h"

namespace kl {
namespace {

constexpr std::string_view kSectionBegin = "<|tool_calls_section_begin|>";
constexpr std::string_view kSectionEnd = "<|tool_calls_section_end|>";
constexpr std::string_view kCallBegin = "<|tool_call_begin|>";
constexpr std::string_view kArgumentBegin = "<|tool_call_argument_begin|>";
constexpr std::string_view kCallEnd = "<|tool_call_end|>";
constexpr std::string_view kInContent[] = {kSectionBegin};
constexpr std::string_view kInSection[] = {kCallBegin, kSectionEnd};
constexpr std::string_view kInId[] = {kArgumentBegin, kCallEnd, kCallBegin, kSectionEnd};
constexpr std::string_view kInArguments[] = {kCallEnd, kCallBegin, kSectionEnd};

std::string_view strip(std::string_view text) {
  constexpr std::string_view kSpaces = " \t\r\n\f\v";
  const size_t begin = text.find_first_not_of(kSpaces);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpaces) + 1 - begin);
}

// The first place in `text` where a marker stands (`marker` names it) or where the text ends inside what may
// become one (`marker` empty).
struct Place {
  size_t position;
  std::string_view marker;
};
Place find_marker(std::string_view text, std::span<const std::string_view> markers) {
  for (size_t at = text.find('<'); at != std::string_view::npos; at = text.find('<', at + 1)) {
    const std::string_view rest = text.substr(at);
    for (const std::string_view marker : markers) {
      if (rest.starts_with(marker)) return {at, marker};
      if (marker.starts_with(rest)) return {at, {}};
    }
  }
  return {text.size(), {}};
}

}  // namespace

std::vector<ToolCallParser::Event> ToolCallParser::push(std::string_view text) {
  std::vector<Event> events;
  pending_ += text;
  take(events, false);
  return events;
}

std::vector<ToolCallParser::Event> ToolCallParser::finish() {
  std::vector<Event> events;
  take(events, true);
  if (state_ == State::arguments) end_call(events);
  call_ = {};
  state_ = State::content;
  return events;
}

// Those that mean something where the parser is; all others are text.
std::span<const std::string_view> ToolCallParser::markers() const {
  switch (state_) {
    case State::content: return kInContent;
    case State::section: return kInSection;
    case State::id: return kInId;
    case State::arguments: break;
  }
  return kInArguments;
}

void ToolCallParser::take(std::vector<Event>& events, bool final) {
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Place place = find_marker(rest, markers());
    take_text(rest.substr(0, place.position), events);
    rest.remove_prefix(place.position);
    if (place.marker.empty()) break;
    take_marker(place.marker, events);
    rest.remove_prefix(place.marker.size());
  }
  if (final) {
    take_text(rest, events);
    rest = {};
  }
  pending_.erase(0, pending_.size() - rest.size());
}

void ToolCallParser::take_text(std::string_view text, std::vector<Event>& events) {
  if (text.empty()) return;
  switch (state_) {
    case State::content: events.push_back({Event::Kind::content, 0, std::string(text)}); break;
    case State::section: break;
    case State::id: call_.id += text; break;
    case State::arguments:
      call_.arguments += text;
      events.push_back({Event::Kind::call_arguments, static_cast<int>(calls_.size()), std::string(text)});
  }
}

void ToolCallParser::take_marker(std::string_view marker, std::vector<Event>& events) {
  if (marker == kArgumentBegin) return begin_call(events);
  if (state_ == State::id) begin_call(events);  // a call without arguments
  if (state_ == State::arguments) end_call(events);
  state_ = marker == kCallBegin ? State::id : marker == kSectionEnd ? State::content : State::section;
}

void ToolCallParser::begin_call(std::vector<Event>& events) {
  call_.id = std::string(strip(call_.id));
  call_.name = tool_name_of_id(call_.id);
  events.push_back({Event::Kind::call_begin, static_cast<int>(calls_.size()), call_.id});
  state_ = State::arguments;
}

void ToolCallParser::end_call(std::vector<Event>& events) {
  events.push_back({Event::Kind::call_end, static_cast<int>(calls_.size()), {}});
  calls_.push_back(std::move(call_));
  call_ = {};
}

std::string_view tool_name_of_id(std::string_view id) {
  const std::string_view path = id.substr(0, id.rfind(':'));
  const size_t dot = path.rfind('.');
  return strip(dot == std::string_view::npos ? path : path.substr(dot + 1));
}

}  // namespace kl
