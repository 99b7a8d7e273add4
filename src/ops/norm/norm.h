// Root-mean-square norms over the last dimension (D elements of a row).
//
//   rms_norm        out = x / sqrt(mean(x²) + eps) · weight
//   rms_norm_gated  out = x / sqrt(mean(x²) + eps) · weight · sigmoid(gate)        norm first, then gate
#pragma once

#include "base/context.h"

namespace kl {

struct RmsNormArgs {
  Tensor x;       // [T, D]  f32|bf16, rows may be strided
  Tensor weight;  // [D]     f32
  Tensor out;     // [T, D]  f32|bf16, rows may be strided; may be x itself
  float eps = 1e-5f;
};
void rms_norm(Ctx&, const RmsNormArgs&);
void rms_norm_ref(const RmsNormArgs&);

struct RmsNormGatedArgs {
  Tensor x;       // [T, H, D]  f32|bf16
  Tensor gate;    // [T, H, D]  f32|bf16, before the sigmoid
  Tensor weight;  // [D]        f32, shared by all heads
  Tensor out;     // [T, H, D]  f32|bf16; may be x itself
  float eps = 1e-5f;
};
void rms_norm_gated(Ctx&, const RmsNormGatedArgs&);
void rms_norm_gated_ref(const RmsNormGatedArgs&);

}  // namespace kl
