// short_conv: the definition against sums in f64, every CPU path against the definition, states, cuts, and
// what the door refuses.
#include "ops/conv/conv.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "testing/compare.h"
#include "testing/isa.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::for_each_isa;
using testing::Random;
using testing::random_normal;

constexpr DType kTypes[] = {DType::f32, DType::bf16};

// f32: exp within 2 ulp and the roundings of four products. bf16: rounding to 8 bits; two results that
// straddle a boundary differ by 2^-8 relative, rarely.
double tolerance(DType out) { return out == DType::bf16 ? 5e-4 : 1e-6; }

OwnedTensor ints(const std::vector<int32_t>& values) {
  OwnedTensor t = make_tensor(DType::i32, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), t.tensor.ptr<int32_t>());
  return t;
}
OwnedTensor clone(const OwnedTensor& from) {
  OwnedTensor t;
  t.buffer = Buffer::host(static_cast<size_t>(from.tensor.bytes()));
  t.tensor = from.tensor;
  t.tensor.data = t.buffer.data();
  std::memcpy(t.tensor.data, from.tensor.data, static_cast<size_t>(from.tensor.bytes()));
  return t;
}

// A batch of sequences of the given lengths, random in everything; fresh slots hold garbage as well.
struct Problem {
  OwnedTensor x, weight, cu_seqlens, state, slot, out;
  Problem(const std::vector<int32_t>& lengths, const std::vector<int32_t>& slots, int64_t n_slots, int64_t C,
          int64_t W, DType in = DType::f32, DType type = DType::f32, uint64_t seed = 1) {
    std::vector<int32_t> cu = {0};
    for (const int32_t n : lengths) cu.push_back(cu.back() + n);
    Random random(seed);
    x = random_normal(in, {cu.back(), C}, random);
    weight = random_normal(DType::f32, {C, W}, random);
    state = random_normal(DType::f32, {n_slots, C, W - 1}, random);
    cu_seqlens = ints(cu);
    slot = ints(slots);
    out = make_tensor(type, {cu.back(), C});
    testing::fill_nan(out.tensor);
  }
  ShortConvArgs args() const {
    return {.x = x.tensor,
            .weight = weight.tensor,
            .cu_seqlens = cu_seqlens.tensor,
            .state = state.tensor,
            .slot = slot.tensor,
            .out = out.tensor};
  }
};

// The equation of conv.h in f64, for one channel of one sequence: past and inputs in one list.
double output(const std::vector<double>& inputs, size_t t, const float* w, int64_t W) {
  double sum = 0;
  for (int64_t j = 0; j < W; ++j)
    sum += w[j] * inputs[t + static_cast<size_t>(j)];  // the past shifts by W - 1
  return sum / (1 + std::exp(-sum));
}

TEST(ShortConv, DefinitionInF64) {
  for (const int64_t W : {2, 3, 4}) {
    const std::vector<int32_t> lengths = {1, 0, 2, 3, 9}, slots = {4, 3, -1, 0, 2};
    const Problem p(lengths, slots, 5, 6, W);
    const OwnedTensor before = clone(p.state);
    short_conv_ref(p.args());
    for (size_t n = 0; n < lengths.size(); ++n)
      for (int64_t c = 0; c < 6; ++c) {
        const int32_t begin = p.cu_seqlens.tensor.ptr<int32_t>()[n];
        std::vector<double> inputs;
        for (int64_t i = 0; i < W - 1; ++i)
          inputs.push_back(slots[n] < 0 ? 0 : *before.tensor.at<float>(slots[n], c, i));
        for (int32_t t = 0; t < lengths[n]; ++t) inputs.push_back(*p.x.tensor.at<float>(begin + t, c));
        for (int32_t t = 0; t < lengths[n]; ++t) {
          const double expected = output(inputs, static_cast<size_t>(t), p.weight.tensor.at<float>(c), W);
          // four products of order 1 in f32
          ASSERT_NEAR(*p.out.tensor.at<float>(begin + t, c), expected, 1e-6)
              << "sequence " << n << ", row " << t;
        }
        if (slots[n] < 0) continue;
        for (int64_t i = 0; i < W - 1; ++i)  // the last W - 1 of everything seen, the old past included
          ASSERT_EQ(*p.state.tensor.at<float>(slots[n], c, i),
                    inputs[inputs.size() - static_cast<size_t>(W - 1 - i)]);
      }
  }
}

