// Writes small random checkpoints of any shape, in the forms met in practice, for tests of the loader and the
// model.
#pragma once

#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "base/check.h"
#include "io/safetensors.h"
#include "testing/files.h"
#include "testing/random.h"

namespace kl::testing {

struct TinyModel {
  std::string layers = "KMK";  // K: KDA, M: MLA
  int vocab_size = 50, hidden_size = 24, intermediate_size = 40;
  int kda_heads = 2, kda_head_dim = 8, conv = 4;
  int mla_heads = 3, kv_lora_rank = 16, nope = 8, rope = 4, v_head_dim = 6;
  int experts = 6, top_k = 2, shared = 1, moe_intermediate = 12;
  int first_k_dense = 1, moe_layer_freq = 1, groups = 1, topk_group = 1;
  bool renormalize = true, tie = false;
  double scaling = 2.5;
  std::string router = "sigmoid";

  // Form of the files.
  bool transformers_names = false;  // dense MLP under block_sparse_moe, layer_types beside linear_attn_config
  int a_log_form = 0;               // [H], [H, 1], [1, 1, H, 1]
  bool conv_rank3 = true;           // [P, 1, W] rather than [P, W]
  DType dtype = DType::f32;         // of the matrices
  int shards = 1;
  uint64_t seed = 1;

