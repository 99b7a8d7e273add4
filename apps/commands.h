// The subcommands of `kimi-linear`: their options, filled from the command line by *_options.cc, and their
// entry points. A command returns its exit code; it throws kl::Error for everything that the user should
// read.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "model/config.h"
#include "ops/sample/sample.h"

namespace kl::app {

struct ModelOptions {
  std::string model;                // -m: a directory or a repository id of the Hugging Face cache
  int threads = 0;                  // -t; 0: all
  int64_t context = 0;              // -c; 0: the model's, at most 32768
  int batch = 512;                  // -b: prompt tokens at a time
  std::string cache_type = "f32";   // of the latent cache: f32 or bf16
  std::string precision = "exact";  // of products with weights: exact or bf16
  std::string isa;                  // "": the best that this machine has
  bool pin = false;                 // a processor of its own for each thread
  bool hf_compat_router = false;
  std::optional<float> kv_a_layernorm_eps;
};

// Sampling as given on the command line; what is absent comes from generation_config.json, then from our
// defaults.
struct SamplingOptions {
  std::optional<float> temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::optional<int> top_k;
  std::optional<uint64_t> seed;
  int64_t max_tokens = -1;
  bool ignore_eos = false;
};

struct RunOptions {
  ModelOptions model;
  SamplingOptions sampling;
  std::optional<std::string> prompt;
  std::string prompt_file;
  std::string system;
  std::string ids;
  std::string session, save_session;  // files; "": none
  bool raw = false, print_ids = false, special = false, quiet = false;
};
int run(const RunOptions&);

struct ChatOptions {
  ModelOptions model;
  SamplingOptions sampling;
  std::string system;
};
int chat(const ChatOptions&);

struct InspectOptions {
  ModelOptions model;
  bool tensors = false;
};
int inspect(const InspectOptions&);

struct TokenizeOptions {
  std::string model;
  std::optional<std::string> text;
  bool parse_special = false, count = false, pieces = false;
};
int tokenize(const TokenizeOptions&);

struct DetokenizeOptions {
  std::string model;
  std::optional<std::string> ids;
};
int detokenize(const DetokenizeOptions&);

struct LogitsOptions {
  ModelOptions model;
  std::string ids, ids_file, output;
  bool hidden = false;
};
int logits(const LogitsOptions&);

struct VerifyOptions {
  ModelOptions model;
  int tokens = 256, steps = 16;
  std::optional<double> tolerance;  // of chunked = whole; absent: 1e-4, with precision bf16 3e-2
  uint64_t seed = 1;
};
int verify(const VerifyOptions&);

struct BenchOptions {
  ModelOptions model;
  std::vector<int64_t> prompts = {512}, generates = {128}, depths = {0};
  std::vector<std::string> pairs;  // "512,128": a prompt and a generation
  std::vector<int> threads;        // empty: all processors
  int parallel = 1;                // sequences
  int repetitions = 5;
  bool no_warmup = false;
  std::string format = "md";
};
int bench(const BenchOptions&);

struct BenchOpsOptions {
  ModelOptions model;
  std::string only;      // names that contain this; "": all
  double seconds = 0.3;  // of each
  std::string format = "md";
};
int bench_ops(const BenchOpsOptions&);

struct PerplexityOptions {
  ModelOptions model;
  std::string file, format = "md";
  bool ids = false;    // the file holds token ids
  int64_t stride = 0;  // 0: half the context
};
int eval_ppl(const PerplexityOptions&);

struct NeedleOptions {
  ModelOptions model;
  std::vector<int64_t> lengths;  // empty: 256, 512, ... up to 4096
  std::vector<int> depths = {0, 25, 50, 75, 100};
  int trials = 4, answer_tokens = 24;
  uint64_t seed = 1;
  bool raw = false, verbose = false;
  std::string haystack, format = "md";
};
int eval_needle(const NeedleOptions&);

struct ClaimsOptions {
  int threads = 0;
  std::string isa, format = "md";
};
int eval_claims(const ClaimsOptions&);

struct SynthOptions {
  std::string output, like, tokenizer_from;
  std::string dtype = "bf16";
  uint64_t seed = 1;
  int threads = 0;
  std::optional<double> shard_gigabytes;
  std::vector<int> mla_layers;                        // 1-based; empty: every fourth and the last
  std::vector<std::function<void(Config&)>> changes;  // of the shape that `like` names
};
int synth(const SynthOptions&);

}  // namespace kl::app
