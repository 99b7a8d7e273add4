// Replay decode: a step of KDA that reads a sequence's state but rarely writes it. What the last steps did is
// kept as records in a ring beside the state and played again:
//
//   S_t = Diag(2^G_t) S + sum_j (k_j 2^(G_t - G_j)) delta_jᵀ          G: sums of log2-decays since S was
//   written
//
// A state is 64 KiB to read and as much to write; a record is 1.5 KiB. With the ring full, the step folds all
// records into the state. Every power is of a sum that is not positive: any gate, no flush for the sake of
// range.
#pragma once

#include "ops/kda/kda.h"

namespace kl {

constexpr int64_t kMostRecords = 16;

struct KdaReplayArgs {
  // One token of each sequence: T = N, row n is sequence n's and cu_seqlens is absent; neither slot_out nor
  // checkpoints. The pool is read, and written where a ring is full.
  KdaArgs kda;
  Tensor keys;    // [slots, Hv, L, K] f32  normalised keys; L of 1 to 16 records
  Tensor decays;  // [slots, Hv, L, K] f32  G of the record's token, each step's part at least -150
  Tensor deltas;  // [slots, Hv, L, V] f32
  // [N] i32: records of sequence n before the step, 0 to L - 1. After it there is one more; or, where this
  // was the L-th, the state holds everything and the ring is empty. The caller counts.
  Tensor fill;
};

// CPU: the definition. CUDA: K of 64 or 128, V a multiple of 64, rows aligned to four elements.
void kda_replay(Ctx&, const KdaReplayArgs&);
// The definition in plain loops. CPU tensors only.
void kda_replay_ref(const KdaReplayArgs&);

// Throws kl::Error unless the tensors fit together as KdaReplayArgs says.
void kda_replay_check(const KdaReplayArgs&);

}  // namespace kl
