// The definition of replay decode, in plain loops and f64 between memory and memory.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/kda/kda_gate.h"
#include "ops/kda/kda_replay.h"

namespace kl {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLeastDecay = -150;

double element(const Tensor& t, int64_t n, int64_t head, int64_t i) {
  return dispatch_float(
      t.dtype, [&]<class T>() { return static_cast<double>(static_cast<float>(*t.at<T>(n, head, i))); });
}

// A row of q or k, normalised where the arguments ask for it.
std::vector<double> normalised(const KdaArgs& a, const Tensor& rows, int64_t n, int64_t head) {
  std::vector<double> x(static_cast<size_t>(rows.size(2)));
  double squares = 0;
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = element(rows, n, head, static_cast<int64_t>(i)), squares += x[i] * x[i];
  if (a.l2norm)
    for (double& y : x) y /= std::sqrt(squares + a.l2_eps);
  return x;
}

void replay_head(const KdaReplayArgs& a, int64_t n, int64_t head) {
  const KdaArgs& kda = a.kda;
  const int64_t K = kda.q.size(2), V = kda.v.size(2), L = a.keys.size(2);
  const int64_t qk_head = head / (kda.v.size(1) / kda.q.size(1));
  const int64_t slot = *kda.slot.at<int32_t>(n), fill = slot < 0 ? 0 : *a.fill.at<int32_t>(n);
  const std::vector<double> q = normalised(kda, kda.q, n, qk_head), k = normalised(kda, kda.k, n, qk_head);

  std::vector<double> G(static_cast<size_t>(K));  // first the natural log-decays of this token
  for (int64_t c = 0; c < K; ++c) G[static_cast<size_t>(c)] = element(kda.g, n, head, c);
  kda::HeadGate<double>(kda.gate, head, K).apply(G.data());
  for (int64_t c = 0; c < K; ++c) {
    double& g = G[static_cast<size_t>(c)];
    g = std::max(g * kLog2e, kLeastDecay) + (fill > 0 ? *a.decays.at<float>(slot, head, fill - 1, c) : 0.);
  }

  const auto state = [&](int64_t c, int64_t v) -> float& {
    return kda.state_v_first ? *kda.state.at<float>(slot, head, v, c)
                             : *kda.state.at<float>(slot, head, c, v);
  };
  // The decayed state before this token's write, one value channel at a time.
  const double beta =
      kda::write_strength(kda.beta_kind, dispatch_float(kda.beta.dtype, [&]<class T>() {
                            return static_cast<double>(static_cast<float>(*kda.beta.at<T>(n, head)));
                          }));
  const double scale = kda.scale != 0 ? kda.scale : 1 / std::sqrt(static_cast<double>(K));
  for (int64_t v = 0; v < V; ++v) {
    std::vector<double> S(static_cast<size_t>(K));
    double u = 0, y = 0, kq = 0;
    for (int64_t c = 0; c < K; ++c) {
      const size_t i = static_cast<size_t>(c);
      S[i] = slot < 0 ? 0 : std::exp2(G[i]) * state(c, v);
      for (int64_t j = 0; j < fill; ++j)
        S[i] += *a.keys.at<float>(slot, head, j, c) *
                std::exp2(G[i] - *a.decays.at<float>(slot, head, j, c)) *
                *a.deltas.at<float>(slot, head, j, v);
      u += S[i] * k[i], y += S[i] * q[i], kq += k[i] * q[i];
    }
    const double delta = beta * (element(kda.v, n, head, v) - u);
    const double o = scale * (y + kq * delta);
    dispatch_float(kda.out.dtype,
                   [&]<class T>() { *kda.out.at<T>(n, head, v) = static_cast<T>(static_cast<float>(o)); });
    if (slot < 0) continue;
    *a.deltas.at<float>(slot, head, fill, v) = static_cast<float>(delta);
    if (fill == L - 1)
      for (int64_t c = 0; c < K; ++c)
        state(c, v) = static_cast<float>(S[static_cast<size_t>(c)] + k[static_cast<size_t>(c)] * delta);
  }
  if (slot < 0) return;
  for (int64_t c = 0; c < K; ++c) {
    *a.keys.at<float>(slot, head, fill, c) = static_cast<float>(k[static_cast<size_t>(c)]);
    *a.decays.at<float>(slot, head, fill, c) = static_cast<float>(G[static_cast<size_t>(c)]);
  }
}

}  // namespace

void kda_replay_ref(const KdaReplayArgs& a) {
  KL_CHECK(a.kda.q.device == Device::cpu, "kda_replay_ref: expected tensors on the cpu, found ",
           name_of(a.kda.q.device));
  for (int64_t n = 0; n < a.kda.q.size(0); ++n)
    for (int64_t head = 0; head < a.kda.v.size(1); ++head) replay_head(a, n, head);
}

}  // namespace kl
