#include "model/activations.h"

#include <algorithm>

namespace kl {

namespace {

Tensor i32_vector(Arena& arena, const std::vector<int32_t>& values) {
  Tensor t = arena.alloc(DType::i32, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), t.ptr<int32_t>());
  return t;
}

Tensor make_page_table(Arena& arena, const Batch& batch, const State& state) {
  size_t widest = 1;
  for (const int slot : batch.slots) widest = std::max(widest, state.pages(slot).size());
  Tensor table = arena.alloc(DType::i32, {batch.sequences(), static_cast<int64_t>(widest)});
  for (int64_t n = 0; n < batch.sequences(); ++n) {
    const std::vector<int32_t>& pages = state.pages(batch.slots[static_cast<size_t>(n)]);
    std::fill_n(table.at<int32_t>(n), widest, -1);
    std::copy(pages.begin(), pages.end(), table.at<int32_t>(n));
  }
  return table;
}

}  // namespace

Activations make_activations(Arena& arena, const Config& c, const Batch& batch, const State& state) {
  const int64_t T = batch.tokens(), D = c.hidden_size;
  const auto f32 = [&](std::initializer_list<int64_t> dims) { return arena.alloc(DType::f32, dims); };
  Activations a;
  a.cu_seqlens = i32_vector(arena, batch.cu_seqlens);
  a.slots = i32_vector(arena, batch.slots);
  std::vector<int32_t> context;
  for (const int slot : batch.slots) context.push_back(static_cast<int32_t>(state.length(slot)));
  a.context = i32_vector(arena, context);
  a.page_table = make_page_table(arena, batch, state);

  a.hidden = f32({T, D});
  a.normed = f32({T, D});
  if (c.kda_layer_count() > 0) {
    const int64_t H = c.linear_attn_config.num_heads, K = c.linear_attn_config.head_dim, P = H * K;
    a.qkv = f32({T, 3 * P});
    a.qkv_conv = f32({T, 3 * P});
    a.f_a = f32({T, K}), a.f = f32({T, P});
    a.g_a = f32({T, K}), a.g = f32({T, P});
    a.beta = f32({T, H});
    a.o = f32({T, P});
  }
  if (c.mla_layer_count() > 0) {
    a.mla_q = f32({T, c.num_attention_heads, c.qk_head_dim()});
    a.latent = f32({T, c.latent_dim()});
    a.mla_o = f32({T, int64_t{c.num_attention_heads} * c.v_head_dim});
  }
  const int64_t width =
      std::max<int64_t>({c.intermediate_size, int64_t{c.num_shared_experts} * c.moe_intermediate_size, 1});
  a.ffn_gate = f32({T, width}), a.ffn_up = f32({T, width});
  if (c.num_experts > 0) {
    a.router_logits = f32({T, c.num_experts});
    a.experts = arena.alloc(DType::i32, {T, c.num_experts_per_token});
    a.weights = f32({T, c.num_experts_per_token});
  }
  const auto rows = static_cast<int64_t>(batch.logit_rows.size());
  a.logit_hidden = f32({rows, D});
  a.logits = f32({rows, c.vocab_size});
  return a;
}

}  // namespace kl
