// The delta rule without a gate and with one per head.
#include "ops/delta_net/delta_net.h"

#include "recurrence/recurrence_cases.h"

namespace kl {
namespace {

using namespace testing;

// f32 against f64. Sequences stay below 1.5e-6; the worst case (2.9e-6) is a single token under a full gate,
// whose query happens to be nearly orthogonal to its key.
constexpr double kTolerance = 5e-6;

struct Options {
  DeltaNetGate gate;
  DeltaNetBeta beta = DeltaNetBeta::sigmoid;
  bool l2norm = true;
};

// extras: beta, then g where there is a gate.
DeltaNetArgs args_of(const RecurrenceCall& c, const Options& options) {
  DeltaNetArgs args{.q = c.q, .k = c.k, .v = c.v};
  args.beta = c.extras[0];
  if (c.extras.size() > 1) args.g = c.extras[1];
  args.cu_seqlens = c.cu_seqlens, args.out = c.out;
  args.state = c.state, args.slot = c.slot, args.slot_out = c.slot_out;
  args.gate = options.gate, args.beta_kind = options.beta, args.l2norm = options.l2norm;
  return args;
}

double any(Random& r, int64_t) { return r.normal(); }

RecurrenceOp op_with(const Options& o, std::function<double(Random&, int64_t)> gate,
                     std::function<double(Random&, int64_t)> beta = any) {
  RecurrenceOp op;
  op.extras = {{false, beta}};
  if (gate) op.extras.push_back({false, gate});
  op.prefill = [o](Ctx& ctx, const RecurrenceCall& c) { delta_net_prefill(ctx, args_of(c, o)); };
  op.decode = [o](Ctx& ctx, const RecurrenceCall& c) { delta_net_decode(ctx, args_of(c, o)); };
  op.definition = [o](const RecurrenceCall& c) {
    delta_net_recurrent_ref(args_of(c, o), recurrence::Precision::f64);
  };
  return op;
}
const Options kLogDecay{.gate = {.kind = DeltaNetGateKind::log_decay}};
RecurrenceOp mild() {
  return op_with(kLogDecay, [](Random& r, int64_t) { return r.uniform(-0.2, 0); });
}

void expect_near_definition_at_all_sizes(const RecurrenceOp& op) {
  for (const int64_t T : interesting_lengths()) {
    SCOPED_TRACE(cat("T ", T));
    expect_near_definition(op, {.lengths = {T}}, 1, kTolerance);
  }
  expect_near_definition(op, {.lengths = {70, 0, 9}, .H = 2, .Hv = 4, .K = 48, .V = 20}, 2, kTolerance);
  expect_near_definition(op, {.lengths = {30, 80}, .K = 5, .V = 17, .initial_state = false}, 3, kTolerance);
  expect_near_definition(op, {.lengths = {66}, .dtype = DType::bf16}, 4, kTolerance);
}

TEST(DeltaNet, IsNearItsDefinition) { expect_near_definition_at_all_sizes(op_with({}, nullptr)); }

TEST(DeltaNet, GatedIsNearItsDefinition) {
  for (const GateFamily& family : gate_families()) {
    SCOPED_TRACE(cat("g ", family.name));
    expect_near_definition_at_all_sizes(op_with(kLogDecay, family.log_decay));
  }
}

TEST(DeltaNet, SoftplusGateWithItsParameters) {
  Random random(7);
  const OwnedTensor A_log = random_normal(DType::f32, {2}, random, 0.5),
                    dt_bias = random_normal(DType::f32, {2}, random, 0.5);
  const Options options{.gate = {.A_log = A_log.tensor, .dt_bias = dt_bias.tensor}};
  expect_near_definition(op_with(options, any), {.lengths = {90, 5}, .Hv = 2}, 5, kTolerance);

  // And the formula itself: the decay of one token, seen on a state of ones that nothing is written to.
  float z[] = {0.3f, -2.f}, zero[] = {0, 0}, one[] = {1, 1}, never[] = {0, 0}, out[2], state[] = {1, 1};
  int32_t cu[] = {0, 1}, slot[] = {0};
  Ctx ctx;
  delta_net_decode(ctx, {.q = Tensor(one, DType::f32, {1, 1, 1}),
                         .k = Tensor(zero, DType::f32, {1, 1, 1}),
                         .v = Tensor(zero, DType::f32, {1, 2, 1}),
                         .g = Tensor(z, DType::f32, {1, 2}),
                         .beta = Tensor(never, DType::f32, {1, 2}),
                         .cu_seqlens = Tensor(cu, DType::i32, {2}),
                         .out = Tensor(out, DType::f32, {1, 2, 1}),
                         .state = Tensor(state, DType::f32, {1, 2, 1, 1}),
                         .slot = Tensor(slot, DType::i32, {1}),
                         .gate = options.gate});
  for (int h = 0; h < 2; ++h) {
    const double expected = std::exp(-std::exp(A_log.tensor.ptr<float>()[h]) *
                                     std::log(1 + std::exp(z[h] + dt_bias.tensor.ptr<float>()[h])));
    EXPECT_NEAR(state[h], expected, 1e-6);
  }
}

// Reflections remember rounding errors for ever: equal keys, beta = 2, no decay. That is what f64 is for.
TEST(DeltaNet, BetaUpToTwo) {
  const auto two = [](Random&, int64_t) { return 2.; };
  const RecurrenceOp op = op_with({.beta = DeltaNetBeta::value}, nullptr, two);
  const RecurrenceProblem problem(op, {.lengths = {1000}}, 6);
  dispatch_float(problem.call.k.dtype, [&]<class T>() {
    for (int64_t t = 1; t < 1000; ++t)
      std::copy_n(problem.call.k.at<T>(0, 0), 32, problem.call.k.at<T>(t, 0));
  });
  const RecurrenceResult expected = problem.definition(), found = problem.prefill();
  EXPECT_LE(rel_rms(found.out.tensor, expected.out.tensor), kTolerance);
  EXPECT_LE(rel_rms(problem.states_of(found), problem.states_of(expected)), kTolerance);
  expect_near_definition(op_with({.beta = DeltaNetBeta::sigmoid2}, nullptr), {.lengths = {100}}, 8,
                         kTolerance);
}

// A key written with beta = 1 is read back as written, whatever stood there before.
TEST(DeltaNet, OverwritesAKey) {
  float q[] = {3, 4, 3, 4}, k[] = {3, 4, 3, 4}, v[] = {7, 5}, beta[] = {1, 1}, out[] = {NAN, NAN},
        state[] = {9, -9};
  int32_t cu[] = {0, 2}, slot[] = {0};
  Ctx ctx;
  delta_net_prefill(ctx, {.q = Tensor(q, DType::f32, {2, 1, 2}),
                          .k = Tensor(k, DType::f32, {2, 1, 2}),
                          .v = Tensor(v, DType::f32, {2, 1, 1}),
                          .beta = Tensor(beta, DType::f32, {2, 1}),
                          .cu_seqlens = Tensor(cu, DType::i32, {2}),
                          .out = Tensor(out, DType::f32, {2, 1, 1}),
                          .state = Tensor(state, DType::f32, {1, 1, 2, 1}),
                          .slot = Tensor(slot, DType::i32, {1}),
                          .beta_kind = DeltaNetBeta::value,
                          .scale = 1});
  EXPECT_NEAR(out[0], 7, 1e-5);
  EXPECT_NEAR(out[1], 5, 1e-5);
}

TEST(DeltaNet, PackedEqualsAlone) { expect_packed_equals_alone(mild(), {.H = 1, .Hv = 2}); }
TEST(DeltaNet, CanBeCutAnywhere) { expect_cut_anywhere(mild(), {.H = 2, .Hv = 2}); }
TEST(DeltaNet, TheFutureDoesNotTouchThePast) { expect_causal(mild(), {.H = 1, .Hv = 2}); }
TEST(DeltaNet, ThreadsDoNotMatter) { expect_threads_do_not_matter(mild(), {.H = 2, .Hv = 4}); }

TEST(DeltaNet, SaysWhatIsWrong) {
  const RecurrenceCase c{.lengths = {4, 2}, .H = 2, .Hv = 4, .K = 8, .V = 8};
  EXPECT_EQ(error_of_call(mild(), c, [](RecurrenceCall&) {}), "");
  EXPECT_EQ(error_of_call(mild(), c, [](RecurrenceCall& x) { x.extras[0] = x.extras[0].slice(1, 0, 3); }),
            "delta_net beta: expected shape [6, 4], found [6, 3]");
  EXPECT_EQ(error_of_call(mild(), c, [](RecurrenceCall& x) { x.extras[1] = x.v; }),
            "delta_net g: expected shape [6, 4], found [6, 4, 8]");
  OwnedTensor bias = make_tensor(DType::f32, {3});
  EXPECT_EQ(error_of_call(op_with({.gate = {.dt_bias = bias.tensor}}, any), c, [](RecurrenceCall&) {}),
            "delta_net gate.dt_bias: expected shape [4], found [3]");
#ifndef KL_CUDA
  EXPECT_EQ(
      error_of_call(mild(), c,
                    [](RecurrenceCall& x) {
                      for (Tensor* t : {&x.q, &x.k, &x.v, &x.out, &x.state, &x.cu_seqlens, &x.slot,
                                        &x.extras[0], &x.extras[1]})
                        t->device = Device::cuda;
                    }),
      "delta_net: the tensors are on a GPU, but this build has no CUDA kernels (configure with KL_CUDA=ON)");
#endif
}

}  // namespace
}  // namespace kl
