// The buffers of one forward pass. Layers of the same kind use the same ones; all come from one arena, so
// that the addresses are those of the pass before whenever the sizes are.
#pragma once

#include "base/buffer.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/state.h"

namespace kl {

struct Activations {
  // What the operators need to know about the packing.
  Tensor cu_seqlens;  // [N + 1] i32
  Tensor slots;       // [N] i32
  Tensor context;     // [N] i32: tokens of each sequence before this pass
  Tensor page_table;  // [N, pages] i32

  Tensor hidden;  // [T, D] the residual stream
  Tensor normed;  // [T, D] what a layer reads

  // KDA: P = H · K
  Tensor qkv;       // [T, 3P] projections before the convolution
  Tensor qkv_conv;  // [T, 3P] after convolution and SiLU
  Tensor f_a, f;    // [T, K], [T, P] raw forget gate
  Tensor g_a, g;    // [T, K], [T, P] raw output gate
  Tensor beta;      // [T, H] logits of the write strength
  Tensor o;         // [T, P]

  // MLA
  Tensor mla_q;   // [T, A, nope + rope]
  Tensor latent;  // [T, R + rope]
  Tensor mla_o;   // [T, A · v]

  // Feed-forward
  Tensor ffn_gate, ffn_up;  // [T, widest of dense and shared]
  Tensor router_logits;     // [T, E]
  Tensor experts, weights;  // [T, top_k] i32, f32

  Tensor logit_hidden;  // [logit rows, D]
  Tensor logits;        // [logit rows, vocab]
};

Activations make_activations(Arena&, const Config&, const Batch&, const State&);

}  // namespace kl
