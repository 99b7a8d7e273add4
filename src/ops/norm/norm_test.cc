// The norms: the definition against sums written out here, every CPU path against the definition, and what
// the doors refuse.
#include "ops/norm/norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "testing/compare.h"
#include "testing/isa.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::for_each_isa;
using testing::random_normal;

constexpr DType kTypes[] = {DType::f32, DType::bf16};

// f32: half an ulp of the result and a few of the vectors' exp. bf16: rounding to 8 bits; two results that
// straddle a boundary differ by 2^-8 relative, rarely.
double tolerance(DType out) { return out == DType::bf16 ? 5e-4 : 5e-7; }

// [T, D] rows in the middle of wider ones, so that neighbours show what is written beside a row.
struct Rows {
  OwnedTensor wide;
  Tensor view;
  Rows(DType dtype, int64_t T, int64_t D) : wide(make_tensor(dtype, {T, D + 12})) {
    testing::fill_nan(wide.tensor);
    view = wide.tensor.slice(1, 3, 3 + D);
  }
  void expect_untouched_outside() const {
    const auto all = testing::to_doubles(wide.tensor);
    const size_t width = static_cast<size_t>(wide.tensor.size(1));
    for (size_t i = 0; i < all.size(); ++i) {
      const bool inside = i % width >= 3 && i % width < width - 9;
      ASSERT_TRUE(inside || std::isnan(all[i])) << "element " << i;
    }
  }
};
void copy(const Tensor& from, const Tensor& to) {
  const auto values = testing::to_doubles(from);
  size_t i = 0;
  dispatch_f32_bf16(to.dtype, [&]<class T>() {
    for (int64_t r = 0; r < to.size(0); ++r)
      for (int64_t c = 0; c < to.size(1); ++c)
        to.at<T>(r)[c] = static_cast<T>(static_cast<float>(values[i++]));
  });
}

TEST(RmsNorm, DefinitionByHand) {
  float x[] = {3, 4, 0, 0, 0, -2}, weight[] = {1, 2, 0.5f}, out[6];
  rms_norm_ref({.x = Tensor(x, DType::f32, {2, 3}),
                .weight = Tensor(weight, DType::f32, {3}),
                .out = Tensor(out, DType::f32, {2, 3}),
                .eps = 0.25f});
  const double first = std::sqrt(25 / 3. + 0.25), second = std::sqrt(4 / 3. + 0.25);
  const double expected[] = {3 / first, 8 / first, 0, 0, 0, -1 / second};
  for (int i = 0; i < 6; ++i) EXPECT_FLOAT_EQ(out[i], static_cast<float>(expected[i])) << i;
}

TEST(RmsNormGated, NormComesBeforeTheGate) {
  float x[] = {3, 4}, gate[] = {0, 1}, weight[] = {1, 2}, out[2];
  rms_norm_gated_ref({.x = Tensor(x, DType::f32, {1, 1, 2}),
                      .gate = Tensor(gate, DType::f32, {1, 1, 2}),
                      .weight = Tensor(weight, DType::f32, {2}),
                      .out = Tensor(out, DType::f32, {1, 1, 2}),
                      .eps = 0.5f});
  const double rms = std::sqrt(12.5 + 0.5);
  EXPECT_FLOAT_EQ(out[0], static_cast<float>(3 / rms / 2));
  EXPECT_FLOAT_EQ(out[1], static_cast<float>(8 / rms / (1 + std::exp(-1.))));
}

TEST(RmsNorm, EveryShapeAndType) {
  ThreadPool pool(3);
  Ctx ctx;
  ctx.pool = &pool;
  for_each_isa([&] {
    for (const int64_t T : {0, 1, 5, 40})
      for (const int64_t D : {1, 7, 16, 17, 128, 256, 2304})
        for (const DType in : kTypes)
          for (const DType type : kTypes) {
            SCOPED_TRACE(cat(T, " x ", D, ", ", name_of(in), " to ", name_of(type)));
            testing::Random random(static_cast<uint64_t>(T * 10000 + D));
            const Rows x(in, T, D), out(type, T, D);
            copy(random_normal(DType::f32, {T, D}, random, 3).tensor, x.view);
            const OwnedTensor weight = random_normal(DType::f32, {D}, random, 0.2, 1);
            const OwnedTensor expected = make_tensor(type, {T, D});
            rms_norm_ref({.x = x.view, .weight = weight.tensor, .out = expected.tensor});
            rms_norm(ctx, {.x = x.view, .weight = weight.tensor, .out = out.view});
            EXPECT_LE(testing::rel_rms(out.view, expected.tensor), tolerance(type));
            out.expect_untouched_outside();
            if (in != type) continue;
            rms_norm(ctx, {.x = x.view, .weight = weight.tensor, .out = x.view});
            EXPECT_LE(testing::rel_rms(x.view, out.view), 0) << "in place";
            x.expect_untouched_outside();
          }
  });
}

