// The definition of the (gated) delta rule: the recurrence, token by token and head by head. Never optimised;
// delta_net_decode runs through it too, in f32.
#include "ops/delta_net/delta_net_head.h"

namespace kl {
namespace delta_net {

using namespace recurrence;

template <class Real>
void recurrent_head(const DeltaNetArgs& args, const Head& h) {
  if (h.idle()) return;
  const int64_t K = h.K, width = padded(h.V);
  std::vector<Real> S(static_cast<size_t>(K * width)), q(static_cast<size_t>(padded(K))), k(q);
  std::vector<Real> delta(static_cast<size_t>(width)), o(delta);
  const auto row = [&](int64_t d) { return &S[static_cast<size_t>(d * width)]; };

  load_state(h, h.read_slot, S.data());
  for (int64_t t = h.begin; t < h.end; ++t) {
    load_qk_row(args, h, args.q, t, q.data());
    load_qk_row(args, h, args.k, t, k.data());
    const Real g = static_cast<Real>(log_decay(args, h, t));

    // S <- exp(g) S,   delta = beta (v - Sᵀ k)
    load_row(args.v, t, h.head, delta.data());
    for (int64_t d = 0; d < K; ++d) {
      decay_by(row(d), g, width);
      add_scaled(delta.data(), -k[static_cast<size_t>(d)], row(d), width);
    }
    scale_by(delta.data(), static_cast<Real>(write_strength(args, h, t)), width);

    // S <- S + k deltaᵀ,   o = scale · Sᵀ q
    std::fill(o.begin(), o.end(), Real(0));
    for (int64_t d = 0; d < K; ++d) {
      add_scaled(row(d), k[static_cast<size_t>(d)], delta.data(), width);
      add_scaled(o.data(), q[static_cast<size_t>(d)], row(d), width);
    }
    scale_by(o.data(), static_cast<Real>(h.scale), width);
    store_row(o.data(), args.out, t, h.head);
  }
  store_state(h, S.data(), h.write_slot);
}
template void recurrent_head<float>(const DeltaNetArgs&, const Head&);
template void recurrent_head<double>(const DeltaNetArgs&, const Head&);

}  // namespace delta_net

void delta_net_recurrent_ref(const DeltaNetArgs& args, recurrence::Precision precision) {
  const recurrence::Problem problem = delta_net::problem_of(args);
  recurrence::check_device(problem, Device::cpu);
  delta_net_check(args);
  const auto work = precision == recurrence::Precision::f64 ? delta_net::recurrent_head<double>
                                                            : delta_net::recurrent_head<float>;
  recurrence::for_each_head(nullptr, problem, [&](const recurrence::Head& h) { work(args, h); });
}

}  // namespace kl
