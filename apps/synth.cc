// kimi-linear synth: a random checkpoint of any shape, for tests and measurements without a download.
#include "model/synth.h"

#include <algorithm>
#include <filesystem>

#include "commands.h"
#include "load.h"
#include "terminal.h"

namespace kl::app {

namespace {

// Files beside tiktoken.model that belong to a tokenizer.
constexpr const char* kTokenizerFiles[] = {"tiktoken.model",          "tokenizer_config.json",
                                           "special_tokens_map.json", "chat_template.jinja",
                                           "tokenization_kimi.py",    "tool_declaration_ts.py"};

Config like_48b() {
  Config c;
  c.vocab_size = 163840, c.hidden_size = 2304, c.num_hidden_layers = 27, c.intermediate_size = 9216;
  c.rms_norm_eps = 1e-5f, c.model_max_length = 1048576;
  c.num_attention_heads = 32, c.kv_lora_rank = 512;
  c.qk_nope_head_dim = 128, c.qk_rope_head_dim = 64, c.v_head_dim = 128;
  c.linear_attn_config.num_heads = 32, c.linear_attn_config.head_dim = 128;
  c.num_experts = 256, c.num_experts_per_token = 8, c.num_shared_experts = 1, c.moe_intermediate_size = 1024;
  c.first_k_dense_replace = 1, c.routed_scaling_factor = 2.446f;
  return c;
}

Config like_demo() {
  Config c = like_48b();
  c.vocab_size = 8192, c.hidden_size = 256, c.num_hidden_layers = 8, c.intermediate_size = 768;
  c.model_max_length = 65536;
  c.num_attention_heads = 2, c.linear_attn_config.num_heads = 2;
  c.num_experts = 8, c.num_experts_per_token = 2, c.moe_intermediate_size = 128;
  return c;
}

// As in the published model: every fourth layer and the last have full attention, unless they are named.
void set_layers(Config& c, const std::vector<int>& mla_layers) {
  LinearAttnConfig& l = c.linear_attn_config;
  for (int i = 1; i <= c.num_hidden_layers; ++i) {
    const bool mla = mla_layers.empty()
                         ? i % 4 == 0 || i == c.num_hidden_layers
                         : std::find(mla_layers.begin(), mla_layers.end(), i) != mla_layers.end();
    (mla ? l.full_attn_layers : l.kda_layers).push_back(i);
  }
  for (const int layer : mla_layers) {
    KL_CHECK(layer >= 0 && layer <= c.num_hidden_layers, "--mla-layers: expected layers from 1 to ",
             c.num_hidden_layers, " (0: none), found ", layer);
  }
}

// Where Kimi's vocabulary has them, or where the tokenizer says.
void set_token_ids(Config& c, const Tokenizer* tokenizer) {
  const auto id = [&](const char* name, int otherwise) {
    const std::optional<int32_t> special = tokenizer ? tokenizer->special_id(name) : std::nullopt;
    return special ? *special : std::clamp(otherwise, 0, c.vocab_size - 1);
  };
  c.bos_token_id = id("[BOS]", c.vocab_size - 256);
  c.eos_token_ids = {id("<|im_end|>", c.vocab_size - 254)};
  c.pad_token_id = id("[PAD]", c.vocab_size - 1);
}

void copy_tokenizer(const std::string& from, const std::string& to) {
  for (const char* name : kTokenizerFiles) {
    if (!file_exists(from + "/" + name)) continue;
    std::error_code error;
    std::filesystem::copy_file(from + "/" + name, to + "/" + name, error);
    KL_CHECK(!error, "cannot copy ", from, "/", name, " to ", to, ": ", error.message());
  }
}

}  // namespace

int synth(const SynthOptions& options) {
  Config wanted = options.like == "demo" ? like_demo() : like_48b();
  for (const auto& change : options.changes) change(wanted);
  set_layers(wanted, options.mla_layers);
  std::optional<Tokenizer> tokenizer;
  if (!options.tokenizer_from.empty()) tokenizer = need_tokenizer(options.tokenizer_from, wanted.vocab_size);
  set_token_ids(wanted, tokenizer ? &*tokenizer : nullptr);
  const DType matrices = options.dtype == "f32"   ? DType::f32
                         : options.dtype == "f16" ? DType::f16
                                                  : DType::bf16;
  // Read back as it will be read: what is impossible is said in the names of config.json.
  const Config config = parse_config(config_json(wanted, matrices), "synth");

  ThreadPool pool(options.threads > 0 ? options.threads : available_processors());
  SynthResult result;
  {
    Progress progress("writing", "MB");
    SynthFileOptions files = {.seed = options.seed, .matrices = matrices, .pool = &pool};
    if (options.shard_gigabytes) files.shard_bytes = static_cast<int64_t>(*options.shard_gigabytes * 1e9);
    files.on_progress = [&](int64_t bytes, int64_t total) {
      KL_CHECK(!interrupted, "interrupted");
      progress.update(static_cast<double>(bytes) / 1e6, static_cast<double>(total) / 1e6);
    };
    result = write_synthetic_checkpoint(options.output, config, files);
  }
  if (tokenizer) copy_tokenizer(options.tokenizer_from, options.output);
  print(cat(options.output, ": ", result.tensors, " tensors, ", result.parameters, " parameters (",
            human_count(static_cast<double>(result.parameters)), "), ",
            human_bytes(static_cast<double>(result.bytes)),
            result.files == 1 ? " in one file" : cat(" in ", result.files, " files"),
            tokenizer ? "" : "; no tokenizer", "\n"));
  return 0;
}

}  // namespace kl::app