TEST(RmsNormGated, EveryShapeAndType) {
  ThreadPool pool(3);
  Ctx ctx;
  ctx.pool = &pool;
  const int64_t shapes[][3] = {{0, 4, 128}, {1, 32, 128}, {9, 3, 64}, {5, 2, 100},
                               {33, 1, 7},  {2, 4, 1},    {2, 0, 8}};
  for_each_isa([&] {
    for (const auto& [T, H, D] : shapes)
      for (const DType in : kTypes)
        for (const DType gate_type : kTypes)
          for (const DType type : kTypes) {
            SCOPED_TRACE(cat(T, " x ", H, " x ", D, ", ", name_of(in), ", ", name_of(gate_type), " to ",
                             name_of(type)));
            testing::Random random(static_cast<uint64_t>(T * 10000 + D));
            const OwnedTensor x = random_normal(in, {T, H, D}, random, 3);
            const OwnedTensor gates = random_normal(gate_type, {T, 2 * H, D}, random, 2);
            const Tensor gate = gates.tensor.slice(1, H, 2 * H);  // heads of a wider row
            const OwnedTensor weight = random_normal(DType::f32, {D}, random, 0.2, 1);
            const OwnedTensor expected = make_tensor(type, {T, H, D});
            const OwnedTensor heads = make_tensor(type, {T, H + 2, D});
            testing::fill_nan(heads.tensor);
            const Tensor out = heads.tensor.slice(1, 1, H + 1);
            rms_norm_gated_ref(
                {.x = x.tensor, .gate = gate, .weight = weight.tensor, .out = expected.tensor});
            rms_norm_gated(ctx, {.x = x.tensor, .gate = gate, .weight = weight.tensor, .out = out});
            EXPECT_LE(testing::rel_rms(out, expected.tensor), tolerance(type));
            for (const int64_t head : {int64_t{0}, H + 1})
              for (const double value : testing::to_doubles(heads.tensor.slice(1, head, head + 1)))
                ASSERT_TRUE(std::isnan(value)) << "a neighbouring head was written";
            if (in != type) continue;
            rms_norm_gated(ctx, {.x = x.tensor, .gate = gate, .weight = weight.tensor, .out = x.tensor});
            EXPECT_LE(testing::rel_rms(x.tensor, out), 0) << "in place";
          }
  });
}

// Squares of these leave the range of f32 on both sides; the result does not.
TEST(RmsNorm, MagnitudesFarFromOne) {
  Ctx ctx;
  for_each_isa([&] {
    for (const float magnitude : {1e-30f, 1e18f, 1e30f, 3e38f})
      for (const DType type : kTypes) {
        SCOPED_TRACE(cat(magnitude, " ", name_of(type)));
        constexpr int64_t D = 2304;
        const OwnedTensor x = make_tensor(type, {1, D}), out = make_tensor(type, {1, D});
        testing::fill(x.tensor, [&](int64_t i) { return i % 2 ? magnitude : -magnitude; });
        const OwnedTensor weight = make_tensor(DType::f32, {D});
        testing::fill(weight.tensor, [](int64_t) { return 1; });
        testing::fill_nan(out.tensor);
        rms_norm(ctx, {.x = x.tensor, .weight = weight.tensor, .out = out.tensor, .eps = 1e-5f});
        const double expected = magnitude > 1 ? 1 : magnitude / std::sqrt(1e-5);
        const auto values = testing::to_doubles(out.tensor);
        for (size_t i = 0; i < values.size(); ++i)
          ASSERT_NEAR(values[i] / (i % 2 ? expected : -expected), 1, type == DType::f32 ? 1e-6 : 1e-2);
      }
  });
}

TEST(RmsNormGated, ZerosAndExtremeGates) {
  Ctx ctx;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float gates[] = {-kInf, -200, -90, 0, 90, 200, kInf};
  for_each_isa([&] {
    for (const DType type : kTypes) {
      const OwnedTensor x = make_tensor(type, {1, 2, 7}), gate = make_tensor(type, {1, 2, 7}),
                        out = make_tensor(type, {1, 2, 7}), weight = make_tensor(DType::f32, {7});
      testing::fill(x.tensor, [](int64_t i) { return i < 7 ? 0 : 2; });  // a head of zeros, a head of twos
      testing::fill(gate.tensor, [&](int64_t i) { return gates[i % 7]; });
      testing::fill(weight.tensor, [](int64_t) { return 3; });
      testing::fill_nan(out.tensor);
      rms_norm_gated(ctx, {.x = x.tensor, .gate = gate.tensor, .weight = weight.tensor, .out = out.tensor});
      const double expected[] = {0, 0, 0, 1.5, 3, 3, 3};
      const auto values = testing::to_doubles(out.tensor);
      for (size_t i = 0; i < 14; ++i)
        EXPECT_NEAR(values[i], i < 7 ? 0 : expected[i - 7], type == DType::f32 ? 1e-5 : 1e-2) << i;
    }
  });
}

