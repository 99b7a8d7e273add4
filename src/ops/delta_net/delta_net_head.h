// The work of the delta rule: one value head of one sequence, and what its raw inputs mean.
#pragma once

#include <cmath>

#include "ops/delta_net/delta_net.h"

namespace kl::delta_net {

using recurrence::Head;

template <class Real>
void recurrent_head(const DeltaNetArgs&, const Head&);  // delta_net_ref.cc; float or double
void chunk_head(const DeltaNetArgs&, const Head&);      // delta_net_chunk_ref.cc

recurrence::Problem problem_of(const DeltaNetArgs&);

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
// log(1 + e^x) without overflow.
inline double softplus(double x) { return std::max(x, 0.) + std::log1p(std::exp(-std::abs(x))); }

// The formulas of gate and beta are one number per token: in double, whatever the caller computes in.
inline double log_decay(const DeltaNetArgs& args, const Head& h, int64_t t) {
  if (!args.g) return 0;
  const double z = recurrence::element(args.g, t, h.head);
  if (args.gate.kind == DeltaNetGateKind::log_decay) return z;
  const double rate = args.gate.A_log ? std::exp(recurrence::element(args.gate.A_log, h.head)) : 1;
  const double bias = args.gate.dt_bias ? recurrence::element(args.gate.dt_bias, h.head) : 0;
  return -rate * softplus(z + bias);
}

inline double write_strength(const DeltaNetArgs& args, const Head& h, int64_t t) {
  const double x = recurrence::element(args.beta, t, h.head);
  switch (args.beta_kind) {
    case DeltaNetBeta::value: return x;
    case DeltaNetBeta::sigmoid: return sigmoid(x);
    case DeltaNetBeta::sigmoid2: return 2 * sigmoid(x);
  }
  return 0;
}

// A row of q or k, divided by its length where args.l2norm asks for it. The length is taken in double: its
// error would scale the whole row, and k enters every later state twice.
template <class Real>
void load_qk_row(const DeltaNetArgs& args, const Head& h, const Tensor& rows, int64_t t, Real* to) {
  recurrence::load_row(rows, t, h.qk_head, to);
  if (!args.l2norm) return;
  double squares = 0;
  for (int64_t i = 0; i < h.K; ++i) squares += static_cast<double>(to[i]) * static_cast<double>(to[i]);
  const double factor = 1 / std::sqrt(squares + args.l2_eps);
  for (int64_t i = 0; i < h.K; ++i) to[i] = static_cast<Real>(to[i] * factor);
}

}  // namespace kl::delta_net
