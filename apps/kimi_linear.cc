// kimi-linear: the command line. Names of flags follow llama.cpp, with vLLM's as aliases.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <new>

#include "base/check.h"
#include "commands.h"
#include "terminal.h"

namespace {

using namespace kl::app;

constexpr int kUsage = 2;

void model_name(CLI::App* command, std::string& model) {
  command->add_option("-m,--model", model, "checkpoint directory, or org/name in the Hugging Face cache")
      ->required();
}

void model_flags(CLI::App* command, ModelOptions& o) {
  model_name(command, o.model);
  command->add_option("-t,--threads", o.threads, "threads (default: all processors)")
      ->check(CLI::Range(1, 4096));
  command->add_option("-b,--batch-size,--max-num-batched-tokens", o.batch, "prompt tokens at a time")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--cache-type,--kv-cache-dtype", o.cache_type, "latent cache: f32 or bf16")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command->add_flag("--hf-compat-router", o.hf_compat_router,
                    "add the correction bias to the expert weights too, as Moonshot's Python code does");
  command->add_option("--kv-a-norm-eps", o.kv_a_layernorm_eps, "eps of kv_a_layernorm (default 1e-6)")
      ->check(CLI::Range(0.f, 1.f));
}

void context_flag(CLI::App* command, ModelOptions& o) {
  command
      ->add_option("-c,--ctx-size,--max-model-len", o.context,
                   "context in tokens (default: the model's, at most 32768)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
}

void sampling_flags(CLI::App* command, SamplingOptions& o) {
  command->add_option("-n,--n-predict,--max-tokens", o.max_tokens,
                      "tokens to generate (default: until the model stops)");
  command->add_option("--temp,--temperature", o.temperature, "temperature; 0 is greedy (default 0.6)");
  command->add_option("--top-k", o.top_k, "keep the k most probable tokens; 0: off");
  command->add_option("--top-p", o.top_p, "keep the most probable tokens that reach this sum");
  command->add_option("--min-p", o.min_p, "drop tokens below this share of the most probable one");
  command->add_option("--repeat-penalty,--repetition-penalty", o.repetition_penalty, "1: off");
  command->add_option("--presence-penalty", o.presence_penalty, "0: off");
  command->add_option("--frequency-penalty", o.frequency_penalty, "0: off");
  command->add_option("-s,--seed", o.seed, "seed of the draws (default: another one each time)");
  command->add_flag("--ignore-eos", o.ignore_eos, "go on past the end of the answer");
}

int dispatch(int argc, char** argv) {
  CLI::App app("Kimi Linear: run, talk to and look into a checkpoint");
  app.require_subcommand(1);
  app.set_version_flag("--version", KL_VERSION);
  app.set_help_all_flag("--help-all", "help of every command");

  RunOptions run_options;
  CLI::App* run_command = app.add_subcommand("run", "answer or continue one prompt");
  model_flags(run_command, run_options.model);
  context_flag(run_command, run_options.model);
  sampling_flags(run_command, run_options.sampling);
  CLI::Option* prompt = run_command->add_option("prompt,-p,--prompt", run_options.prompt,
                                                "the prompt (default: standard input)");
  CLI::Option* file =
      run_command->add_option("-f,--file", run_options.prompt_file, "read the prompt from a file")
          ->excludes(prompt);
  run_command->add_option("--ids", run_options.ids, "the prompt as token ids, e.g. \"1 2 3\"")
      ->excludes(prompt)
      ->excludes(file);
  run_command->add_option("--system", run_options.system, "system message");
  run_command->add_flag("--raw", run_options.raw, "no chat template: continue the text as it is");
  run_command->add_flag("--print-ids", run_options.print_ids, "print token ids instead of text");
  run_command->add_flag("--special", run_options.special, "print special tokens too");
  run_command->add_flag("-q,--quiet", run_options.quiet, "no closing line on the terminal");

  ChatOptions chat_options;
  CLI::App* chat_command = app.add_subcommand("chat", "talk to the model on the terminal");
  model_flags(chat_command, chat_options.model);
  context_flag(chat_command, chat_options.model);
  sampling_flags(chat_command, chat_options.sampling);
  chat_command->add_option("--system", chat_options.system, "system message");

  InspectOptions inspect_options;
  CLI::App* inspect_command = app.add_subcommand("inspect", "what a checkpoint is and what it costs to hold");
  model_flags(inspect_command, inspect_options.model);
  inspect_command->add_flag("--tensors", inspect_options.tensors, "list every tensor");

  TokenizeOptions tokenize_options;
  CLI::App* tokenize_command = app.add_subcommand("tokenize", "text to token ids");
  model_name(tokenize_command, tokenize_options.model);
  tokenize_command->add_option("text", tokenize_options.text, "the text (default: standard input)");
  tokenize_command->add_flag("--parse-special", tokenize_options.parse_special,
                             "names of special tokens become those tokens");
  tokenize_command->add_flag("--count", tokenize_options.count, "print the number of tokens only");
  tokenize_command->add_flag("--pieces", tokenize_options.pieces, "a line for each token: id and text");

  DetokenizeOptions detokenize_options;
  CLI::App* detokenize_command = app.add_subcommand("detokenize", "token ids to text");
  model_name(detokenize_command, detokenize_options.model);
  detokenize_command->add_option("ids", detokenize_options.ids,
                                 "the ids, e.g. \"1 2 3\" (default: standard input)");

  LogitsOptions logits_options;
  CLI::App* logits_command = app.add_subcommand("logits", "write logits to a safetensors file");
  model_flags(logits_command, logits_options.model);
  CLI::Option* ids = logits_command->add_option("--ids", logits_options.ids, "token ids, e.g. \"1 2 3\"");
  logits_command->add_option("--ids-file", logits_options.ids_file, "a file of token ids")->excludes(ids);
  logits_command->add_option("-o,--output", logits_options.output, "the file to write: logits [T, vocab] f32")
      ->required();
  logits_command->add_flag("--hidden", logits_options.hidden,
                           "also hidden.0 (embedding) ... hidden.L (after the final norm)");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kUsage;
  }
  if (*run_command) return run(run_options);
  if (*chat_command) return chat(chat_options);
  if (*inspect_command) return inspect(inspect_options);
  if (*tokenize_command) return tokenize(tokenize_options);
  if (*detokenize_command) return detokenize(detokenize_options);
  return logits(logits_options);
}

}  // namespace

int main(int argc, char** argv) {
  install_signal_handlers();
  try {
    return dispatch(argc, argv);
  } catch (const std::bad_alloc&) {
    std::fputs("error: out of memory\n", stderr);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
  }
  return 1;
}
