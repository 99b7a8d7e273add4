// What the door of the mixture of experts calls on the CPU. The door has checked the arguments.
#pragma once

#include "ops/moe/moe.h"
#include "simd/isa.h"

namespace kl {

void moe_route_cpu(Ctx&, const MoeRouteArgs&);                 // moe_route.cc
void moe_experts_cpu(Ctx&, const MoeExpertsArgs&, int64_t I);  // moe_experts.cc; I: width of an expert

// moe_cpu.cc: some tokens and some of the hidden units of one expert.
//   h[i, j] = silu(w1_j · x_i) · (w3_j · x_i)
struct ExpertHidden {
  const float* x;       // [rows, D], contiguous
  const bf16* packed;   // or, if x is null: x rounded (simd/gemm_bf16.h), w1 and w3 being bf16
  const void *w1, *w3;  // [units, D]
  DType w1_dtype, w3_dtype;
  float* h;  // [rows, units]
  int64_t ldh;
  int64_t rows, units, D;  // rows <= kExpertRows
};
constexpr int64_t kExpertRows = 512;

// out[i] += sum_j weights[j] · y[rows[j]]: the sum in f32 in the order of j, then added once. y [.., D].
struct ExpertSum {
  const float* y;
  const int32_t* rows;   // [top_k]
  const float* weights;  // [top_k]
  int64_t top_k, D;
  float* out;
};

KL_DECLARE_PER_ISA(void expert_hidden(const ExpertHidden&); void expert_sum(const ExpertSum&);)

}  // namespace kl
