// What the raw tensors g and beta mean: the formulas of KdaGateKind and KdaBeta, in the precision of the
// caller. CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/kda/kda.h"

namespace kl::kda {

template <class Real>
Real sigmoid(Real x) {
  return 1 / (1 + std::exp(-x));
}

// log(1 + e^x) without overflow, and without the cut-off that makes other implementations jump at x = 20.
template <class Real>
Real softplus(Real x) {
  return std::max(x, Real(0)) + std::log1p(std::exp(-std::abs(x)));
}

inline double write_strength(KdaBeta kind, double x) {
  switch (kind) {
    case KdaBeta::value: return x;
    case KdaBeta::sigmoid: return sigmoid(x);
    case KdaBeta::sigmoid2: return 2 * sigmoid(x);
  }
  return 0;
}

// The gate of one value head.
template <class Real>
class HeadGate {
 public:
  HeadGate(const KdaGate& gate, int64_t head, int64_t K)
      : kind_(gate.kind), lower_bound_(gate.lower_bound), bias_(static_cast<size_t>(K), Real(0)) {
    // exp in double: its error would be common to all tokens and add up in the sum of log-decays.
    if (gate.A_log) rate_ = static_cast<Real>(std::exp(element(gate.A_log, head)));
    if (gate.dt_bias) {
      const Tensor row = gate.dt_bias[head];
      for (int64_t i = 0; i < K; ++i) bias_[static_cast<size_t>(i)] = static_cast<Real>(element(row, i));
    }
  }

  Real rate() const { return rate_; }
  const Real* bias() const { return bias_.data(); }

  // Turns a row of K raw values into log-decays, each from 0 to -inf.
  void apply(Real* z) const {
    switch (kind_) {
      case KdaGateKind::log_decay: return;
      case KdaGateKind::softplus:
        for (size_t i = 0; i < bias_.size(); ++i) z[i] = -rate_ * softplus(z[i] + bias_[i]);
        return;
      case KdaGateKind::bounded:
        for (size_t i = 0; i < bias_.size(); ++i) z[i] = lower_bound_ * sigmoid(rate_ * (z[i] + bias_[i]));
        return;
    }
  }

 private:
  static double element(const Tensor& t, int64_t i) {
    return dispatch_float(t.dtype, [&]<class T>() { return static_cast<double>(*t.at<T>(i)); });
  }

  KdaGateKind kind_;
  Real rate_ = 1;  // exp(A_log)
  Real lower_bound_;
  std::vector<Real> bias_;  // [K]
};

}  // namespace kl::kda
