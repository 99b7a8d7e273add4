#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "base/check.h"
#include "io/checkpoint.h"
#include "io/quote.h"

namespace kl {

using nlohmann::json;

namespace {

constexpr int kMaxDepth = 16;       // of nested JSON
constexpr size_t kMaxListed = 100;  // that a message lists

// A value of the file, for messages.
std::string shown(const json& value) {
  return printable(value.dump(-1, ' ', true, json::error_handler_t::replace), 60);
}

// Reads typed values out of one JSON object and collects what is wrong, so that a user sees all of it at
// once.
class Reader {
 public:
  Reader(const json& object, std::string prefix, std::vector<std::string>& errors)
      : object_(object), prefix_(std::move(prefix)), errors_(errors) {}

  bool has(const char* key) const {
    const auto it = object_.find(key);
    return it != object_.end() && !it->is_null();
  }
  const json& at(const char* key) const { return *object_.find(key); }

  template <class Int>
  void integer(const char* key, Int& value, int64_t low, int64_t high) {
    if (!has(key)) return;
    const json& j = at(key);
    const bool fits =
        j.is_number_integer() && !(j.is_number_unsigned() && j.get<uint64_t>() > static_cast<uint64_t>(high));
    if (!fits || j.get<int64_t>() < low || j.get<int64_t>() > high) {
      wrong(key, cat("an integer from ", low, " to ", high));
    } else {
      value = static_cast<Int>(j.get<int64_t>());
    }
  }
  void required(const char* key, int& value, int64_t low, int64_t high) {
    if (has(key)) {
      integer(key, value, low, high);
    } else {
      errors_.push_back(cat(prefix_, key, " is missing"));
    }
  }
  void number(const char* key, float& value, double low, double high) {
    if (!has(key)) return;
    const json& j = at(key);
    if (!j.is_number() || !(j.get<double>() >= low && j.get<double>() <= high)) {
      wrong(key, cat("a number from ", low, " to ", high));
    } else {
      value = j.get<float>();
    }
  }
  void boolean(const char* key, bool& value) {
    if (!has(key)) return;
    if (at(key).is_boolean()) {
      value = at(key).get<bool>();
    } else {
      wrong(key, "true or false");
    }
  }
  void text(const char* key, std::string& value) {
    if (!has(key)) return;
    if (at(key).is_string()) {
      value = at(key).get<std::string>();
    } else {
      wrong(key, "a string");
    }
  }
  void layer_list(const char* key, std::vector<int>& value, int layers) {
    if (!has(key)) return;
    const json& j = at(key);
    bool good = j.is_array() && j.size() <= static_cast<size_t>(layers);
    for (size_t i = 0; good && i < j.size(); ++i) {
      good = j[i].is_number_integer() && j[i].get<int64_t>() >= 1 && j[i].get<int64_t>() <= layers;
      if (good) value.push_back(j[i].get<int>());
    }
    if (!good) wrong(key, cat("a list of layer numbers from 1 to ", layers));
  }
  void wrong(const char* key, const std::string& expected) {
    errors_.push_back(cat(prefix_, key, ": expected ", expected, ", found ", shown(at(key))));
  }

