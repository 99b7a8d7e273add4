// The command line of the commands that make, check and measure models: synth, verify, bench, eval.
#include "command_line.h"

namespace kl::app {

namespace {

void add_verify(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  VerifyOptions& o =
      add_command(app, chosen, "verify",
                  "try the engine's promises on a checkpoint; exit code 1 if one fails", verify, command);
  model_flags(command, o.model);
  command->add_option("-n,--tokens", o.tokens, "tokens of the prompt (default 256)")
      ->check(CLI::Range(32, 1 << 20));
  command->add_option("--steps", o.steps, "tokens after it, one at a time (default 16)")
      ->check(CLI::Range(1, 1 << 16));
  command
      ->add_option("--tolerance", o.tolerance,
                   "of chunked = whole: relative difference of the logits (default 1e-4)")
      ->check(CLI::PositiveNumber);
  command->add_option("-s,--seed", o.seed, "of the text or the ids (default 1)");
}

CLI::Option* format_flag(CLI::App* command, std::string& format) {
  return command->add_option("-o,--output-format", format, "md, csv or json (default md)")
      ->check(CLI::IsMember({"md", "csv", "json"}));
}

void add_bench(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  BenchOptions& o = add_command(app, chosen, "bench", "tokens per second, beside what this machine could do",
                                bench, command);
  command->add_option("-m,--model", o.model.model,
                      "checkpoint directory, or org/name in the Hugging Face cache");
  computing_flags(command, o.model);
  command->parse_complete_callback([command, &o] {
    if (command->get_subcommands().empty() && o.model.model.empty()) throw CLI::RequiredError("--model");
  });
  const auto list = [&](const char* flags, auto& values, const char* help, int64_t low) {
    command->add_option(flags, values, help)->delimiter(',')->check(CLI::Range(low, int64_t{1} << 30));
  };
  list("-p,--n-prompt", o.prompts, "prompt lengths, e.g. 512,2048; 0: none (default 512)", 0);
  list("-n,--n-gen", o.generates, "tokens to generate; 0: none (default 128)", 0);
  list("-d,--n-depth", o.depths, "tokens in the context before (default 0)", 0);
  list("-t,--threads", o.threads, "threads, e.g. 1,2 (default: all processors)", 1);
  command->add_option("--pg", o.pairs, "a prompt and a generation one after the other, e.g. --pg 512,128");
  command->add_option("--parallel,--np", o.parallel, "sequences computed together (default 1)")
      ->check(CLI::Range(1, 1024));
  command->add_option("-r,--repetitions", o.repetitions, "of every measurement (default 5)")
      ->check(CLI::Range(1, 10000));
  command->add_flag("--no-warmup", o.no_warmup, "measure at once");
  format_flag(command, o.format);

  CLI::App* ops = nullptr;
  BenchOpsOptions& p =
      add_command(*command, chosen, "ops", "single operators at the shapes of a model", bench_ops, ops);
  model_flags(ops, p.model);
  ops->add_option("--only", p.only, "operators whose name contains this, e.g. kda");
  ops->add_option("--seconds", p.seconds, "for each operator (default 0.3)")->check(CLI::Range(0., 1e4));
  format_flag(ops, p.format);
}

void add_eval(CLI::App& app, Chosen& chosen) {
  CLI::App* eval = app.add_subcommand("eval", "how good a model is, and what the paper claims");
  eval->require_subcommand(1);
  CLI::App* command = nullptr;
  PerplexityOptions& p = add_command(*eval, chosen, "ppl", "perplexity of a text file", eval_ppl, command);
  model_flags(command, p.model);
  command->add_option("-c,--ctx-size", p.model.context, "tokens of a window (default 2048)")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 30));
  command->add_option("file,-f,--file", p.file, "the text")->required();
  command->add_flag("--ids", p.ids, "the file holds token ids");
  command->add_option("--stride", p.stride, "tokens from window to window (default: half the context)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  format_flag(command, p.format);

  NeedleOptions& n =
      add_command(*eval, chosen, "needle", "pass keys hidden in long texts", eval_needle, command);
  model_flags(command, n.model);
  command->add_option("-l,--lengths", n.lengths, "tokens of the prompts (default 256,512,... up to 4096)")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{16}, int64_t{1} << 30));
  command->add_option("--depths", n.depths, "where the key stands, in per cent (default 0,25,50,75,100)")
      ->delimiter(',')
      ->check(CLI::Range(0, 100));
  command->add_option("-r,--trials", n.trials, "keys for each place and length (default 4)")
      ->check(CLI::Range(1, 100000));
  command->add_option("-n,--answer-tokens", n.answer_tokens, "length of an answer (default 24)")
      ->check(CLI::Range(1, 100000));
  command->add_option("--haystack", n.haystack, "a text file to hide keys in (default: made-up sentences)");
  command->add_flag("--raw", n.raw, "no chat template: the text ends in \"The pass key is\"");
  command->add_flag("-v,--verbose", n.verbose, "every key and answer on standard error");
  command->add_option("-s,--seed", n.seed, "of keys and texts (default 1)");
  format_flag(command, n.format);

  ClaimsOptions& c =
      add_command(*eval, chosen, "claims", "the paper's claims, measured; exit code 1 if one is missed",
                  eval_claims, command);
  command->add_option("-t,--threads", c.threads, "threads (default: all processors)")
      ->check(CLI::Range(1, 4096));
  command->add_option("--isa", c.isa, "instruction set (default: the best of this machine)");
  format_flag(command, c.format);
}

