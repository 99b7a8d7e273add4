// The CUDA back-ends of DPLR beside the f64 definition, with vectors that have nothing to do with each other
// and with those that make it Kimi Delta Attention. Without a GPU every test here is skipped.
#ifdef KL_CUDA
#include "cuda/launch.h"
#include "ops/dplr/dplr.h"
#include "testing/recurrence_cuda.h"

namespace kl {
namespace {

using namespace testing;

// Products of bf16 halves leave 2^-16 of each term, and chunks add up; a bf16 output is rounded to nearest,
// which costs 1.7e-3.
constexpr double kF32 = 1e-4, kBf16 = 2e-3;
// The Hopper kernel rounds rows, triangles and the state to bf16 where they enter its products.
constexpr double kHopper = 5e-3;

DplrArgs args_of(const RecurrenceCall& c) {
  return {.q = c.q,
          .k = c.k,
          .a = c.extras[0],
          .b = c.extras[1],
          .v = c.v,
          .g = c.extras[2],
          .cu_seqlens = c.cu_seqlens,
          .out = c.out,
          .state = c.state,
          .slot = c.slot,
          .slot_out = c.slot_out};
}

// a and b of length about 0.7, independent of each other and of k: the transition amplifies a little.
RecurrenceOp op_with(const std::function<double(Random&, int64_t)>& gate, int64_t K) {
  const double size = 0.7 / std::sqrt(static_cast<double>(K));
  const auto small = [size](Random& r, int64_t) { return size * r.normal(); };
  RecurrenceOp op;
  op.extras = {{true, small}, {true, small}, {true, gate}};
  op.prefill = [](Ctx& ctx, const RecurrenceCall& c) { dplr_prefill(ctx, args_of(c)); };
  op.decode = [](Ctx& ctx, const RecurrenceCall& c) { dplr_decode(ctx, args_of(c)); };
  op.definition = [](const RecurrenceCall& c) { dplr_recurrent_ref(args_of(c), recurrence::Precision::f64); };
  return op;
}
double mild(Random& r, int64_t) { return r.uniform(-0.2, 0); }
void expect_right(const std::function<double(Random&, int64_t)>& gate, const RecurrenceCase& c,
                  uint64_t seed) {
  const RecurrenceOp op = op_with(gate, c.K);
  for (const auto& f : {op.prefill, op.decode})
    expect_right_on_device(op, f, c, seed, c.dtype == DType::bf16 ? kBf16 : kF32, kF32);
}

// The kernel that runs where a workspace is given.
void hopper_prefill(Ctx& ctx, const RecurrenceCall& c) {
  DplrArgs args = args_of(c);
  const int64_t bytes = dplr_workspace_bytes(args);
  ASSERT_TRUE(bytes > 0 || c.cu_seqlens.size(0) == 1) << "the Hopper kernel does not take this";
  const cuda::DeviceTensor workspace = cuda::device_tensor(DType::u8, {std::max<int64_t>(bytes, 1)});
  args.workspace = workspace.tensor;
  dplr_prefill(ctx, args);
  KL_CUDA_CHECK(cudaDeviceSynchronize(), "running a case that has a workspace");
}
// Rows where the copy engine can fetch them.
RecurrenceCase hopper_case(RecurrenceCase c) {
  c.dtype = DType::bf16, c.row_pad = 8, c.out_pad = 8;
  return c;
}
void expect_right_on_hopper(const std::function<double(Random&, int64_t)>& gate, const RecurrenceCase& c,
                            uint64_t seed, double tolerance = kHopper) {
  expect_right_on_device(op_with(gate, c.K), hopper_prefill, hopper_case(c), seed, tolerance, tolerance);
}

#define KL_NEEDS_HOPPER() \
  KL_NEEDS_GPU();         \
  if (cuda::current_device().arch != 90) GTEST_SKIP() << "no GPU of architecture 9.0"

TEST(DplrHopper, EveryGateFamily) {
  KL_NEEDS_HOPPER();
  for (const GateFamily& family : gate_families())
    for (const int64_t D : {64, 128}) {
      SCOPED_TRACE(cat("g ", family.name, ", ", D));
      expect_right_on_hopper(family.log_decay, {.lengths = {70, 16, 1, 33}, .H = 2, .Hv = 2, .K = D, .V = D},
                             1);
    }
}

TEST(DplrHopper, EveryLength) {
  KL_NEEDS_HOPPER();
  for (const int64_t T : {0, 1, 2, 15, 16, 17, 63, 64, 65, 300})
    for (const bool initial_state : {false, true}) {
      SCOPED_TRACE(cat("T ", T, ", state ", initial_state));
      expect_right_on_hopper(mild, {.lengths = {T}, .K = 64, .V = 64, .initial_state = initial_state}, 2);
      expect_right_on_hopper(mild, {.lengths = {T}, .K = 128, .V = 128, .initial_state = initial_state}, 2);
    }
  expect_right_on_hopper(mild, {.lengths = {0, 5, 0, 0, 40, 0}, .H = 3, .Hv = 3, .K = 128, .V = 128}, 3);
}

// Few heads: sequences are cut. With the first gates transitions die out soon, with the last one never;
// nothing forgets or erases what was rounded then, and it adds up over a thousand tokens (7e-3, cut or not).
TEST(DplrHopper, SegmentsOfLongSequences) {
  KL_NEEDS_HOPPER();
  const auto alternating = [](Random&, int64_t t) { return t % 16 < 8 ? -12. : -1e-3; };
  const auto weak = [](Random& r, int64_t) { return r.uniform(-2e-3, 0); };
  const std::function<double(Random&, int64_t)> gates[] = {mild, alternating, weak};
  for (size_t g = 0; g < std::size(gates); ++g)
    for (const int64_t D : {64, 128}) {
      SCOPED_TRACE(cat("gate ", g, ", ", D));
      const double tolerance = g == 2 ? 1e-2 : kHopper;
      RecurrenceCase c{.lengths = {1500}, .H = 2, .Hv = 2, .K = D, .V = D};
      expect_right_on_hopper(gates[g], c, 7, tolerance);
      c.lengths = {3, 2000, 0, 700}, c.initial_state = false;
      expect_right_on_hopper(gates[g], c, 8, tolerance);
    }
}

// More (sequence, head) pairs than multiprocessors: blocks take what is next, and no sequence is cut, so that
// bits do not depend on the others.
TEST(DplrHopper, PackedEqualsAlone) {
  KL_NEEDS_HOPPER();
  const RecurrenceOp op = op_with(mild, 64);
  expect_packed_equals_alone_on_device(op, hopper_prefill,
                                       hopper_case({.H = 70, .Hv = 70, .K = 64, .V = 64}));
}

// Other rows, other element types: the portable kernel takes over, whatever workspace is given.
TEST(DplrHopper, LeavesTheRestToThePortableKernel) {
  KL_NEEDS_HOPPER();
  const RecurrenceCase taken = hopper_case({.lengths = {20}, .K = 64, .V = 64});
  RecurrenceCase f32 = taken, narrow = taken, unaligned = taken;
  f32.dtype = DType::f32, narrow.V = 32, unaligned.row_pad = 2;
  const RecurrenceOp op = op_with(mild, 64);
  const auto prefill = [](Ctx& ctx, const RecurrenceCall& c) {
    DplrArgs args = args_of(c);
    EXPECT_EQ(dplr_workspace_bytes(args), 0);
    const cuda::DeviceTensor workspace = cuda::device_tensor(DType::u8, {1});
    args.workspace = workspace.tensor;
    dplr_prefill(ctx, args);
  };
  for (const RecurrenceCase& c : {f32, narrow, unaligned})
    expect_right_on_device(op, prefill, c, 9, c.dtype == DType::bf16 ? kBf16 : kF32, kF32);
}

TEST(DplrHopper, SaysThatTheWorkspaceIsTooSmall) {
  KL_NEEDS_HOPPER();
  const RecurrenceOp op = op_with(mild, 64);
  const RecurrenceCase c = hopper_case({.lengths = {20}, .K = 64, .V = 64});
  RecurrenceOnDevice(RecurrenceProblem(op, c, 10), c).run([](Ctx& ctx, const RecurrenceCall& call) {
    DplrArgs args = args_of(call);
    const int64_t bytes = dplr_workspace_bytes(args);
    const cuda::DeviceTensor workspace = cuda::device_tensor(DType::u8, {bytes - 1});
    args.workspace = workspace.tensor;
    std::string found;
    try {
      dplr_prefill(ctx, args);
    } catch (const Error& e) {
      found = e.what();
    }
    EXPECT_EQ(found, cat("dplr prefill: expected a workspace of ", bytes, " bytes, found ", bytes - 1));
  });
}

TEST(DplrCuda, EveryGateFamily) {
  KL_NEEDS_GPU();
  for (const GateFamily& family : gate_families())
    for (const DType dtype : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(cat("g ", family.name, ", ", name_of(dtype)));
      expect_right(family.log_decay,
                   {.lengths = {70, 16, 1, 33}, .H = 2, .Hv = 2, .K = 128, .V = 128, .dtype = dtype}, 1);
    }
}

TEST(DplrCuda, EveryLength) {
  KL_NEEDS_GPU();
  for (const int64_t T : {0, 1, 15, 16, 17, 63, 64, 65, 300})
    for (const bool initial_state : {false, true}) {
      SCOPED_TRACE(cat("T ", T, ", state ", initial_state));
      expect_right(mild, {.lengths = {T}, .K = 64, .V = 40, .initial_state = initial_state}, 2);
    }
  expect_right(mild, {.lengths = {0, 5, 0, 0, 40, 0}, .H = 3, .Hv = 3}, 3);
}

TEST(DplrCuda, EveryWidth) {
  KL_NEEDS_GPU();
  const int64_t widths[][2] = {{64, 64}, {256, 256}, {128, 256}, {256, 64}, {100, 100},
                               {1, 1},   {7, 250},   {250, 7},   {192, 130}};
  for (const auto& [K, V] : widths) {
    SCOPED_TRACE(cat(K, " x ", V));
    expect_right(mild, {.lengths = {37, 16}, .H = 2, .Hv = 2, .K = K, .V = V}, 4);
  }
}

// With a = beta k, b = exp(g) k and beta k for k it is Kimi Delta Attention; keys of length 1, strengths near
// 1, many chunks. The gate is the same for all tokens, so that b can be drawn beside it.
TEST(DplrCuda, KimiDeltaAttentionOverManyChunks) {
  KL_NEEDS_GPU();
  constexpr int64_t K = 64, T = 1500;
  constexpr double kBeta = 0.9, kGate = -0.01;
  std::vector<double> key(static_cast<size_t>(T * K));
  Random random(5);
  for (size_t t = 0; t < key.size(); t += K) {
    double squares = 0;
    for (size_t i = t; i < t + K; ++i) key[i] = random.normal(), squares += key[i] * key[i];
    for (size_t i = t; i < t + K; ++i) key[i] /= std::sqrt(squares);
  }
  // Values are asked for row by row: each input counts its own channels.
  const auto channel = [&](double factor) {
    return [&key, factor, next = size_t{0}](Random&, int64_t) mutable {
      return factor * key[next++ % key.size()];  // once more for every problem that is drawn
    };
  };
  RecurrenceOp op = op_with(mild, K);
  op.extras = {{true, channel(kBeta)},
               {true, channel(std::exp(kGate))},
               {true, [](Random&, int64_t) { return kGate; }},
               {true, channel(kBeta)}};
  const auto with_keys = [](RecurrenceCall c) {
    c.k = c.extras[3];
    return c;
  };
  op.definition = [&](const RecurrenceCall& c) {
    dplr_recurrent_ref(args_of(with_keys(c)), recurrence::Precision::f64);
  };
  const auto prefill = [&](Ctx& ctx, const RecurrenceCall& c) { dplr_prefill(ctx, args_of(with_keys(c))); };
  expect_right_on_device(op, prefill, {.lengths = {T}, .K = K, .V = 64}, 6, kF32, kF32);
  if (cuda::current_device().arch != 90) return;
  const auto hopper = [&](Ctx& ctx, const RecurrenceCall& c) { hopper_prefill(ctx, with_keys(c)); };
  expect_right_on_device(op, hopper, hopper_case({.lengths = {T}, .K = K, .V = 64}), 6, kHopper, kHopper);
}

TEST(DplrCuda, PackedEqualsAlone) {
  KL_NEEDS_GPU();
  const RecurrenceOp op = op_with(mild, 32);
  expect_packed_equals_alone_on_device(op, op.prefill, {.H = 2, .Hv = 2, .dtype = DType::bf16});
}

}  // namespace
}  // namespace kl
#endif  // KL_CUDA
