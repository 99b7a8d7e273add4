// What the two kernels of the fused decode step (kda_step.h) share: parameters beside StepParams, and one
// channel of a short convolution.
#pragma once

#include "ops/kda/kda_step.h"
#include "ops/kda/kda_tile.cuh"

namespace kl::cuda {

struct Conv {
  const float* weight;  // [C, 4]
  float* state;         // [slots, C, 3]
  int64_t slot_stride;
};
struct FusedParams {
  Conv q, k, v;
  Operand out_gate;
  const float* norm_weight;
  float norm_eps;
};
inline Conv conv_params(const StepConv& conv) {
  return {conv.weight.ptr<float>(), conv.state.ptr<float>(), conv.state.stride[0]};
}
inline FusedParams fused_params(const KdaStepArgs& a) {
  return {.q = conv_params(a.q),
          .k = conv_params(a.k),
          .v = conv_params(a.v),
          .out_gate = operand(a.out_gate),
          .norm_weight = a.norm_weight.ptr<float>(),
          .norm_eps = a.norm_eps};
}

// silu(conv(x)) of a channel: its taps, its last three inputs from the oldest on, the current one.
KL_DEVICE float convolved(float4 weight, const float* last, float x) {
  const float sum = fmaf(weight.w, x, fmaf(weight.z, last[2], fmaf(weight.y, last[1], weight.x * last[0])));
  return sum * sigmoid(sum);
}

}  // namespace kl::cuda