// The fields of config.json as flags.
struct IntField {
  const char *flags, *help;
  int Config::*field;
};
constexpr IntField kSizes[] = {
    {"--vocab-size", "tokens", &Config::vocab_size},
    {"--hidden-size", "width of the residual stream", &Config::hidden_size},
    {"--num-hidden-layers,--layers", "layers", &Config::num_hidden_layers},
    {"--intermediate-size", "width of a dense feed-forward", &Config::intermediate_size},
    {"--num-attention-heads,--mla-heads", "heads of MLA", &Config::num_attention_heads},
    {"--kv-lora-rank", "latent of MLA", &Config::kv_lora_rank},
    {"--qk-nope-head-dim", "of MLA", &Config::qk_nope_head_dim},
    {"--qk-rope-head-dim", "of MLA, shared by the heads", &Config::qk_rope_head_dim},
    {"--v-head-dim", "of MLA", &Config::v_head_dim},
    {"--num-experts,--experts", "routed experts; 0: every feed-forward is dense", &Config::num_experts},
    {"--num-experts-per-token,--top-k", "experts of a token", &Config::num_experts_per_token},
    {"--num-shared-experts,--shared-experts", "experts of every token", &Config::num_shared_experts},
    {"--moe-intermediate-size", "width of an expert", &Config::moe_intermediate_size},
    {"--first-k-dense-replace", "layers at the beginning without experts", &Config::first_k_dense_replace},
    {"--moe-layer-freq", "experts in every such layer", &Config::moe_layer_freq},
    {"--num-expert-group", "groups of the router", &Config::num_expert_group},
    {"--topk-group", "groups that stay eligible", &Config::topk_group}};
struct KdaField {
  const char *flags, *help;
  int LinearAttnConfig::*field;
};
constexpr KdaField kKdaSizes[] = {
    {"--kda-heads", "linear_attn_config.num_heads", &LinearAttnConfig::num_heads},
    {"--kda-head-dim", "linear_attn_config.head_dim", &LinearAttnConfig::head_dim},
    {"--short-conv-kernel-size", "of linear_attn_config", &LinearAttnConfig::short_conv_kernel_size}};

// A flag that changes the configuration.
template <class T, class Set>
CLI::Option* change(CLI::App* command, SynthOptions& o, const char* flags, const char* help, Set set) {
  return command
      ->add_option_function<T>(
          flags,
          [&o, set](const T& value) { o.changes.push_back([set, value](Config& c) { set(c, value); }); },
          help)
      ->group("Shape");
}

void add_synth(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  SynthOptions& o =
      add_command(app, chosen, "synth", "write a random checkpoint of any shape", synth, command);
  command->add_option("-o,--output", o.output, "directory to write, empty or new")->required();
  command->add_option("--like", o.like, "the shape to start from: 48b (Kimi-Linear-48B-A3B) or demo")
      ->required()
      ->check(CLI::IsMember({"48b", "demo"}));
  command->add_option("-s,--seed", o.seed, "the same seed gives the same bytes everywhere (default 1)");
  command->add_option("--dtype", o.dtype, "of the matrices: bf16, f16 or f32 (default bf16)")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}));
  command->add_option("--tokenizer-from", o.tokenizer_from,
                      "copy the tokenizer of this checkpoint directory");
  command->add_option("--shard-size", o.shard_gigabytes, "gigabytes of a file (default 5)")
      ->check(CLI::Range(1e-6, 1e6));
  command->add_option("-t,--threads", o.threads, "threads (default: all processors)")
      ->check(CLI::Range(1, 4096));
  for (const IntField& f : kSizes)
    change<int>(command, o, f.flags, f.help, [m = f.field](Config& c, int v) { c.*m = v; });
  for (const KdaField& f : kKdaSizes)
    change<int>(command, o, f.flags, f.help,
                [m = f.field](Config& c, int v) { c.linear_attn_config.*m = v; });
  command
      ->add_option(
          "--mla-layers", o.mla_layers,
          "layers with full attention, from 1, e.g. 4,8 (default: every fourth and the last; 0: none)")
      ->delimiter(',')
      ->group("Shape");
  change<int64_t>(command, o, "--model-max-length", "context",
                  [](Config& c, int64_t v) { c.model_max_length = v; });
  change<float>(command, o, "--rms-norm-eps", "of the norms", [](Config& c, float v) { c.rms_norm_eps = v; });
  change<float>(command, o, "--routed-scaling-factor", "of the experts' weights",
                [](Config& c, float v) { c.routed_scaling_factor = v; });
  change<bool>(command, o, "--moe-renormalize", "true or false",
               [](Config& c, bool v) { c.moe_renormalize = v; });
  change<bool>(command, o, "--tie-word-embeddings", "true or false",
               [](Config& c, bool v) { c.tie_word_embeddings = v; });
  change<std::string>(command, o, "--moe-router-activation-func", "sigmoid or softmax",
                      [](Config& c, const std::string& v) { c.moe_router_activation_func = v; });
  command->footer(
      "The checkpoint that the speed tables are measured on (2.15 B parameters, 4.29 GB):\n"
      "  kimi-linear synth -o DIR --like 48b --layers 8 --experts 32 --vocab-size 32768");
}

}  // namespace

void add_measure_commands(CLI::App& app, Chosen& chosen) {
  add_synth(app, chosen);
  add_verify(app, chosen);
  add_bench(app, chosen);
  add_eval(app, chosen);
}

}  // namespace kl::app