 private:
  const json& object_;
  std::string prefix_;
  std::vector<std::string>& errors_;
};

bool is_neutral(const json& j) {  // null, false, 0, "" or an empty container: says that a feature is off
  return j.is_null() || (j.is_boolean() && !j.get<bool>()) || (j.is_number() && j.get<double>() == 0) ||
         ((j.is_string() || j.is_structured()) && j.empty()) ||
         (j.is_string() && j.get<std::string>().empty());
}

// Keys of relatives that carry the same model_type. Any of them, switched on, makes another model.
void refuse_relatives(const json& root, const std::string& source) {
  if (root.contains("text_config")) {
    detail::fail(
        cat(source,
            ": this is not a Kimi Linear model: it has a text_config (a multimodal model such as Kimi K3)"));
  }
  const json type = root.value("model_type", json());
  const std::string model_type = type.is_string() ? type.get<std::string>() : shown(type);
  KL_CHECK(model_type == "kimi_linear", source,
           ": this is not a Kimi Linear model: expected model_type kimi_linear, found ",
           type.is_null() ? "none" : printable(model_type, 60));
  for (const char* key :
       {"attn_res_block_size", "attnres_block_size", "routed_expert_hidden_size", "mla_use_output_gate",
        "activation_situ_beta", "activation_situ_linear_beta", "q_lora_rank", "index_topk"}) {
    if (root.contains(key) && !is_neutral(root[key])) {
      detail::fail(cat(source, ": model_type says kimi_linear, but ", key, " = ", shown(root[key]),
                       " belongs to another model of the family (Kimi K3 carries the same model_type); only "
                       "Kimi Linear is "
                       "supported"));
    }
  }
  if (root.contains("hidden_act") && root["hidden_act"] != "silu") {
    detail::fail(
        cat(source, ": model_type says kimi_linear, but hidden_act = ", shown(root["hidden_act"]),
            " where Kimi Linear has \"silu\" (Kimi K3 carries the same model_type and has \"situ\")"));
  }
  const json linear = root.value("linear_attn_config", json::object());
  for (const char* key : {"use_full_rank_gate", "gate_lower_bound", "lower_bound", "safe_gate"}) {
    if (linear.is_object() && linear.contains(key) && !is_neutral(linear[key])) {
      detail::fail(cat(source, ": model_type says kimi_linear, but linear_attn_config.", key, " = ",
                       shown(linear[key]),
                       " belongs to another model of the family (Kimi K3 carries the same model_type); only "
                       "Kimi Linear is "
                       "supported"));
    }
  }
}

// Other keys that would change the mathematics if they were on.
void refuse_unsupported(const json& root, std::vector<std::string>& errors) {
  for (const char* key :
       {"attention_bias", "mlp_bias", "use_bias", "qk_norm", "use_qk_norm", "sliding_window",
        "use_sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "logits_scaling",
        "embedding_multiplier", "residual_multiplier", "attention_multiplier", "allow_neg_eigval",
        "quantization_config", "swiglu_limit", "hc_mult", "rope_parameters_mla"}) {
    if (root.contains(key) && !is_neutral(root[key])) {
      errors.push_back(cat(key, ": not supported, it changes the computation; found ", shown(root[key])));
    }
  }
  // The published layer has no positional encoding; mla_use_nope: false would ask for rotation. Absent means
  // NoPE.
  if (root.contains("mla_use_nope") && root["mla_use_nope"] == false) {
    errors.push_back("mla_use_nope: expected true (no rotary encoding), found false");
  }
  // linear_attn_config holds nothing but mathematics: every key has to be known.
  const std::set<std::string> known = {"head_dim",         "num_heads",        "short_conv_kernel_size",
                                       "kda_layers",       "full_attn_layers", "use_full_rank_gate",
                                       "gate_lower_bound", "lower_bound",      "safe_gate"};
  if (root.contains("linear_attn_config") && root["linear_attn_config"].is_object()) {
    for (const auto& [key, value] : root["linear_attn_config"].items()) {
      if (!known.count(key) && !is_neutral(value)) {
        errors.push_back(cat("linear_attn_config.", printable(key, 60),
                             ": not known, it may change the computation; found ", shown(value)));
      }
    }
  }
}

// transformers' own list ("linear_attention", "full_attention") and Moonshot's 1-based lists say the same
// thing twice.
void read_layer_types(const json& root, Config& c, std::vector<std::string>& errors) {
  const LinearAttnConfig& linear = c.linear_attn_config;
  c.kda_.assign(static_cast<size_t>(c.num_hidden_layers), false);
  for (const int layer : linear.kda_layers) c.kda_[static_cast<size_t>(layer - 1)] = true;
  for (const int layer : linear.full_attn_layers) {
    if (c.kda_[static_cast<size_t>(layer - 1)]) {
      errors.push_back(
          cat("linear_attn_config: layer ", layer, " is in both kda_layers and full_attn_layers"));
    }
  }
  const bool lists = root.contains("linear_attn_config") && root["linear_attn_config"].is_object() &&
                     (root["linear_attn_config"].contains("kda_layers") ||
                      root["linear_attn_config"].contains("full_attn_layers"));
  if (lists && !root["linear_attn_config"].contains("kda_layers")) {
    c.kda_.assign(c.kda_.size(), true);
    for (const int layer : linear.full_attn_layers) c.kda_[static_cast<size_t>(layer - 1)] = false;
  }
  if (lists && !linear.kda_layers.empty() && !linear.full_attn_layers.empty() &&
      linear.kda_layers.size() + linear.full_attn_layers.size() != c.kda_.size()) {
    errors.push_back(cat("linear_attn_config: expected kda_layers and full_attn_layers to name each of the ",
                         c.kda_.size(), " layers once, found ", linear.kda_layers.size(), " and ",
                         linear.full_attn_layers.size()));
  }
  const json types = root.value("layer_types", json());
  if (types.is_null()) {
    if (!lists) errors.push_back("linear_attn_config.kda_layers and layer_types are both missing");
    return;
  }
  if (!types.is_array() || types.size() != c.kda_.size()) {
    errors.push_back(cat("layer_types: expected a list of ", c.kda_.size(), " names"));
    return;
  }
  for (size_t i = 0; i < types.size(); ++i) {
    const bool kda = types[i] == "linear_attention";
    if (!kda && types[i] != "full_attention") {
      errors.push_back(
          cat("layer_types[", i, "]: expected linear_attention or full_attention, found ", shown(types[i])));
    } else if (!lists) {
      c.kda_[i] = kda;
    } else if (kda != c.kda_[i]) {
      errors.push_back(cat("layer_types[", i, "] = ", shown(types[i]), " contradicts linear_attn_config"));
    }
  }
}

void check_mlp_layer_types(const json& root, const Config& c, std::vector<std::string>& errors) {
  const json types = root.value("mlp_layer_types", json());
  if (types.is_null()) return;
  if (!types.is_array() || types.size() != static_cast<size_t>(c.num_hidden_layers)) {
    errors.push_back(cat("mlp_layer_types: expected a list of ", c.num_hidden_layers, " names"));
    return;
  }
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    const char* expected = c.is_moe(i) ? "sparse" : "dense";
    if (types[static_cast<size_t>(i)] != expected) {
      errors.push_back(cat("mlp_layer_types[", i, "] = ", shown(types[static_cast<size_t>(i)]),
                           ": first_k_dense_replace and ", "moe_layer_freq make this layer ", expected));
    }
  }
}

void read_linear_attention(const json& root, Config& c, std::vector<std::string>& errors) {
  constexpr int kMaxHeads = 1 << 16;
  LinearAttnConfig& linear = c.linear_attn_config;
  Reader top(root, "", errors);
  // transformers repeats these at the top level; its file may lack the nested object.
  top.integer("linear_num_heads", linear.num_heads, 1, kMaxHeads);
  top.integer("linear_head_dim", linear.head_dim, 1, 256);
  top.integer("linear_conv_kernel_dim", linear.short_conv_kernel_size, 2, 4);
  if (root.contains("linear_attn_config") && !root["linear_attn_config"].is_null()) {
    const json& nested = root["linear_attn_config"];
    if (!nested.is_object()) {
      errors.push_back("linear_attn_config: expected an object, found " + shown(nested));
      return;
    }
    const LinearAttnConfig repeated = linear;
    Reader reader(nested, "linear_attn_config.", errors);
    reader.integer("num_heads", linear.num_heads, 1, kMaxHeads);
    reader.integer("head_dim", linear.head_dim, 1, 256);
    reader.integer("short_conv_kernel_size", linear.short_conv_kernel_size, 2, 4);
    reader.layer_list("kda_layers", linear.kda_layers, c.num_hidden_layers);
    reader.layer_list("full_attn_layers", linear.full_attn_layers, c.num_hidden_layers);
    if ((repeated.num_heads && repeated.num_heads != linear.num_heads) ||
        (repeated.head_dim && repeated.head_dim != linear.head_dim)) {
      errors.push_back(cat("linear_num_heads, linear_head_dim (", repeated.num_heads, ", ", repeated.head_dim,
                           ") contradict linear_attn_config (", linear.num_heads, ", ", linear.head_dim,
                           ")"));
    }
  }
}

void read_moe(const json& root, Config& c, std::vector<std::string>& errors) {
  Reader reader(root, "", errors);
  reader.integer("num_experts", c.num_experts, 0, 65536);
  reader.integer("num_experts_per_tok", c.num_experts_per_token, 1, 65536);
  reader.integer("num_experts_per_token", c.num_experts_per_token, 1, 65536);
  reader.integer("num_shared_experts", c.num_shared_experts, 0, 4096);
  reader.integer("moe_intermediate_size", c.moe_intermediate_size, 1, 1 << 24);
  reader.integer("first_k_dense_replace", c.first_k_dense_replace, 0, 1 << 16);
  reader.integer("moe_layer_freq", c.moe_layer_freq, 1, 1 << 16);
  reader.integer("num_expert_group", c.num_expert_group, 1, 65536);
  reader.integer("topk_group", c.topk_group, 1, 65536);
  reader.boolean("moe_renormalize", c.moe_renormalize);
  reader.number("routed_scaling_factor", c.routed_scaling_factor, -1e6, 1e6);
  reader.text("moe_router_activation_func", c.moe_router_activation_func);
  bool use_grouped_topk = true;
  reader.boolean("use_grouped_topk", use_grouped_topk);
  if (!use_grouped_topk) c.num_expert_group = c.topk_group = 1;
  if (c.num_experts == 0) return;

  if (c.moe_router_activation_func != "sigmoid" && c.moe_router_activation_func != "softmax") {
    errors.push_back("moe_router_activation_func: expected sigmoid or softmax, found " +
                     printable(c.moe_router_activation_func, 60));
  }
  if (c.num_experts_per_token == 0) errors.push_back("num_experts_per_token is missing");
  if (c.moe_intermediate_size == 0) errors.push_back("moe_intermediate_size is missing");
  if (c.num_experts % c.num_expert_group != 0) {
    errors.push_back(cat("num_expert_group: expected a divisor of num_experts = ", c.num_experts, ", found ",
                         c.num_expert_group));
  } else if (c.topk_group > c.num_expert_group) {
    errors.push_back(cat("topk_group: expected at most num_expert_group = ", c.num_expert_group, ", found ",
                         c.topk_group));
  } else if (c.num_experts_per_token > c.num_experts / c.num_expert_group * c.topk_group) {
    errors.push_back(cat("num_experts_per_token: expected at most the ",
                         c.num_experts / c.num_expert_group * c.topk_group,
                         " experts that can be chosen, found ", c.num_experts_per_token));
  }
}

void read_mla(const json& root, Config& c, std::vector<std::string>& errors) {
  if (c.mla_layer_count() == 0) return;
  Reader reader(root, "", errors);
  reader.required("num_attention_heads", c.num_attention_heads, 1, 1 << 16);
  reader.required("kv_lora_rank", c.kv_lora_rank, 1, 1 << 16);
  reader.required("qk_nope_head_dim", c.qk_nope_head_dim, 1, 1 << 14);
  reader.integer("qk_rope_head_dim", c.qk_rope_head_dim, 0, 1 << 14);
  reader.required("v_head_dim", c.v_head_dim, 1, 1 << 14);
  int kv_heads = c.num_attention_heads;
  reader.integer("num_key_value_heads", kv_heads, 1, 1 << 16);
  if (kv_heads != c.num_attention_heads) {
    errors.push_back(cat("num_key_value_heads: expected num_attention_heads = ", c.num_attention_heads,
                         ", found ", kv_heads));
  }
  int qk_head_dim = c.qk_head_dim();
  reader.integer("qk_head_dim", qk_head_dim, 1, 1 << 15);
  if (qk_head_dim != c.qk_head_dim()) {
    errors.push_back(cat("qk_head_dim: expected qk_nope_head_dim + qk_rope_head_dim = ", c.qk_head_dim(),
                         ", found ", qk_head_dim));
  }
}

void read_token_ids(const json& root, Config& c, std::vector<std::string>& errors) {
  Reader reader(root, "", errors);
  reader.integer("bos_token_id", c.bos_token_id, 0, std::numeric_limits<int32_t>::max());
  reader.integer("pad_token_id", c.pad_token_id, 0, std::numeric_limits<int32_t>::max());
  const json eos = root.value("eos_token_id", json());
  for (const json& id : eos.is_array() ? eos : eos.is_null() ? json::array() : json::array({eos})) {
    if (id.is_number_integer() && id.get<int64_t>() >= 0 &&
        id.get<int64_t>() <= std::numeric_limits<int32_t>::max()) {
      c.eos_token_ids.push_back(id.get<int>());
    } else {
      errors.push_back("eos_token_id: expected a token id or a list of them, found " + shown(eos));
      break;
    }
  }
}

json parse_bounded(std::string_view text, const std::string& source) {
  const auto bounded = [&](int depth, json::parse_event_t, json&) {
    KL_CHECK(depth <= kMaxDepth, source, ": JSON nested deeper than ", kMaxDepth);
    return true;
  };
  // The JSON library takes a zero byte for the end of its input.
  KL_CHECK(text.find('\0') == std::string_view::npos, source, ": not valid JSON: it has a zero byte");
  try {
    json root = json::parse(text, bounded);
    KL_CHECK(root.is_object(), source, ": expected a JSON object");
    return root;
  } catch (const json::exception& e) {
    detail::fail(cat(source, ": not valid JSON: ", printable(e.what())));
  }
}

}  // namespace

