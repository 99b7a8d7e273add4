// Multi-head latent attention without positional encoding (NoPE MLA), causal, over a paged cache of latents.
//
// A token's cache row is [c | p]: the latent c (R values, after its norm) and p (P values that all heads
// share). A query head is [q_nope | q_pe] (Nk + P values). Per head, W_UK [Nk, R] and W_UV [V, R] are the
// rows of kv_b_proj:
//
//   score_j = (q_nope · (W_UK c_j) + q_pe · p_j) / sqrt(Nk + P)     out = sum_j softmax(score)_j (W_UV c_j)
//
// Query t of a sequence sees the `context` rows cached before this batch and the rows of the batch up to its
// own. mla_prefill expands keys and values of each head; mla_decode moves W_UK to the query and W_UV behind
// the sum ("absorbed"), so that it reads only the cache. Both compute the same function.
#pragma once

#include "base/context.h"

namespace kl {

struct MlaCache {
  Tensor rows;        // [pages, page_size, R + P]  f32|bf16
  Tensor page_table;  // [N, max_pages] i32: page of tokens [i · page_size, (i + 1) · page_size) of sequence n
  Tensor context;     // [N] i32: rows in the cache before this batch's
};

struct MlaAppendArgs {
  Tensor latent;      // [T, R + P]  f32, normed
  Tensor cu_seqlens;  // [N + 1] i32
  MlaCache cache;     // rows context[n] ... context[n] + length[n] of each sequence are written
};
void mla_append(Ctx&, const MlaAppendArgs&);

struct MlaArgs {
  Tensor q;           // [T, A, Nk + P]       f32
  Tensor kv_b_proj;   // [A · (Nk + V), R]    f32|bf16|f16: per head Nk rows of W_UK, then V rows of W_UV
  Tensor cu_seqlens;  // [N + 1] i32
  MlaCache cache;     // holds this batch's rows already
  Tensor out;         // [T, A, V]  f32
};
void mla_prefill(Ctx&, const MlaArgs&);
void mla_decode(Ctx&, const MlaArgs&);

// The letters above.
struct MlaShape {
  int64_t A, Nk, P, R, V;
};
// Bytes of ctx.scratch that they take at most on the CPU for T new tokens, however long the context is.
int64_t mla_prefill_scratch_bytes(const MlaShape&, int64_t T, int threads);
int64_t mla_decode_scratch_bytes(const MlaShape&, int64_t T, int threads);
void mla_ref(const MlaArgs&);  // the definition as written above, f64

}  // namespace kl
