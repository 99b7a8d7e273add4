// One decode step of a KDA layer between its projections, fused: what short convolutions, kda_decode() and a
// gated RMS norm do one after another, without their intermediate results in memory.
//
//   q, k, v = silu(conv(x_q)), silu(conv(x_k)), silu(conv(x_v))       conv_t[c] = sum_j weight[c, j] ·
//   x_{t-3+j}[c] S, o    = one step of KDA                                           (kda.h) out     = o /
//   sqrt(mean(o²) + eps) · norm_weight · sigmoid(out_gate)
//
// Intermediate results are f32 or better: they are not rounded to the type of the rows.
#pragma once

#include "ops/kda/kda.h"

namespace kl {

constexpr int64_t kStepTaps = 4;  // of the convolutions

// A short convolution of H·K or Hv·V channels.
struct StepConv {
  Tensor weight;  // [C, 4]        f32; tap 3 multiplies the current token
  Tensor state;   // [slots, C, 3] f32, the last inputs, oldest first; read and updated in place
};

struct KdaStepArgs {
  // One token of each sequence: T = N, row n is sequence n's and cu_seqlens is absent. q, k and v are inputs
  // of the convolutions, out is the norm's result. H = Hv. No checkpoints; slot_out only redirects S, so it
  // is absent.
  KdaArgs kda;
  StepConv q, k, v;    // slots as in kda.slot; < 0: the inputs before are zero, and nothing is kept
  Tensor out_gate;     // [N, H, V]  f32|bf16, before the sigmoid
  Tensor norm_weight;  // [V]        f32, shared by all heads
  float norm_eps = 1e-5f;
};

// CPU: through the definition. CUDA: one launch, for arguments that kda_step_takes().
void kda_step(Ctx&, const KdaStepArgs&);
// True if kda_step() has a kernel for these: always on the CPU; on CUDA sm_90 and up with K = V of 64 or 128.
bool kda_step_takes(const KdaStepArgs&);
// The definition, through kda_recurrent_ref(). CPU tensors only.
void kda_step_ref(const KdaStepArgs&, KdaPrecision);

// Throws kl::Error unless the tensors fit together as KdaStepArgs says.
void kda_step_check(const KdaStepArgs&);

}  // namespace kl
