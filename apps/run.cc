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

std::vector<int32_t> prompt_ids(const RunOptions& options, const Tokenizer* tokenizer,
                                const std::string& directory) {
  if (!options.ids.empty()) return parse_ids(options.ids);
  KL_CHECK(tokenizer, directory, " has no tokenizer (tiktoken.model): give the prompt as token ids (--ids)");
  const std::string text = prompt_text(options);
  if (options.raw) return tokenizer->encode(text);
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({.role = "system", .content = options.system});
  messages.push_back({.role = "user", .content = text});
  return encode_chat(*tokenizer, render_chat(messages));
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
  const std::vector<int32_t> prompt = prompt_ids(options, text, directory);
  KL_CHECK(!prompt.empty(), "the prompt is empty");

  Sampler sampler(sample_params(options.sampling, directory));
  for (const int32_t id : prompt) sampler.see(id);
  Session session(*engine);
  double prefill_seconds = 0;
  {
    Progress progress("reading the prompt", "tokens");
    session.feed(
        prompt, [&](Session::Progress p) { progress.update(p.done, static_cast<double>(p.total)); },
        &interrupted);
    prefill_seconds = progress.seconds();
  }
  if (session.tokens().size() < prompt.size()) return 0;  // interrupted

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
  if (!options.quiet) {
    note(cat("\n", prompt.size(), " prompt tokens, ",
             fixed(static_cast<double>(prompt.size()) / prefill_seconds, 1), " tokens/s; ", result.ids.size(),
             " generated, ", fixed(static_cast<double>(result.ids.size()) / seconds, 1), " tokens/s; ",
             human_bytes(static_cast<double>(session.bytes().total())), " of state",
             result.finish == Finish::length ? "; stopped at the length limit" : ""));
  }
  return 0;
}

}  // namespace kl::app
