// Linear attention without decay, with a decay per head and with one per channel.
#include "ops/linear_attention/linear_attention.h"

#include "recurrence/recurrence_cases.h"

namespace kl {
namespace {

using namespace testing;

// f32 against f64. Sequences stay below 1.5e-6; the worst case (3.4e-6) is a single token under a full gate,
// whose query happens to be nearly orthogonal to its key.
constexpr double kTolerance = 5e-6;

LinearAttentionArgs args_of(const RecurrenceCall& c) {
  LinearAttentionArgs args{.q = c.q, .k = c.k, .v = c.v};
  if (!c.extras.empty()) args.g = c.extras[0];
  args.cu_seqlens = c.cu_seqlens, args.out = c.out;
  args.state = c.state, args.slot = c.slot, args.slot_out = c.slot_out;
  return args;
}

enum class Decay { none, per_head, per_channel };

RecurrenceOp op_with(Decay decay, const GateFamily& family) {
  RecurrenceOp op;
  if (decay != Decay::none) op.extras = {{decay == Decay::per_channel, family.log_decay}};
  op.prefill = [](Ctx& ctx, const RecurrenceCall& c) { linear_attention_prefill(ctx, args_of(c)); };
  op.decode = [](Ctx& ctx, const RecurrenceCall& c) { linear_attention_decode(ctx, args_of(c)); };
  op.definition = [](const RecurrenceCall& c) {
    linear_attention_recurrent_ref(args_of(c), recurrence::Precision::f64);
  };
  return op;
}
RecurrenceOp mild(Decay decay) {
  return op_with(decay, {"mild", [](Random& r, int64_t) { return r.uniform(-0.2, 0); }});
}
constexpr Decay kDecays[] = {Decay::none, Decay::per_head, Decay::per_channel};

TEST(LinearAttention, IsNearItsDefinition) {
  for (const Decay decay : kDecays)
    for (const GateFamily& family : gate_families()) {
      if (decay == Decay::none && family.name != "0") continue;
      const RecurrenceOp op = op_with(decay, family);
      for (const int64_t T : interesting_lengths()) {
        SCOPED_TRACE(cat("decay ", static_cast<int>(decay), ", g ", family.name, ", T ", T));
        expect_near_definition(op, {.lengths = {T}}, 1, kTolerance);
      }
      expect_near_definition(op, {.lengths = {70, 0, 9}, .H = 2, .Hv = 4, .K = 48, .V = 20}, 2, kTolerance);
      expect_near_definition(op, {.lengths = {30, 80}, .K = 5, .V = 17, .initial_state = false}, 3,
                             kTolerance);
      expect_near_definition(op, {.lengths = {66}, .dtype = DType::bf16}, 4, kTolerance);
    }
}

// Two tokens by hand: a decay of 1/2, keys and queries of one channel.
TEST(LinearAttention, IsWhatTheEquationSays) {
  float q[] = {1, 3}, k[] = {2, 5}, v[] = {7, 11}, g[] = {0.f, std::log(0.5f)}, out[2] = {NAN, NAN},
        state[] = {4};
  int32_t cu[] = {0, 2}, slot[] = {0};
  const auto rows = [](float* data) { return Tensor(data, DType::f32, {2, 1, 1}); };
  Ctx ctx;
  linear_attention_prefill(ctx, {.q = rows(q),
                                 .k = rows(k),
                                 .v = rows(v),
                                 .g = rows(g),
                                 .cu_seqlens = Tensor(cu, DType::i32, {2}),
                                 .out = rows(out),
                                 .state = Tensor(state, DType::f32, {1, 1, 1, 1}),
                                 .slot = Tensor(slot, DType::i32, {1}),
                                 .scale = 2});
  EXPECT_FLOAT_EQ(out[0], 2 * 1 * (4 + 14));
  EXPECT_FLOAT_EQ(out[1], 2 * 3 * (9 + 55));
  EXPECT_FLOAT_EQ(state[0], 64);
}

TEST(LinearAttention, PackedEqualsAlone) {
  for (const Decay decay : kDecays) expect_packed_equals_alone(mild(decay), {.H = 1, .Hv = 2});
}
TEST(LinearAttention, CanBeCutAnywhere) {
  for (const Decay decay : kDecays) expect_cut_anywhere(mild(decay), {.H = 2, .Hv = 2});
}
TEST(LinearAttention, TheFutureDoesNotTouchThePast) {
  for (const Decay decay : kDecays) expect_causal(mild(decay), {.H = 1, .Hv = 2});
}
TEST(LinearAttention, ThreadsDoNotMatter) {
  for (const Decay decay : kDecays) expect_threads_do_not_matter(mild(decay), {.H = 2, .Hv = 4});
}

TEST(LinearAttention, SaysWhatIsWrong) {
  const RecurrenceCase c{.lengths = {4, 2}, .H = 2, .Hv = 4, .K = 8, .V = 8};
  const RecurrenceOp op = mild(Decay::per_channel);
  EXPECT_EQ(error_of_call(op, c, [](RecurrenceCall&) {}), "");
  EXPECT_EQ(error_of_call(op, c, [](RecurrenceCall& x) { x.extras[0] = x.extras[0].slice(1, 0, 3); }),
            "linear_attention g: expected shape [6, 4, 8], found [6, 3, 8]");
  EXPECT_EQ(error_of_call(op, c, [](RecurrenceCall& x) { x.extras[0] = x.q.slice(0, 0, 5)[0]; }),
            "linear_attention g: expected shape [6, 4], found [2, 8]");
  EXPECT_EQ(error_of_call(op, c, [](RecurrenceCall& x) { x.v = x.v.slice(1, 0, 3); }),
            "linear_attention v: expected a multiple of the 2 query/key heads as value heads, found 3");
  EXPECT_EQ(error_of_call(op, c, [](RecurrenceCall& x) { x.q.device = Device::cuda; }),
            "linear_attention k: expected a tensor on the cuda like q, found one on the cpu");
#ifndef KL_CUDA
  EXPECT_EQ(error_of_call(
                op, c,
                [](RecurrenceCall& x) {
                  for (Tensor* t : {&x.q, &x.k, &x.v, &x.out, &x.state, &x.cu_seqlens, &x.slot, &x.extras[0]})
                    t->device = Device::cuda;
                }),
            "linear_attention: the tensors are on a GPU, but this build has no CUDA kernels (configure with "
            "KL_CUDA=ON)");
#endif
}

}  // namespace
}  // namespace kl
