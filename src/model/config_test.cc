// config.json: the two published forms, other models, and everything that can be wrong with it.
#include "model/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io/checkpoint.h"
#include "model/published_config.h"
#include "testing/golden.h"
#include "testing/tiny_checkpoint.h"

namespace kl {
namespace {

using nlohmann::json;
using testing::config_json;
using testing::TinyModel;

// The message that a configuration is refused with; "" if it is accepted.
std::string refusal(const std::string& text) {
  try {
    parse_config(text, "config.json");
    return "";
  } catch (const Error& e) {
    return e.what();
  }
}
std::string refusal(const json& j) { return refusal(j.dump()); }
json base() { return json::parse(config_json(TinyModel{})); }

void expect_mentions(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
}

TEST(Config, ThePublishedModel) {
  const Config c = parse_config(testing::published_48b_config().dump(), "config.json");
  EXPECT_EQ(c.kda_layer_count(), 20);
  EXPECT_EQ(c.mla_layer_count(), 7);
  for (const int layer : {3, 7, 11, 15, 19, 23, 26}) EXPECT_FALSE(c.is_kda(layer));
  EXPECT_FALSE(c.is_moe(0));
  EXPECT_TRUE(c.is_moe(1));
  EXPECT_EQ(c.kda_dim(), 4096);
  EXPECT_EQ(c.qk_head_dim(), 192);
  EXPECT_EQ(c.latent_dim(), 576);
  EXPECT_FLOAT_EQ(c.rms_norm_eps, 1e-5f);
  EXPECT_FLOAT_EQ(c.kv_a_layernorm_eps, 1e-6f);
  EXPECT_EQ(c.eos_token_ids, std::vector<int>{163586});
}

TEST(Config, TheFormOfTransformers) {
  const Config c = load_config(testing::demo_model());
  EXPECT_EQ(c.num_hidden_layers, 8);
  EXPECT_FALSE(c.is_kda(3));
  EXPECT_TRUE(c.is_kda(4));
  EXPECT_EQ(c.moe_router_activation_func, "sigmoid");  // absent from the file
  // layer_types alone say as much as the two lists.
  json j = json::parse(config_json(TinyModel{.layers = "KKM", .transformers_names = true}));
  j["linear_attn_config"].erase("kda_layers");
  j["linear_attn_config"].erase("full_attn_layers");
  EXPECT_FALSE(parse_config(j.dump(), "x").is_kda(2));
  j.erase("linear_attn_config");
  EXPECT_TRUE(parse_config(j.dump(), "x").is_kda(1));
}

TEST(Config, GroupedRoutingFollowsTheNumberOfGroups) {
  json j = base();
  j["num_expert_group"] = 3, j["topk_group"] = 2;
  j.erase("use_grouped_topk");
  EXPECT_EQ(parse_config(j.dump(), "x").num_expert_group, 3);
  j["use_grouped_topk"] = false;
  EXPECT_EQ(parse_config(j.dump(), "x").num_expert_group, 1);
}

TEST(Config, OtherModelsAreNamedByWhatTellsThemApart) {
  const auto with = [](const char* key, const json& value) {
    json j = base();
    j[key] = value;
    return refusal(j);
  };
  expect_mentions(with("attn_res_block_size", 12), {"attn_res_block_size", "Kimi K3"});
  expect_mentions(with("mla_use_output_gate", true), {"mla_use_output_gate"});
  expect_mentions(with("q_lora_rank", 1536), {"q_lora_rank", "1536"});
  expect_mentions(with("hidden_act", "situ"), {"hidden_act", "situ"});
  expect_mentions(with("routed_expert_hidden_size", 3584), {"routed_expert_hidden_size"});
  expect_mentions(with("model_type", "deepseek_v3"), {"kimi_linear", "deepseek_v3"});
  expect_mentions(with("text_config", json::object()), {"text_config"});
  json j = base();
  j.erase("model_type");
  expect_mentions(refusal(j), {"model_type", "none"});
  j = base();
  j["linear_attn_config"]["use_full_rank_gate"] = true;
  expect_mentions(refusal(j), {"use_full_rank_gate"});
  j = base();
  j["linear_attn_config"]["gate_lower_bound"] = -5.0;
  expect_mentions(refusal(j), {"gate_lower_bound", "-5"});
}

TEST(Config, KeysThatChangeTheMathematicsAreErrorsOthersAreNot) {
  json j = base();
  j["attention_bias"] = false, j["something_new"] = {{"a", 1}}, j["rope_theta"] = 5,
  j["quantization_config"] = nullptr;
  EXPECT_EQ(refusal(j), "");
  j["attention_bias"] = true, j["mla_use_nope"] = false, j["quantization_config"] = {{"bits", 8}};
  j["linear_attn_config"]["new_gate"] = "x";
  expect_mentions(refusal(j),
                  {"attention_bias", "mla_use_nope", "quantization_config", "linear_attn_config.new_gate"});
}

TEST(Config, EverythingWrongIsInOneMessage) {
  json j = base();
  j["hidden_size"] = -3, j["vocab_size"] = "many", j["rms_norm_eps"] = "small", j["tie_word_embeddings"] = 1;
  j.erase("num_hidden_layers");
  expect_mentions(refusal(j),
                  {"hidden_size: expected an integer from 1", "found -3", "vocab_size", "\"many\"",
                   "rms_norm_eps", "tie_word_embeddings", "num_hidden_layers is missing"});
  j = base();
  j["num_experts_per_token"] = 7, j["v_head_dim"] = nullptr;
  j["linear_attn_config"]["head_dim"] = 257, j["linear_attn_config"]["short_conv_kernel_size"] = 5;
  expect_mentions(refusal(j), {"num_experts_per_token", "v_head_dim is missing",
                               "linear_attn_config.head_dim", "257", "short_conv_kernel_size"});
}

TEST(Config, LayerListsMustFit) {
  for (const json& lists : {json{{1, 2}, {2, 3}}, json{{1}, {2}}, json{{1, 4}, {2}}, json{{0, 1}, {2, 3}}}) {
    json j = base();
    j["linear_attn_config"]["kda_layers"] = lists[0], j["linear_attn_config"]["full_attn_layers"] = lists[1];
    EXPECT_NE(refusal(j), "") << lists;
  }
  json j = base();
  j["layer_types"] = {"linear_attention", "linear_attention", "linear_attention"};
  expect_mentions(refusal(j), {"layer_types[1]", "contradicts"});
  j = base();
  j["mlp_layer_types"] = {"dense", "dense", "sparse"};
  expect_mentions(refusal(j), {"mlp_layer_types[1]"});
}

// Found by fuzz_config: what a terminal obeys came through from several places, and nothing bounded the
// message.
TEST(Config, MessagesAreShortAndPrintable) {
  const std::string escape = "\x1b]0;x\x07\x7f\u009b";
  std::vector<std::string> messages;
  for (const char* key :
       {"model_type", "hidden_act", "moe_router_activation_func", "attention_bias", "q_lora_rank"}) {
    json j = base();
    j[key] = escape + std::string(1000, 'a');
    messages.push_back(refusal(j));
  }
  json j = base();
  j["linear_attn_config"][escape] = escape;
  messages.push_back(refusal(j));
  j = base();
  j["linear_attn_config"]["lower_bound"] = escape;
  messages.push_back(refusal(j));
  messages.push_back(refusal("{\"a\": \"" + escape + "\", \xff"));
  j = json::parse(config_json(TinyModel{.layers = std::string(2000, 'K')}));
  j["layer_types"] = json(std::vector<std::string>(2000, escape));
  messages.push_back(refusal(j));
  expect_mentions(messages.back(), {"and 1900 more"});
  for (const std::string& message : messages) {
    EXPECT_NE(message, "");
    EXPECT_LT(message.size(), 20'000u) << message;
    for (const char c : message) EXPECT_TRUE(c == '\n' || (c >= 0x20 && c < 0x7f)) << message;
  }
}

TEST(Config, HostileText) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("null"), std::string("\xff\xfe"),
        std::string(100000, '['), std::string("{\"model_type\": 5}"),
        std::string("{\"model_type\": \"kimi_linear\"}"),
        std::string("{\"model_type\": \"kimi_linear\", \"linear_attn_config\": 3, \"vocab_size\": 1e300,"
                    " \"hidden_size\": 18446744073709551615, \"num_hidden_layers\": 9223372036854775807}")}) {
    EXPECT_NE(refusal(text), "") << text.substr(0, 60);
  }
  EXPECT_NE(refusal(config_json(TinyModel{}) + std::string(1, '\0') + "more"), "");
  // Every prefix and every single-byte change is either refused or accepted, never a crash.
  const std::string good = config_json(TinyModel{.transformers_names = true});
  for (size_t n = 0; n < good.size(); ++n) EXPECT_NE(refusal(good.substr(0, n)), "");
  testing::Random random(3);
  for (int i = 0; i < 3000; ++i) {
    std::string bad = good;
    bad[static_cast<size_t>(random.integer(0, static_cast<int64_t>(bad.size()) - 1))] =
        static_cast<char>(random.integer(0, 255));
    refusal(bad);
  }
}

}  // namespace
}  // namespace kl
