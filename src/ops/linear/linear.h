// Linear layer without bias.
//
//   out[t, o] = sum_i x[t, i] · w[o, i]        (or out += with `accumulate`)
//
// f32 accumulation. The result of a row does not depend on how many rows are computed with it, nor on the
// number of threads.
#pragma once

#include "base/context.h"

namespace kl {

struct LinearArgs {
  Tensor x;    // [T, in]    f32, rows may be strided
  Tensor w;    // [out, in]  f32|bf16|f16, contiguous, as the checkpoint stores it
  Tensor out;  // [T, out]   f32, rows may be strided
  bool accumulate = false;
};

void linear(Ctx&, const LinearArgs&);
void linear_ref(const LinearArgs&);  // the definition: plain loops, f64 accumulation

}  // namespace kl
