// R3: what the operators say of each other. Two of them get the same numbers, arranged as the equation of
// each wants them, and have to agree: to rounding of f64, and to 1e-6 in f32, as recurrences and in their
// chunkwise forms, which are different code.
//
// Signs and conventions. DPLR subtracts a bᵀ and b reads the state before the token's own decay, KDA's k
// after it: (I - beta k kᵀ) Diag(exp g) = Diag(exp g) - a bᵀ with a = beta k and b = exp(g) ⊙ k. Where one
// operator has beta and the other has not, beta goes into k (DPLR) or into v (linear attention): k (beta v)ᵀ
// is the same matrix. KDA's one beta both erases and writes; with beta = 2^-60 · beta' and v = 2^60 · v' the
// write keeps its strength and the erasure is below the rounding of f64, which is KDA without an erasure.
#include <algorithm>

#include "eval/claims.h"
#include "eval/memory_case.h"
#include "ops/delta_net/delta_net.h"
#include "ops/dplr/dplr.h"
#include "ops/kda/kda.h"
#include "ops/linear_attention/linear_attention.h"

namespace kl {
namespace {

using namespace eval;

// Arranges values in the tensors that the operators want.
class Reductions {
 public:
  Reductions(const MemoryTypes& types, bool in_chunks, ThreadPool* pool)
      : types_(types), in_chunks_(in_chunks), pool_(pool) {
    Random random(5);
    m_.q = normal_values(T_ * H_ * K_, random);
    m_.k = unit_rows(normal_values(T_ * H_ * K_, random), K_);
    m_.v = normal_values(T_ * H_ * V_, random);
    m_.state = normal_values(m_.sequences() * H_ * K_ * V_, random);
    for (int64_t i = 0; i < T_ * H_; ++i) {
      beta_.push_back(random.uniform());
      g_head_.push_back(-random.uniform() * random.uniform());
      for (int64_t d = 0; d < K_; ++d) g_spread_.push_back(g_head_.back());
    }
    for (size_t i = 0; i < m_.k.size(); ++i) g_channel_.push_back(-random.uniform() * random.uniform());
    for (Values* v : {&m_.q, &m_.k, &m_.v, &m_.state, &beta_, &g_head_, &g_spread_, &g_channel_}) round(*v);
  }

  double kda_is_gated_delta_net() const {
    return relative_error(kda(m_, g_spread_, beta_), delta_net(m_, g_head_, beta_));
  }
  double kda_without_gate_is_delta_net() const {
    return relative_error(kda(m_, Values(g_channel_.size()), beta_), delta_net(m_, {}, beta_));
  }
  double gate_of_zero_is_delta_net() const {
    return relative_error(delta_net(m_, Values(g_head_.size()), beta_), delta_net(m_, {}, beta_));
  }
  double dplr_is_kda() const {
    MemoryCase m = m_;
    m.k = scaled(m_.k, beta_, 1);
    Values b = m_.k;
    for (size_t i = 0; i < b.size(); ++i) b[i] *= std::exp(g_channel_[i]);
    return relative_error(dplr(m, m.k, b, g_channel_), kda(m_, g_channel_, beta_));
  }
  double dplr_without_erasure_is_gla() const {
    MemoryCase m = m_;
    m.k = scaled(m_.k, beta_, 1);
    const Values zero(m.k.size());
    return relative_error(dplr(m, zero, zero, g_channel_), linear_attention(written(), g_channel_));
  }
  double kda_without_erasure_is_gla() const {
    constexpr double kTiny = 0x1p-60;
    MemoryCase m = m_;
    for (double& x : m.v) x /= kTiny;
    Values beta = beta_;
    for (double& x : beta) x *= kTiny;
    return relative_error(kda(m, g_channel_, beta), linear_attention(written(), g_channel_));
  }
  double gla_is_decayed_attention() const {
    return relative_error(linear_attention(m_, g_spread_), linear_attention(m_, g_head_));
  }
  double gate_of_zero_is_linear_attention() const {
    return std::max(relative_error(linear_attention(m_, Values(g_channel_.size())), linear_attention(m_, {})),
                    relative_error(linear_attention(m_, Values(g_head_.size())), linear_attention(m_, {})));
  }

 private:
  // To what a tensor of the inputs' type can hold, so that both sides start from the same numbers.
  void round(Values& values) const {
    if (types_.inputs != DType::f64)
      for (double& x : values) x = static_cast<float>(x);
  }
  static Values scaled(Values rows, const Values& factor, double also) {
    const size_t width = rows.size() / factor.size();
    for (size_t i = 0; i < rows.size(); ++i) rows[i] *= factor[i / width] * also;
    return rows;
  }
  // beta v in the place of v: linear attention that writes what KDA does.
  MemoryCase written() const {
    MemoryCase m = m_;
    m.v = scaled(m_.v, beta_, 1);
    return m;
  }

  OwnedTensor heads(const Values& x) const { return to_tensor(types_.inputs, {T_, H_}, x); }
  OwnedTensor channels(const Values& x) const { return to_tensor(types_.inputs, {T_, H_, K_}, x); }

