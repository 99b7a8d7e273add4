// The whole model: against the golden file of an independent implementation, against a plain f64 model for
// other shapes, and against itself under every way to cut and pack the work.
#include "model/forward.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "model/plain_model.h"
#include "testing/golden.h"

namespace kl {
namespace {

using nlohmann::json;
using testing::rel_rms;
using testing::TinyModel;

constexpr uint8_t kPoison = 0x3e;  // memory full of 0x3e3e3e3e = 0.186: wrong, but not NaN

// An f32 forward reached 1.6e-6 from these goldens, which are f32 themselves; ten times that leaves room for
// other orders of summation and none for a wrong eps (9e-6 for the smallest such slip) times ten layers.
constexpr double kGoldenTolerance = 2e-5;
// Different cuts of the same f32 computation.
constexpr double kSplitTolerance = 1e-5;

struct Runner {
  explicit Runner(const Model& m, int slots = 1, int64_t context = 2048, int threads = 2)
      : model(m),
        pool(threads),
        state(m.config, {.slots = slots, .max_tokens = context, .page_size = 16, .poison = kPoison}) {
    ctx.pool = &pool;
  }
  std::vector<double> logits(const Batch& batch, const ForwardOptions& options = {}) {
    return testing::to_doubles(forward(ctx, model, batch, state, arena, options));
  }
  // Logits of every row of one sequence, fed in pieces of these lengths (the last piece takes the rest).
  std::vector<double> all_logits(int slot, const std::vector<int32_t>& ids,
                                 const std::vector<size_t>& pieces = {}) {
    std::vector<double> rows;
    size_t at = 0;
    for (size_t p = 0; at < ids.size(); ++p) {
      const size_t n = p < pieces.size() ? std::min(pieces[p], ids.size() - at) : ids.size() - at;
      Batch batch;
      batch.add(slot, std::span(ids).subspan(at, n), Batch::Logits::all);
      const std::vector<double> part = logits(batch);
      rows.insert(rows.end(), part.begin(), part.end());
      at += n;
    }
    return rows;
  }
  const Model& model;
  ThreadPool pool;
  Ctx ctx;
  Arena arena;
  State state;
};

const Model& demo() {
  static const Model model = load_model(testing::demo_model());
  return model;
}

struct Golden {
  json cases;
  SafetensorsFile file;
};
const Golden& golden() {
  static const Golden g = [] {
    Golden x;
    std::ifstream(testing::golden_path("demo_golden.json")) >> x.cases;
    x.file = SafetensorsFile::open(testing::golden_path("demo_golden.safetensors"));
    return x;
  }();
  return g;
}

TEST(Golden, LogitsOfEveryPrompt) {
  Runner runner(demo());
  for (const auto& [name, c] : golden().cases.items()) {
    const auto ids = c["ids"].get<std::vector<int32_t>>();
    const int slot = runner.state.open();
    Batch batch;
    batch.add(slot, ids, Batch::Logits::none);
    batch.logit_rows = c["positions"].get<std::vector<int32_t>>();
    const std::vector<double> expected = testing::to_doubles(golden().file.find(name + ".logits")->tensor());
    EXPECT_LT(rel_rms(runner.logits(batch), expected), kGoldenTolerance) << name;
    runner.state.close(slot);
  }
}

TEST(Golden, HiddenStatesLayerByLayer) {
  Runner runner(demo());
  for (const std::string name : {"prose_65", "define_gravity"}) {
    const auto ids = golden().cases[name]["ids"].get<std::vector<int32_t>>();
    const int slot = runner.state.open();
    int seen = 0;
    ForwardOptions options;
    options.on_hidden = [&](int i, const Tensor& hidden) {
      const Tensor expected = golden().file.find(cat(name, ".hidden.", i))->tensor();
      EXPECT_LT(rel_rms(hidden, expected), kGoldenTolerance) << name << " layer " << i;
      ++seen;
    };
    Batch batch;
    batch.add(slot, ids, Batch::Logits::last);
    runner.logits(batch, options);
    EXPECT_EQ(seen, 9);
    runner.state.close(slot);
  }
}

TEST(Golden, MeanNegativeLogLikelihood) {
  Runner runner(demo());
  for (const std::string name : {"prose_129", "codes"}) {
    const json& c = golden().cases[name];
    const auto ids = c["ids"].get<std::vector<int32_t>>();
    const int slot = runner.state.open();
    const std::vector<double> logits = runner.all_logits(slot, ids);
    const size_t vocab = static_cast<size_t>(demo().config.vocab_size);
    double nll = 0;
    for (size_t t = 0; t + 1 < ids.size(); ++t) {
      const double* row = &logits[t * vocab];
      const double top = *std::max_element(row, row + vocab);
      double sum = 0;
      for (size_t i = 0; i < vocab; ++i) sum += std::exp(row[i] - top);
      nll += top + std::log(sum) - row[ids[t + 1]];
    }
    EXPECT_NEAR(nll / static_cast<double>(ids.size() - 1), c["nll"].get<double>(), 2e-5) << name;
    runner.state.close(slot);
  }
}

// Prefill, then decode with convolution, KDA and absorbed MLA caches: id for id.
TEST(Golden, GreedyContinuations) {
  Runner runner(demo());
  int compared = 0;
  for (const auto& [name, c] : golden().cases.items()) {
    if (!c.contains("greedy")) continue;
    const int slot = runner.state.open();
    auto next = c["ids"].get<std::vector<int32_t>>();
    std::vector<int32_t> ours;
    const auto greedy = c["greedy"].get<std::vector<int32_t>>();
    while (ours.size() < greedy.size()) {
      Batch batch;
      batch.add(slot, next, Batch::Logits::last);
      const std::vector<double> logits = runner.logits(batch);
      ours.push_back(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      next = {ours.back()};
    }
    EXPECT_EQ(ours, greedy) << name;
    runner.state.close(slot);
    ++compared;
  }
  EXPECT_EQ(compared, 6);
}

Model write_and_load(const std::string& folder, const TinyModel& shape,
                     const std::map<std::string, OwnedTensor>& tensors) {
  testing::write_checkpoint(folder, shape, tensors);
  return load_model(folder);
}

// A random shape of everything that the format allows to vary.
TinyModel random_shape() {
  using rc::gen::inRange;
  TinyModel m;
  m.layers = *rc::gen::suchThat(rc::gen::container<std::string>(rc::gen::element('K', 'M')),
                                [](const std::string& s) { return !s.empty() && s.size() <= 5; });
  m.hidden_size = *inRange(3, 40), m.vocab_size = *inRange(2, 60), m.intermediate_size = *inRange(1, 50);
  m.kda_heads = *inRange(1, 4), m.kda_head_dim = *inRange(1, 20), m.conv = *inRange(2, 5);
  m.mla_heads = *inRange(1, 4), m.kv_lora_rank = *inRange(1, 30), m.nope = *inRange(1, 20),
  m.rope = *inRange(0, 10);
  m.v_head_dim = *inRange(1, 20);
  m.groups = *inRange(1, 4), m.topk_group = *inRange(1, m.groups + 1);
  const int per_group = *inRange(1, 5);
  m.experts = *rc::gen::arbitrary<bool>() ? m.groups * per_group : 0;
  m.top_k = *inRange(1, per_group * m.topk_group + 1);
  m.shared = *inRange(0, 3), m.moe_intermediate = *inRange(1, 20);
  m.first_k_dense = *inRange(0, 3), m.moe_layer_freq = *inRange(1, 3);
  m.renormalize = *rc::gen::arbitrary<bool>(), m.tie = *rc::gen::arbitrary<bool>();
  m.router = *rc::gen::element<std::string>("sigmoid", "softmax");
  m.transformers_names = *rc::gen::arbitrary<bool>(), m.conv_rank3 = *rc::gen::arbitrary<bool>();
  m.a_log_form = *inRange(0, 3), m.shards = *inRange(1, 4);
  m.dtype = *rc::gen::element(DType::f32, DType::bf16, DType::f16);
  m.seed = *rc::gen::arbitrary<uint64_t>();
  return m;
}

std::vector<int32_t> random_ids(const TinyModel& m, int least, int most) {
  const auto n = static_cast<size_t>(*rc::gen::inRange(least, most + 1));
  return *rc::gen::container<std::vector<int32_t>>(n, rc::gen::inRange(0, m.vocab_size));
}

// Where a router decides within rounding, f32 and f64 (or two orders of f32 sums) may rightly differ in a
// whole expert: such a case says nothing and is discarded. Scores are of the order of 0.1 and off by about
// 1e-7.
constexpr double kTooClose = 1e-5;

// What two f32 computations of these logits may differ by. Some random shapes amplify rounding without
// limit: the norm of a head of one channel, say, whose value happens to cancel to almost nothing. How much a
// case amplifies is measured: by the change that roundings of the weights alone (2^-24 of each) make in f64.
// Of 24,000 random cases the worst that was off by more than 1e-5 was off by 4 times that change.
constexpr double kRoundings = 64;
double allowed(const TinyModel& shape, const std::map<std::string, OwnedTensor>& tensors,
               const std::vector<int32_t>& ids, const std::vector<double>& exact) {
  double change = 0;
  for (const uint64_t seed : {1, 2, 3})
    change = std::max(change, rel_rms(testing::PlainModel(shape, tensors, 0x1p-24, seed).run(ids), exact));
  return std::max(1e-5, kRoundings * change);
}

RC_GTEST_PROP(Model, AnyShapeMatchesThePlainModel, ()) {
  const TinyModel shape = random_shape();
  const auto tensors = testing::tiny_tensors(shape);
  const testing::TempDir folder;
  const Model model = write_and_load(folder.path(), shape, tensors);
  const std::vector<int32_t> ids = random_ids(shape, 1, 40);
  Runner runner(model);
  testing::PlainModel plain(shape, tensors);
  const std::vector<double> expected = plain.run(ids);
  RC_PRE(plain.closest_choice() > kTooClose);
  const std::vector<double> ours = runner.all_logits(runner.state.open(), ids);
  RC_ASSERT(rel_rms(ours, expected) < allowed(shape, tensors, ids, expected));
}

RC_GTEST_PROP(Model, AnySplitGivesTheSameLogits, ()) {
  TinyModel shape = random_shape();
  const auto tensors = testing::tiny_tensors(shape);
  const testing::TempDir folder;
  const Model model = write_and_load(folder.path(), shape, tensors);
  const std::vector<int32_t> ids = random_ids(shape, 2, 90);
  const auto pieces = *rc::gen::container<std::vector<size_t>>(rc::gen::inRange<size_t>(1, 40));
  testing::PlainModel plain(shape, tensors);
  const std::vector<double> exact = plain.run(ids);
  RC_PRE(plain.closest_choice() > kTooClose);
  Runner runner(model, 2);
  const std::vector<double> whole = runner.all_logits(runner.state.open(), ids);
  const std::vector<double> split = runner.all_logits(runner.state.open(), ids, pieces);
  RC_ASSERT(rel_rms(split, whole) < allowed(shape, tensors, ids, exact));
}

TEST(Model, DemoSplitAnywhere) {
  const auto ids = golden().cases["prose_129"]["ids"].get<std::vector<int32_t>>();
  Runner runner(demo());
  const auto run = [&](const std::vector<size_t>& pieces) {
    const int slot = runner.state.open();
    const std::vector<double> rows = runner.all_logits(slot, ids, pieces);
    runner.state.close(slot);
    return rows;
  };
  const std::vector<double> whole = run({});
  for (const size_t cut : {1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 127, 128}) {
    EXPECT_LT(rel_rms(run({cut}), whole), kSplitTolerance) << cut;
  }
  EXPECT_LT(rel_rms(run(std::vector<size_t>(ids.size(), 1)), whole), kSplitTolerance) << "token by token";
  EXPECT_LT(rel_rms(run(std::vector<size_t>(ids.size(), 5)), whole), kSplitTolerance) << "five by five";
}

// Packed with others, a sequence gets what it gets alone; the other sequences' slots and the order do not
// matter.
TEST(Model, PackedSequencesAgreeWithEachAlone) {
  const std::vector<std::string> names = {"prose_17", "one_token", "codes", "prose_64", "define_gravity"};
  Runner runner(demo(), 6);
  Batch packed;
  std::vector<double> alone;
  std::vector<int> slots;
  for (size_t i = 0; i < names.size() + 1; ++i) slots.push_back(runner.state.open());
  for (size_t i = 0; i < names.size(); ++i) {
    const auto ids = golden().cases[names[i]]["ids"].get<std::vector<int32_t>>();
    packed.add(slots[names.size() - i], ids, Batch::Logits::all);
    if (i == 2) packed.add(slots[0], {}, Batch::Logits::all);  // a sequence without tokens
    Runner single(demo());
    const std::vector<double> rows = single.all_logits(single.state.open(), ids);
    alone.insert(alone.end(), rows.begin(), rows.end());
  }
  EXPECT_LT(rel_rms(runner.logits(packed), alone), kSplitTolerance);

  // One more token each, as a decode batch.
  Batch step;
  std::vector<double> next_alone;
  for (size_t i = 0; i < names.size(); ++i) {
    const int32_t token = 100 + static_cast<int32_t>(i);
    step.add(slots[names.size() - i], {&token, 1}, Batch::Logits::last);
    auto ids = golden().cases[names[i]]["ids"].get<std::vector<int32_t>>();
    ids.push_back(token);
    Runner single(demo());
    Batch whole;
    whole.add(single.state.open(), ids, Batch::Logits::last);
    const std::vector<double> row = single.logits(whole);
    next_alone.insert(next_alone.end(), row.begin(), row.end());
  }
  EXPECT_LT(rel_rms(runner.logits(step), next_alone), kSplitTolerance);
}

TEST(Model, SameBitsWhateverTheNumberOfThreads) {
  const auto ids = golden().cases["codes"]["ids"].get<std::vector<int32_t>>();
  std::vector<std::vector<double>> results;
  for (const int threads : {1, 2, 3}) {
    Runner runner(demo(), 1, 2048, threads);
    results.push_back(runner.all_logits(runner.state.open(), ids, {50, 1, 1}));
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

TEST(Model, ACopiedStateGoesOnByItself) {
  const auto ids = golden().cases["prose_64"]["ids"].get<std::vector<int32_t>>();
  Runner runner(demo(), 2);
  const int first = runner.state.open(), second = runner.state.open();
  runner.all_logits(first, ids);
  runner.state.copy(first, second);
  EXPECT_EQ(runner.state.length(second), 64);
  const std::vector<int32_t> more = {5, 6, 7};
  const std::vector<double> a = runner.all_logits(first, more);
  runner.all_logits(first, {9, 9, 9, 9, 9, 9, 9, 9, 9, 9});  // the original moves on
  EXPECT_EQ(runner.all_logits(second, more), a);
}

TEST(Model, RefusesWhatDoesNotFit) {
  Runner runner(demo(), 1, 10);
  const int slot = runner.state.open();
  EXPECT_THROW(runner.all_logits(slot, {8192}), Error);
  EXPECT_THROW(runner.all_logits(slot, {-1}), Error);
  EXPECT_THROW(runner.all_logits(slot, std::vector<int32_t>(11, 1)), Error);
  EXPECT_EQ(runner.state.length(slot), 0);
  EXPECT_EQ(runner.all_logits(slot, std::vector<int32_t>(10, 1)).size(), 10u * 8192);
  EXPECT_THROW(runner.all_logits(slot, {1}), Error);
  Batch twice;
  const int32_t one = 1;
  twice.add(slot, {&one, 1}, Batch::Logits::last);
  twice.add(slot, {&one, 1}, Batch::Logits::last);
  EXPECT_THROW(runner.logits(twice), Error);
}

// What `inspect` says of the memory of a pass is what a pass takes, in every form that the operators have.
TEST(Forward, TakesTheMemoryThatItIsSaidTo) {
  for (const int threads : {1, 2, 5})
    for (const int64_t tokens : {1, 9, 64, 300, 700}) {
      Runner runner(demo(), 1, 2048, threads);
      const int slot = runner.state.open();
      for (int pass = 0; pass < 2; ++pass) {  // the second behind a context
        Batch batch;
        batch.add(slot, std::vector<int32_t>(static_cast<size_t>(tokens), 7), Batch::Logits::last);
        runner.logits(batch);
      }
      const auto taken = static_cast<double>(runner.arena.peak());
      const auto said = static_cast<double>(forward_bytes(demo().config, tokens, threads));
      EXPECT_GE(said, taken * 0.98) << tokens << " tokens, " << threads << " threads";
      // Short passes: the parts of a long context are counted, which is not there.
      if (tokens >= 300) {
        EXPECT_LE(said, taken * 1.1) << tokens << " tokens, " << threads << " threads";
      }
    }
}

}  // namespace
}  // namespace kl
