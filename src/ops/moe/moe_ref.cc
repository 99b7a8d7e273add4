// The definition of the mixture of experts: plain loops in f64. Scores are rounded to f32 and chosen by in
// f32, as every implementation does, because that decides which experts are equal. Not checked: the doors in
// moe.cc are.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/moe/moe.h"

namespace kl {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

std::vector<float> scores(const float* logit, int64_t E, MoeScore kind) {
  std::vector<double> s(E);
  double top = kNever, sum = 0;
  for (int64_t e = 0; e < E; ++e) top = std::max<double>(top, logit[e]);
  for (int64_t e = 0; e < E; ++e) sum += std::exp(logit[e] - top);
  for (int64_t e = 0; e < E; ++e)
    s[e] = kind == MoeScore::softmax ? std::exp(logit[e] - top) / sum
                                     : 1 / (1 + std::exp(-static_cast<double>(logit[e])));
  return {s.begin(), s.end()};
}

// Takes the largest of c, the first among equals, and leaves `kNever` in its place.
int32_t take_best(std::vector<float>& c) {
  size_t best = 0;
  for (size_t i = 1; i < c.size(); ++i)
    if (c[i] > c[best]) best = i;
  c[best] = kNever;
  return static_cast<int32_t>(best);
}

// Experts outside of the topk_group best groups get kNever.
void drop_groups(std::vector<float>& c, int n_group, int topk_group) {
  const size_t size = c.size() / n_group;
  std::vector<float> group(n_group);
  for (int g = 0; g < n_group; ++g) {
    std::vector<float> members(c.begin() + g * size, c.begin() + (g + 1) * size);
    for (size_t i = 0; i < std::min<size_t>(size, 2); ++i) {
      const std::vector<float> before = members;
      group[g] += before[take_best(members)];
    }
  }
  std::vector<bool> kept(n_group);
  for (int i = 0; i < topk_group; ++i) kept[take_best(group)] = true;
  for (size_t e = 0; e < c.size(); ++e)
    if (!kept[e / size]) c[e] = kNever;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

double dot(const Tensor& w, int64_t row, const std::vector<double>& x) {
  double sum = 0;
  dispatch_float(w.dtype, [&]<class W>() {
    for (size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(w.at<W>(row)[i]) * x[i];
  });
  return sum;
}

std::vector<double> feed_forward(const ExpertWeights& w, const std::vector<double>& x) {
  std::vector<double> h(w.w1.size(0)), y(w.w2.size(0));
  for (size_t i = 0; i < h.size(); ++i)
    h[i] = silu(dot(w.w1, static_cast<int64_t>(i), x)) * dot(w.w3, static_cast<int64_t>(i), x);
  for (size_t i = 0; i < y.size(); ++i) y[i] = dot(w.w2, static_cast<int64_t>(i), h);
  return y;
}

}  // namespace

void moe_route_ref(const MoeRouteArgs& a) {
  const int64_t E = a.logits.size(1), top_k = a.experts.size(1);
  for (int64_t t = 0; t < a.logits.size(0); ++t) {
    const std::vector<float> s = scores(a.logits.at<float>(t), E, a.score);
    std::vector<float> c = s;
    for (int64_t e = 0; e < E && a.bias; ++e) c[e] += a.bias.ptr<float>()[e];
    const std::vector<float> biased = c;
    if (a.topk_group < a.n_group) drop_groups(c, a.n_group, a.topk_group);

    double sum = 0;
    float* const w = a.weights.at<float>(t);
    for (int64_t j = 0; j < top_k; ++j) {
      const int32_t e = a.experts.at<int32_t>(t)[j] = take_best(c);
      w[j] = a.bias_in_weights ? biased[e] : s[e];
      sum += w[j];
    }
    const double factor = a.renormalize ? a.scaling / (sum + 1e-20) : a.scaling;
    for (int64_t j = 0; j < top_k; ++j) w[j] = static_cast<float>(w[j] * factor);
  }
}

void moe_experts_ref(const MoeExpertsArgs& a) {
  const int64_t D = a.x.size(1);
  for (int64_t t = 0; t < a.x.size(0); ++t) {
    const std::vector<double> x(a.x.at<float>(t), a.x.at<float>(t) + D);
    std::vector<double> sum(D);
    for (int64_t j = 0; j < a.experts.size(1); ++j) {
      const std::vector<double> y = feed_forward(a.weights_of[*a.experts.at<int32_t>(t, j)], x);
      for (int64_t d = 0; d < D; ++d) sum[d] += *a.weights.at<float>(t, j) * y[d];
    }
    for (int64_t d = 0; d < D; ++d) {
      float* const out = a.out.at<float>(t, d);
      *out = static_cast<float>(*out + sum[d]);
    }
  }
}

}  // namespace kl
