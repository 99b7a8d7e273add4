// kimi-linear run: one prompt in, its continuation or answer out as it is generated.
#include <chrono>

#include "commands.h"
#include "load.h"
#include "terminal.h"
#include "text/chat.h"

namespace kl::app {

namespace {

std::string prompt_text(const RunOptions& options) {
  if (options.prompt) return *options.prompt;
  if (!options.prompt_file.empty()) return read_text_file(options.prompt_file, size_t{1} << 30);
  KL_CHECK(!stdin_is_terminal(), "no prompt: give one as an argument, with -f FILE, or on standard input");
  return read_stdin();
}

bool has_prompt(const RunOptions& options) {
  return options.prompt || !options.prompt_file.empty() || !options.ids.empty();
}

// What the session has not read yet: a prompt, or the next message of the conversation.
std::vector<int32_t> prompt_ids(const RunOptions& options, const Tokenizer* tokenizer, const Session& session,
                                const std::string& directory) {
  const std::vector<int32_t>& before = session.tokens();
  KL_CHECK(before.empty() || options.system.empty(), options.session,
           ": a system message stands at the beginning, and this session has begun");
  if (!before.empty() && !has_prompt(options)) return {};
  if (!options.ids.empty()) return parse_ids(options.ids);
  KL_CHECK(tokenizer, directory, " has no tokenizer (tiktoken.model): give the prompt as token ids (--ids)");
  const std::string text = prompt_text(options);
  if (options.raw) return tokenizer->encode(text);
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({.role = "system", .content = options.system});
  messages.push_back({.role = "user", .content = text});
  std::vector<int32_t> ids = encode_chat(*tokenizer, render_chat(messages));
  const std::optional<int32_t> end = tokenizer->special_id("<|im_end|>");
  if (!before.empty() && end && before.back() != *end) ids.insert(ids.begin(), *end);  // an answer cut short
  return ids;
}

// Feeds the end of the answer too, so that whoever goes on from the file finds all of it.
void save(const RunOptions& options, Session& session, const Sampler& sampler, const GenerateResult& result) {
  const int32_t last = result.finish == Finish::stop ? result.stop_id
                       : result.ids.empty()          ? -1
                                                     : result.ids.back();
  if (last >= 0 && session.room() > 0) session.feed({&last, 1});
  session.save(options.save_session, sampler.draws());
  note(cat("\n", options.save_session, ": ", session.tokens().size(), " tokens, ",
           human_bytes(static_cast<double>(session.bytes().total())), " of state"));
}

// The closing line.
std::string summary(size_t prompt, double prompt_seconds, const GenerateResult& result, double seconds,
                    const Session& session) {
  const auto rate = [](size_t tokens, double s) { return fixed(static_cast<double>(tokens) / s, 1); };
  std::string line = "\n";
  if (prompt > 0) line += cat(prompt, " prompt tokens, ", rate(prompt, prompt_seconds), " tokens/s; ");
  line += cat(result.ids.size(), " generated, ", rate(result.ids.size(), seconds), " tokens/s; ",
              human_bytes(static_cast<double>(session.bytes().total())), " of state");
  return line + (result.finish == Finish::length ? "; stopped at the length limit" : "");
}

}  // namespace

int run(const RunOptions& options) {
  const std::string directory = model_directory(options.model.model);
  const std::unique_ptr<Engine> engine = open_engine(options.model);
  const Config& config = engine->model().config;
  const std::optional<Tokenizer> tokenizer = find_tokenizer(directory, config.vocab_size);
  const Tokenizer* text = tokenizer ? &*tokenizer : nullptr;
  KL_CHECK(text || options.print_ids, directory,
           " has no tokenizer (tiktoken.model): use --ids with --print-ids");
  Session session(*engine);
  const uint64_t draws = options.session.empty() ? 0 : session.restore(options.session);
  const std::vector<int32_t> prompt = prompt_ids(options, text, session, directory);
  KL_CHECK(!prompt.empty() || !session.tokens().empty(), "the prompt is empty");

  Sampler sampler(sample_params(options.sampling, directory));
  sampler.continue_after(draws);
  for (const int32_t id : session.tokens()) sampler.see(id);
  for (const int32_t id : prompt) sampler.see(id);
  double prefill_seconds = 0;
  {
    Progress progress("reading the prompt", "tokens");
    const size_t all = session.tokens().size() + prompt.size();
    session.feed(
        prompt, [&](Session::Progress p) { progress.update(p.done, static_cast<double>(p.total)); },
        &interrupted);
    prefill_seconds = progress.seconds();
    if (session.tokens().size() < all) return 0;  // interrupted
  }

  GenerateOptions generation;
  generation.max_tokens = options.sampling.max_tokens;
  generation.stop = &interrupted;
  if (!options.sampling.ignore_eos) generation.stop_ids = stop_ids(engine->model(), text);
  std::optional<Detokenizer> detokenizer;
  if (text) detokenizer.emplace(*text, !options.special);
  const auto start = std::chrono::steady_clock::now();
  bool first = true;
  const GenerateResult result = generate(session, sampler, generation, [&](int32_t id) {
    if (options.print_ids) {
      print((first ? "" : " ") + std::to_string(id));
    } else {
      print(detokenizer->push(id));
    }
    first = false;
  });
  if (!options.print_ids) print(detokenizer->finish());
  print("\n");

  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!options.quiet) note(summary(prompt.size(), prefill_seconds, result, seconds, session));
  if (!options.save_session.empty()) save(options, session, sampler, result);
  return 0;
}

}  // namespace kl::app
