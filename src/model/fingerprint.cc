#include "model/fingerprint.h"

#include "io/xxh64.h"

namespace kl {

namespace {

constexpr int64_t kWhole = 64 << 10;  // bytes of a tensor that is hashed as a whole
constexpr int64_t kSample = 256;      // bytes taken of a larger one

void add_config(Xxh64& hash, const Config& c) {
  const LinearAttnConfig& kda = c.linear_attn_config;
  hash.update(cat(c.vocab_size, ' ', c.hidden_size, ' ', c.num_hidden_layers, ' ', c.intermediate_size, ' ',
                  c.rms_norm_eps, ' ', c.tie_word_embeddings, ' ', c.num_attention_heads, ' ', c.kv_lora_rank,
                  ' ', c.qk_nope_head_dim, ' ', c.qk_rope_head_dim, ' ', c.v_head_dim, ' ',
                  c.kv_a_layernorm_eps, ' ', kda.head_dim, ' ', kda.num_heads, ' ',
                  kda.short_conv_kernel_size, '\n'));
  for (const bool is_kda : c.kda_) hash.update(is_kda ? "K" : "M");
  hash.update(cat('\n', c.num_experts, ' ', c.num_experts_per_token, ' ', c.num_shared_experts, ' ',
                  c.moe_intermediate_size, ' ', c.first_k_dense_replace, ' ', c.moe_layer_freq, ' ',
                  c.num_expert_group, ' ', c.topk_group, ' ', c.moe_renormalize, ' ', c.routed_scaling_factor,
                  ' ', c.moe_router_activation_func, ' ', c.hf_compat_router, '\n'));
}

void add_tensor(Xxh64& hash, const SafetensorsFile::Entry& entry) {
  std::string line = cat(entry.name, ' ', name_of(entry.dtype));
  for (const int64_t n : entry.shape) line += cat(' ', n);
  hash.update(line + '\n');
  if (entry.bytes <= kWhole) {
    hash.update(entry.data, static_cast<size_t>(entry.bytes));
    return;
  }
  // Another place in each tensor: the first rows of an embedding are often those of unused tokens.
  const auto places = static_cast<uint64_t>(entry.bytes - kSample);
  hash.update(entry.data + xxh64(entry.name.data(), entry.name.size()) % places, kSample);
}

}  // namespace

uint64_t fingerprint(const Model& model) {
  Xxh64 hash;
  add_config(hash, model.config);
  for (const SafetensorsFile::Entry* entry : model.checkpoint.entries()) add_tensor(hash, *entry);
  return hash.digest();
}

}  // namespace kl
