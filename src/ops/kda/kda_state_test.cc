// Where states come from and go to: slots, checkpoints, packed sequences, split sequences, threads. Mostly
// properties over random problems.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "ops/kda/kda_problem.h"

namespace kl {
namespace {

using testing::decode;
using testing::kda_rows;
using testing::KdaCase;
using testing::KdaIndices;
using testing::KdaProblem;
using testing::KdaResult;
using testing::prefill;
using testing::Random;
using testing::recurrence_f64;
using testing::rel_rms;
using testing::same_bits;

using Kda = void (*)(const KdaArgs&);

int64_t draw(int64_t low, int64_t high) { return *rc::gen::inRange<int64_t>(low, high + 1); }

// A random case with the given lengths. Its gate mixes memories of a few tokens with such of thousands.
KdaCase any_case(std::vector<int64_t> lengths) {
  KdaCase c{.lengths = std::move(lengths)};
  c.H = draw(1, 2), c.Hv = c.H * draw(1, 2), c.K = draw(1, 24), c.V = draw(1, 24);
  c.initial_state = *rc::gen::arbitrary<bool>();
  c.state_v_first = *rc::gen::arbitrary<bool>();
  c.fused_rows = *rc::gen::arbitrary<bool>();
  c.dtype = *rc::gen::element(DType::f32, DType::bf16);
  c.gate = *rc::gen::element(KdaGateKind::softplus, KdaGateKind::bounded);
  c.g = [](Random& r, int64_t, int64_t i) { return 2 * r.normal() - static_cast<double>(i % 3) * 4; };
  c.beta_kind = *rc::gen::element(KdaBeta::sigmoid, KdaBeta::sigmoid2);
  return c;
}
uint64_t any_seed() { return static_cast<uint64_t>(draw(1, 1000000)); }
std::vector<int64_t> any_lengths() {
  std::vector<int64_t> lengths(static_cast<size_t>(draw(1, 5)));
  for (int64_t& length : lengths) length = draw(0, 1) ? draw(0, 100) : draw(0, 3) * 16;
  return lengths;
}
constexpr Kda kAll[] = {prefill, decode, recurrence_f64};
Kda any_kda() { return kAll[draw(0, 2)]; }  // drawn by number: rapidcheck cannot print a function

// The first call on rows [0, split) takes a sequence's state from its slot and leaves it there for the
// second.
KdaResult run_split(const KdaProblem& problem, int64_t split, Kda first, Kda second) {
  const int64_t T = problem.args.q.size(0);
  KdaIndices slot{{problem.slot_of(0)}},
      cu[] = {{{0, static_cast<int32_t>(split)}}, {{0, static_cast<int32_t>(T - split)}}};
  return problem.run([&](const KdaArgs& args) {
    KdaArgs head = kda_rows(args, 0, split), tail = kda_rows(args, split, T);
    head.cu_seqlens = cu[0].tensor(), tail.cu_seqlens = cu[1].tensor();
    tail.slot = slot.tensor(), tail.slot_out = {};
    first(head);
    second(tail);
  });
}

// 1e-5: both sides are within 5e-6 of the definition.
RC_GTEST_PROP(KdaState, SplitPrefillIsWholePrefill, ()) {
  const int64_t T = draw(1, 150), split = draw(0, 1) ? draw(0, T) : draw(0, T / 16) * 16;
  const KdaProblem problem(any_case({T}), any_seed());
  RC_ASSERT(problem.error(run_split(problem, split, prefill, prefill), problem.run(prefill)) <= 1e-5);
}

RC_GTEST_PROP(KdaState, PrefillThenDecodeIsPrefill, ()) {
  const int64_t T = draw(1, 100), split = draw(0, T);
  const KdaProblem problem(any_case({T}), any_seed());
  RC_ASSERT(problem.error(run_split(problem, split, prefill, decode), problem.run(prefill)) <= 1e-5);
}

// Chunks start at the same tokens on both sides, and the state that is handed over is an f32 already.
RC_GTEST_PROP(KdaState, SplitAtChunksHasTheSameBits, ()) {
  const int64_t T = draw(1, 200), split = draw(0, T / 64) * 64;
  KdaCase c = any_case({T});
  c.beta_kind = KdaBeta::sigmoid;
  const KdaProblem problem(c, any_seed());
  const KdaResult whole = problem.run(prefill), parts = run_split(problem, split, prefill, prefill);
  RC_ASSERT(same_bits(whole.out.tensor, parts.out.tensor));
  RC_ASSERT(same_bits(whole.state.tensor, parts.state.tensor));
}

RC_GTEST_PROP(KdaState, DecodeTokenByTokenHasTheSameBits, ()) {
  const int64_t T = draw(1, 40), split = draw(0, T);
  const KdaProblem problem(any_case({T}), any_seed());
  const KdaResult whole = problem.run(decode), parts = run_split(problem, split, decode, decode);
  RC_ASSERT(same_bits(whole.out.tensor, parts.out.tensor));
  RC_ASSERT(same_bits(whole.state.tensor, parts.state.tensor));
}

RC_GTEST_PROP(KdaState, PackedSequencesHaveTheBitsOfEachAlone, ()) {
  const KdaProblem problem(any_case(any_lengths()), any_seed());
  const Kda kda = any_kda();
  const KdaResult packed = problem.run(kda);
  const KdaResult alone = problem.run([&](const KdaArgs& args) {
    const int32_t* cu = args.cu_seqlens.ptr<int32_t>();
    for (int64_t n = 0; n + 1 < args.cu_seqlens.size(0); ++n) {
      KdaIndices one{{0, cu[n + 1] - cu[n]}};
      KdaArgs a = kda_rows(args, cu[n], cu[n + 1]);
      a.cu_seqlens = one.tensor(), a.slot = args.slot.slice(0, n, n + 1);
      if (args.slot_out) a.slot_out = args.slot_out.slice(0, n, n + 1);
      kda(a);
    }
  });
  RC_ASSERT(same_bits(packed.out.tensor, alone.out.tensor));
  RC_ASSERT(same_bits(packed.state.tensor, alone.state.tensor));
  RC_ASSERT(problem.others_untouched(packed));
}

RC_GTEST_PROP(KdaState, ThreadsDoNotChangeBits, ()) {
  const KdaProblem problem(any_case(any_lengths()), any_seed());
  const bool decodes = *rc::gen::arbitrary<bool>();
  const auto on = [&](int threads) {
    return problem.run([&](const KdaArgs& args) {
      ThreadPool pool(threads);
      Ctx ctx{.pool = &pool};
      decodes ? kda_decode(ctx, args) : kda_prefill(ctx, args);
    });
  };
  const KdaResult one = on(1), three = on(3);
  RC_ASSERT(same_bits(one.out.tensor, three.out.tensor));
  RC_ASSERT(same_bits(one.state.tensor, three.state.tensor));
}

// The state at a checkpoint is the final state of the sequence cut off there, to the bit.
RC_GTEST_PROP(KdaState, CheckpointsAreFinalStatesOfPrefixes, ()) {
  std::vector<int64_t> lengths = any_lengths();
  lengths[0] += 16;
  const KdaProblem problem(any_case(lengths), any_seed());
  const Kda kda = any_kda();
  const int32_t* cu = problem.args.cu_seqlens.ptr<int32_t>();
  const int64_t N = problem.args.cu_seqlens.size(0) - 1;

  // Each sequence is asked for some of its checkpoints; every third is a skipped one.
  KdaIndices rows, slots;
  std::vector<int64_t> owners;
  const auto extra = static_cast<int32_t>(problem.pool().size(0));
  for (int64_t n = 0; n < N; ++n)
    for (int32_t row = cu[n] + 16; row <= cu[n + 1]; row += 16) {
      if (draw(0, 1)) continue;
      rows.values.push_back(row), owners.push_back(n);
      const auto m = static_cast<int32_t>(slots.values.size());
      slots.values.push_back(m % 3 == 2 ? -1 : extra + m);
    }
  const auto M = static_cast<int64_t>(rows.values.size());

  // A pool with room for them after the slots of the sequences.
  const Tensor& pool = problem.pool();
  const OwnedTensor larger = make_tensor(DType::f32, {extra + M, pool.size(1), pool.size(2), pool.size(3)});
  testing::fill_nan(larger.tensor);
  std::memcpy(larger.tensor.data, pool.data, static_cast<size_t>(pool.bytes()));
  const KdaResult plain = problem.run(kda);
  const KdaResult found = problem.run([&](KdaArgs args) {
    args.state = larger.tensor, args.checkpoint_row = rows.tensor(), args.checkpoint_slot = slots.tensor();
    kda(args);
  });
  RC_ASSERT(same_bits(found.out.tensor, plain.out.tensor));
  RC_ASSERT(same_bits(larger.tensor.slice(0, 0, extra), plain.state.tensor));

  for (int64_t m = 0; m < M; ++m) {
    const auto i = static_cast<size_t>(m);
    const int64_t n = owners[i], begin = cu[n], row = rows.values[i];
    const KdaResult prefix = problem.run([&](const KdaArgs& args) {
      KdaIndices one{{0, static_cast<int32_t>(row - begin)}};
      KdaArgs a = kda_rows(args, begin, row);
      a.cu_seqlens = one.tensor(), a.slot = args.slot.slice(0, n, n + 1);
      if (args.slot_out) a.slot_out = args.slot_out.slice(0, n, n + 1);
      kda(a);
    });
    const Tensor state = larger.tensor[extra + m];
    if (slots.values[i] < 0) {
      RC_ASSERT(std::isnan(*state.at<float>(0, 0, 0)));
    } else {
      RC_ASSERT(same_bits(state, prefix.state.tensor[problem.slot_of(n)]));
    }
  }
}

TEST(KdaState, NegativeSlotLeavesThePoolUntouched) {
  const KdaProblem problem({.lengths = {5, 70}, .K = 8, .V = 8}, 1);
  KdaIndices none{{-1, -1}};
  for (const Kda kda : kAll) {
    const KdaResult found = problem.run([&](KdaArgs args) {
      args.slot = none.tensor();
      kda(args);
    });
    EXPECT_TRUE(same_bits(found.state.tensor, problem.pool()));
    EXPECT_TRUE(problem.finite(found));
  }
}

TEST(KdaState, WithoutAPoolNothingIsKept) {
  const KdaProblem problem({.lengths = {5, 70}, .K = 8, .V = 8}, 1);
  KdaIndices none{{-1, -1}};
  for (const Kda kda : kAll) {
    const auto without = [&](bool pool) {
      return problem.run([&](KdaArgs args) {
        args.slot = none.tensor();
        if (!pool) args.state = {};
        kda(args);
      });
    };
    EXPECT_TRUE(same_bits(without(false).out.tensor, without(true).out.tensor));
  }
}

// slot is only read where slot_out is there; two sequences may start from one state.
TEST(KdaState, SlotOutKeepsTheInitialState) {
  const KdaProblem problem({.lengths = {70, 0, 0, 33}, .K = 8, .V = 8}, 2);
  const int32_t shared = problem.slot_of(0), out = problem.slot_of(3), copied = problem.slot_of(1),
                zeroed = problem.slot_of(2);
  KdaIndices slot{{shared, shared, -1, shared}}, slot_out{{-1, copied, zeroed, out}},
      in_place{{-1, -1, -1, shared}};
  for (const Kda kda : kAll) {
    const KdaResult found = problem.run([&](KdaArgs args) {
      args.slot = slot.tensor(), args.slot_out = slot_out.tensor();
      kda(args);
    });
    const KdaResult expected = problem.run([&](KdaArgs args) {
      args.slot = in_place.tensor();
      kda(args);
    });
    const Tensor& pool = found.state.tensor;
    EXPECT_TRUE(same_bits(pool[shared], problem.pool()[shared]));
    EXPECT_TRUE(same_bits(pool[copied], problem.pool()[shared]));  // no tokens: the state as it was
    EXPECT_TRUE(same_bits(pool[out], expected.state.tensor[shared]));
    for (const double x : testing::to_doubles(pool[zeroed])) ASSERT_EQ(x, 0);
    EXPECT_TRUE(same_bits(found.out.tensor.slice(0, 70, 103), expected.out.tensor.slice(0, 70, 103)));
    EXPECT_TRUE(problem.others_untouched(found));
  }
}

// A sequence without tokens keeps the bits of its state, NaN garbage included.
TEST(KdaState, EmptySequenceKeepsItsBits) {
  const KdaProblem problem({.lengths = {0, 3}, .K = 8, .V = 8}, 3);
  for (const Kda kda : kAll) {
    const KdaResult found = problem.run([&](const KdaArgs& args) {
      const uint32_t signalling = 0x7fa12345u;
      std::memcpy(args.state[problem.slot_of(0)].data, &signalling, sizeof signalling);
      kda(args);
    });
    uint32_t bits = 0;
    std::memcpy(&bits, found.state.tensor[problem.slot_of(0)].data, sizeof bits);
    EXPECT_EQ(bits, 0x7fa12345u);
  }
}

TEST(KdaState, NothingToDo) {
  const KdaProblem empty({.lengths = {}}, 4), no_tokens({.lengths = {0, 0}}, 4);
  for (const Kda kda : kAll) {
    EXPECT_TRUE(same_bits(empty.run(kda).state.tensor, empty.pool()));
    EXPECT_TRUE(same_bits(no_tokens.run(kda).state.tensor, no_tokens.pool()));
  }
}

TEST(KdaState, RunsAgainWithTheSameBits) {
  const KdaProblem problem({.lengths = {100, 30}, .Hv = 2}, 5);
  for (const Kda kda : {prefill, decode}) {
    const KdaResult a = problem.run(kda), b = problem.run(kda);
    EXPECT_TRUE(same_bits(a.out.tensor, b.out.tensor) && same_bits(a.state.tensor, b.state.tensor));
  }
}

TEST(KdaState, TraceCountsBytesAndFlops) {
  const KdaProblem problem({.lengths = {64, 64}, .Hv = 2, .K = 32, .V = 16}, 6);
  Trace trace;
  problem.run([&](const KdaArgs& args) {
    Ctx ctx{.trace = &trace};
    kda_prefill(ctx, args);
    kda_decode(ctx, args);
  });
  const double rows = 128. * (32 + 32 + 2 * 16 + 2 * 32 + 2 + 2 * 16) * 4, states = 2. * 2 * 2 * 32 * 16 * 4;
  ASSERT_EQ(trace.entries().size(), 2u);
  EXPECT_EQ(trace.entries().at("kda_prefill").bytes, rows + states);
  EXPECT_EQ(trace.entries().at("kda_decode").bytes, rows + states);
  EXPECT_EQ(trace.entries().at("kda_decode").flops, 128. * 2 * 7 * 32 * 16);
}

}  // namespace
}  // namespace kl
