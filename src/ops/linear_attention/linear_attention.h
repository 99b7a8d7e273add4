// Linear attention and its decayed forms: an additive memory, without a delta rule.
//
//   S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t
//
//   g absent       plain linear attention
//   g [T, Hv]      one decay per head: RetNet and Lightning (the same at every token), Mamba-2 (g =
//   -exp(A_log) dt
//                  and v = dt x)
//   g [T, Hv, K]   one decay per channel: gated linear attention; HGRN2 with k = 1 - exp(g)
//
// Feature maps of q and k, a normaliser and skip connections are the caller's. T tokens of N packed
// sequences; sequence n owns rows [cu_seqlens[n], cu_seqlens[n+1]). H query/key heads serve Hv value heads
// (Hv a multiple of H; value head h reads query/key head h / (Hv / H)). Correct for any gate from 0 to -inf a
// step, any length including zero, any K and V up to 256.
#pragma once

#include "base/context.h"
#include "base/tensor.h"
#include "recurrence/problem.h"

namespace kl {

struct LinearAttentionArgs {
  Tensor q, k;        // [T, H, K]   f32|bf16 (on the CPU f64 too, here and below, where f32 may stand)
  Tensor v;           // [T, Hv, V]  f32|bf16
  Tensor g;           // [T, Hv, K] or [T, Hv]  f32|bf16, log-decay, at most 0; absent: 0
  Tensor cu_seqlens;  // [N + 1]     i32|i64, ascending from 0 to T
  Tensor out;         // [T, Hv, V]  f32|bf16, overwritten
  // The innermost dimension of all of these is contiguous; the others may be strided.

  Tensor state;  // [slots, Hv, K, V] f32; may be absent if no sequence has a slot
  Tensor slot;   // [N] i32: where sequence n finds its state and leaves it; < 0: starts at zero, nothing kept
  Tensor slot_out;  // [N] i32, optional: the final state goes here instead (< 0: nowhere)

  float scale = 0.f;  // 0: K^-0.5
};

// Any lengths: the chunkwise algorithm in f32; on CUDA beside products of bf16 halves, which leave some 1e-5.
void linear_attention_prefill(Ctx&, const LinearAttentionArgs&);
// Short sequences. CPU: one step of the recurrence after another, in f32. CUDA: as above.
void linear_attention_decode(Ctx&, const LinearAttentionArgs&);

// The definition: the recurrence, token by token, as it is written above (linear_attention_ref.cc).
void linear_attention_recurrent_ref(const LinearAttentionArgs&, recurrence::Precision);

// Throws kl::Error unless the tensors fit together as LinearAttentionArgs says.
void linear_attention_check(const LinearAttentionArgs&);

}  // namespace kl
