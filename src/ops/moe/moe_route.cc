// moe_route on the CPU. A token's scores are few and its experts cost a thousand times as much, so this is
// plain code with the definition's arithmetic: the same choices and the same bits as moe_route_ref.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/moe/moe_cpu.h"

namespace kl {
namespace {

constexpr int64_t kTokensPerTask = 32;  // some 50 us with 256 experts

void scores(const float* logit, int64_t E, MoeScore kind, float* s) {
  if (kind == MoeScore::sigmoid) {
    for (int64_t e = 0; e < E; ++e)
      s[e] = static_cast<float>(1 / (1 + std::exp(-static_cast<double>(logit[e]))));
    return;
  }
  const double top = *std::max_element(logit, logit + E);
  double sum = 0;
  for (int64_t e = 0; e < E; ++e) sum += std::exp(logit[e] - top);
  for (int64_t e = 0; e < E; ++e) s[e] = static_cast<float>(std::exp(logit[e] - top) / sum);
}

// The k largest of [0, n) by value(i), best first; the lower index wins among equals.
template <class Value>
void best(int64_t n, int64_t k, Value&& value, int32_t* chosen) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t place = found;
    while (place > 0 && value(i) > value(chosen[place - 1])) --place;
    if (place == k) continue;
    found = std::min(found + 1, k);
    std::copy_backward(chosen + place, chosen + found - 1, chosen + found);
    chosen[place] = static_cast<int32_t>(i);
  }
}

float group_score(const float* c, int64_t size) {
  float first = -std::numeric_limits<float>::infinity(), second = first;
  for (int64_t e = 0; e < size; ++e) {
    if (c[e] > first)
      second = first, first = c[e];
    else if (c[e] > second)
      second = c[e];
  }
  return size == 1 ? first : first + second;
}

// One token; the buffers are reused from token to token.
class Router {
 public:
  explicit Router(const MoeRouteArgs& a)
      : a_(a), E_(a.logits.size(1)), s_(E_), c_(E_), group_(a.n_group), kept_(a.topk_group) {}

  void route(int64_t t) {
    scores(a_.logits.at<float>(t), E_, a_.score, s_.data());
    for (int64_t e = 0; e < E_; ++e) {
      c_[e] = s_[e] + (a_.bias ? a_.bias.ptr<float>()[e] : 0.f);
      KL_CHECK(!std::isnan(c_[e]), "moe_route: row ", t, ": the score of expert ", e, " is NaN (logit ",
               a_.logits.at<float>(t)[e], ")");
    }
    if (a_.topk_group < a_.n_group) drop_groups();
    int32_t* const experts = a_.experts.at<int32_t>(t);
    best(
        E_, a_.experts.size(1), [&](int64_t e) { return c_[e]; }, experts);
    weigh(t, experts);
  }

 private:
  // Leaves the topk_group best groups; the others can no longer be chosen.
  void drop_groups() {
    const int64_t size = E_ / a_.n_group;
    for (int64_t g = 0; g < a_.n_group; ++g) group_[g] = group_score(&c_[g * size], size);
    best(
        a_.n_group, a_.topk_group, [&](int64_t g) { return group_[g]; }, kept_.data());
    for (int32_t g = 0; g < a_.n_group; ++g)
      if (std::find(kept_.begin(), kept_.end(), g) == kept_.end())
        std::fill_n(&c_[g * size], size, -std::numeric_limits<float>::infinity());
  }

  void weigh(int64_t t, const int32_t* experts) {
    float* const w = a_.weights.at<float>(t);
    double sum = 0;
    for (int64_t j = 0; j < a_.experts.size(1); ++j) {
      w[j] = a_.bias_in_weights ? c_[experts[j]] : s_[experts[j]];
      sum += w[j];
    }
    const double factor = a_.renormalize ? a_.scaling / (sum + 1e-20) : a_.scaling;
    for (int64_t j = 0; j < a_.experts.size(1); ++j) w[j] = static_cast<float>(w[j] * factor);
  }

  const MoeRouteArgs& a_;
  const int64_t E_;
  std::vector<float> s_, c_;   // [E] scores, choice scores
  std::vector<float> group_;   // [n_group]
  std::vector<int32_t> kept_;  // [topk_group]
};

}  // namespace

void moe_route_cpu(Ctx& ctx, const MoeRouteArgs& a) {
  parallel_for(ctx.pool, a.logits.size(0), kTokensPerTask, [&](int64_t begin, int64_t end) {
    Router router(a);
    for (int64_t t = begin; t < end; ++t) router.route(t);
  });
}

}  // namespace kl
