// Element-wise activations.
//
//   silu_mul   out = silu(gate) · up,   silu(x) = x · sigmoid(x)
#pragma once

#include "base/context.h"

namespace kl {

struct SiluMulArgs {
  Tensor gate;  // [T, D]  f32|bf16, rows may be strided
  Tensor up;    // [T, D]  f32|bf16, rows may be strided
  Tensor out;   // [T, D]  f32|bf16, rows may be strided; may be gate or up itself
};
void silu_mul(Ctx&, const SiluMulArgs&);
void silu_mul_ref(const SiluMulArgs&);

}  // namespace kl
