// The delta rule in general: a transition that is diagonal plus low rank.
//
//   S_t = (Diag(exp g_t) - a_t b_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t
//
// b reads the state *before* the decay of its own token. Special cases:
//
//   a = 0                                          gated linear attention
//   a = beta k, b = exp(g) ⊙ k, k <- beta k        Kimi Delta Attention: (I - beta k kᵀ) Diag(exp g) =
//   Diag(exp g) -
//                                                  beta k (exp(g) ⊙ k)ᵀ
//   a = r ⊙ k, b = k                               RWKV-7, r its in-context learning rate
//
// Nothing is normalised: q, k, a and b are used as they come, and the caller sees to it that the transition
// does not amplify. T tokens of N packed sequences; sequence n owns rows [cu_seqlens[n], cu_seqlens[n+1]).
// All heads have their own q, k, a, b, v. Correct for any gate from 0 to -inf a step, any length including
// zero, any K and V up to 256.
#pragma once

#include "base/context.h"
#include "base/tensor.h"
#include "recurrence/problem.h"

namespace kl {

struct DplrArgs {
  Tensor q, k, a, b;  // [T, H, K]  f32|bf16 (on the CPU f64 too, here and below, where f32 may stand)
  Tensor v;           // [T, H, V]  f32|bf16
  Tensor g;           // [T, H, K]  f32|bf16, log-decay, at most 0
  Tensor cu_seqlens;  // [N + 1]    i32|i64, ascending from 0 to T
  Tensor out;         // [T, H, V]  f32|bf16, overwritten
  // The innermost dimension of all of these is contiguous; the others may be strided.

  Tensor state;  // [slots, H, K, V] f32; may be absent if no sequence has a slot
  Tensor slot;   // [N] i32: where sequence n finds its state and leaves it; < 0: starts at zero, nothing kept
  Tensor slot_out;  // [N] i32, optional: the final state goes here instead (< 0: nowhere)

  float scale = 0.f;  // 0: K^-0.5

  // CUDA, prefill: memory of the operator until the work is done, at least dplr_workspace_bytes() of it,
  // 256-byte aligned. Where it is absent a slower kernel runs that needs none.
  Tensor workspace;  // u8
};

// Any lengths: the chunkwise algorithm in f32; on CUDA beside products of bf16 halves, which leave some 1e-5.
// The Hopper kernel (bf16 rows, K = V = 64 or 128) rounds what enters its tensor cores to bf16: 5e-3.
void dplr_prefill(Ctx&, const DplrArgs&);
// Bytes of `workspace` with which dplr_prefill() runs its fastest kernel for tensors of these shapes,
// whatever they hold; 0 where none is wanted.
int64_t dplr_workspace_bytes(const DplrArgs&);
// Short sequences. CPU: one step of the recurrence after another, in f32. CUDA: as above.
void dplr_decode(Ctx&, const DplrArgs&);

// The definition: the recurrence, token by token, as it is written above (dplr_ref.cc).
void dplr_recurrent_ref(const DplrArgs&, recurrence::Precision);

// Throws kl::Error unless the tensors fit together as DplrArgs says.
void dplr_check(const DplrArgs&);

}  // namespace kl
