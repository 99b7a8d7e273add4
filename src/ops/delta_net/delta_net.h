// The delta rule with at most one gate per head: delta net and gated delta net.
//
//   S_t = exp(g_t) (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t
//
// Without g: delta net. A number commutes with the erasure, so this is Kimi Delta Attention with the same
// gate in all channels. T tokens of N packed sequences; sequence n owns rows [cu_seqlens[n],
// cu_seqlens[n+1]). H query/key heads serve Hv value heads (Hv a multiple of H; value head h reads query/key
// head h / (Hv / H)). Correct for any gate from 0 to -inf a step, any length including zero, any K and V up
// to 256.
#pragma once

#include "base/context.h"
#include "base/tensor.h"
#include "recurrence/problem.h"

namespace kl {

// How `g` is to be read; z is what the tensor holds.
enum class DeltaNetGateKind {
  log_decay,  // g = z, at most 0
  softplus,   // g = -exp(A_log[h]) · softplus(z + dt_bias[h])
};

struct DeltaNetGate {
  DeltaNetGateKind kind = DeltaNetGateKind::softplus;
  Tensor A_log;    // [Hv] f32; absent: 0, a factor of 1
  Tensor dt_bias;  // [Hv] f32; absent: 0
};

enum class DeltaNetBeta {
  value,     // beta = x, in [0, 2]
  sigmoid,   // beta = sigmoid(x)
  sigmoid2,  // beta = 2 · sigmoid(x): negative eigenvalues allowed
};

struct DeltaNetArgs {
  Tensor q, k;        // [T, H, K]   f32|bf16 (on the CPU f64 too, here and below, where f32 may stand)
  Tensor v;           // [T, Hv, V]  f32|bf16
  Tensor g;           // [T, Hv]     f32|bf16, read as `gate` says; absent: no gate
  Tensor beta;        // [T, Hv]     f32|bf16, read as `beta_kind` says
  Tensor cu_seqlens;  // [N + 1]     i32|i64, ascending from 0 to T
  Tensor out;         // [T, Hv, V]  f32|bf16, overwritten
  // The innermost dimension of all of these is contiguous; the others may be strided.

  Tensor state;  // [slots, Hv, K, V] f32; may be absent if no sequence has a slot
  Tensor slot;   // [N] i32: where sequence n finds its state and leaves it; < 0: starts at zero, nothing kept
  Tensor slot_out;  // [N] i32, optional: the final state goes here instead (< 0: nowhere)

  DeltaNetGate gate;
  DeltaNetBeta beta_kind = DeltaNetBeta::sigmoid;
  bool l2norm = true;  // q and k are first divided by sqrt(sum of squares + l2_eps)
  float l2_eps = 1e-6f;
  float scale = 0.f;  // 0: K^-0.5
};

// Any lengths: the chunkwise algorithm. CPU: in f32 where beta cannot pass 1. CUDA: f32 beside products of
// bf16 halves, which leave some 1e-5.
void delta_net_prefill(Ctx&, const DeltaNetArgs&);
// Short sequences. CPU: one step of the recurrence after another, in f32. CUDA: as above.
void delta_net_decode(Ctx&, const DeltaNetArgs&);

// The definition: the recurrence, token by token, as it is written above (delta_net_ref.cc).
void delta_net_recurrent_ref(const DeltaNetArgs&, recurrence::Precision);

// Throws kl::Error unless the tensors fit together as DeltaNetArgs says.
void delta_net_check(const DeltaNetArgs&);

}  // namespace kl
