// What config.json says about a Kimi Linear model, under the names that config.json uses.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kl {

struct LinearAttnConfig {
  int head_dim = 0;                   // K = V of a KDA head
  int num_heads = 0;                  // H
  int short_conv_kernel_size = 4;     // W
  std::vector<int> kda_layers;        // 1-based
  std::vector<int> full_attn_layers;  // 1-based
};

struct Config {
  int vocab_size = 163840;
  int hidden_size = 0;
  int num_hidden_layers = 0;
  int intermediate_size = 0;  // of a dense feed-forward
  float rms_norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  int64_t model_max_length = 0;  // 0: not given
  std::vector<int> eos_token_ids;
  int bos_token_id = -1, pad_token_id = -1;

  // MLA
  int num_attention_heads = 0;
  int kv_lora_rank = 0;
  int qk_nope_head_dim = 0;
  int qk_rope_head_dim = 0;  // part of the dot product, never rotated
  int v_head_dim = 0;
  float kv_a_layernorm_eps = 1e-6f;  // not a key of config.json: the published model code fixes it

  // KDA
  LinearAttnConfig linear_attn_config;

  // MoE
  int num_experts = 0;  // 0: every feed-forward is dense
  int num_experts_per_token = 0;
  int num_shared_experts = 0;
  int moe_intermediate_size = 0;
  int first_k_dense_replace = 0;
  int moe_layer_freq = 1;
  int num_expert_group = 1, topk_group = 1;
  bool moe_renormalize = true;
  float routed_scaling_factor = 1.f;
  std::string moe_router_activation_func = "sigmoid";
  bool hf_compat_router = false;  // not a key: see MoeRouteArgs::bias_in_weights

  // Layers are counted from 0 here.
  bool is_kda(int layer) const { return kda_[static_cast<size_t>(layer)]; }
  bool is_moe(int layer) const {
    return num_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  int kda_layer_count() const;
  int mla_layer_count() const { return num_hidden_layers - kda_layer_count(); }
  int kda_dim() const { return linear_attn_config.num_heads * linear_attn_config.head_dim; }  // P = H · K
  int qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }  // values in an MLA cache row

  std::vector<bool> kda_;  // [num_hidden_layers], filled by parse_config
};

// Reads config.json's text. Throws kl::Error with everything that is wrong in one message: missing or
// impossible values, another model (naming the field that tells it apart), keys that change the mathematics
// and are not supported. Unknown keys that do not are ignored. `source` names the file in messages.
Config parse_config(std::string_view json_text, const std::string& source);

// config.json of a checkpoint directory.
Config load_config(const std::string& directory);

}  // namespace kl
