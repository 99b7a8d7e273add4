// Is it the right function? The recurrence against golden vectors made by independent code, and everything
// else against the recurrence in f64.
#include <gtest/gtest.h>

#include <fstream>
#include <list>
#include <nlohmann/json.hpp>

#include "ops/kda/kda_cpu.h"
#include "ops/kda/kda_problem.h"
#include "testing/golden.h"

namespace kl {
namespace {

using testing::decode;
using testing::KdaCase;
using testing::KdaIndices;
using testing::KdaProblem;
using testing::KdaResult;
using testing::prefill;
using testing::Random;
using testing::recurrence_f32;
using testing::recurrence_f64;
using testing::rel_rms;
using testing::to_doubles;

// ---- golden vectors ----

struct Golden {
  KdaArgs args;  // but for `out` and `state`
  Tensor S0;
  std::vector<double> o, S;
};

// rel-RMS of the output and of the final states, whichever is larger, with results of type `result`.
double golden_error(const Golden& golden, void (*kda)(const KdaArgs&), DType result) {
  KdaArgs args = golden.args;
  const OwnedTensor out = make_tensor(result, {args.v.size(0), args.v.size(1), args.v.size(2)});
  testing::fill_nan(out.tensor);
  const OwnedTensor state = KdaProblem::copy_of(golden.S0, result);
  args.out = out.tensor, args.state = state.tensor;
  kda(args);
  return std::max(rel_rms(to_doubles(out.tensor), golden.o), rel_rms(to_doubles(state.tensor), golden.S));
}

void expect_golden(const Golden& golden, double tolerance_f64) {
  EXPECT_LE(golden_error(golden, recurrence_f64, DType::f64), tolerance_f64);
  // 1.4e-6 is what the f32 recurrence of other implementations reaches on the same vectors.
  EXPECT_LE(golden_error(golden, recurrence_f32, DType::f32), 1.4e-6);
  EXPECT_LE(golden_error(golden, decode, DType::f32), 1.4e-6);
  EXPECT_LE(golden_error(golden, prefill, DType::f32), 5e-6);
  EXPECT_LE(golden_error(golden, kda_chunk_ref, DType::f32), 5e-6);
}

nlohmann::json read_json(const std::string& name) {
  std::ifstream file(testing::golden_path(name));
  return nlohmann::json::parse(file);
}

TEST(KdaGolden, Safetensors) {
  const auto file = SafetensorsFile::open(testing::golden_path("kda_golden.safetensors"));
  const nlohmann::json cases = read_json("kda_golden.json");
  ASSERT_EQ(cases.size(), 7u);
  for (const auto& [name, c] : cases.items()) {
    SCOPED_TRACE(name);
    const auto tensor = [&, prefix = name + "."](const std::string& field) {
      const auto* entry = file.find(prefix + field);
      KL_CHECK(entry, "golden file: no ", prefix, field);
      return entry->tensor();
    };
    const int64_t B = c["B"], T = c["T_"], H = c["H"], K = c["K"], V = c["Vd"];
    KdaIndices cu, slots;
    for (int64_t b = 0; b <= B; ++b) cu.values.push_back(static_cast<int32_t>(b * T));
    for (int64_t b = 0; b < B; ++b) slots.values.push_back(static_cast<int32_t>(b));
    Golden golden;
    golden.S0 = tensor("S0");
    golden.o = to_doubles(tensor("o")), golden.S = to_doubles(tensor("S"));
    KdaArgs& args = golden.args;
    args.q = tensor("q").view({B * T, H, K}), args.k = tensor("k").view({B * T, H, K});
    args.v = tensor("v").view({B * T, H, V}), args.g = tensor("z").view({B * T, H, K});
    args.beta = tensor("beta_logit").view({B * T, H});
    args.cu_seqlens = cu.tensor(), args.slot = slots.tensor();
    args.gate = {.A_log = tensor("A_log"), .dt_bias = tensor("dt_bias")};
    if (!c["lb"].is_null()) args.gate.kind = KdaGateKind::bounded, args.gate.lower_bound = c["lb"];
    args.beta_kind = c.value("two", false) ? KdaBeta::sigmoid2 : KdaBeta::sigmoid;
    expect_golden(golden, 1e-7);  // the file holds f32

    // The same through ready-made gates and strengths, which are in the file too; rounded to f32 there.
    args.g = tensor("g").view({B * T, H, K}), args.beta = tensor("beta").view({B * T, H});
    args.gate = {.kind = KdaGateKind::log_decay}, args.beta_kind = KdaBeta::value;
    EXPECT_LE(golden_error(golden, recurrence_f64, DType::f64), 1e-6);
  }
}

// Numbers of nested lists, in order.
void append_numbers(const nlohmann::json& j, std::vector<double>& to) {
  if (j.is_array()) {
    for (const auto& x : j) append_numbers(x, to);
  } else {
    to.push_back(j);
  }
}

TEST(KdaGolden, VectorsInF64) {
  const nlohmann::json cases = read_json("kda_vectors.json");
  ASSERT_EQ(cases.size(), 4u);
  for (const nlohmann::json& c : cases) {
    const int64_t T = c["T"], K = c["K"], V = c["V"];
    SCOPED_TRACE(cat("T ", T, ", K ", K, ", V ", V, c["lower_bound"].is_null() ? ", softplus" : ", bounded"));
    std::list<std::vector<double>> values;
    const auto read = [&](const char* field, std::initializer_list<int64_t> shape) {
      append_numbers(c[field], values.emplace_back());
      const Tensor t(values.back().data(), DType::f64, shape);
      KL_CHECK(t.numel() == static_cast<int64_t>(values.back().size()), "golden file: ", field);
      return t;
    };
    KdaIndices cu{{0, static_cast<int32_t>(T)}}, slot{{0}};
    Golden golden;
    golden.S0 = read("S0", {1, 1, K, V});
    golden.o = to_doubles(read("o", {T, 1, V})), golden.S = to_doubles(read("S_T", {1, 1, K, V}));
    KdaArgs& args = golden.args;
    args.q = read("q", {T, 1, K}), args.k = read("k", {T, 1, K}), args.v = read("v", {T, 1, V});
    args.g = read("z_gate", {T, 1, K}), args.beta = read("beta_logit", {T, 1});
    args.cu_seqlens = cu.tensor(), args.slot = slot.tensor();
    args.gate = {.A_log = read("A_log", {1}), .dt_bias = read("dt_bias", {1, K})};
    if (!c["lower_bound"].is_null())
      args.gate.kind = KdaGateKind::bounded, args.gate.lower_bound = c["lower_bound"];
    expect_golden(golden, 1e-13);  // all of it is f64, but for l2_eps
  }
}

// ---- every implementation against the recurrence in f64 ----

struct Gate {
  const char* name;
  KdaGateKind kind;
  std::function<double(Random&, int64_t t, int64_t channel)> g;
};

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kLogDecays[] = {0, -1e-4, -0.05, -5, -160, -kInf};

std::vector<Gate> gates() {
  std::vector<Gate> all;
  static const char* const names[] = {"0", "-1e-4", "-0.05", "-5", "-160", "-inf"};
  for (size_t i = 0; i < std::size(kLogDecays); ++i) {
    all.push_back(
        {names[i], KdaGateKind::log_decay, [x = kLogDecays[i]](Random&, int64_t, int64_t) { return x; }});
  }
  const auto add = [&](const char* name, KdaGateKind kind, auto g) { all.push_back({name, kind, g}); };
  add("any of them per element", KdaGateKind::log_decay,
      [](Random& r, int64_t, int64_t) { return kLogDecays[r.integer(0, 5)]; });
  add("one of them per channel", KdaGateKind::log_decay,
      [](Random&, int64_t, int64_t i) { return kLogDecays[i % 6]; });
  add("one of them per token", KdaGateKind::log_decay,
      [](Random&, int64_t t, int64_t) { return kLogDecays[(7 * t + t / 5) % 6]; });
  add("alternating blocks of 24 tokens, two halves of the channels", KdaGateKind::log_decay,
      [](Random&, int64_t t, int64_t i) { return (t / 24 + i / 16) % 2 ? -3. : -1e-3; });
  add("mild, -inf at times", KdaGateKind::log_decay,
      [](Random& r, int64_t, int64_t) { return r.uniform() < 0.01 ? -kInf : -1e-3 * r.uniform(); });
  add("mild, -160 at times", KdaGateKind::log_decay,
      [](Random& r, int64_t, int64_t) { return r.uniform() < 0.05 ? -160 : -0.05 * r.uniform(); });
  add("softplus", KdaGateKind::softplus, [](Random& r, int64_t, int64_t) { return r.normal(); });
  add("softplus, weak", KdaGateKind::softplus, [](Random& r, int64_t, int64_t) { return r.normal() - 5; });
  add("softplus, strong", KdaGateKind::softplus,
      [](Random& r, int64_t, int64_t) { return 6 + 8 * r.normal(); });
  add("bounded", KdaGateKind::bounded, [](Random& r, int64_t, int64_t) { return r.normal(); });
  add("bounded, weak", KdaGateKind::bounded, [](Random& r, int64_t, int64_t) { return r.normal() - 8; });
  add("bounded, saturated", KdaGateKind::bounded,
      [](Random& r, int64_t, int64_t) { return r.normal() + 40; });
  return all;
}

struct Strength {
  const char* name;
  KdaBeta kind;
  std::function<double(Random&, int64_t t)> beta;
};

std::vector<Strength> strengths() {
  return {{"sigmoid", KdaBeta::sigmoid, [](Random& r, int64_t) { return r.normal(); }},
          {"sigmoid near 1", KdaBeta::sigmoid, [](Random& r, int64_t) { return 8 + r.normal(); }},
          {"sigmoid saturated at 0 and 1", KdaBeta::sigmoid,
           [](Random& r, int64_t) { return r.uniform() < 0.2 ? -200. : 200.; }},
          {"value from 0 to 2", KdaBeta::value, [](Random& r, int64_t) { return r.uniform(0, 2); }},
          {"value 2", KdaBeta::value, [](Random&, int64_t) { return 2.; }},
          {"sigmoid2", KdaBeta::sigmoid2, [](Random& r, int64_t) { return 3 * r.normal(); }}};
}

// The bound of the chunkwise algorithm, for any input. Its f32 rounds at 6e-8; the worst found is 8e-7.
constexpr double kChunkBound = 5e-6;
// The f32 recurrence rounds the state at every token. beta near 2 turns the state instead of shrinking it, so
// that roundings of k add up over all tokens (equal keys, 1000 tokens: 1.2e-5).
double decode_bound(const KdaCase& c) { return c.beta_kind == KdaBeta::sigmoid ? 5e-6 : 5e-5; }

// Worst errors of a test, for its XML record.
struct Worst {
  double prefill = 0, decode = 0;
  ~Worst() {
    ::testing::Test::RecordProperty("worst_prefill", cat(prefill));
    ::testing::Test::RecordProperty("worst_decode", cat(decode));
  }
};

void expect_accurate(const KdaCase& c, uint64_t seed, Worst& worst) {
  const KdaProblem problem(c, seed);
  const KdaResult expected = problem.run(recurrence_f64, DType::f64);
  EXPECT_TRUE(problem.finite(expected));
  const KdaResult chunks = problem.run(prefill), steps = problem.run(decode);
  const double prefill_error = problem.error(chunks, expected), decode_error = problem.error(steps, expected);
  EXPECT_LE(prefill_error, kChunkBound);
  EXPECT_LE(decode_error, decode_bound(c));
  EXPECT_TRUE(problem.others_untouched(chunks) && problem.others_untouched(steps));
  worst.prefill = std::max(worst.prefill, prefill_error), worst.decode = std::max(worst.decode, decode_error);
}

void set(KdaCase& c, const Gate& gate, const Strength& strength) {
  c.gate = gate.kind, c.g = gate.g, c.beta_kind = strength.kind, c.beta = strength.beta;
}

TEST(KdaAccuracy, EveryGateWithNearlyEqualKeys) {
  Worst worst;
  for (const Gate& gate : gates())
    for (const Strength& strength : strengths())
      for (const double spread : {1., 0.1, 1e-3, 0.}) {
        SCOPED_TRACE(cat("gate ", gate.name, ", beta ", strength.name, ", key spread ", spread));
        KdaCase c{.lengths = {1000}, .K = 32, .V = 16, .key_spread = spread};
        set(c, gate, strength);
        expect_accurate(c, 1, worst);
      }
}

TEST(KdaAccuracy, EveryLength) {
  Worst worst;
  for (const Gate& gate : gates())
    for (const Strength& strength : strengths())
      for (const int64_t T : {1, 15, 16, 17, 31, 63, 64, 65, 128, 200}) {
        SCOPED_TRACE(cat("gate ", gate.name, ", beta ", strength.name, ", T ", T));
        KdaCase c{.lengths = {T}, .K = 16, .V = 48};
        set(c, gate, strength);
        expect_accurate(c, 2, worst);
      }
}

TEST(KdaAccuracy, EveryKeyAndValueDimension) {
  Worst worst;
  for (const int64_t K : {1, 7, 32, 48, 64, 128, 256})
    for (const int64_t V : {1, 7, 32, 48, 64, 128, 256})
      for (const char* name : {"one of them per channel", "softplus, weak"}) {
        SCOPED_TRACE(cat("gate ", name, ", K ", K, ", V ", V));
        KdaCase c{.lengths = {81}, .K = K, .V = V};
        for (const Gate& gate : gates())
          if (gate.name == std::string_view(name)) set(c, gate, strengths()[0]);
        expect_accurate(c, 3, worst);
      }
}

TEST(KdaAccuracy, LongSequenceOfModelSize) {
  Worst worst;
  for (const double spread : {1., 1e-3}) {
    KdaCase c{.lengths = {1000}, .K = 128, .V = 128, .key_spread = spread};
    set(c, gates()[1], strengths()[1]);
    expect_accurate(c, 4, worst);
  }
}

TEST(KdaAccuracy, PackedSequencesAndSharedKeys) {
  Worst worst;
  for (const auto& [H, Hv] : {std::pair{1, 1}, {2, 2}, {2, 6}, {1, 3}})
    for (const bool initial : {false, true})
      for (const Gate& gate : gates()) {
        SCOPED_TRACE(cat("gate ", gate.name, ", H ", H, ", Hv ", Hv, initial ? "" : ", from zero"));
        KdaCase c{.lengths = {0, 1, 0, 17, 130, 64, 0}, .H = H, .Hv = Hv, .K = 32, .V = 16};
        c.initial_state = initial;
        set(c, gate, strengths()[0]);
        expect_accurate(c, 5, worst);
      }
}

TEST(KdaAccuracy, Bf16Inputs) {
  Worst worst;
  for (const Gate& gate : gates()) {
    SCOPED_TRACE(gate.name);
    KdaCase c{.lengths = {100, 29}, .H = 1, .Hv = 2, .K = 32, .V = 16, .dtype = DType::bf16};
    set(c, gate, strengths()[0]);
    expect_accurate(c, 6, worst);
  }
}

// Sequences in segments, whatever the gates, keys and initial states: the bound of the chunks. Segments of
// one chunk have the most transitions to chain.
TEST(KdaAccuracy, Segments) {
  Worst worst;
  for (const Gate& gate : gates())
    for (const double spread : {1., 1e-3})
      for (const int64_t segment : {16, 64, 240}) {
        SCOPED_TRACE(cat("gate ", gate.name, ", key spread ", spread, ", segments of ", segment));
        KdaCase c{.lengths = {500, 0, 64, 3, 65}, .H = 1, .Hv = 2, .K = 40, .V = 24, .key_spread = spread};
        c.initial_state = segment != 64;
        set(c, gate, strengths()[1]);
        KdaProblem problem(c, 7);
        problem.args.segment = segment;
        const KdaResult expected = problem.run(recurrence_f64, DType::f64), found = problem.run(prefill);
        const double error = problem.error(found, expected);
        EXPECT_LE(error, kChunkBound);
        EXPECT_TRUE(problem.others_untouched(found));
        worst.prefill = std::max(worst.prefill, error);
      }
}

// What reads the state is rounded to bf16, 1.7e-3 in the mean, on both sides of a product; the worst found is
// 3.0e-3, and 4e-3 is what is promised. On a processor without such products these are their stand-ins.
void expect_rounded(const KdaCase& c, uint64_t seed, KdaProducts products, Worst& worst) {
  const KdaProblem problem(c, seed);
  const KdaResult expected = problem.run(recurrence_f64, DType::f64),
                  found = problem.run([&](const KdaArgs&args) {
                    Ctx ctx;
                    kda_prefill_cpu_with(products, ctx, args);
                  });
  const double error = problem.error(found, expected);
  EXPECT_LE(error, 4e-3);
  EXPECT_TRUE(problem.others_untouched(found));
  worst.prefill = std::max(worst.prefill, error);
}

class KdaRounded : public ::testing::TestWithParam<KdaProducts> {
 protected:
  void SetUp() override {
    if (GetParam() == KdaProducts::tiles && active_isa() == Isa::avx512_bf16)
      GTEST_SKIP() << "this processor has no tiles, and their stand-in is for those without AVX-512-BF16";
  }
};
INSTANTIATE_TEST_SUITE_P(Products, KdaRounded, ::testing::Values(KdaProducts::pairs, KdaProducts::tiles),
                         [](const auto& info) {
                           return info.param == KdaProducts::pairs ? "pairs" : "tiles";
                         });

TEST_P(KdaRounded, EveryGateWithNearlyEqualKeys) {
  Worst worst;
  for (const Gate& gate : gates())
    for (const size_t strength : {0, 1, 2})
      for (const double spread : {1., 0.1, 1e-3}) {
        SCOPED_TRACE(cat("gate ", gate.name, ", beta ", strengths()[strength].name, ", key spread ", spread));
        KdaCase c{.lengths = {300, 5, 33}, .K = 64, .V = 48, .key_spread = spread};
        set(c, gate, strengths()[strength]);
        expect_rounded(c, 8, GetParam(), worst);
      }
}

TEST_P(KdaRounded, LongSequenceOfModelSize) {
  Worst worst;
  for (const size_t gate : {size_t{0}, size_t{1}, size_t{12}})
    for (const double spread : {1., 1e-3}) {
      SCOPED_TRACE(cat("gate ", gates()[gate].name, ", key spread ", spread));
      KdaCase c{.lengths = {1000}, .K = 128, .V = 128, .key_spread = spread};
      set(c, gates()[gate], strengths()[1]);
      expect_rounded(c, 9, GetParam(), worst);
    }
}

// Dimensions and lengths around a tile and a chunk, rows of every type.
TEST_P(KdaRounded, SizesAndTypes) {
  Worst worst;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64})
    for (const int64_t n : {1, 7, 15, 16, 17, 31, 33, 48, 127, 129, 256}) {
      SCOPED_TRACE(cat(name_of(dtype), ", ", n));
      expect_rounded({.lengths = {n, 35}, .K = n, .V = 20, .dtype = dtype}, 10, GetParam(), worst);
      KdaCase c{.lengths = {50, n, 0}, .H = 2, .Hv = 4, .K = 20, .V = n, .dtype = dtype, .fused_rows = true};
      c.state_v_first = n % 2 == 0, c.initial_state = n % 3 != 0;
      expect_rounded(c, 11, GetParam(), worst);
    }
}

