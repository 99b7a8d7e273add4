// The definition of DPLR: the recurrence, token by token and head by head. Never optimised; dplr_decode runs
// through it too, in f32.
#include "ops/dplr/dplr_head.h"

namespace kl {
namespace dplr {

using namespace recurrence;

template <class Real>
void recurrent_head(const DplrArgs& args, const Head& h) {
  if (h.idle()) return;
  const int64_t K = h.K, width = padded(h.V);
  std::vector<Real> S(static_cast<size_t>(K * width)), q(static_cast<size_t>(padded(K))), k(q), a(q), b(q),
      g(q);
  std::vector<Real> v(static_cast<size_t>(width)), p(v), o(v);

  load_state(h, h.read_slot, S.data());
  for (int64_t t = h.begin; t < h.end; ++t) {
    load_row(args.q, t, h.head, q.data());
    load_row(args.k, t, h.head, k.data());
    load_row(args.a, t, h.head, a.data());
    load_row(args.b, t, h.head, b.data());
    load_row(args.g, t, h.head, g.data());
    load_row(args.v, t, h.head, v.data());

    // p = Sᵀ b                                    of the state before the decay
    std::fill(p.begin(), p.end(), Real(0));
    for (int64_t d = 0; d < K; ++d)
      add_scaled(p.data(), b[static_cast<size_t>(d)], &S[static_cast<size_t>(d * width)], width);

    // S <- Diag(exp g) S - a pᵀ + k vᵀ,   o = scale · Sᵀ q
    std::fill(o.begin(), o.end(), Real(0));
    for (int64_t d = 0; d < K; ++d) {
      const size_t i = static_cast<size_t>(d);
      Real* S_d = &S[i * static_cast<size_t>(width)];
      decay_by(S_d, g[i], width);
      add_scaled(S_d, -a[i], p.data(), width);
      add_scaled(S_d, k[i], v.data(), width);
      add_scaled(o.data(), q[i], S_d, width);
    }
    scale_by(o.data(), static_cast<Real>(h.scale), width);
    store_row(o.data(), args.out, t, h.head);
  }
  store_state(h, S.data(), h.write_slot);
}
template void recurrent_head<float>(const DplrArgs&, const Head&);
template void recurrent_head<double>(const DplrArgs&, const Head&);

}  // namespace dplr

void dplr_recurrent_ref(const DplrArgs& args, recurrence::Precision precision) {
  const recurrence::Problem problem = dplr::problem_of(args);
  recurrence::check_device(problem, Device::cpu);
  dplr_check(args);
  const auto work =
      precision == recurrence::Precision::f64 ? dplr::recurrent_head<double> : dplr::recurrent_head<float>;
  recurrence::for_each_head(nullptr, problem, [&](const recurrence::Head& h) { work(args, h); });
}

}  // namespace kl
