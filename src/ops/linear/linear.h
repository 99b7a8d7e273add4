// Linear layer without bias.
//
//   out[t, o] = sum_i x[t, i] · w[o, i]        (or out += with `accumulate`)
//
// f32 accumulation. With ctx.precision bf16, x is rounded to bf16 first where w is bf16 and the processor
// multiplies bf16 itself (otherwise nothing changes): that moves an x by 2^-8 of
// itself at most and by 1.6e-3 in the root mean square, and a sum of independent terms as much: the result is
// within 4e-3 rel-RMS of the definition.
//
// For each precision, the result of a row does not depend on how many rows are computed with it, nor on the
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
