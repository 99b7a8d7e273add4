// The command line of the commands that use a model: run, chat, inspect, tokenize, detokenize, logits. Names
// of flags follow llama.cpp, with vLLM's as aliases.
#include "command_line.h"

namespace kl::app {

void model_name(CLI::App* command, std::string& model) {
  command->add_option("-m,--model", model, "checkpoint directory, or org/name in the Hugging Face cache")
      ->required();
}

void model_flags(CLI::App* command, ModelOptions& o) {
  model_name(command, o.model);
  command->add_option("-t,--threads", o.threads, "threads (default: all processors)")
      ->check(CLI::Range(1, 4096));
  computing_flags(command, o);
}

void computing_flags(CLI::App* command, ModelOptions& o) {
  command->add_option("-b,--batch-size,--max-num-batched-tokens", o.batch, "prompt tokens at a time")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--cache-type,--kv-cache-dtype", o.cache_type, "latent cache: f32 or bf16")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command
      ->add_option(
          "--precision", o.precision,
          "activations in products with bf16 weights and what KDA's chunks multiply: exact, or bf16, "
          "which is faster where the processor multiplies bf16 itself (default exact)")
      ->check(CLI::IsMember({"exact", "bf16"}));
  command->add_option(
      "--isa", o.isa,
      "instruction set: generic, avx2, avx512, avx512_bf16 or amx (default: the best of this machine)");
  command->add_flag("--pin", o.pin, "keep each thread on a processor of its own");
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

namespace {

void add_run(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  RunOptions& o = add_command(app, chosen, "run", "answer or continue one prompt", run, command);
  model_flags(command, o.model);
  context_flag(command, o.model);
  sampling_flags(command, o.sampling);
  CLI::Option* prompt =
      command->add_option("prompt,-p,--prompt", o.prompt, "the prompt (default: standard input)");
  CLI::Option* file =
      command->add_option("-f,--file", o.prompt_file, "read the prompt from a file")->excludes(prompt);
  command->add_option("--ids", o.ids, "the prompt as token ids, e.g. \"1 2 3\"")
      ->excludes(prompt)
      ->excludes(file);
  command->add_option("--system", o.system, "system message");
  command->add_flag("--raw", o.raw, "no chat template: continue the text as it is");
  command->add_option("--session", o.session,
                      "go on from this session file; without a prompt, with the next token");
  command->add_option("--save-session", o.save_session,
                      "keep prompt and answer in this file: going on from it is going on here");
  command->add_flag("--print-ids", o.print_ids, "print token ids instead of text");
  command->add_flag("--special", o.special, "print special tokens too");
  command->add_flag("-q,--quiet", o.quiet, "no closing line on the terminal");
}

void add_chat(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  ChatOptions& o = add_command(app, chosen, "chat", "talk to the model on the terminal", chat, command);
  model_flags(command, o.model);
  context_flag(command, o.model);
  sampling_flags(command, o.sampling);
  command->add_option("--system", o.system, "system message");
}

void add_tokens(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  TokenizeOptions& t = add_command(app, chosen, "tokenize", "text to token ids", tokenize, command);
  model_name(command, t.model);
  command->add_option("text", t.text, "the text (default: standard input)");
  command->add_flag("--parse-special", t.parse_special, "names of special tokens become those tokens");
  command->add_flag("--count", t.count, "print the number of tokens only");
  command->add_flag("--pieces", t.pieces, "a line for each token: id and text");

  DetokenizeOptions& d = add_command(app, chosen, "detokenize", "token ids to text", detokenize, command);
  model_name(command, d.model);
  command->add_option("ids", d.ids, "the ids, e.g. \"1 2 3\" (default: standard input)");
}

void add_logits(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  LogitsOptions& o =
      add_command(app, chosen, "logits", "write logits to a safetensors file", logits, command);
  model_flags(command, o.model);
  CLI::Option* ids = command->add_option("--ids", o.ids, "token ids, e.g. \"1 2 3\"");
  command->add_option("--ids-file", o.ids_file, "a file of token ids")->excludes(ids);
  command->add_option("-o,--output", o.output, "the file to write: logits [T, vocab] f32")->required();
  command->add_flag("--hidden", o.hidden, "also hidden.0 (embedding) ... hidden.L (after the final norm)");
}

}  // namespace

void add_text_commands(CLI::App& app, Chosen& chosen) {
  add_run(app, chosen);
  add_chat(app, chosen);
  CLI::App* command = nullptr;
  InspectOptions& o =
      add_command(app, chosen, "inspect", "what a checkpoint is and what it costs to hold", inspect, command);
  model_flags(command, o.model);
  command->add_flag("--tensors", o.tensors, "list every tensor");
  add_tokens(app, chosen);
  add_logits(app, chosen);
}

}  // namespace kl::app