TEST(RmsNorm, ThreadsAndCompanyChangeNoBit) {
  testing::Random random(5);
  const OwnedTensor x = random_normal(DType::f32, {50, 2304}, random, 3);
  const OwnedTensor weight = random_normal(DType::f32, {2304}, random, 0.2, 1);
  const OwnedTensor alone = make_tensor(DType::f32, {50, 2304}),
                    together = make_tensor(DType::f32, {50, 2304});
  Ctx ctx;
  for (int64_t t = 0; t < 50; ++t)
    rms_norm(
        ctx,
        {.x = x.tensor.slice(0, t, t + 1), .weight = weight.tensor, .out = alone.tensor.slice(0, t, t + 1)});
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    ctx.pool = &pool;
    testing::fill_nan(together.tensor);
    rms_norm(ctx, {.x = x.tensor, .weight = weight.tensor, .out = together.tensor});
    EXPECT_TRUE(testing::same_bits(alone.tensor, together.tensor)) << threads << " threads";
  }
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(RmsNorm, DoorSaysWhatItFound) {
  Ctx ctx;
  const OwnedTensor input = make_tensor(DType::f32, {2, 8}), memory = make_tensor(DType::f32, {64});
  const Tensor x = input.tensor;
  const auto tensor = [&](std::initializer_list<int64_t> dims, DType dtype = DType::f32) {
    return Tensor(memory.tensor.data, dtype, dims);
  };
  const auto run = [&](const RmsNormArgs& a) { return message_of([&] { rms_norm(ctx, a); }); };
  const Tensor weight = tensor({8}), out = tensor({2, 8});
  EXPECT_EQ(run({.x = x, .weight = tensor({7}), .out = out}),
            "rms_norm: weight: expected shape [8], found [7]");
  EXPECT_EQ(run({.x = x, .weight = weight, .out = tensor({3, 8})}),
            "rms_norm: out: expected shape [2, 8], found [3, 8]");
  EXPECT_EQ(run({.x = tensor({8}), .weight = weight, .out = out}),
            "rms_norm: x: expected shape [any, any], found [8]");
  EXPECT_EQ(run({.x = x, .weight = weight, .out = tensor({2, 8}, DType::i32)}),
            "rms_norm: out: expected F32 or BF16, found I32");
  EXPECT_EQ(run({.x = x, .weight = tensor({8}, DType::bf16), .out = out}),
            "rms_norm: weight: expected F32, found BF16");
  EXPECT_EQ(run({.x = x, .weight = weight, .out = out, .eps = 0}),
            "rms_norm: expected an eps between 0 and 1, found 0");
  Tensor columns = x;
  columns.stride = {1, 2};
  EXPECT_EQ(run({.x = columns, .weight = weight, .out = out}),
            "rms_norm: x: expected a last dimension of stride 1, found 2");
  Tensor narrow = x;
  narrow.dtype = DType::bf16;
  EXPECT_EQ(run({.x = narrow, .weight = weight, .out = x}),
            "rms_norm: out: shares its memory with an input of another type or other strides");
  Tensor far = out;
  far.device = Device::cuda;
  EXPECT_EQ(run({.x = x, .weight = weight, .out = far}),
            "rms_norm: out: expected a tensor on cpu, found one on cuda");
}

#ifndef KL_CUDA
TEST(RmsNorm, SaysThatThereIsNoCuda) {
  Ctx ctx;
  ctx.device = Device::cuda;
  float memory[8] = {};
  const Tensor rows(memory, DType::f32, {1, 8}, Device::cuda), weight(memory, DType::f32, {8}, Device::cuda);
  EXPECT_EQ(message_of([&] { rms_norm(ctx, {.x = rows, .weight = weight, .out = rows}); }),
            "rms_norm: asked to run on cuda, but this program was built without CUDA");
  const Tensor heads(memory, DType::f32, {1, 1, 8}, Device::cuda);
  EXPECT_EQ(
      message_of([&] { rms_norm_gated(ctx, {.x = heads, .gate = heads, .weight = weight, .out = heads}); }),
      "rms_norm_gated: asked to run on cuda, but this program was built without CUDA");
}
#endif

}  // namespace
}  // namespace kl
