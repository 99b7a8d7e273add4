// kimi-linear chat: a conversation on the terminal. Each turn feeds only what is new, because the session
// keeps its state.
#include <histedit.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <cwchar>
#include <iostream>

#include "commands.h"
#include "load.h"
#include "terminal.h"
#include "text/chat.h"

namespace kl::app {

namespace {

constexpr const char* kHelp =
    "  /help            this list\n"
    "  /reset           forget the conversation\n"
    "  /system TEXT     set the system message and start over (no TEXT: none)\n"
    "  /save FILE       keep the conversation in a file\n"
    "  /load FILE       go on with the conversation of a file\n"
    "  /quit            leave (as Ctrl-D does)\n"
    "  \"\"\"              starts and ends a message of several lines; a line that ends in \\ goes on too\n"
    "  Ctrl-C           stops the answer\n";

// Where lines come from: an editor with history on a terminal, plain reading otherwise.
class LineReader {
 public:
  LineReader() {
    if (!stdin_is_terminal()) return;
    // The editor asks the locale what bytes make a character.
    if (!std::setlocale(LC_CTYPE, "") || MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
    editor_ = el_init("kimi-linear", stdin, stderr, stderr);  // standard output is for answers
    history_ = history_init();
    HistEvent event;
    history(history_, &event, H_SETSIZE, 1000);
    history(history_, &event, H_SETUNIQUE, 1);
    el_set(editor_, EL_CLIENTDATA, this);
    el_set(editor_, EL_PROMPT, &LineReader::prompt_of);
    el_set(editor_, EL_EDITOR, "emacs");
    el_set(editor_, EL_HIST, history, history_);
    el_set(editor_, EL_SIGNAL, 0);
    el_set(editor_, EL_GETCFN, &LineReader::next_character);
    el_source(editor_, nullptr);  // the user's ~/.editrc
    history_file_ = find_history_file();
    if (!history_file_.empty()) history(history_, &event, H_LOAD, history_file_.c_str());
  }
  ~LineReader() {
    if (!editor_) return;
    HistEvent event;
    if (!history_file_.empty()) history(history_, &event, H_SAVE, history_file_.c_str());
    history_end(history_);
    el_end(editor_);
  }
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  enum class Result { line, interrupted, end };
  Result read(const std::string& prompt, std::string& line) {
    line.clear();
    if (!editor_) {
      if (std::getline(std::cin, line)) return Result::line;
      return interrupted ? Result::interrupted : Result::end;
    }
    prompt_ = prompt;
    int length = 0;
    errno = 0;
    const char* text = el_gets(editor_, &length);
    if (interrupted) {
      std::fputc('\n', stderr);
      el_reset(editor_);
      return Result::interrupted;
    }
    if (!text || length <= 0) return Result::end;
    line.assign(text, static_cast<size_t>(length));
    if (line.find_first_not_of(" \t\r\n") != std::string::npos) {
      HistEvent event;
      history(history_, &event, H_ENTER, text);
    }
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
    return Result::line;
  }

 private:
  static char* prompt_of(EditLine* editor) {
    void* self = nullptr;
    el_get(editor, EL_CLIENTDATA, &self);
    return static_cast<LineReader*>(self)->prompt_.data();
  }

  // For the editor: 1 and the next character of standard input, 0 at its end, -1 where there was an error or
  // Ctrl-C. It does not sleep in read(), because a signal that arrives just before that would be noticed with
  // the next key only; so would one that another thread takes.
  static int next_character(EditLine*, wchar_t* character) {
    std::mbstate_t state{};
    for (;;) {
      pollfd input{.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
      const int ready = poll(&input, 1, 100);
      if (interrupted) {
        errno = EINTR;
        return -1;
      }
      if (ready < 0 && errno != EINTR) return -1;
      if (ready <= 0) continue;
      char byte = 0;
      const ssize_t n = ::read(STDIN_FILENO, &byte, 1);
      if (n == 0) return 0;
      if (n < 0 && errno != EINTR && errno != EAGAIN) return -1;
      if (n < 0) continue;
      const size_t used = std::mbrtowc(character, &byte, 1, &state);
      if (used == 0) *character = L'\0';
      if (used <= 1) return 1;
      if (used == static_cast<size_t>(-1)) state = {};  // not a character of this locale: left out
    }
  }

  // $XDG_STATE_HOME/kimi-linear/history; "" if the folder cannot be made.
  static std::string find_history_file() {
    const char* state = std::getenv("XDG_STATE_HOME");
    const char* home = std::getenv("HOME");
    if (!(state && *state) && !(home && *home)) return "";
    std::string folder = state && *state ? state : std::string(home) + "/.local/state";
    for (size_t slash = 1; (slash = folder.find('/', slash)) != std::string::npos; ++slash) {
      mkdir(folder.substr(0, slash).c_str(), 0700);
    }
    mkdir(folder.c_str(), 0700);
    folder += "/kimi-linear";
    if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) return "";
    return folder + "/history";
  }

  EditLine* editor_ = nullptr;
  History* history_ = nullptr;
  std::string prompt_, history_file_;
};

// Reads one message, which may span lines. False at the end of input.
enum class Input { message, interrupted, end };
Input read_message(LineReader& reader, std::string& message) {
  std::string line;
  LineReader::Result result = reader.read("> ", line);
  const auto more = [&] { return (result = reader.read(". ", line)) == LineReader::Result::line; };
  message.clear();
  if (result == LineReader::Result::line && line.rfind("\"\"\"", 0) == 0) {
    message = line.substr(3);
    while (message.size() < 3 || message.compare(message.size() - 3, 3, "\"\"\"") != 0) {
      if (!more()) break;
      message += (message.empty() ? "" : "\n") + line;
    }
    if (result == LineReader::Result::line) message.resize(message.size() - 3);
  } else if (result == LineReader::Result::line) {
    message = line;
    while (!message.empty() && message.back() == '\\') {
      message.back() = '\n';
      if (!more()) break;
      message += line;
    }
  }
  if (result == LineReader::Result::interrupted) return Input::interrupted;
  return result == LineReader::Result::end && message.empty() ? Input::end : Input::message;
}

// The conversation as ids, and the session that has read most of them.
class Conversation {
 public:
  Conversation(const ChatOptions& options, Engine& engine, const Tokenizer& tokenizer,
               const std::string& directory)
      : engine_(engine),
        tokenizer_(tokenizer),
        session_(engine),
        sampling_(sample_params(options.sampling, directory)),
        sampler_(sampling_) {
    generation_.max_tokens = options.sampling.max_tokens;
    generation_.stop = &interrupted;
    if (!options.sampling.ignore_eos) generation_.stop_ids = stop_ids(engine.model(), &tokenizer);
    const std::optional<int32_t> end = tokenizer.special_id("<|im_end|>");
    KL_CHECK(end.has_value() && tokenizer.special_id("<|im_user|>"), directory,
             ": the tokenizer has no chat tokens (<|im_user|>, <|im_end|>): this is not a chat model");
    end_of_message_ = *end;
    restart(options.system);
  }

