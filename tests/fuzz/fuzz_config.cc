// config.json. What is accepted describes a model whose sizes can be computed with.
#include "fuzz.h"
#include "model/config.h"
#include "model/state.h"

namespace kl::fuzz {
namespace {

void check_config(const Config& c) {
  FUZZ_REQUIRE(c.num_hidden_layers > 0 && c.hidden_size > 0 && c.vocab_size > 0);
  FUZZ_REQUIRE(c.kda_.size() == static_cast<size_t>(c.num_hidden_layers));
  FUZZ_REQUIRE(c.kda_layer_count() + c.mla_layer_count() == c.num_hidden_layers);
  if (c.kda_layer_count() > 0) {
    FUZZ_REQUIRE(c.kda_dim() > 0 && c.linear_attn_config.short_conv_kernel_size >= 2);
  }
  if (c.mla_layer_count() > 0) {
    FUZZ_REQUIRE(c.latent_dim() > 0 && c.qk_head_dim() > 0 && c.v_head_dim > 0 && c.num_attention_heads > 0);
  }
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    FUZZ_REQUIRE(c.is_moe(i) || c.intermediate_size > 0, "layer ", i);
    if (!c.is_moe(i)) continue;
    FUZZ_REQUIRE(c.moe_intermediate_size > 0, "layer ", i);
    FUZZ_REQUIRE(c.num_experts_per_token >= 1 && c.num_experts_per_token <= c.num_experts, "layer ", i);
    FUZZ_REQUIRE(c.num_experts % c.num_expert_group == 0 && c.topk_group <= c.num_expert_group, "layer ", i);
  }
  const StateBytes bytes = state_bytes(c, 1'000'000);
  FUZZ_REQUIRE(bytes.kda >= 0 && bytes.conv >= 0 && bytes.latent >= 0 && bytes.total() > 0);
}

}  // namespace
}  // namespace kl::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kl;
  using namespace kl::fuzz;
  accepted([&] { check_config(parse_config(as_text(data, size), "config.json")); });
  return 0;
}