TEST(ShortConv, EveryShapeAndType) {
  ThreadPool pool(3);
  Ctx ctx;
  ctx.pool = &pool;
  const std::vector<std::vector<int32_t>> batches = {{}, {0}, {1}, {1, 1, 1}, {40}, {0, 3, 0, 17, 2, 0}};
  for_each_isa([&] {
    for (const auto& lengths : batches)
      for (const int64_t C : {1, 15, 16, 100, 600})
        for (const int64_t W : {2, 3, 4})
          for (const DType in : kTypes)
            for (const DType type : kTypes) {
              SCOPED_TRACE(cat(lengths.size(), " sequences, ", C, " channels, ", W, " taps, ", name_of(in),
                               " to ", name_of(type)));
              std::vector<int32_t> slots;  // every other slot, the second sequence none
              for (size_t n = 0; n < lengths.size(); ++n)
                slots.push_back(n == 1 ? -1 : static_cast<int32_t>(2 * n));
              Problem a(lengths, slots, 12, C, W, in, type);
              const Problem b(lengths, slots, 12, C, W, in, type);
              short_conv(ctx, a.args());
              short_conv_ref(b.args());
              EXPECT_LE(testing::rel_rms(a.out.tensor, b.out.tensor), tolerance(type));
              EXPECT_TRUE(
                  testing::same_bits(a.state.tensor, b.state.tensor));  // states hold inputs, unrounded
            }
  });
}

TEST(ShortConv, StridedRowsAndUntouchedSlots) {
  constexpr int64_t C = 21, W = 4, T = 12;
  Ctx ctx;
  for_each_isa([&] {
    Problem p({5, 7}, {3, 1}, 5, C, W);
    const OwnedTensor before = clone(p.state);
    Random random(9);
    const OwnedTensor wide_x = random_normal(DType::f32, {T, 3 * C}, random),
                      wide_out = make_tensor(DType::f32, {T, C + 8});
    testing::fill_nan(wide_out.tensor);
    ShortConvArgs strided = p.args();
    strided.x = wide_x.tensor.slice(1, C, 2 * C);
    strided.out = wide_out.tensor.slice(1, 4, 4 + C);
    short_conv(ctx, strided);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < C + 8; ++c)
        ASSERT_EQ(std::isnan(*wide_out.tensor.at<float>(t, c)), c < 4 || c >= 4 + C) << t << ", " << c;
    for (const int64_t slot : {0, 2, 4})
      EXPECT_TRUE(testing::same_bits(p.state.tensor[slot], before.tensor[slot])) << "slot " << slot;

    Problem q({5, 7}, {3, 1}, 5, C, W);  // the same with rows in one piece
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < C; ++c) *q.x.tensor.at<float>(t, c) = *strided.x.at<float>(t, c);
    short_conv(ctx, q.args());
    EXPECT_EQ(testing::rel_rms(strided.out, q.out.tensor), 0);
    EXPECT_TRUE(testing::same_bits(p.state.tensor, q.state.tensor));
  });
}

TEST(ShortConv, EmptySequencesKeepTheirState) {
  Ctx ctx;
  Problem p({0, 0}, {1, 0}, 2, 50, 4);
  const OwnedTensor before = clone(p.state);
  short_conv(ctx, p.args());
  EXPECT_TRUE(testing::same_bits(p.state.tensor, before.tensor));
}

// The same rows in one piece and cut anywhere, also into pieces shorter than the window: same bits, same
// state.
RC_GTEST_PROP(ShortConv, CutsChangeNoBit, ()) {
  const int64_t W = *rc::gen::inRange(2, 5), C = *rc::gen::inRange(1, 70);
  const auto lengths = *rc::gen::container<std::vector<int32_t>>(rc::gen::inRange(0, 6));
  const int32_t T = std::accumulate(lengths.begin(), lengths.end(), 0);
  const DType type = *rc::gen::element(DType::f32, DType::bf16);
  const uint64_t seed = *rc::gen::arbitrary<uint64_t>();
  const Isa isa = *rc::gen::element(Isa::generic, Isa::avx2, Isa::avx512);
  RC_PRE(isa_supported(isa));
  force_isa(isa);
  ThreadPool pool(2);
  Ctx alone, threads;
  threads.pool = &pool;

  Problem whole({T}, {0}, 1, C, W, type, type, seed);
  short_conv(alone, whole.args());
  Problem cut({T}, {0}, 1, C, W, type, type, seed);
  int32_t begin = 0;
  for (const int32_t n : lengths) {
    const OwnedTensor cu = ints({0, n});
    ShortConvArgs piece = cut.args();
    piece.x = cut.x.tensor.slice(0, begin, begin + n);
    piece.out = cut.out.tensor.slice(0, begin, begin + n);
    piece.cu_seqlens = cu.tensor;
    short_conv(threads, piece);
    begin += n;
  }
  force_isa(best_isa());
  RC_ASSERT(testing::same_bits(whole.out.tensor, cut.out.tensor));
  RC_ASSERT(testing::same_bits(whole.state.tensor, cut.state.tensor));
}

