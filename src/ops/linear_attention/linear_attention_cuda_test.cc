// The CUDA back-end of linear attention beside the f64 definition: without decay, with a decay per head, with
// one per channel. Without a GPU every test here is skipped.
#ifdef KL_CUDA
#include "ops/linear_attention/linear_attention.h"
#include "testing/recurrence_cuda.h"

namespace kl {
namespace {

using namespace testing;

// Products of bf16 halves leave 2^-16 of each term, and chunks add up; a bf16 output is rounded to nearest,
// which costs 1.7e-3.
constexpr double kF32 = 1e-4, kBf16 = 2e-3;

LinearAttentionArgs args_of(const RecurrenceCall& c) {
  LinearAttentionArgs args{.q = c.q, .k = c.k, .v = c.v};
  if (!c.extras.empty()) args.g = c.extras[0];
  args.cu_seqlens = c.cu_seqlens, args.out = c.out;
  args.state = c.state, args.slot = c.slot, args.slot_out = c.slot_out;
  return args;
}

enum class Decay { none, per_head, per_channel };
constexpr Decay kDecays[] = {Decay::none, Decay::per_head, Decay::per_channel};

RecurrenceOp op_with(Decay decay, const std::function<double(Random&, int64_t)>& gate) {
  RecurrenceOp op;
  if (decay != Decay::none) op.extras = {{decay == Decay::per_channel, gate}};
  op.prefill = [](Ctx& ctx, const RecurrenceCall& c) { linear_attention_prefill(ctx, args_of(c)); };
  op.decode = [](Ctx& ctx, const RecurrenceCall& c) { linear_attention_decode(ctx, args_of(c)); };
  op.definition = [](const RecurrenceCall& c) {
    linear_attention_recurrent_ref(args_of(c), recurrence::Precision::f64);
  };
  return op;
}
double mild(Random& r, int64_t) { return r.uniform(-0.2, 0); }
void expect_right(const RecurrenceOp& op, const RecurrenceCase& c, uint64_t seed) {
  for (const auto& f : {op.prefill, op.decode})
    expect_right_on_device(op, f, c, seed, c.dtype == DType::bf16 ? kBf16 : kF32, kF32);
}

TEST(LinearAttentionCuda, EveryGateFamily) {
  KL_NEEDS_GPU();
  for (const Decay decay : kDecays)
    for (const GateFamily& family : gate_families())
      for (const DType dtype : {DType::f32, DType::bf16}) {
        if (decay == Decay::none && family.name != "0") continue;
        SCOPED_TRACE(cat("decay ", static_cast<int>(decay), ", g ", family.name, ", ", name_of(dtype)));
        expect_right(op_with(decay, family.log_decay),
                     {.lengths = {70, 16, 1, 33}, .H = 2, .Hv = 2, .K = 128, .V = 128, .dtype = dtype}, 1);
      }
}

TEST(LinearAttentionCuda, EveryLength) {
  KL_NEEDS_GPU();
  const RecurrenceOp op = op_with(Decay::per_channel, mild);
  for (const int64_t T : {0, 1, 15, 16, 17, 63, 64, 65, 300})
    for (const bool initial_state : {false, true}) {
      SCOPED_TRACE(cat("T ", T, ", state ", initial_state));
      expect_right(op, {.lengths = {T}, .K = 64, .V = 40, .initial_state = initial_state}, 2);
    }
  expect_right(op, {.lengths = {0, 5, 0, 0, 40, 0}, .H = 1, .Hv = 3}, 3);
}

TEST(LinearAttentionCuda, EveryWidth) {
  KL_NEEDS_GPU();
  const int64_t widths[][2] = {{64, 64}, {256, 256}, {128, 256}, {256, 64}, {100, 100},
                               {1, 1},   {7, 250},   {250, 7},   {192, 130}};
  for (const Decay decay : kDecays)
    for (const auto& [K, V] : widths) {
      SCOPED_TRACE(cat("decay ", static_cast<int>(decay), ", ", K, " x ", V));
      expect_right(op_with(decay, mild), {.lengths = {37, 16}, .H = 2, .Hv = 6, .K = K, .V = V}, 4);
    }
}

TEST(LinearAttentionCuda, PackedEqualsAlone) {
  KL_NEEDS_GPU();
  for (const Decay decay : kDecays) {
    const RecurrenceOp op = op_with(decay, mild);
    expect_packed_equals_alone_on_device(op, op.prefill, {.H = 1, .Hv = 2, .dtype = DType::bf16});
  }
}

}  // namespace
}  // namespace kl
#endif  // KL_CUDA
