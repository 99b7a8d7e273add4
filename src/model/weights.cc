#include "model/weights.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_set>

namespace kl {

namespace {

using Shape = std::vector<int64_t>;

std::string to_string(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

int64_t numel(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// A configuration may ask for millions of tensors that a file does not have: stop listing them here.
constexpr size_t kMaxErrors = 100000;

bool is_weight_dtype(DType d) { return d == DType::f32 || d == DType::bf16 || d == DType::f16; }

// Takes tensors out of a checkpoint one by one, checks them, and remembers what was wrong and what was used.
class Collector {
 public:
  Collector(const Checkpoint& checkpoint, Weights& weights) : checkpoint_(checkpoint), weights_(weights) {}

  // Which of these names stands in the checkpoint; the first if none does.
  std::string one_of(const std::string& first, const std::string& second) const {
    return !checkpoint_.find_entry(first) && checkpoint_.find_entry(second) ? second : first;
  }

  // A matrix, as it is stored. `uses` is the share of it that one token is multiplied with (experts: top_k of
  // E).
  Tensor matrix(const std::string& name, Shape shape, double uses = 1) {
    const SafetensorsFile::Entry* entry = take(name, {shape});
    if (!entry) return {};
    weights_.active_parameters += static_cast<int64_t>(uses * static_cast<double>(numel(shape)));
    weights_.active_bytes += static_cast<int64_t>(uses * static_cast<double>(entry->bytes));
    return *checkpoint_.find(name);
  }

  // A vector (or the small matrix of a convolution) as f32. The file may hold it in any of these shapes; the
  // first is the shape that the result has.
  Tensor widened(const std::string& name, const std::vector<Shape>& shapes, bool per_token = true) {
    const SafetensorsFile::Entry* entry = take(name, shapes);
    if (!entry) return {};
    const int64_t n = numel(shapes[0]);
    if (per_token) weights_.active_parameters += n, weights_.active_bytes += entry->bytes;
    Buffer buffer = Buffer::host(static_cast<size_t>(n) * sizeof(float));
    float* out = reinterpret_cast<float*>(buffer.data());
    dispatch_float(entry->dtype, [&]<class T>() {
      for (int64_t i = 0; i < n; ++i) {
        T value;  // read by bytes: a file may place vectors at any offset
        std::memcpy(&value, entry->data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        out[i] = static_cast<float>(value);
      }
    });
    const Shape& s = shapes[0];
    Tensor t = s.size() == 1 ? Tensor(out, DType::f32, {s[0]}) : Tensor(out, DType::f32, {s[0], s[1]});
    weights_.widened.push_back(std::move(buffer));
    return t;
  }

  // Ends the collection: throws one message with everything that was wrong.
  void finish() {
    std::string surplus;
    int count = 0;
    for (const SafetensorsFile::Entry* entry : checkpoint_.entries()) {
      // Multi-token prediction heads are extra layers for training; other implementations drop them too.
      if (used_.count(entry->name) || entry->name.rfind("model.mtp", 0) == 0) continue;
      surplus += "\n  surplus: " + entry->name + " " + to_string(entry->shape);
      ++count;
    }
    if (errors_.empty() && count == 0) return;
    std::string message = cat(checkpoint_.directory(), ": the tensors do not fit config.json:");
    for (const std::string& e : errors_) message += "\n  " + e;
    detail::fail(message + surplus);
  }

 private:
  const SafetensorsFile::Entry* take(const std::string& name, const std::vector<Shape>& shapes) {
    const SafetensorsFile::Entry* entry = checkpoint_.find_entry(name);
    if (!entry) {
      errors_.push_back("missing: " + name + " " + to_string(shapes[0]));
      if (errors_.size() == kMaxErrors) finish();
      return nullptr;
    }
    used_.insert(entry->name);
    if (std::find(shapes.begin(), shapes.end(), entry->shape) == shapes.end()) {
      std::string expected;
      for (const Shape& s : shapes) expected += (expected.empty() ? "" : " or ") + to_string(s);
      errors_.push_back("shape: " + name + ": expected " + expected + ", found " + to_string(entry->shape));
      return nullptr;
    }
    if (!is_weight_dtype(entry->dtype)) {
      errors_.push_back(cat("type: ", name, ": expected BF16, F32 or F16, found ", name_of(entry->dtype)));
      return nullptr;
    }
    weights_.parameters += numel(entry->shape);
    weights_.bytes += entry->bytes;
    return entry;
  }

  const Checkpoint& checkpoint_;
  Weights& weights_;
  std::vector<std::string> errors_;
  std::unordered_set<std::string> used_;
};

KdaWeights collect_kda(Collector& from, const Config& c, const std::string& prefix) {
  const int64_t D = c.hidden_size, H = c.linear_attn_config.num_heads, K = c.linear_attn_config.head_dim,
                P = H * K;
  const int64_t W = c.linear_attn_config.short_conv_kernel_size;
  const std::vector<Shape> taps = {{P, W}, {P, 1, W}};
  KdaWeights w;
  w.q_proj = from.matrix(prefix + "q_proj.weight", {P, D});
  w.k_proj = from.matrix(prefix + "k_proj.weight", {P, D});
  w.v_proj = from.matrix(prefix + "v_proj.weight", {P, D});
  w.q_conv1d = from.widened(prefix + "q_conv1d.weight", taps);
  w.k_conv1d = from.widened(prefix + "k_conv1d.weight", taps);
  w.v_conv1d = from.widened(prefix + "v_conv1d.weight", taps);
  w.A_log = from.widened(prefix + "A_log", {{H}, {1, 1, H, 1}, {H, 1}});
  w.dt_bias = from.widened(prefix + "dt_bias", {{H, K}, {P}});
  w.f_a_proj = from.matrix(prefix + "f_a_proj.weight", {K, D});
  w.f_b_proj = from.matrix(prefix + "f_b_proj.weight", {P, K});
  w.b_proj = from.matrix(prefix + "b_proj.weight", {H, D});
  w.g_a_proj = from.matrix(prefix + "g_a_proj.weight", {K, D});
  w.g_b_proj = from.matrix(prefix + "g_b_proj.weight", {P, K});
  w.o_norm = from.widened(prefix + "o_norm.weight", {{K}});
  w.o_proj = from.matrix(prefix + "o_proj.weight", {D, P});
  return w;
}

MlaWeights collect_mla(Collector& from, const Config& c, const std::string& prefix) {
  const int64_t D = c.hidden_size, A = c.num_attention_heads, R = c.kv_lora_rank;
  MlaWeights w;
  w.q_proj = from.matrix(prefix + "q_proj.weight", {A * c.qk_head_dim(), D});
  w.kv_a_proj_with_mqa = from.matrix(prefix + "kv_a_proj_with_mqa.weight", {c.latent_dim(), D});
  w.kv_a_layernorm = from.widened(prefix + "kv_a_layernorm.weight", {{R}});
  w.kv_b_proj = from.matrix(prefix + "kv_b_proj.weight", {A * (c.qk_nope_head_dim + c.v_head_dim), R});
  w.o_proj = from.matrix(prefix + "o_proj.weight", {D, A * c.v_head_dim});
  return w;
}

MlpWeights collect_mlp(Collector& from, const std::string& prefix, int64_t D, int64_t I) {
  MlpWeights w;
  w.gate_proj = from.matrix(prefix + "gate_proj.weight", {I, D});
  w.up_proj = from.matrix(prefix + "up_proj.weight", {I, D});
  w.down_proj = from.matrix(prefix + "down_proj.weight", {D, I});
  return w;
}

MoeWeights collect_moe(Collector& from, const Config& c, const std::string& prefix) {
  const int64_t D = c.hidden_size, E = c.num_experts, I = c.moe_intermediate_size;
  const double share = static_cast<double>(c.num_experts_per_token) / static_cast<double>(E);
  MoeWeights w;
  w.gate = from.matrix(prefix + "gate.weight", {E, D});
  w.e_score_correction_bias = from.widened(prefix + "gate.e_score_correction_bias", {{E}});
  w.experts.resize(static_cast<size_t>(E));
  for (int64_t e = 0; e < E; ++e) {
    const std::string expert = cat(prefix, "experts.", e, ".");
    ExpertWeights& x = w.experts[static_cast<size_t>(e)];
    x.w1 = from.matrix(expert + "w1.weight", {I, D}, share);
    x.w3 = from.matrix(expert + "w3.weight", {I, D}, share);
    x.w2 = from.matrix(expert + "w2.weight", {D, I}, share);
  }
  if (c.num_shared_experts > 0) {
    w.shared_experts = collect_mlp(from, prefix + "shared_experts.", D, c.num_shared_experts * I);
  }
  return w;
}

LayerWeights collect_layer(Collector& from, const Config& c, int layer) {
  const int64_t D = c.hidden_size;
  const std::string prefix = cat("model.layers.", layer, ".");
  LayerWeights w;
  w.input_layernorm = from.widened(prefix + "input_layernorm.weight", {{D}});
  w.post_attention_layernorm = from.widened(prefix + "post_attention_layernorm.weight", {{D}});
  if (c.is_kda(layer)) {
    w.kda = collect_kda(from, c, prefix + "self_attn.");
  } else {
    w.mla = collect_mla(from, c, prefix + "self_attn.");
  }
  if (c.is_moe(layer)) {
    w.moe = collect_moe(from, c, prefix + "block_sparse_moe.");
  } else {
    // transformers keeps the dense feed-forward where the sparse one would be.
    const std::string dense =
        from.one_of(prefix + "mlp.gate_proj.weight", prefix + "block_sparse_moe.gate_proj.weight");
    w.mlp = collect_mlp(from, dense.substr(0, dense.size() - std::strlen("gate_proj.weight")), D,
                        c.intermediate_size);
  }
  return w;
}

}  // namespace

Weights load_weights(const Checkpoint& checkpoint, const Config& c,
                     const std::function<void(int, int)>& on_layer) {
  Weights w;
  Collector from(checkpoint, w);
  const int64_t D = c.hidden_size, vocab = c.vocab_size;
  w.embed_tokens = from.matrix("model.embed_tokens.weight", {vocab, D}, 0);
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
    w.layers.push_back(collect_layer(from, c, layer));
    if (on_layer) on_layer(layer + 1, c.num_hidden_layers);
  }
  w.norm = from.widened("model.norm.weight", {{D}});
  // An lm_head in the file is the head, whatever the flag says: transformers stores and uses it either way.
  if (c.tie_word_embeddings && !checkpoint.find_entry("lm_head.weight")) {
    w.lm_head = w.embed_tokens;
    w.active_parameters += w.embed_tokens.numel();
    w.active_bytes += w.embed_tokens.bytes();
  } else {
    w.lm_head = from.matrix("lm_head.weight", {vocab, D});
  }
  from.finish();
  return w;
}

}  // namespace kl
