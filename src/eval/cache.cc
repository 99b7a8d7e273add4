// R9: bytes of one sequence, in the hybrid and with a latent cache in every layer.
#include "eval/claims.h"
#include "model/state.h"

namespace kl {
namespace {

constexpr StateOptions kBf16Latents{.page_size = 1, .latent_dtype = DType::bf16};

// The hybrid's bytes over those of a model whose layers are all MLA.
double hybrid_over_mla(const Config& c, int64_t tokens) {
  const StateBytes hybrid = state_bytes(c, tokens, kBf16Latents);
  const double all_mla =
      static_cast<double>(hybrid.latent) * c.num_hidden_layers / static_cast<double>(c.mla_layer_count());
  return static_cast<double>(hybrid.total()) / all_mla;
}

// Tokens at which a KDA layer's matrix states are as large as an MLA layer's cache.
double break_even_tokens(const Config& c) {
  const StateBytes one = state_bytes(c, 1, kBf16Latents);
  return (static_cast<double>(one.kda) / c.kda_layer_count()) /
         (static_cast<double>(one.latent) / c.mla_layer_count());
}

}  // namespace

Config kimi_linear_48b_attention() {
  Config c;
  c.num_hidden_layers = 27;
  c.kv_lora_rank = 512, c.qk_rope_head_dim = 64;
  c.linear_attn_config = {.head_dim = 128, .num_heads = 32, .full_attn_layers = {4, 8, 12, 16, 20, 24, 27}};
  c.kda_.assign(27, true);
  for (const int layer : c.linear_attn_config.full_attn_layers)
    c.kda_[static_cast<size_t>(layer - 1)] = false;
  for (int layer = 1; layer <= 27; ++layer)
    if (c.is_kda(layer - 1)) c.linear_attn_config.kda_layers.push_back(layer);
  return c;
}

std::vector<Claim> cache_claims(const Config& c) {
  constexpr int64_t k128K = 131072, k1M = 1048576;
  const StateBytes few = state_bytes(c, 1, kBf16Latents), many = state_bytes(c, k1M, kBf16Latents);
  return {{"R9", "hybrid state over a latent cache in every layer, 128K tokens", hybrid_over_mla(c, k128K),
           ClaimBound::at_most, 0.271, "up to 75 % less"},
          {"R9", "hybrid state over a latent cache in every layer, 1M tokens", hybrid_over_mla(c, k1M),
           ClaimBound::at_most, 0.262, "up to 75 % less"},
          {"R9", "growth of the KDA states from 1 token to 1M, bytes",
           static_cast<double>(many.kda - few.kda), ClaimBound::at_most, 0, "a fixed size"},
          {"R9", "tokens at which a KDA layer is as large as an MLA layer", break_even_tokens(c),
           ClaimBound::at_most, 1821, ""}};
}

}  // namespace kl