  bool is_moe(int i) const { return experts > 0 && i >= first_k_dense && i % moe_layer_freq == 0; }
};

inline std::string config_json(const TinyModel& m, const std::string& extra = "") {
  std::string kda, full, types, mlp;
  for (size_t i = 0; i < m.layers.size(); ++i) {
    std::string& list = m.layers[i] == 'K' ? kda : full;
    list += (list.empty() ? "" : ", ") + std::to_string(i + 1);
    types += cat(i ? ", " : "", m.layers[i] == 'K' ? "\"linear_attention\"" : "\"full_attention\"");
    mlp += cat(i ? ", " : "", m.is_moe(static_cast<int>(i)) ? "\"sparse\"" : "\"dense\"");
  }
  std::string j = cat(
      "{\"architectures\": [\"KimiLinearForCausalLM\"], \"model_type\": \"kimi_linear\", \"vocab_size\": ",
      m.vocab_size, ", \"hidden_size\": ", m.hidden_size, ", \"num_hidden_layers\": ", m.layers.size(),
      ", \"intermediate_size\": ", m.intermediate_size, ", \"rms_norm_eps\": 1e-05, \"hidden_act\": \"silu\"",
      ", \"num_attention_heads\": ", m.mla_heads, ", \"num_key_value_heads\": ", m.mla_heads,
      ", \"head_dim\": 72, \"q_lora_rank\": null, \"kv_lora_rank\": ", m.kv_lora_rank,
      ", \"qk_nope_head_dim\": ", m.nope, ", \"qk_rope_head_dim\": ", m.rope,
      ", \"v_head_dim\": ", m.v_head_dim);
  j += cat(", \"num_experts\": ", m.experts, ", \"num_experts_per_token\": ", m.top_k,
           ", \"num_shared_experts\": ", m.shared, ", \"moe_intermediate_size\": ", m.moe_intermediate,
           ", \"first_k_dense_replace\": ", m.first_k_dense, ", \"num_expert_group\": ", m.groups,
           ", \"topk_group\": ", m.topk_group, ", \"moe_renormalize\": ", m.renormalize,
           ", \"routed_scaling_factor\": ", m.scaling, ", \"tie_word_embeddings\": ", m.tie);
  const std::string sizes = cat("\"head_dim\": ", m.kda_head_dim, ", \"num_heads\": ", m.kda_heads,
                                ", \"short_conv_kernel_size\": ", m.conv);
  j += cat(", \"linear_attn_config\": {", sizes, ", \"kda_layers\": [", kda, "], \"full_attn_layers\": [",
           full, "]}");
  if (m.transformers_names) {
    j += cat(", \"layer_types\": [", types, "], \"mlp_layer_types\": [", mlp,
             "], \"linear_num_heads\": ", m.kda_heads, ", \"linear_head_dim\": ", m.kda_head_dim,
             ", \"linear_conv_kernel_dim\": ", m.conv, ", \"qk_head_dim\": ", m.nope + m.rope);
  }
  if (!m.transformers_names || m.moe_layer_freq != 1) j += cat(", \"moe_layer_freq\": ", m.moe_layer_freq);
  if (!m.transformers_names || m.router != "sigmoid") {
    j += cat(", \"moe_router_activation_func\": \"", m.router, "\"");
  }
  if (!m.transformers_names) j += ", \"mla_use_nope\": true, \"use_grouped_topk\": true";
  return j + extra + "}";
}

// The tensors of the model by name, as they would stand in its files.
inline std::map<std::string, OwnedTensor> tiny_tensors(const TinyModel& m) {
  Random random(m.seed);
  std::map<std::string, OwnedTensor> t;
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t columns, double gain = 1) {
    t[name + ".weight"] =
        random_normal(m.dtype, {rows, columns}, random, gain / std::sqrt(static_cast<double>(columns)));
  };
  const auto vector = [&](const std::string& name, int64_t n, DType dtype, double mean, double deviation) {
    t[name] = random_normal(dtype, {n}, random, deviation, mean);
  };
  const auto mlp = [&](const std::string& prefix, int64_t width) {
    matrix(prefix + "gate_proj", width, m.hidden_size);
    matrix(prefix + "up_proj", width, m.hidden_size);
    matrix(prefix + "down_proj", m.hidden_size, width);
  };
  const int64_t D = m.hidden_size, H = m.kda_heads, K = m.kda_head_dim, P = H * K;
  t["model.embed_tokens.weight"] = random_normal(m.dtype, {m.vocab_size, D}, random);
  if (!m.tie) matrix("lm_head", m.vocab_size, D);
  vector("model.norm.weight", D, m.dtype, 1, 0.1);
  for (size_t i = 0; i < m.layers.size(); ++i) {
    const std::string layer = cat("model.layers.", i, "."), attn = layer + "self_attn.",
                      moe = layer + "block_sparse_moe.";
    vector(layer + "input_layernorm.weight", D, m.dtype, 1, 0.1);
    vector(layer + "post_attention_layernorm.weight", D, m.dtype, 1, 0.1);
    if (m.layers[i] == 'K') {
      for (const char* x : {"q", "k", "v"}) {
        matrix(attn + x + "_proj", P, D);
        const std::string name = attn + x + "_conv1d.weight";
        t[name] = m.conv_rank3 ? make_tensor(m.dtype, {P, 1, m.conv}) : make_tensor(m.dtype, {P, m.conv});
        fill_normal(t[name].tensor, random, 0.5);
      }
      t[attn + "A_log"] = m.a_log_form == 0   ? make_tensor(DType::f32, {H})
                          : m.a_log_form == 1 ? make_tensor(DType::f32, {H, 1})
                                              : make_tensor(DType::f32, {1, 1, H, 1});
      fill(t[attn + "A_log"].tensor, [&](int64_t) { return std::log(random.uniform(1, 16)); });
      t[attn + "dt_bias"] = make_tensor(DType::f32, {P});
      fill(t[attn + "dt_bias"].tensor, [&](int64_t) {
        const double dt = std::exp(random.uniform(std::log(0.001), std::log(0.1)));
        return dt + std::log(-std::expm1(-dt));
      });
      matrix(attn + "f_a_proj", K, D), matrix(attn + "f_b_proj", P, K);
      matrix(attn + "g_a_proj", K, D), matrix(attn + "g_b_proj", P, K);
      matrix(attn + "b_proj", H, D);
      vector(attn + "o_norm.weight", K, m.dtype, 1, 0.1);
      matrix(attn + "o_proj", D, P);
    } else {
      matrix(attn + "q_proj", m.mla_heads * (m.nope + m.rope), D);
      matrix(attn + "kv_a_proj_with_mqa", m.kv_lora_rank + m.rope, D);
      vector(attn + "kv_a_layernorm.weight", m.kv_lora_rank, m.dtype, 1, 0.1);
      matrix(attn + "kv_b_proj", m.mla_heads * (m.nope + m.v_head_dim), m.kv_lora_rank);
      matrix(attn + "o_proj", D, m.mla_heads * m.v_head_dim);
    }
    if (!m.is_moe(static_cast<int>(i))) {
      mlp(m.transformers_names ? moe : layer + "mlp.", m.intermediate_size);
      continue;
    }
    matrix(moe + "gate", m.experts, D, 2);
    vector(moe + "gate.e_score_correction_bias", m.experts, m.transformers_names ? DType::f32 : m.dtype, 0,
           0.3);
    for (int e = 0; e < m.experts; ++e) {
      const std::string expert = cat(moe, "experts.", e, ".");
      matrix(expert + "w1", m.moe_intermediate, D), matrix(expert + "w3", m.moe_intermediate, D);
      matrix(expert + "w2", D, m.moe_intermediate);
    }
    if (m.shared > 0) mlp(moe + "shared_experts.", m.shared * m.moe_intermediate);
  }
  return t;
}

// Writes config.json and the shards; `without` and `replace` spoil the tensors for tests of the loader.
inline void write_checkpoint(const std::string& folder, const TinyModel& m,
                             const std::map<std::string, OwnedTensor>& tensors,
                             const std::string& extra_config = "") {
  std::ofstream(folder + "/config.json") << config_json(m, extra_config);
  std::vector<std::map<std::string, Tensor>> shards(static_cast<size_t>(m.shards));
  std::string weight_map;
  size_t n = 0;
  for (const auto& [name, t] : tensors) {
    const size_t shard = n++ % shards.size();
    shards[shard][name] = t.tensor;
    weight_map += cat(weight_map.empty() ? "" : ", ", "\"", name, "\": \"part-", shard, ".safetensors\"");
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    write_safetensors(
        m.shards == 1 ? folder + "/model.safetensors" : cat(folder, "/part-", i, ".safetensors"), shards[i]);
  }
  if (m.shards > 1) {
    std::ofstream(folder + "/model.safetensors.index.json")
        << "{\"metadata\": {}, \"weight_map\": {" << weight_map << "}}";
  }
}

}  // namespace kl::testing
