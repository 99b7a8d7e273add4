// Finding a model's tensors: what is missing, surplus or misshapen is named, all of it in one message.
#include "model/weights.h"

#include <gtest/gtest.h>

#include "model/model.h"
#include "model/published_config.h"
#include "testing/checkpoint_48b.h"
#include "testing/compare.h"
#include "testing/golden.h"
#include "testing/tiny_checkpoint.h"

namespace kl {
namespace {

using testing::TempDir;
using testing::tiny_tensors;
using testing::TinyModel;
using testing::write_checkpoint;

std::string refused_weights(const std::string& folder) {
  try {
    load_model(folder);
    return "";
  } catch (const Error& e) {
    return e.what();
  }
}

TEST(Weights, TheDemoModel) {
  const Model m = load_model(testing::demo_model());
  // The index file of the checkpoint counts 14526988: it leaves out the correction biases, 8 in each of 7 MoE
  // layers.
  EXPECT_EQ(m.weights.parameters, 14526988 + 7 * 8);
  EXPECT_EQ(m.weights.bytes, 29057296);
  EXPECT_EQ(m.weights.layers[1].moe.experts.size(), 8u);
  check_shape("A_log", m.weights.layers[0].kda.A_log, {2});
  check_shape("conv", m.weights.layers[0].kda.q_conv1d, {256, 4});
  // Matrices are views into the mapping, not copies.
  EXPECT_EQ(m.weights.lm_head.data, m.checkpoint.find("lm_head.weight")->data);
}

TEST(Weights, EveryFormGivesTheSameNumbers) {
  for (const bool names : {false, true}) {
    for (int form = 0; form < 3; ++form) {
      TinyModel shape{
          .transformers_names = names, .a_log_form = form, .conv_rank3 = form != 1, .shards = form + 1};
      const auto tensors = tiny_tensors(shape);
      const TempDir folder;
      write_checkpoint(folder.path(), shape, tensors);
      const Model m = load_model(folder.path());
      const KdaWeights& kda = m.weights.layers[0].kda;
      EXPECT_EQ(testing::to_doubles(kda.A_log),
                testing::to_doubles(tensors.at("model.layers.0.self_attn.A_log").tensor));
      EXPECT_EQ(testing::to_doubles(kda.q_conv1d),
                testing::to_doubles(tensors.at("model.layers.0.self_attn.q_conv1d.weight").tensor));
      check_shape("dt_bias", kda.dt_bias, {2, 8});
    }
  }
}

TEST(Weights, TiedEmbeddings) {
  TinyModel shape{.tie = true};
  auto tensors = tiny_tensors(shape);
  const TempDir folder;
  write_checkpoint(folder.path(), shape, tensors);
  const Model tied = load_model(folder.path());
  EXPECT_EQ(tied.weights.lm_head.data, tied.weights.embed_tokens.data);
  // A head in the file is the head, whatever the flag says.
  testing::Random random(5);
  tensors["lm_head.weight"] =
      testing::random_normal(DType::f32, {shape.vocab_size, shape.hidden_size}, random);
  write_checkpoint(folder.path(), shape, tensors);
  const Model separate = load_model(folder.path());
  EXPECT_NE(separate.weights.lm_head.data, separate.weights.embed_tokens.data);
}

TEST(Weights, PredictionHeadsAreDropped) {
  TinyModel shape;
  auto tensors = tiny_tensors(shape);
  tensors["model.mtp.0.norm.weight"] = make_tensor(DType::f32, {4});
  const TempDir folder;
  write_checkpoint(folder.path(), shape, tensors);
  EXPECT_EQ(refused_weights(folder.path()), "");
}

TEST(Weights, EverythingWrongIsNamedAtOnce) {
  TinyModel shape;
  auto tensors = tiny_tensors(shape);
  tensors.erase("model.layers.0.self_attn.A_log");
  tensors.erase("model.layers.2.block_sparse_moe.experts.3.w2.weight");
  tensors["model.layers.1.self_attn.q_proj.weight"] = make_tensor(DType::f32, {24, 36});
  tensors["model.layers.0.self_attn.v_conv1d.weight"] = make_tensor(DType::f32, {16, 1, 3});
  tensors["model.norm.weight"] = make_tensor(DType::i32, {24});
  tensors["model.layers.1.self_attn.q_a_proj.weight"] = make_tensor(DType::f32, {2, 24});
  const TempDir folder;
  write_checkpoint(folder.path(), shape, tensors);
  const std::string message = refused_weights(folder.path());
  for (const char* part :
       {"missing: model.layers.0.self_attn.A_log [2]",
        "missing: model.layers.2.block_sparse_moe.experts.3.w2.weight [24, 12]",
        "model.layers.1.self_attn.q_proj.weight: expected [36, 24], found [24, 36]",
        "model.layers.0.self_attn.v_conv1d.weight: expected [16, 4] or [16, 1, 4], found [16, 1, 3]",
        "model.norm.weight: expected BF16, F32 or F16, found I32",
        "surplus: model.layers.1.self_attn.q_a_proj.weight [2, 24]"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
  }
}

// The published 48B model, in sparse files: all 20,493 tensors fit, and the counts are the published ones.
TEST(Weights, ThePublishedModel) {
  const testing::TempDir folder;
  if (!testing::write_48b_checkpoint(folder, testing::kimi_linear_48b(),
                                     testing::published_48b_config().dump())) {
    GTEST_SKIP() << "no sparse files on the file system of " << folder.path();
  }
  const Model m = load_model(folder.path());
  EXPECT_EQ(m.weights.parameters, 49'122'681'728);
  EXPECT_EQ(m.weights.active_parameters, 3'106'972'544);
  EXPECT_EQ(m.weights.bytes, 98'245'528'576);
}

// A configuration may ask for a billion experts' tensors: the message ends somewhere, and soon.
TEST(Weights, AnAbsurdConfigurationEndsSoon) {
  TinyModel shape;
  const TempDir folder;
  write_checkpoint(folder.path(), shape, tiny_tensors(shape));
  TinyModel absurd{.layers = std::string(4000, 'M'), .experts = 60000};
  std::ofstream(folder.path() + "/config.json") << testing::config_json(absurd);
  const std::string message = refused_weights(folder.path());
  EXPECT_NE(message.find("missing: "), std::string::npos);
  EXPECT_LT(message.size(), 20u << 20);
}

}  // namespace
}  // namespace kl
