// Random checkpoints: the published names, values like before training, the same bytes everywhere.
#include "model/synth.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <set>

#include "io/xxh64.h"
#include "model/fingerprint.h"
#include "model/model.h"
#include "testing/compare.h"
#include "testing/golden.h"
#include "testing/tiny_checkpoint.h"

namespace kl {
namespace {

Config tiny_config(const testing::TinyModel& m = {}) {
  return parse_config(testing::config_json(m, ", \"bos_token_id\": 1, \"eos_token_id\": [2, 3]"), "test");
}

std::set<std::string> names_in(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

TEST(Synth, The48BHasItsPublishedTensors) {
  testing::TinyModel m{.layers = "KKKMKKKMKKKMKKKMKKKMKKKMKKM",
                       .vocab_size = 163840,
                       .hidden_size = 2304,
                       .intermediate_size = 9216,
                       .kda_heads = 32,
                       .kda_head_dim = 128,
                       .mla_heads = 32,
                       .kv_lora_rank = 512,
                       .nope = 128,
                       .rope = 64,
                       .v_head_dim = 128,
                       .experts = 256,
                       .top_k = 8,
                       .moe_intermediate = 1024};
  int64_t parameters = 0, bytes = 0;
  const std::vector<SynthTensor> tensors = synth_tensors(tiny_config(m), DType::bf16);
  for (const SynthTensor& t : tensors) parameters += t.numel(), bytes += t.bytes();
  EXPECT_EQ(tensors.size(), 20493u);
  EXPECT_EQ(parameters, 49122681728);
  EXPECT_EQ(bytes, 98245528576);
}

TEST(Synth, WhatIsWrittenLoads) {
  for (const testing::TinyModel& m :
       {testing::TinyModel{},
        testing::TinyModel{.layers = "MK", .shared = 0, .tie = true, .router = "softmax"},
        testing::TinyModel{.layers = "KK", .conv = 3, .experts = 0},
        testing::TinyModel{.layers = "KMKK",
        .experts = 8,
        .first_k_dense = 0,
        .moe_layer_freq = 2,
        .groups = 4,
        .topk_group = 2}}) {
    for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
      const testing::TempDir folder;
      const Config c = tiny_config(m);
      const SynthResult result = write_synthetic_checkpoint(folder.path(), c, {.matrices = dtype});
      const Model model = load_model(folder.path());
      EXPECT_EQ(model.weights.parameters, result.parameters);
      EXPECT_EQ(model.weights.bytes, result.bytes);
      EXPECT_EQ(model.weights.lm_head.dtype, dtype);
      EXPECT_EQ(config_json(model.config, dtype), config_json(c, dtype));  // nothing is lost on the way
    }
  }
}

TEST(Synth, TheSeedIsAllThatTheBytesDependOn) {
  const testing::TempDir a, b;
  ThreadPool pool(3);
  const Config c = tiny_config({.layers = "KM", .vocab_size = 3000});
  write_synthetic_checkpoint(a.path(), c, {.seed = 5});
  const SynthResult sharded =
      write_synthetic_checkpoint(b.path(), c, {.seed = 5, .shard_bytes = 20000, .pool = &pool});
  EXPECT_EQ(names_in(a.path()),
            (std::set<std::string>{"config.json", "generation_config.json", "model.safetensors"}));
  EXPECT_GT(sharded.files, 3);
  EXPECT_TRUE(names_in(b.path()).count("model.safetensors.index.json"));
  EXPECT_TRUE(names_in(b.path()).count(cat("model-00001-of-0000", sharded.files, ".safetensors")));
  const Checkpoint one = Checkpoint::open(a.path()), many = Checkpoint::open(b.path());
  ASSERT_EQ(one.entries().size(), many.entries().size());
  for (const SafetensorsFile::Entry* entry : one.entries()) {
    const SafetensorsFile::Entry* other = many.find_entry(entry->name);
    ASSERT_TRUE(other) << entry->name;
    EXPECT_EQ(xxh64(entry->data, entry->bytes), xxh64(other->data, other->bytes)) << entry->name;
  }
}

// Every machine and every later version has to make these bytes (computed once more, in Python).
TEST(Synth, BytesOfSeed1) {
  const struct {
    SynthInit init;
    DType dtype;
    float spread;
    uint64_t hash;
  } cases[] = {{SynthInit::normal, DType::bf16, 0.02f, 9437273461637691074u},
               {SynthInit::normal, DType::f32, 0.96f, 7404711014927153318u},
               {SynthInit::norm, DType::f32, 0.1f, 15426196493734901473u},
               {SynthInit::uniform, DType::f32, 0.5f, 10464485323150036882u},
               {SynthInit::A_log, DType::f32, 0, 12515782655517256537u},
               {SynthInit::dt_bias, DType::f32, 0, 2237034013987371208u}};
  for (const auto& c : cases) {
    const SynthTensor t = {"model.some.weight", c.dtype, {100, 100}, c.init, c.spread};
    std::vector<char> bytes(static_cast<size_t>(t.bytes()));
    synth_fill(t, 1, 0, t.numel(), bytes.data());
    EXPECT_EQ(xxh64(bytes.data(), bytes.size()), c.hash) << static_cast<int>(c.init);
  }
}

struct Moments {
  double mean = 0, deviation = 0, low = 1e9, high = -1e9;
};
Moments moments(SynthInit init, float spread) {
  const SynthTensor t = {"x", DType::f32, {200000}, init, spread};
  std::vector<float> v(200000);
  synth_fill(t, 3, 0, t.numel(), v.data());
  Moments m;
  for (const float x : v) {
    m.mean += x / 2e5, m.deviation += double{x} * x / 2e5;
    m.low = std::min<double>(m.low, x), m.high = std::max<double>(m.high, x);
  }
  m.deviation = std::sqrt(m.deviation - m.mean * m.mean);
  return m;
}

// 200,000 draws: the mean's own deviation is 0.0022 of the spread; five of those are allowed.
TEST(Synth, ValuesAreThoseOfAModelBeforeTraining) {
  const Moments normal = moments(SynthInit::normal, 0.02f);
  EXPECT_NEAR(normal.mean, 0, 0.02 * 0.011);
  EXPECT_NEAR(normal.deviation, 0.02, 0.02 * 0.01);
  EXPECT_GT(normal.high, 3 * 0.02);
  EXPECT_LE(normal.high, 3.5 * 0.02);
  const Moments norm = moments(SynthInit::norm, 0.1f);
  EXPECT_NEAR(norm.mean, 1, 0.0011);
  EXPECT_NEAR(norm.deviation, 0.1, 0.001);
  const Moments uniform = moments(SynthInit::uniform, 0.5f);
  EXPECT_NEAR(uniform.mean, 0, 0.004);
  EXPECT_NEAR(uniform.deviation, 1 / std::sqrt(12.), 0.004);
  EXPECT_LE(std::max(uniform.high, -uniform.low), 0.5);
  const Moments a = moments(SynthInit::A_log, 0);
  EXPECT_GE(a.low, 0);
  EXPECT_LE(a.high, std::log(16.) + 1e-3);
  EXPECT_NEAR(a.mean, (16 * std::log(16.) - 15) / 15, 0.01);
  const Moments bias = moments(SynthInit::dt_bias, 0);  // softplus of it: 0.001 .. 0.1
  EXPECT_NEAR(std::log1p(std::exp(bias.low)), 0.001, 1e-6);
  EXPECT_NEAR(std::log1p(std::exp(bias.high)), 0.1, 1e-4);
}

TEST(Synth, AnyPartOfATensorCanBeMadeAlone) {
  const SynthTensor t = {"x", DType::bf16, {10, 100}, SynthInit::normal, 1.f};
  std::vector<uint16_t> whole(1000), part(300);
  synth_fill(t, 9, 0, 1000, whole.data());
  synth_fill(t, 9, 333, 300, part.data());
  EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + 333));
}

TEST(Synth, NothingIsOverwrittenAndNothingHalfIsLeft) {
  const testing::TempDir folder;
  const std::string inside = folder.path() + "/new/folder";
  EXPECT_THROW(
      write_synthetic_checkpoint(
          inside, tiny_config(),
          {.shard_bytes = 5000,
           .on_progress = [](int64_t bytes, int64_t total) { KL_CHECK(bytes < total / 2, "stopped"); }}),
      Error);
  EXPECT_TRUE(names_in(inside).empty());
  write_synthetic_checkpoint(inside, tiny_config(), {});
  const uint64_t before = fingerprint(load_model(inside));
  EXPECT_THROW(write_synthetic_checkpoint(inside, tiny_config(), {.seed = 2}), Error);
  EXPECT_EQ(fingerprint(load_model(inside)), before);
  EXPECT_THROW(write_synthetic_checkpoint("/proc/none", tiny_config(), {}), Error);
}

}  // namespace
}  // namespace kl
