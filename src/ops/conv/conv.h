// Causal depthwise convolution over packed sequences, with the state that carries a sequence from one call to
// the next.
//
//   out_t[c] = silu( sum_{j<W} weight[c, j] · x_{t-W+1+j}[c] )        tap W-1 multiplies the current token
//
// Inputs before the start of the rows come from the state: the last W-1 inputs of the sequence, oldest first
// (zeros for a new sequence).
#pragma once

#include "base/context.h"

namespace kl {

struct ShortConvArgs {
  Tensor x;           // [T, C]            f32|bf16, rows may be strided
  Tensor weight;      // [C, W]            f32, W of 2 to 4, contiguous
  Tensor cu_seqlens;  // [N + 1]           i32
  // [slots, C, W - 1] f32, each slot contiguous; read and updated in place at slot[n], untouched for an empty
  // sequence and outside the slots of this call. No two sequences share a slot.
  Tensor state;
  Tensor slot;  // [N]               i32; < 0: starts at zero, nothing is kept
  Tensor out;   // [T, C]            f32|bf16, rows may be strided; not x
};
void short_conv(Ctx&, const ShortConvArgs&);
void short_conv_ref(const ShortConvArgs&);

}  // namespace kl
