// The parameters of a Kimi Linear model, named as in the checkpoint. Matrices are views into the mapped
// files; vectors (norms, biases, convolution taps, A_log, dt_bias) are widened to f32 once, because every
// operator wants them so and they are small.
#pragma once

#include <functional>
#include <vector>

#include "io/checkpoint.h"
#include "model/config.h"
#include "ops/moe/moe.h"

namespace kl {

struct MlpWeights {
  Tensor gate_proj, up_proj;  // [I, D]
  Tensor down_proj;           // [D, I]
};

struct KdaWeights {
  Tensor q_proj, k_proj, v_proj;        // [P, D], P = H · K
  Tensor q_conv1d, k_conv1d, v_conv1d;  // [P, W] f32
  Tensor A_log;                         // [H] f32
  Tensor dt_bias;                       // [H, K] f32
  Tensor f_a_proj, f_b_proj;            // [K, D], [P, K]: the forget gate, low rank
  Tensor b_proj;                        // [H, D]: the write strength beta
  Tensor g_a_proj, g_b_proj;            // [K, D], [P, K]: the output gate, low rank
  Tensor o_norm;                        // [K] f32, shared by the heads
  Tensor o_proj;                        // [D, P]
};

struct MlaWeights {
  Tensor q_proj;              // [A · (nope + rope), D]
  Tensor kv_a_proj_with_mqa;  // [R + rope, D]
  Tensor kv_a_layernorm;      // [R] f32
  Tensor kv_b_proj;           // [A · (nope + v), R]
  Tensor o_proj;              // [D, A · v]
};

struct MoeWeights {
  Tensor gate;                         // [E, D]
  Tensor e_score_correction_bias;      // [E] f32
  std::vector<ExpertWeights> experts;  // E
  MlpWeights
      shared_experts;  // one feed-forward of width num_shared_experts · moe_intermediate_size; maybe absent
};

struct LayerWeights {
  Tensor input_layernorm;           // [D] f32
  Tensor post_attention_layernorm;  // [D] f32
  KdaWeights kda;                   // of a KDA layer
  MlaWeights mla;                   // of an MLA layer
  MlpWeights mlp;                   // of a dense layer
  MoeWeights moe;                   // of an MoE layer
};

struct Weights {
  Tensor embed_tokens;  // [vocab, D]
  std::vector<LayerWeights> layers;
  Tensor norm;     // [D] f32
  Tensor lm_head;  // [vocab, D]; embed_tokens when the embeddings are tied

  int64_t parameters = 0;  // of all tensors
  int64_t active_parameters =
      0;                        // that one token is multiplied with: its top_k experts, and not the embedding
  int64_t bytes = 0;            // as stored
  int64_t active_bytes = 0;     // read for one token: of active_parameters
  std::vector<Buffer> widened;  // owns the f32 vectors
};

// Finds every tensor of `config` in the checkpoint. Throws kl::Error that names every missing, surplus and
// misshapen tensor with what was found and what was expected. Accepts Moonshot's names and those of
// transformers (a dense feed-forward under block_sparse_moe.), A_log as [H], [H, 1] or [1, 1, H, 1],
// convolutions as [P, W] or [P, 1, W].
Weights load_weights(const Checkpoint&, const Config&,
                     const std::function<void(int layers_done, int layers)>& on_layer = {});

}  // namespace kl
