// What every KDA kernel reads its operands with: those of cuda/operand.cuh, the gate and the write strength.
#pragma once

#include "cuda/operand.cuh"
#include "ops/kda/kda.h"

namespace kl::cuda {

// The gate of one value head.
struct GateParams {
  const float* A_log;    // [Hv], null: 0
  const float* dt_bias;  // [Hv, K] with stride dt_stride, null: 0
  int64_t dt_stride;
  float lower_bound;
  KdaGateKind kind;
};
inline GateParams gate_params(const KdaGate& gate) {
  return {static_cast<const float*>(gate.A_log.data), static_cast<const float*>(gate.dt_bias.data),
          gate.dt_bias ? gate.dt_bias.stride[0] : 0, gate.lower_bound, gate.kind};
}

// A_log[head]; 0 where the gate has none. The gate's factor is its exp.
KL_DEVICE float A_log_of(const GateParams& gate, int head) {
  return gate.A_log != nullptr && gate.kind != KdaGateKind::log_decay ? gate.A_log[head] : 0.f;
}
// dt_bias of one channel; 0 where the gate has none.
KL_DEVICE float dt_bias_of(const GateParams& gate, int head, int channel) {
  return gate.dt_bias != nullptr && gate.kind != KdaGateKind::log_decay
             ? gate.dt_bias[head * gate.dt_stride + channel]
             : 0.f;
}

// The log-decay of one channel; `factor` is exp(A_log), `z` the tensor's element plus dt_bias.
KL_DEVICE float log_decay(const GateParams& gate, float factor, float z) {
  if (gate.kind == KdaGateKind::log_decay) return z;
  return gate.kind == KdaGateKind::softplus ? -factor * softplus(z) : gate.lower_bound * sigmoid(factor * z);
}

KL_DEVICE float write_strength(KdaBeta kind, float x) {
  return kind == KdaBeta::value ? x : (kind == KdaBeta::sigmoid ? 1.f : 2.f) * sigmoid(x);
}

}  // namespace kl::cuda
