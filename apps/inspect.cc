// kimi-linear inspect: what a checkpoint is, and what it costs to hold.
#include <cstdio>

#include "commands.h"
#include "load.h"
#include "model/forward.h"
#include "terminal.h"

namespace kl::app {

namespace {

std::string line(const std::string& name, const std::string& value) {
  return "  " + name + std::string(name.size() < 22 ? 22 - name.size() : 1, ' ') + value + "\n";
}

std::string padded(const std::string& text, size_t width) {
  return (text.size() < width ? std::string(width - text.size(), ' ') : "") + text;
}

std::string describe_model(const Model& m) {
  const Config& c = m.config;
  const LinearAttnConfig& kda = c.linear_attn_config;
  std::string layers;
  for (int i = 0; i < c.num_hidden_layers; ++i) layers += c.is_kda(i) ? 'K' : 'M';
  std::string out = "Kimi Linear  " + m.checkpoint.directory() + "\n";
  out += line("layers", cat(c.num_hidden_layers, ": ", c.kda_layer_count(), " KDA, ", c.mla_layer_count(),
                            " MLA  ", layers));
  out += line("hidden size", std::to_string(c.hidden_size));
  if (c.kda_layer_count() > 0) {
    out += line("KDA", cat(kda.num_heads, " heads of ", kda.head_dim, ", convolution of ",
                           kda.short_conv_kernel_size));
  }
  if (c.mla_layer_count() > 0) {
    out += line("MLA", cat(c.num_attention_heads, " heads, latent ", c.kv_lora_rank, " + ",
                           c.qk_rope_head_dim, ", query ", c.qk_nope_head_dim, " + ", c.qk_rope_head_dim,
                           ", value ", c.v_head_dim, ", no position encoding"));
  }
  if (c.num_experts > 0) {
    out += line("experts", cat(c.num_experts_per_token, " of ", c.num_experts, " of width ",
                               c.moe_intermediate_size, ", ", c.num_shared_experts, " shared, ",
                               c.moe_router_activation_func, " router, weights x ", c.routed_scaling_factor));
  }
  int dense = 0;
  for (int i = 0; i < c.num_hidden_layers; ++i) dense += !c.is_moe(i);
  if (dense > 0) out += line("dense layers", cat(dense, " of width ", c.intermediate_size));
  out += line(
      "vocabulary",
      cat(c.vocab_size, m.weights.lm_head.data == m.weights.embed_tokens.data ? ", tied embeddings" : ""));
  if (c.model_max_length > 0) out += line("context", cat(c.model_max_length, " tokens"));
  return out;
}

std::string describe_weights(const Model& m) {
  const Weights& w = m.weights;
  const auto human = [](int64_t n) { return human_count(static_cast<double>(n)); };
  std::string out = "\nweights\n";
  out += line("files", std::to_string(m.checkpoint.files()));
  out += line("tensors", std::to_string(m.checkpoint.entries().size()));
  out += line("parameters", cat(w.parameters, "  (", human(w.parameters), ")"));
  out += line("active per token", cat(w.active_parameters, "  (", human(w.active_parameters), ")"));
  out += line("bytes", cat(w.bytes, "  (", human_bytes(static_cast<double>(w.bytes)), ")"));
  out += line("read per token", human_bytes(static_cast<double>(w.active_bytes)));
  return out;
}

// 1024, 4096, ... and the longest itself.
std::vector<int64_t> context_lengths(int64_t longest) {
  std::vector<int64_t> lengths;
  for (int64_t tokens = 1024; tokens < longest; tokens *= 4) lengths.push_back(tokens);
  lengths.push_back(longest);
  return lengths;
}

// Cache of one sequence: this model beside the same model with an MLA layer in every place. `working`: bytes
// of a pass, which come on top of it.
std::string describe_cache(const Config& c, const StateOptions& options, int64_t working) {
  const auto human = [](int64_t bytes) { return human_bytes(static_cast<double>(bytes)); };
  Config full = c;
  full.kda_.assign(full.kda_.size(), false);
  std::string out =
      cat("\ncache of one sequence (latents in ", options.latent_dtype == DType::bf16 ? "bf16" : "f32",
          ", KDA and convolution states in f32)\n");
  out += line("fixed",
              cat(human(state_bytes(c, 0, options).total()), "  (KDA ", human(state_bytes(c, 0, options).kda),
                  ", convolution ", human(state_bytes(c, 0, options).conv), ")"));
  if (c.mla_layer_count() == 0) return out + line("per token", "0 B");
  const int64_t row = int64_t{c.latent_dim()} * size_of(options.latent_dtype);
  out += line("per token",
              cat(c.mla_layer_count() * row, " B  (full attention: ", full.mla_layer_count() * row, " B)"));
  out += "\n" + padded("context", 12) + padded("this model", 16) + padded("with a pass", 16) +
         padded("full attention", 18) + padded("ratio", 9) + "\n";
  for (const int64_t tokens : context_lengths(c.model_max_length > 0 ? c.model_max_length : 131072)) {
    const int64_t ours = state_bytes(c, tokens, options).total(),
                  theirs = state_bytes(full, tokens, options).total();
    out += padded(std::to_string(tokens), 12) + padded(human(ours), 16) + padded(human(ours + working), 16) +
           padded(human(theirs), 18) +
           padded(fixed(100. * static_cast<double>(ours) / static_cast<double>(theirs), 1) + " %", 9) + "\n";
  }
  return out;
}

std::string describe_working_memory(int64_t bytes, int tokens, int threads) {
  return "\nworking memory\n" +
         line("a pass", cat(human_bytes(static_cast<double>(bytes)), "  (", tokens, " tokens at a time, ",
                            threads, threads == 1 ? " thread)" : " threads)"));
}

std::string list_tensors(const Model& m) {
  std::string out = "\ntensors\n";
  for (const SafetensorsFile::Entry* e : m.checkpoint.entries()) {
    std::string shape;
    for (const int64_t n : e->shape) shape += (shape.empty() ? "" : ", ") + std::to_string(n);
    out += cat("  ", e->name, "  ", name_of(e->dtype), " [", shape, "]\n");
  }
  return out;
}

}  // namespace

int inspect(const InspectOptions& options) {
  const Model m = open_model(options.model);
  StateOptions state;
  state.latent_dtype = options.model.cache_type == "bf16" ? DType::bf16 : DType::f32;
  const int threads = options.model.threads > 0 ? options.model.threads : available_processors();
  const int64_t working = forward_bytes(m.config, options.model.batch, threads);
  std::string out = describe_model(m) + describe_weights(m) + describe_cache(m.config, state, working) +
                    describe_working_memory(working, options.model.batch, threads);
  if (options.tensors) out += list_tensors(m);
  print(out);
  return 0;
}

}  // namespace kl::app