// A sequence has the same bits alone and in a batch.
TEST(ShortConv, CompanyChangesNoBit) {
  Ctx ctx;
  for_each_isa([&] {
    Problem batch({3, 1, 0, 8}, {2, 0, 1, -1}, 3, 40, 4);
    const OwnedTensor state = clone(batch.state);
    short_conv(ctx, batch.args());
    for (int64_t n = 0; n < 4; ++n) {
      const int32_t* cu = batch.cu_seqlens.tensor.ptr<int32_t>() + n;
      const OwnedTensor own_cu = ints({0, cu[1] - cu[0]}), own_state = clone(OwnedTensor{{}, state.tensor});
      const OwnedTensor out = make_tensor(DType::f32, {cu[1] - cu[0], 40});
      ShortConvArgs one = batch.args();
      one.x = batch.x.tensor.slice(0, cu[0], cu[1]);
      one.cu_seqlens = own_cu.tensor;
      one.slot = batch.slot.tensor.slice(0, n, n + 1);
      one.state = own_state.tensor;
      one.out = out.tensor;
      short_conv(ctx, one);
      EXPECT_TRUE(testing::same_bits(out.tensor, batch.out.tensor.slice(0, cu[0], cu[1])))
          << "sequence " << n;
    }
  });
}

TEST(ShortConv, OverflowToMinusInfinityIsZero) {
  Ctx ctx;
  for_each_isa([&] {
    for (const DType type : kTypes) {
      Problem p({1}, {-1}, 0, 20, 2, DType::f32, type);
      testing::fill(p.x.tensor, [](int64_t) { return -3e38; });
      testing::fill(p.weight.tensor, [](int64_t) { return 100; });
      short_conv(ctx, p.args());
      for (const double y : testing::to_doubles(p.out.tensor)) ASSERT_EQ(y, 0);
    }
  });
}

TEST(ShortConv, DoorSaysWhatItFound) {
  Ctx ctx;
  const Problem p({2, 3}, {1, 0}, 2, 8, 4);
  const auto run = [&](auto&& change) -> std::string {
    ShortConvArgs a = p.args();
    change(a);
    try {
      short_conv(ctx, a);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const OwnedTensor descending = ints({0, 6, 5}), late = ints({1, 2, 5}), slots = ints({2, 0}),
                    memory = make_tensor(DType::f32, {2, 8, 8});
  const auto other = [&](std::initializer_list<int64_t> dims, DType type = DType::f32) {
    return Tensor(memory.tensor.data, type, dims);
  };
  EXPECT_EQ(run([](ShortConvArgs&) {}), "no error");
  EXPECT_EQ(run([&](ShortConvArgs& a) {
              a.weight = other({8, 5});
            }),
            "short_conv: weight: expected a width of 2 to 4, found 5");
  EXPECT_EQ(run([&](ShortConvArgs& a) {
              a.weight = other({7, 4});
            }),
            "short_conv: weight: expected shape [8, any], found [7, 4]");
  EXPECT_EQ(run([&](ShortConvArgs& a) {
              a.state = other({2, 8, 4});
            }),
            "short_conv: state: expected shape [any, 8, 3], found [2, 8, 4]");
  EXPECT_EQ(run([&](ShortConvArgs& a) {
              a.state = other({2, 8, 4}).slice(2, 0, 3);
            }),
            "short_conv: state: expected channels in one piece, a stride of 3, found 4");
  EXPECT_EQ(run([&](ShortConvArgs& a) {
              a.state = other({2, 8, 3}, DType::bf16);
            }),
            "short_conv: state: expected F32, found BF16");
  EXPECT_EQ(run([&](ShortConvArgs& a) { a.cu_seqlens = descending.tensor; }),
            "short_conv: cu_seqlens: expected ascending numbers, found 6 before 5");
  EXPECT_EQ(run([&](ShortConvArgs& a) { a.cu_seqlens = late.tensor; }),
            "short_conv: cu_seqlens: expected to run from 0 to 5, found 1 to 5");
  EXPECT_EQ(run([&](ShortConvArgs& a) { a.slot = slots.tensor; }),
            "short_conv: slot[0]: expected less than 2, found 2");
  EXPECT_EQ(run([&](ShortConvArgs& a) { a.slot = a.slot.slice(0, 0, 1); }),
            "short_conv: slot: expected shape [2], found [1]");
  EXPECT_EQ(run([&](ShortConvArgs& a) { a.out = a.x; }),
            "short_conv: out: expected other memory than that of x");
  EXPECT_EQ(run([&](ShortConvArgs& a) {
              a.out = other({5, 8}, DType::i32);
            }),
            "short_conv: out: expected F32 or BF16, found I32");
}

}  // namespace
}  // namespace kl
