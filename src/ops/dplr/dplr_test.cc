// Diagonal plus low rank with vectors that have nothing to do with each other, as no special case has them.
#include "ops/dplr/dplr.h"

#include "recurrence/recurrence_cases.h"

namespace kl {
namespace {

using namespace testing;

// f32 against f64. Sequences stay below 1.5e-6; the worst case (2.4e-6) is a single token under a full gate,
// whose query happens to be nearly orthogonal to its key.
constexpr double kTolerance = 5e-6;

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

// a and b of length about 0.7 at 32 channels: independent of each other and of k. The transition I - a bᵀ
// then amplifies a little, some 1.5 times over 200 tokens without decay.
RecurrenceOp op_with(const std::function<double(Random&, int64_t)>& gate) {
  const auto eighth = [](Random& r, int64_t) { return r.normal() / 8; };
  RecurrenceOp op;
  op.extras = {{true, eighth}, {true, eighth}, {true, gate}};
  op.prefill = [](Ctx& ctx, const RecurrenceCall& c) { dplr_prefill(ctx, args_of(c)); };
  op.decode = [](Ctx& ctx, const RecurrenceCall& c) { dplr_decode(ctx, args_of(c)); };
  op.definition = [](const RecurrenceCall& c) { dplr_recurrent_ref(args_of(c), recurrence::Precision::f64); };
  return op;
}
RecurrenceOp mild() {
  return op_with([](Random& r, int64_t) { return r.uniform(-0.2, 0); });
}

TEST(Dplr, IsNearItsDefinition) {
  for (const GateFamily& family : gate_families()) {
    const RecurrenceOp op = op_with(family.log_decay);
    for (const int64_t T : interesting_lengths()) {
      SCOPED_TRACE(cat("g ", family.name, ", T ", T));
      expect_near_definition(op, {.lengths = {T}}, 1, kTolerance);
    }
    expect_near_definition(op, {.lengths = {70, 0, 9}, .H = 2, .Hv = 2, .K = 48, .V = 20}, 2, kTolerance);
    expect_near_definition(op, {.lengths = {30, 80}, .K = 5, .V = 17, .initial_state = false}, 3, kTolerance);
    expect_near_definition(op, {.lengths = {66}, .dtype = DType::bf16}, 4, kTolerance);
  }
}

// Two channels by hand; b reads the state before the decay of its own token.
TEST(Dplr, IsWhatTheEquationSays) {
  float q[] = {1, 10}, k[] = {2, 3}, a[] = {0.5f, -1}, b[] = {1, 2}, v[] = {7}, g[] = {std::log(0.5f), 0.f};
  float out[] = {NAN}, state[] = {4, 6};
  int32_t cu[] = {0, 1}, slot[] = {0};
  const auto row = [](float* data) { return Tensor(data, DType::f32, {1, 1, 2}); };
  Ctx ctx;
  dplr_prefill(ctx, {.q = row(q),
                     .k = row(k),
                     .a = row(a),
                     .b = row(b),
                     .v = Tensor(v, DType::f32, {1, 1, 1}),
                     .g = row(g),
                     .cu_seqlens = Tensor(cu, DType::i32, {2}),
                     .out = Tensor(out, DType::f32, {1, 1, 1}),
                     .state = Tensor(state, DType::f32, {1, 1, 2, 1}),
                     .slot = Tensor(slot, DType::i32, {1}),
                     .scale = 1});
  const float read = 4 + 2 * 6;
  EXPECT_FLOAT_EQ(state[0], 4 * 0.5f - 0.5f * read + 2 * 7);
  EXPECT_FLOAT_EQ(state[1], 6 + read + 3 * 7);
  EXPECT_FLOAT_EQ(out[0], state[0] + 10 * state[1]);
}

TEST(Dplr, PackedEqualsAlone) { expect_packed_equals_alone(mild(), {.H = 2, .Hv = 2}); }
TEST(Dplr, CanBeCutAnywhere) { expect_cut_anywhere(mild(), {.H = 2, .Hv = 2}); }
TEST(Dplr, TheFutureDoesNotTouchThePast) { expect_causal(mild(), {.H = 2, .Hv = 2}); }
TEST(Dplr, ThreadsDoNotMatter) { expect_threads_do_not_matter(mild(), {.H = 2, .Hv = 2}); }

TEST(Dplr, SaysWhatIsWrong) {
  const RecurrenceCase c{.lengths = {4, 2}, .H = 2, .Hv = 2, .K = 8, .V = 8};
  EXPECT_EQ(error_of_call(mild(), c, [](RecurrenceCall&) {}), "");
  EXPECT_EQ(
      error_of_call(mild(), {.lengths = {4, 2}, .H = 1, .Hv = 2, .K = 8, .V = 8}, [](RecurrenceCall&) {}),
      "dplr v: expected the 1 heads of q, found 2");
  EXPECT_EQ(error_of_call(mild(), c, [](RecurrenceCall& x) { x.extras[0] = x.extras[0].slice(0, 0, 5); }),
            "dplr a: expected shape [6, 2, 8], found [5, 2, 8]");
  EXPECT_EQ(error_of_call(mild(), c, [](RecurrenceCall& x) { x.extras[1] = x.extras[1].slice(2, 0, 7); }),
            "dplr b: expected shape [6, 2, 8], found [6, 2, 7]");
  EXPECT_EQ(error_of_call(mild(), c, [](RecurrenceCall& x) { x.extras[2].dtype = DType::f16; }),
            "dplr g: expected F32 or BF16 or F64, found F16");
#ifndef KL_CUDA
  EXPECT_EQ(error_of_call(mild(), c,
                          [](RecurrenceCall& x) {
                            for (Tensor* t : {&x.q, &x.k, &x.v, &x.out, &x.state, &x.cu_seqlens, &x.slot,
                                              &x.extras[0], &x.extras[1], &x.extras[2]})
                              t->device = Device::cuda;
                          }),
            "dplr: the tensors are on a GPU, but this build has no CUDA kernels (configure with KL_CUDA=ON)");
#endif
}

}  // namespace
}  // namespace kl
