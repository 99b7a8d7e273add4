// What the common checks say, and that index tensors of either width are read.
#include "recurrence/problem.h"

#include "recurrence/recurrence_cases.h"

namespace kl {
namespace {

using namespace testing;

// An operator that only checks.
RecurrenceOp checker() {
  RecurrenceOp op;
  op.prefill = [](Ctx&, const RecurrenceCall& c) {
    recurrence::check_problem({.op = "op",
                               .q = c.q,
                               .k = c.k,
                               .v = c.v,
                               .out = c.out,
                               .cu_seqlens = c.cu_seqlens,
                               .state = c.state,
                               .slot = c.slot,
                               .slot_out = c.slot_out});
  };
  return op;
}

std::string error_of(const RecurrenceCase& c, const std::function<void(RecurrenceCall&)>& spoil) {
  return error_of_call(checker(), c, spoil);
}
const RecurrenceCase kCase{.lengths = {4, 2}, .H = 2, .Hv = 4, .K = 8, .V = 8};

TEST(RecurrenceProblem, RowsAndStates) {
  EXPECT_EQ(error_of(kCase, [](RecurrenceCall&) {}), "");
  EXPECT_EQ(error_of(kCase, [](RecurrenceCall& c) { c.k = c.k.slice(2, 0, 7); }),
            "op k: expected shape [6, 2, 8], found [6, 2, 7]");
  EXPECT_EQ(error_of(kCase, [](RecurrenceCall& c) { c.q.dtype = DType::i32; }),
            "op q: expected F32 or BF16 or F64, found I32");
  EXPECT_EQ(error_of(kCase, [](RecurrenceCall& c) { c.v.stride[2] = 2; }),
            "op v: expected a last dimension of stride 1, found 2");
  EXPECT_EQ(error_of(kCase, [](RecurrenceCall& c) { c.k.data = nullptr; }),
            "op k: expected a tensor, found none");
  EXPECT_EQ(error_of(kCase, [](RecurrenceCall& c) { c.out.device = Device::cuda; }),
            "op out: expected a tensor on the cpu like q, found one on the cuda");
  EXPECT_EQ(error_of(kCase, [](RecurrenceCall& c) { c.state = c.state.slice(1, 0, 3); }),
            "op state: expected shape [any, 4, 8, 8], found [5, 3, 8, 8]");
  EXPECT_EQ(error_of({.K = 257}, [](RecurrenceCall&) {}),
            "op q: expected a key dimension of 1 to 256, found 257");
  EXPECT_EQ(error_of({.V = 300}, [](RecurrenceCall&) {}),
            "op v: expected a value dimension of 1 to 256, found 300");
}

TEST(RecurrenceProblem, Sequences) {
  int32_t cu[] = {0, 7, 6}, one[] = {1, 4, 6};
  int64_t wide[] = {0, 4, 6};
  const auto with = [&](auto* values, DType type) {
    return error_of(kCase, [&](RecurrenceCall& c) { c.cu_seqlens = Tensor(values, type, {3}); });
  };
  EXPECT_EQ(with(wide, DType::i64), "");
  EXPECT_EQ(with(cu, DType::i32), "op cu_seqlens[2]: expected at least 7 as before it, found 6");
  EXPECT_EQ(with(one, DType::i32), "op cu_seqlens[0]: expected 0, found 1");
  wide[2] = 5;
  EXPECT_EQ(with(wide, DType::i64), "op cu_seqlens[2]: expected the 6 rows of q, found 5");
}

TEST(RecurrenceProblem, Slots) {
  int32_t in[] = {0, 1}, out[] = {2, 2};
  const auto with = [&](bool redirected) {
    return error_of(kCase, [&](RecurrenceCall& c) {
      c.slot = Tensor(in, DType::i32, {2});
      if (redirected) c.slot_out = Tensor(out, DType::i32, {2});
    });
  };
  EXPECT_EQ(with(false), "");
  EXPECT_EQ(with(true),
            "op slot_out[1]: expected a slot of its own, found slot 2 that sequence 0 writes too");
  out[1] = 0;
  EXPECT_EQ(with(true),
            "op slot[0]: expected a slot that no other sequence writes, found slot 0 of sequence 1");
  in[1] = 5;
  EXPECT_EQ(with(false), "op slot[1]: expected a slot below 5, the number of states, found 5");
  in[1] = 0;
  EXPECT_EQ(with(false), "op slot[1]: expected a slot of its own, found slot 0 that sequence 0 writes too");
  in[0] = in[1] = -1;
  EXPECT_EQ(with(false), "");
}

}  // namespace
}  // namespace kl