  // The chunkwise form, or the recurrence in the precision of the inputs.
  template <class Args>
  struct Operator {
    void (*prefill)(Ctx&, const Args&);
    void (*decode)(Ctx&, const Args&);
    void (*definition)(const Args&);
  };
  template <class Args>
  Values run_operator(const MemoryCase& m, const Operator<Args>& op,
                      const std::function<void(Args&)>& arrange) const {
    return joined(run<Args>(m, types_, [&](Args& args) {
      arrange(args);
      Ctx ctx{.pool = pool_};
      if (types_.inputs == DType::f64) return op.definition(args);
      in_chunks_ ? op.prefill(ctx, args) : op.decode(ctx, args);
    }));
  }

  Values kda(const MemoryCase& m, const Values& g, const Values& beta) const {
    const OwnedTensor gate = channels(g), strength = heads(beta);
    return run_operator<KdaArgs>(
        m, {kda_prefill, kda_decode, [](const KdaArgs& args) { kda_recurrent_ref(args, KdaPrecision::f64); }},
        [&](KdaArgs& args) {
          args.g = gate.tensor, args.gate.kind = KdaGateKind::log_decay;
          args.beta = strength.tensor, args.beta_kind = KdaBeta::value;
          args.l2norm = false;
        });
  }
  Values delta_net(const MemoryCase& m, const Values& g, const Values& beta) const {
    const OwnedTensor gate = g.empty() ? OwnedTensor{} : heads(g), strength = heads(beta);
    return run_operator<DeltaNetArgs>(
        m,
        {delta_net_prefill, delta_net_decode,
         [](const DeltaNetArgs& args) { delta_net_recurrent_ref(args, recurrence::Precision::f64); }},
        [&](DeltaNetArgs& args) {
          args.g = gate.tensor, args.gate.kind = DeltaNetGateKind::log_decay;
          args.beta = strength.tensor, args.beta_kind = DeltaNetBeta::value;
          args.l2norm = false;
        });
  }
  Values linear_attention(const MemoryCase& m, const Values& g) const {
    const bool by_channel = g.size() == g_channel_.size();
    const OwnedTensor gate = g.empty() ? OwnedTensor{} : by_channel ? channels(g) : heads(g);
    const auto definition = [](const LinearAttentionArgs& args) {
      linear_attention_recurrent_ref(args, recurrence::Precision::f64);
    };
    return run_operator<LinearAttentionArgs>(m,
                                             {linear_attention_prefill, linear_attention_decode, definition},
                                             [&](LinearAttentionArgs& args) { args.g = gate.tensor; });
  }
  Values dplr(const MemoryCase& m, const Values& a, const Values& b, const Values& g) const {
    const OwnedTensor left = channels(a), right = channels(b), gate = channels(g);
    return run_operator<DplrArgs>(
        m,
        {dplr_prefill, dplr_decode,
         [](const DplrArgs& args) { dplr_recurrent_ref(args, recurrence::Precision::f64); }},
        [&](DplrArgs& args) { args.a = left.tensor, args.b = right.tensor, args.g = gate.tensor; });
  }

  static constexpr int64_t T_ = 150, H_ = 2, K_ = 32, V_ = 24;
  MemoryTypes types_;
  bool in_chunks_;
  ThreadPool* pool_;
  MemoryCase m_{.lengths = {100, 1, 49}, .H = H_, .K = K_, .V = V_};
  Values beta_, g_head_;         // [T, H]
  Values g_spread_, g_channel_;  // [T, H, K] the gate of the head in all channels; one per channel
};

}  // namespace

std::vector<Claim> reduction_claims(ThreadPool* pool) {
  const struct {
    const char* what;
    double (Reductions::*error)() const;
  } reductions[] = {
      {"KDA with one gate per head = gated delta net", &Reductions::kda_is_gated_delta_net},
      {"KDA without a gate = delta net", &Reductions::kda_without_gate_is_delta_net},
      {"gated delta net with a gate of 0 = delta net", &Reductions::gate_of_zero_is_delta_net},
      {"DPLR with a = beta k, b = exp(g) k, k <- beta k = KDA", &Reductions::dplr_is_kda},
      {"KDA that erases nothing = gated linear attention", &Reductions::kda_without_erasure_is_gla},
      {"DPLR with a = 0 = gated linear attention", &Reductions::dplr_without_erasure_is_gla},
      {"gated linear attention with one gate per head = decayed linear attention",
       &Reductions::gla_is_decayed_attention},
      {"a gate of 0 = linear attention", &Reductions::gate_of_zero_is_linear_attention}};
  // f64 leaves the rounding of 150 dependent steps.
  const struct {
    const char* name;
    MemoryTypes types;
    bool in_chunks;
    double required;
  } forms[] = {{", f64", kAllF64, false, 1e-12},
               {", f32", kAllF32, false, 1e-6},
               {", f32 in chunks", kAllF32, true, 1e-6}};

  std::vector<Claim> claims;
  for (const auto& form : forms) {
    const Reductions r(form.types, form.in_chunks, pool);
    for (const auto& reduction : reductions)
      claims.push_back({"R3", cat(reduction.what, form.name), (r.*reduction.error)(), ClaimBound::at_most,
                        form.required, "equal"});
  }
  return claims;
}

}  // namespace kl
