// The definition of Kimi Delta Attention: the recurrence, token by token and head by head. Never optimised.
#include "ops/kda/kda_head.h"

namespace kl {
namespace kda {

template <class Real>
void recurrent_head(const Head& h) {
  if (h.begin == h.end && h.read_slot == h.write_slot) return;
  const KdaArgs& args = h.args;
  const HeadGate<Real> gate(args.gate, h.head, h.K);
  const int64_t K = h.K, width = padded(h.V);
  std::vector<Real> S(static_cast<size_t>(K * width)), q(static_cast<size_t>(padded(K))), k(q), g(q);
  std::vector<Real> delta(static_cast<size_t>(width)), o(delta);

  load_state(h, h.read_slot, S.data());
  for (int64_t t = h.begin; t < h.end; ++t) {
    load_qk_row(h, args.q, t, q.data());
    load_qk_row(h, args.k, t, k.data());
    load_row(args.g, t, h.head, g.data());
    gate.apply(g.data());

    // S <- Diag(exp g) S                          the decay comes first,
    // delta = beta (v - Sᵀ k)                     so the prediction is that of the decayed state
    load_row(args.v, t, h.head, delta.data());
    for (int64_t d = 0; d < K; ++d) {
      Real* S_d = &S[static_cast<size_t>(d * width)];
      decay_by(S_d, g[static_cast<size_t>(d)], width);
      add_scaled(delta.data(), -k[static_cast<size_t>(d)], S_d, width);
    }
    scale_by(delta.data(), load_beta<Real>(h, t), width);

    // S <- S + k deltaᵀ,   o = scale · Sᵀ q       the query reads the updated state
    std::fill(o.begin(), o.end(), Real(0));
    for (int64_t d = 0; d < K; ++d) {
      Real* S_d = &S[static_cast<size_t>(d * width)];
      add_scaled(S_d, k[static_cast<size_t>(d)], delta.data(), width);
      add_scaled(o.data(), q[static_cast<size_t>(d)], S_d, width);
    }
    scale_by(o.data(), static_cast<Real>(h.scale), width);

    store_row(o.data(), args.out, t, h.head);
    for_each_checkpoint(args, t, t + 1, [&](int64_t, int64_t slot) { store_state(h, S.data(), slot); });
  }
  store_state(h, S.data(), h.write_slot);
}
template void recurrent_head<float>(const Head&);
template void recurrent_head<double>(const Head&);

}  // namespace kda

void kda_recurrent_ref(const KdaArgs& args, KdaPrecision precision) {
  kda_check(args);
  KL_CHECK(args.q.device == Device::cpu, "kda_recurrent_ref: expected tensors on the cpu, found ",
           name_of(args.q.device));
  kda::for_each_head(
      nullptr, args,
      precision == KdaPrecision::f64 ? kda::recurrent_head<double> : kda::recurrent_head<float>);
}

}  // namespace kl
