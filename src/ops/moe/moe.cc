// The doors of the mixture of experts: what must fit together, and which back-end runs.
#include "ops/moe/moe.h"

#include <algorithm>
#include <string>
#include <vector>

#include "ops/moe/moe_cpu.h"

namespace kl {
namespace {

void check_operand(std::string_view name, const Tensor& t, DType dtype, Device device) {
  check_dtype(name, t, {dtype});
  check_device(name, t, device);
  check_rows(name, t);
}

void check_args(const MoeRouteArgs& a, Device device) {
  check_shape("moe_route: logits", a.logits, {-1, -1});
  const int64_t T = a.logits.size(0), E = a.logits.size(1);
  check_shape("moe_route: experts", a.experts, {T, -1});
  const int64_t top_k = a.experts.size(1);
  check_shape("moe_route: weights", a.weights, {T, top_k});
  check_operand("moe_route: logits", a.logits, DType::f32, device);
  check_operand("moe_route: experts", a.experts, DType::i32, device);
  check_operand("moe_route: weights", a.weights, DType::f32, device);
  if (a.bias) {
    check_shape("moe_route: bias", a.bias, {E});
    check_operand("moe_route: bias", a.bias, DType::f32, device);
  }
  KL_CHECK(a.n_group >= 1 && E >= a.n_group && E % a.n_group == 0, "moe_route: expected n_group to divide ",
           E, " experts, found ", a.n_group);
  KL_CHECK(a.topk_group >= 1 && a.topk_group <= a.n_group, "moe_route: expected topk_group from 1 to ",
           a.n_group, ", found ", a.topk_group);
  const int64_t eligible = a.topk_group * (E / a.n_group);
  KL_CHECK(top_k >= 1 && top_k <= eligible, "moe_route: expected top_k from 1 to ", eligible,
           " (the experts of ", a.topk_group, " of ", a.n_group, " groups), found ", top_k);
}

void check_args(const MoeExpertsArgs& a, Device device) {
  check_shape("moe_experts: x", a.x, {-1, -1});
  const int64_t T = a.x.size(0), D = a.x.size(1);
  check_shape("moe_experts: experts", a.experts, {T, -1});
  check_shape("moe_experts: weights", a.weights, {T, a.experts.size(1)});
  check_shape("moe_experts: out", a.out, {T, D});
  check_operand("moe_experts: x", a.x, DType::f32, device);
  check_operand("moe_experts: experts", a.experts, DType::i32, device);
  check_operand("moe_experts: weights", a.weights, DType::f32, device);
  check_operand("moe_experts: out", a.out, DType::f32, device);
  KL_CHECK(a.out.numel() == 0 || a.out.data != a.x.data,
           "moe_experts: out: expected other memory than that of x");
}

void check_weight(const std::string& name, const Tensor& w, int64_t rows, int64_t columns, Device device) {
  check_shape(name, w, {rows, columns});
  check_dtype(name, w, {DType::f32, DType::bf16, DType::f16});
  check_device(name, w, device);
  KL_CHECK(w.is_contiguous(), name, ": expected a contiguous tensor, found strides ", w.stride[0], ", ",
           w.stride[1]);
}

// The chosen experts' weights: all of one width I, which is returned.
int64_t check_weights(const MoeExpertsArgs& a, const std::vector<char>& chosen) {
  const int64_t D = a.x.size(1);
  int64_t I = -1;
  for (size_t e = 0; e < chosen.size(); ++e) {
    if (!chosen[e]) continue;
    const ExpertWeights& w = a.weights_of[e];
    const std::string name = cat("moe_experts: expert ", e, ": ");
    check_weight(name + "w1", w.w1, I, D, a.x.device);
    I = w.w1.size(0);
    check_weight(name + "w3", w.w3, I, D, a.x.device);
    check_weight(name + "w2", w.w2, D, I, a.x.device);
  }
  return std::max<int64_t>(I, 0);
}

// Which experts somebody chose; only where the host can read it.
std::vector<char> check_choices(const MoeExpertsArgs& a) {
  const int64_t E = static_cast<int64_t>(a.weights_of.size());
  std::vector<char> chosen(a.weights_of.size());
  for (int64_t t = 0; t < a.experts.size(0); ++t)
    for (int64_t j = 0; j < a.experts.size(1); ++j) {
      const int32_t e = *a.experts.at<int32_t>(t, j);
      KL_CHECK(e >= 0 && e < E, "moe_experts: experts[", t, ", ", j, "]: expected 0 to ", E - 1, ", found ",
               e);
      chosen[static_cast<size_t>(e)] = 1;
    }
  return chosen;
}

// Bytes of weights that have to be read.
int64_t weight_bytes(const MoeExpertsArgs& a, const std::vector<char>& chosen) {
  int64_t bytes = 0;
  for (size_t e = 0; e < chosen.size(); ++e)
    if (chosen[e])
      bytes += a.weights_of[e].w1.bytes() + a.weights_of[e].w2.bytes() + a.weights_of[e].w3.bytes();
  return bytes;
}

void run_on_cpu(Ctx& ctx, const MoeExpertsArgs& a) {
  const std::vector<char> chosen = check_choices(a);
  const int64_t I = check_weights(a, chosen);
  const double products = static_cast<double>(a.experts.numel()) * static_cast<double>(3 * a.x.size(1) * I);
  const TraceScope trace(ctx.trace, "moe_experts",
                         static_cast<double>(weight_bytes(a, chosen) + a.x.bytes() + 2 * a.out.bytes()),
                         2 * products);
  moe_experts_cpu(ctx, a, I);
}

}  // namespace

void moe_route(Ctx& ctx, const MoeRouteArgs& a) {
  check_args(a, ctx.device);
  const double values = static_cast<double>(a.logits.numel());
  const TraceScope trace(ctx.trace, "moe_route",
                         static_cast<double>(a.logits.bytes() + a.experts.bytes() + a.weights.bytes()),
                         values * static_cast<double>(5 + a.experts.size(1)));
  switch (ctx.device) {
    case Device::cpu: return moe_route_cpu(ctx, a);
    case Device::cuda: KL_CHECK(false, "moe_route: asked to run on cuda, where it has no kernel");
  }
}

void moe_experts(Ctx& ctx, const MoeExpertsArgs& a) {
  check_args(a, ctx.device);
  switch (ctx.device) {
    case Device::cpu: return run_on_cpu(ctx, a);
    case Device::cuda: KL_CHECK(false, "moe_experts: asked to run on cuda, where it has no kernel");
  }
}

}  // namespace kl