  void restart(const std::string& system) {
    system_ = system;
    session_.reset();
    sampler_ = Sampler(sampling_);
    ids_.clear();
    if (!system.empty()) append({{.role = "system", .content = system}}, false);
  }
  void restart() { restart(std::string(system_)); }

  // Both throw kl::Error; a conversation that cannot be loaded leaves this one as it is.
  void save(const std::string& path) {
    KL_CHECK(!ids_.empty(), "/save: nothing was said yet");
    if (!read()) return;  // interrupted; what is unread is read with the next message
    session_.save(path, sampler_.draws());
    note(cat("(", path, ": ", ids_.size(), " tokens)"));
  }
  void load(const std::string& path) {
    const uint64_t draws = session_.restore(path);
    ids_ = session_.tokens();
    if (ids_.back() != end_of_message_) ids_.push_back(end_of_message_);  // an answer cut short
    sampler_ = Sampler(sampling_);
    for (const int32_t id : ids_) sampler_.see(id);
    sampler_.continue_after(draws);
    note(cat("(", path, ": ", ids_.size(), " tokens)"));
  }

  // Reads the message, prints the answer.
  void turn(const std::string& message) {
    const size_t before = ids_.size();
    append({{.role = "user", .content = message}}, true);
    if (!read()) {
      ids_.resize(before);  // stopped before the answer began: the message was not said
      if (session_.tokens().size() > before)
        session_.reset();  // the state cannot be rewound; it is read again
      return;
    }
    Detokenizer detokenizer(tokenizer_, true);
    const GenerateResult result =
        generate(session_, sampler_, generation_, [&](int32_t id) { print(detokenizer.push(id)); });
    print(detokenizer.finish() + "\n");
    ids_.insert(ids_.end(), result.ids.begin(), result.ids.end());
    ids_.push_back(end_of_message_);
    sampler_.see(end_of_message_);  // as who loads the conversation will have seen it
    if (result.finish == Finish::cancelled) note("(stopped)");
    if (result.finish == Finish::length) {
      note(session_.room() == 0 ? "(the context is full: /reset starts over, a larger -c holds more)"
                                : "(length limit)");
    }
  }

