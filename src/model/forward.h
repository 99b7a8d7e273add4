// The model as a function: packed tokens and the state of their sequences -> logits.
#pragma once

#include <functional>

#include "base/context.h"
#include "model/batch.h"
#include "model/model.h"
#include "model/state.h"

namespace kl {

struct ForwardOptions {
  // Called with the residual stream [T, D] f32: index 0 after the embedding, i after layer i - 1 for the
  // layers but the last, and num_hidden_layers after the final norm.
  std::function<void(int index, const Tensor& hidden)> on_hidden;
  std::function<void(int layers_done)> on_layer;  // after each layer: for a progress display
};

// Runs the batch and moves the state of its sequences forward. Returns logits [logit_rows, vocab] f32, which
// live in `arena` until its next reset (forward resets it first). Throws kl::Error for ids outside the
// vocabulary and sequences that do not fit; the state is unchanged then.
Tensor forward(Ctx&, const Model&, const Batch&, State&, Arena& arena, const ForwardOptions& = {});

// Bytes of `arena` that forward() takes for `tokens` new tokens of one sequence, however long it is already;
// with exact activations (rounded ones are copies besides, half as large as what operators take from
// ctx.scratch).
int64_t forward_bytes(const Config&, int64_t tokens, int threads);

}  // namespace kl