// Tokens before one that is not a number do not know of it.
TEST_P(KdaRounded, NanStaysBehindItsToken) {
  const KdaProblem problem({.lengths = {40}, .K = 24, .V = 37}, 12);
  const auto run = [&] {
    return problem.run([&](const KdaArgs& args) {
      Ctx ctx;
      kda_prefill_cpu_with(GetParam(), ctx, args);
    });
  };
  const KdaResult clean = run();
  for (const Tensor& rows :
       {problem.args.v, problem.args.k, problem.args.q, problem.args.g, problem.args.beta}) {
    float& x = rows.ptr<float>()[26 * rows.stride[0]];
    const float before = x;
    x = std::numeric_limits<float>::quiet_NaN();
    const KdaResult found = run();
    x = before;
    for (int64_t t = 0; t < 40; ++t)
      for (int64_t i = 0; i < 37; ++i) {
        const float y = found.out.tensor.at<float>(t, 0)[i], expected = clean.out.tensor.at<float>(t, 0)[i];
        // Where a column holds no NaN, its sums may be made in another order.
        ASSERT_TRUE(t >= 26 || std::abs(y - expected) <= 1e-4 + 1e-2 * std::abs(expected)) << t << ", " << i;
      }
    EXPECT_TRUE(std::isnan(found.out.tensor.at<float>(26, 0)[0]));
  }
}

}  // namespace
}  // namespace kl