 private:
  void append(const std::vector<ChatMessage>& messages, bool answer) {
    const std::vector<ChatPiece> pieces = render_chat(messages, {}, {.add_generation_prompt = answer});
    const std::vector<int32_t> ids = encode_chat(tokenizer_, pieces);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    for (const int32_t id : ids) sampler_.see(id);
  }
  // Feeds what the session has not read yet. False if it was interrupted.
  bool read() {
    const std::span<const int32_t> all(ids_);
    const std::span<const int32_t> rest = all.subspan(session_.tokens().size());
    KL_CHECK(static_cast<int64_t>(rest.size()) < session_.room(),
             "the conversation does not fit the context of ", engine_.context(),
             " tokens: /reset starts over, a larger -c holds more");
    Progress progress("reading", "tokens");
    session_.feed(
        rest, [&](Session::Progress p) { progress.update(p.done, static_cast<double>(p.total)); },
        &interrupted);
    return session_.tokens().size() == ids_.size();
  }

  Engine& engine_;
  const Tokenizer& tokenizer_;
  Session session_;
  SampleParams sampling_;
  Sampler sampler_;
  GenerateOptions generation_;
  int32_t end_of_message_ = -1;
  std::string system_;
  std::vector<int32_t> ids_;
};

// Handles a line that starts with '/'. False: leave.
bool command(Conversation& conversation, const std::string& line) {
  const size_t space = std::min(line.find(' '), line.size()),
               text = std::min(line.find_first_not_of(' ', space), line.size());
  const std::string name = line.substr(0, space), rest = line.substr(text);
  if (name == "/quit" || name == "/exit") return false;
  if (name == "/help" || name == "/?") {
    std::fputs(kHelp, stderr);
  } else if (name == "/reset") {
    conversation.restart();
    note("(new conversation)");
  } else if (name == "/system") {
    conversation.restart(rest);
    note(rest.empty() ? "(new conversation without a system message)"
                      : "(new conversation with this system message)");
  } else if (name == "/save" || name == "/load") {
    KL_CHECK(!rest.empty(), name, ": expected the name of a file");
    name == "/save" ? conversation.save(rest) : conversation.load(rest);
  } else {
    std::fprintf(stderr, "unknown command %s; /help lists them\n", name.c_str());
  }
  return true;
}

}  // namespace

int chat(const ChatOptions& options) {
  const std::string directory = model_directory(options.model.model);
  const std::unique_ptr<Engine> engine = open_engine(options.model);
  const Tokenizer tokenizer = need_tokenizer(directory, engine->model().config.vocab_size);
  Conversation conversation(options, *engine, tokenizer, directory);
  LineReader reader;
  note(cat("kimi-linear: ", directory, ", context ", engine->context(), ". /help lists the commands."));

  std::string message;
  for (;;) {
    const Input input = read_message(reader, message);
    if (input == Input::end) break;
    if (input == Input::interrupted) {
      interrupted = false;
      if (!stdin_is_terminal()) break;
      note("(/quit or Ctrl-D leaves)");
      continue;
    }
    if (message.find_first_not_of(" \t\n") == std::string::npos) continue;
    try {
      if (message[0] == '/' && message.find('\n') == std::string::npos) {
        if (!command(conversation, message)) break;
      } else {
        conversation.turn(message);
      }
    } catch (const Error& e) {
      std::fprintf(stderr, "error: %s\n", e.what());
    }
    if (interrupted && !stdin_is_terminal()) break;
    interrupted = false;
  }
  return 0;
}

}  // namespace kl::app
