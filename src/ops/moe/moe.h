// Mixture of experts: a router that picks top_k of E experts for each token, and the experts' feed-forward.
//
//   s = sigmoid(logit) (or softmax)        c = s + bias                       choice scores: the bias only
//   selects groups: the E experts form n_group equal groups; a group's score is the sum of its two best c;
//   only the topk_group best
//           groups stay eligible
//   experts = top_k of c;  w_e = s_e;  renormalize: w /= sum w + 1e-20;  w *= scaling
//   y = sum_e w_e · w2_e( silu(w1_e x) · w3_e x )
#pragma once

#include <span>

#include "base/context.h"

namespace kl {

enum class MoeScore { sigmoid, softmax };

struct MoeRouteArgs {
  Tensor logits;   // [T, E] f32
  Tensor bias;     // [E] f32 (e_score_correction_bias); absent: 0
  Tensor experts;  // [T, top_k] i32, written: best first; equal scores: the lower index first
  Tensor weights;  // [T, top_k] f32, written
  MoeScore score = MoeScore::sigmoid;
  int n_group = 1, topk_group = 1;
  bool renormalize = true;
  float scaling = 1.f;
  // Moonshot's published Python code adds the bias in place, so that it also enters the weights (w_e = s_e +
  // bias_e). Set this to compare with that code; every other implementation leaves the weights unbiased.
  bool bias_in_weights = false;
};
void moe_route(Ctx&, const MoeRouteArgs&);
void moe_route_ref(const MoeRouteArgs&);

// One feed-forward: w1 = gate [I, D], w3 = up [I, D], w2 = down [D, I]; f32|bf16|f16, contiguous.
struct ExpertWeights {
  Tensor w1, w3, w2;
};

// With ctx.precision bf16, x and the hidden values silu(..) · (..) are rounded to bf16 first where the
// weights of all experts are bf16 and the processor multiplies bf16 itself: within 4e-3 rel-RMS of the
// definition's sum over the experts (roundings as in ops/linear/linear.h; x enters a hidden value twice).
struct MoeExpertsArgs {
  Tensor x;                                   // [T, D]     f32, rows may be strided
  Tensor experts;                             // [T, top_k] i32, each in [0, weights_of.size())
  Tensor weights;                             // [T, top_k] f32
  std::span<const ExpertWeights> weights_of;  // E experts
  Tensor out;                                 // [T, D]     f32, out += (the residual stream)
};
void moe_experts(Ctx&, const MoeExpertsArgs&);
void moe_experts_ref(const MoeExpertsArgs&);
// Bytes of ctx.scratch that moe_experts() takes on the CPU for T tokens, with exact activations.
int64_t moe_experts_scratch_bytes(int64_t T, int64_t top_k, int64_t D, int64_t I);

}  // namespace kl
