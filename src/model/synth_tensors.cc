// Which tensors a checkpoint has, and their values.
#include <cmath>
#include <numeric>

#include "base/counter_random.h"
#include "model/synth.h"

namespace kl {

namespace {

constexpr float kNormSpread = 0.1f, kRouterBias = 0.01f, kConvSpread = 0.5f, kEmbedding = 0.02f;

class Lister {
 public:
  Lister(const Config& c, DType matrices) : c_(c), dtype_(matrices) {}

  std::vector<SynthTensor> list() {
    const int64_t D = c_.hidden_size, V = c_.vocab_size;
    add("model.embed_tokens.weight", {V, D}, SynthInit::normal, kEmbedding);
    for (int i = 0; i < c_.num_hidden_layers; ++i) layer(i);
    norm("model.norm", D);
    if (!c_.tie_word_embeddings) matrix("lm_head", V, D);
    return std::move(tensors_);
  }

 private:
  void add(const std::string& name, std::vector<int64_t> shape, SynthInit init, float spread) {
    tensors_.push_back({name, dtype_, std::move(shape), init, spread});
  }
  void add_f32(const std::string& name, std::vector<int64_t> shape, SynthInit init) {
    tensors_.push_back({name, DType::f32, std::move(shape), init, 0});
  }
  // The published deviation is 0.02 at a width of 2304; other widths keep the size of what comes out.
  void matrix(const std::string& name, int64_t rows, int64_t columns, double gain = 1) {
    const double deviation = gain * 0.96 / std::sqrt(static_cast<double>(columns));
    add(name + ".weight", {rows, columns}, SynthInit::normal, static_cast<float>(deviation));
  }
  // Writes to the residual stream: the sum over the layers keeps the size of one.
  void output(const std::string& name, int64_t rows, int64_t columns) {
    matrix(name, rows, columns, 1 / std::sqrt(2. * c_.num_hidden_layers));
  }
  void norm(const std::string& name, int64_t n) { add(name + ".weight", {n}, SynthInit::norm, kNormSpread); }

  void mlp(const std::string& prefix, int64_t width) {
    matrix(prefix + "gate_proj", width, c_.hidden_size);
    matrix(prefix + "up_proj", width, c_.hidden_size);
    output(prefix + "down_proj", c_.hidden_size, width);
  }
  void kda(const std::string& p) {
    const LinearAttnConfig& l = c_.linear_attn_config;
    const int64_t D = c_.hidden_size, H = l.num_heads, K = l.head_dim, P = H * K;
    for (const char* x : {"q", "k", "v"}) matrix(p + x + "_proj", P, D);
    for (const char* x : {"q", "k", "v"})
      add(p + x + "_conv1d.weight", {P, 1, l.short_conv_kernel_size}, SynthInit::uniform, kConvSpread);
    add_f32(p + "A_log", {1, 1, H, 1}, SynthInit::A_log);
    add_f32(p + "dt_bias", {P}, SynthInit::dt_bias);
    matrix(p + "f_a_proj", K, D), matrix(p + "f_b_proj", P, K);
    matrix(p + "b_proj", H, D);
    matrix(p + "g_a_proj", K, D), matrix(p + "g_b_proj", P, K);
    norm(p + "o_norm", K);
    output(p + "o_proj", D, P);
  }
  void mla(const std::string& p) {
    const int64_t D = c_.hidden_size, A = c_.num_attention_heads, R = c_.kv_lora_rank;
    matrix(p + "q_proj", A * c_.qk_head_dim(), D);
    matrix(p + "kv_a_proj_with_mqa", c_.latent_dim(), D);
    norm(p + "kv_a_layernorm", R);
    matrix(p + "kv_b_proj", A * (c_.qk_nope_head_dim + c_.v_head_dim), R);
    output(p + "o_proj", D, A * c_.v_head_dim);
  }
  void moe(const std::string& p) {
    const int64_t D = c_.hidden_size, E = c_.num_experts, I = c_.moe_intermediate_size;
    matrix(p + "gate", E, D);
    add(p + "gate.e_score_correction_bias", {E}, SynthInit::normal, kRouterBias);
    for (int64_t e = 0; e < E; ++e) {
      const std::string expert = cat(p, "experts.", e, ".");
      matrix(expert + "w1", I, D);
      output(expert + "w2", D, I);
      matrix(expert + "w3", I, D);
    }
    if (c_.num_shared_experts > 0) mlp(p + "shared_experts.", c_.num_shared_experts * I);
  }
  void layer(int i) {
    const std::string p = cat("model.layers.", i, ".");
    norm(p + "input_layernorm", c_.hidden_size);
    norm(p + "post_attention_layernorm", c_.hidden_size);
    c_.is_kda(i) ? kda(p + "self_attn.") : mla(p + "self_attn.");
    c_.is_moe(i) ? moe(p + "block_sparse_moe.") : mlp(p + "mlp.", c_.intermediate_size);
  }

  const Config& c_;
  DType dtype_;
  std::vector<SynthTensor> tensors_;
};

// The sum of the four 16-bit parts of `bits` around its middle: exact, deviation sqrt((2^32 - 1) / 3).
double sum_of_four(uint64_t bits) {
  const uint64_t sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
  return static_cast<double>(static_cast<int64_t>(sum) - 131070);
}

// To a multiple of 2^-12: libraries' logarithms differ far below that.
double coarse(double x) { return std::nearbyint(x * 4096) / 4096; }

double dt_bias(double u) {
  const double dt = std::exp(u * (std::log(0.1) - std::log(0.001)) + std::log(0.001));
  return coarse(dt + std::log(-std::expm1(-dt)));
}

}  // namespace

int64_t SynthTensor::numel() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

std::vector<SynthTensor> synth_tensors(const Config& c, DType matrices) { return Lister(c, matrices).list(); }

void synth_fill(const SynthTensor& t, uint64_t seed, int64_t first, int64_t count, void* out) {
  const CounterRandom random(seed, t.name);
  // As f32 the factors have 24 bits; times an integer of 18 that is exact in f64, so that an FMA and a
  // product with a sum round alike.
  const double normal = static_cast<float>(t.spread / std::sqrt(4294967295. / 3));
  const auto value = [&](uint64_t i) -> double {
    switch (t.init) {
      case SynthInit::normal: return sum_of_four(random.bits(i)) * normal;
      case SynthInit::norm: return 1 + sum_of_four(random.bits(i)) * normal;
      case SynthInit::uniform: {
        const auto u = static_cast<double>(static_cast<int64_t>(random.bits(i) >> 40) * 2 - 0xffffff);
        return u * (t.spread / 0x1p24);
      }
      case SynthInit::A_log: return coarse(std::log(1 + 15 * random.uniform(i)));
      case SynthInit::dt_bias: return dt_bias(random.uniform(i));
    }
    return 0;
  };
  dispatch_float(t.dtype, [&]<class T>() {
    T* to = static_cast<T*>(out);
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<T>(static_cast<float>(value(static_cast<uint64_t>(first + i))));
  });
}

}  // namespace kl
