// For tests: config.json of Kimi-Linear-48B-A3B.
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>

namespace kl::testing {

inline nlohmann::json published_48b_config() {
  using nlohmann::json;
  json kda = json::array(), full = json::array({4, 8, 12, 16, 20, 24, 27});
  for (int i = 1; i <= 27; ++i) {
    if (std::find(full.begin(), full.end(), json(i)) == full.end()) kda.push_back(i);
  }
  return {{"architectures", {"KimiLinearForCausalLM"}},
          {"model_type", "kimi_linear"},
          {"dtype", "bfloat16"},
          {"vocab_size", 163840},
          {"hidden_size", 2304},
          {"num_hidden_layers", 27},
          {"intermediate_size", 9216},
          {"hidden_act", "silu"},
          {"rms_norm_eps", 1e-5},
          {"initializer_range", 0.02},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 32},
          {"head_dim", 72},
          {"q_lora_rank", nullptr},
          {"kv_lora_rank", 512},
          {"qk_nope_head_dim", 128},
          {"qk_rope_head_dim", 64},
          {"v_head_dim", 128},
          {"mla_use_nope", true},
          {"rope_theta", 10000.0},
          {"rope_scaling", nullptr},
          {"model_max_length", 1048576},
          {"linear_attn_config",
           {{"head_dim", 128},
            {"num_heads", 32},
            {"short_conv_kernel_size", 4},
            {"kda_layers", kda},
            {"full_attn_layers", full}}},
          {"num_experts", 256},
          {"num_experts_per_token", 8},
          {"num_shared_experts", 1},
          {"moe_intermediate_size", 1024},
          {"first_k_dense_replace", 1},
          {"moe_layer_freq", 1},
          {"moe_router_activation_func", "sigmoid"},
          {"moe_renormalize", true},
          {"routed_scaling_factor", 2.446},
          {"use_grouped_topk", true},
          {"num_expert_group", 1},
          {"topk_group", 1},
          {"num_nextn_predict_layers", 0},
          {"tie_word_embeddings", false},
          {"use_cache", true},
          {"bos_token_id", 163584},
          {"eos_token_id", 163586},
          {"pad_token_id", 163839},
          {"auto_map", {{"AutoConfig", "configuration_kimi.KimiLinearConfig"}}}};
}

}  // namespace kl::testing
