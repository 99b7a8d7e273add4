// The definition of linear attention: the recurrence, token by token and head by head. Never optimised;
// linear_attention_decode runs through it too, in f32.
#include "ops/linear_attention/linear_attention_head.h"

namespace kl {
namespace linear_attention {
namespace {

using namespace recurrence;

// The log-decays of all channels at token t.
template <class Real>
void load_gate(const LinearAttentionArgs& args, const Head& h, int64_t t, Real* g) {
  if (!args.g) return std::fill(g, g + padded(h.K), Real(0));
  if (args.g.rank == 3) return load_row(args.g, t, h.head, g);
  std::fill(g, g + padded(h.K), static_cast<Real>(element(args.g, t, h.head)));
}

}  // namespace

template <class Real>
void recurrent_head(const LinearAttentionArgs& args, const Head& h) {
  if (h.idle()) return;
  const int64_t K = h.K, width = padded(h.V);
  std::vector<Real> S(static_cast<size_t>(K * width)), q(static_cast<size_t>(padded(K))), k(q), g(q);
  std::vector<Real> v(static_cast<size_t>(width)), o(v);

  load_state(h, h.read_slot, S.data());
  for (int64_t t = h.begin; t < h.end; ++t) {
    load_row(args.q, t, h.qk_head, q.data());
    load_row(args.k, t, h.qk_head, k.data());
    load_row(args.v, t, h.head, v.data());
    load_gate(args, h, t, g.data());
    // S <- Diag(exp g) S + k vᵀ,   o = scale · Sᵀ q
    std::fill(o.begin(), o.end(), Real(0));
    for (int64_t d = 0; d < K; ++d) {
      const size_t i = static_cast<size_t>(d);
      Real* S_d = &S[i * static_cast<size_t>(width)];
      decay_by(S_d, g[i], width);
      add_scaled(S_d, k[i], v.data(), width);
      add_scaled(o.data(), q[i], S_d, width);
    }
    scale_by(o.data(), static_cast<Real>(h.scale), width);
    store_row(o.data(), args.out, t, h.head);
  }
  store_state(h, S.data(), h.write_slot);
}
template void recurrent_head<float>(const LinearAttentionArgs&, const Head&);
template void recurrent_head<double>(const LinearAttentionArgs&, const Head&);

}  // namespace linear_attention

void linear_attention_recurrent_ref(const LinearAttentionArgs& args, recurrence::Precision precision) {
  const recurrence::Problem problem = linear_attention::problem_of(args);
  recurrence::check_device(problem, Device::cpu);
  linear_attention_check(args);
  const auto work = precision == recurrence::Precision::f64 ? linear_attention::recurrent_head<double>
                                                            : linear_attention::recurrent_head<float>;
  recurrence::for_each_head(nullptr, problem, [&](const recurrence::Head& h) { work(args, h); });
}

}  // namespace kl
