// Kimi Delta Attention (Kimi Linear, arXiv 2510.26692).
//
//   S_t = (I - beta_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t
//
// T tokens of N packed sequences; sequence n owns rows [cu_seqlens[n], cu_seqlens[n+1]). H query/key heads
// serve Hv value heads (Hv a multiple of H; value head h reads query/key head h / (Hv / H)). Correct for any
// gate from 0 to -inf a step, any length including zero, any K and V up to 256.
#pragma once

#include "base/context.h"
#include "base/tensor.h"

namespace kl {

// How `g` is to be read; z is what the tensor holds, i a channel of head h.
enum class KdaGateKind {
  log_decay,  // g = z, at most 0
  softplus,   // g = -exp(A_log[h]) · softplus(z + dt_bias[h, i])                    (Kimi-Linear-48B)
  bounded,    // g = lower_bound · sigmoid(exp(A_log[h]) · (z + dt_bias[h, i]))
};

struct KdaGate {
  KdaGateKind kind = KdaGateKind::softplus;
  Tensor A_log;              // [Hv] f32; absent: 0, a factor of 1
  Tensor dt_bias;            // [Hv, K] f32; absent: 0
  float lower_bound = -5.f;  // of `bounded`, below 0
};

enum class KdaBeta {
  value,     // beta = x, in [0, 2]
  sigmoid,   // beta = sigmoid(x)
  sigmoid2,  // beta = 2 · sigmoid(x): negative eigenvalues allowed
};

struct KdaArgs {
  Tensor q, k;        // [T, H, K]    f32|bf16
  Tensor v;           // [T, Hv, V]   f32|bf16
  Tensor g;           // [T, Hv, K]   f32|bf16, read as `gate` says
  Tensor beta;        // [T, Hv]      f32|bf16, read as `beta_kind` says
  Tensor cu_seqlens;  // [N + 1]      i32|i64, ascending from 0 to T
  Tensor out;         // [T, Hv, V]   f32|bf16, overwritten
  // The innermost dimension of all of these is contiguous; the others may be strided.

  Tensor state;  // [slots, Hv, K, V] f32 (bf16 optional on CUDA); [slots, Hv, V, K] with state_v_first
  Tensor
      slot;  // [N] i32: where sequence n finds its state and leaves it; < 0: starts at zero, nothing is kept
  Tensor slot_out;  // [N] i32, optional: the final state goes here instead (< 0: nowhere); `slot` is then
                    // only read

  // States inside the sequences, for a prefix cache: the state after rows [cu_seqlens[n], checkpoint_row[m])
  // of the sequence that owns row checkpoint_row[m] - 1 is written to `state` at checkpoint_slot[m] (< 0:
  // skipped). Rows are a multiple of 16 tokens from their sequence's start.
  Tensor checkpoint_row;   // [M] i32, ascending
  Tensor checkpoint_slot;  // [M] i32

  KdaGate gate;
  KdaBeta beta_kind = KdaBeta::sigmoid;
  bool state_v_first = false;
  bool l2norm = true;  // q and k are first divided by sqrt(sum of squares + l2_eps)
  float l2_eps = 1e-6f;
  float scale = 0.f;  // 0: K^-0.5
  // CUDA: the bits of a sequence depend on its own rows and on the call's tensors by their shape alone, not
  // on what else is in the batch. Costs speed where kernels are chosen, or sequences cut, by the size of a
  // batch. Calls with checkpoints and calls without still differ.
  bool batch_invariant = false;

  // CPU, prefill, f32: sequences are cut into segments of so many tokens, a multiple of 16, that are computed
  // side by side; 0: never. Exact for any gate, but 2.3 times the arithmetic: for one long sequence, few
  // heads and at least eight threads a head (docs/2026-11-24-kda-cpu.md). Bits depend on it, never on the
  // threads.
  int64_t segment = 0;

  // CUDA, prefill: memory of the operator until the work is done, at least kda_workspace_bytes() of it,
  // 256-byte aligned.
  Tensor workspace;  // u8
};

// Any lengths. CPU: the chunkwise algorithm in f32, to 5e-6 of the recurrence in f64 (rel-RMS of outputs and
// of states); in f64 where beta may pass 1. With ctx.precision == Precision::bf16 on AMX or on AVX-512-BF16
// where that is faster than f32 (f32 elsewhere), what reads the state is rounded to bf16: 4e-3.
void kda_prefill(Ctx&, const KdaArgs&);
// Bytes of `workspace` that kda_prefill() needs for tensors of these shapes, strides and alignments, whatever
// they hold; 0 on the CPU.
int64_t kda_workspace_bytes(const KdaArgs&);
// Bytes of ctx.scratch that kda_prefill() and kda_decode() take at most on the CPU.
int64_t kda_scratch_bytes(int64_t K, int64_t V, int threads);
// Short sequences (every length 1, or a few for the verification of drafts): one step of the recurrence after
// another.
void kda_decode(Ctx&, const KdaArgs&);

// The definition: the recurrence, token by token, as it is written above (kda_ref.cc). CPU tensors only.
enum class KdaPrecision { f32, f64 };
void kda_recurrent_ref(const KdaArgs&, KdaPrecision);

// The chunkwise algorithm of the paper in plain code (kda_chunk_ref.cc). CPU tensors only.
void kda_chunk_ref(const KdaArgs&);

// Throws kl::Error unless the tensors fit together as KdaArgs says.
void kda_check(const KdaArgs&);

}  // namespace kl