int Config::kda_layer_count() const { return static_cast<int>(std::count(kda_.begin(), kda_.end(), true)); }

Config parse_config(std::string_view json_text, const std::string& source) {
  const json root = parse_bounded(json_text, source);
  refuse_relatives(root, source);

  Config c;
  std::vector<std::string> errors;
  Reader reader(root, "", errors);
  reader.required("vocab_size", c.vocab_size, 1, 1 << 28);
  reader.required("hidden_size", c.hidden_size, 1, 1 << 20);
  reader.required("num_hidden_layers", c.num_hidden_layers, 1, 4096);
  reader.integer("intermediate_size", c.intermediate_size, 1, 1 << 24);
  reader.number("rms_norm_eps", c.rms_norm_eps, 0, 1);
  reader.boolean("tie_word_embeddings", c.tie_word_embeddings);
  reader.integer("model_max_length", c.model_max_length, 1, int64_t{1} << 40);
  if (c.model_max_length == 0)
    reader.integer("max_position_embeddings", c.model_max_length, 1, int64_t{1} << 40);
  read_token_ids(root, c, errors);
  refuse_unsupported(root, errors);
  if (errors.empty()) {  // what follows needs the number of layers
    read_linear_attention(root, c, errors);
    read_layer_types(root, c, errors);
    if (c.kda_layer_count() > 0 &&
        (c.linear_attn_config.num_heads == 0 || c.linear_attn_config.head_dim == 0)) {
      errors.push_back("linear_attn_config.num_heads or linear_attn_config.head_dim is missing");
    }
    read_mla(root, c, errors);
    read_moe(root, c, errors);
    check_mlp_layer_types(root, c, errors);
    bool any_dense = false;
    for (int i = 0; i < c.num_hidden_layers; ++i) any_dense |= !c.is_moe(i);
    if (any_dense && c.intermediate_size == 0)
      errors.push_back("intermediate_size is missing (there are dense layers)");
  }
  if (!errors.empty()) {
    std::string message = cat(source, ": cannot use this configuration:");
    for (size_t i = 0; i < errors.size() && i < kMaxListed; ++i) message += "\n  " + errors[i];
    if (errors.size() > kMaxListed) message += cat("\n  and ", errors.size() - kMaxListed, " more");
    detail::fail(message);
  }
  return c;
}

Config load_config(const std::string& directory) {
  const std::string path = directory + "/config.json";
  return parse_config(read_text_file(path, size_t{1} << 20), path);
}

}  // namespace kl
