// silu_mul: the definition against f64, every CPU path against the definition, extreme values, and what the
// door refuses.
#include "ops/act/act.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "testing/compare.h"
#include "testing/isa.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::for_each_isa;
using testing::random_normal;

constexpr DType kTypes[] = {DType::f32, DType::bf16};
constexpr float kInf = std::numeric_limits<float>::infinity();

// f32: exp within 2 ulp and three roundings. bf16: rounding to 8 bits; two results that straddle a boundary
// differ by 2^-8 relative, rarely.
double tolerance(DType out) { return out == DType::bf16 ? 5e-4 : 5e-7; }

double silu(double x) { return x / (1 + std::exp(-x)); }

TEST(SiluMul, DefinitionInF64) {
  testing::Random random(1);
  const OwnedTensor gate = random_normal(DType::f32, {20, 50}, random, 5),
                    up = random_normal(DType::f32, {20, 50}, random), out = make_tensor(DType::f32, {20, 50});
  testing::fill_nan(out.tensor);
  silu_mul_ref({.gate = gate.tensor, .up = up.tensor, .out = out.tensor});
  const auto g = testing::to_doubles(gate.tensor), u = testing::to_doubles(up.tensor),
             found = testing::to_doubles(out.tensor);
  for (size_t i = 0; i < g.size(); ++i)
    ASSERT_NEAR(found[i], silu(g[i]) * u[i], 1e-6 * std::abs(silu(g[i]) * u[i])) << "gate " << g[i];
}

TEST(SiluMul, EveryShapeAndType) {
  ThreadPool pool(3);
  Ctx ctx;
  ctx.pool = &pool;
  const int64_t shapes[][2] = {{0, 5}, {5, 0}, {1, 1}, {3, 7}, {1, 20000}, {300, 33}, {2, 16}, {40, 1000}};
  for_each_isa([&] {
    for (const auto& [T, D] : shapes)
      for (const DType gate_type : kTypes)
        for (const DType up_type : kTypes)
          for (const DType type : kTypes) {
            SCOPED_TRACE(
                cat(T, " x ", D, ", ", name_of(gate_type), ", ", name_of(up_type), " to ", name_of(type)));
            testing::Random random(static_cast<uint64_t>(T * 10000 + D));
            // gate and up side by side in one row, as a fused projection leaves them, where types allow
            const OwnedTensor gates = random_normal(gate_type, {T, 2 * D + 5}, random, 3);
            const OwnedTensor ups = random_normal(up_type, {T, D + 3}, random);
            const Tensor gate = gates.tensor.slice(1, 2, D + 2), up = ups.tensor.slice(1, 1, D + 1);
            const OwnedTensor expected = make_tensor(type, {T, D}), wide = make_tensor(type, {T, D + 4});
            testing::fill_nan(wide.tensor);
            const Tensor out = wide.tensor.slice(1, 1, D + 1);
            silu_mul_ref({.gate = gate, .up = up, .out = expected.tensor});
            silu_mul(ctx, {.gate = gate, .up = up, .out = out});
            EXPECT_LE(testing::rel_rms(out, expected.tensor), tolerance(type));
            for (const int64_t beside : {int64_t{0}, D + 1, D + 3})
              for (const double x : testing::to_doubles(wide.tensor.slice(1, beside, beside + 1)))
                ASSERT_TRUE(std::isnan(x)) << "column " << beside << " was written";
            if (gate_type != type) continue;
            silu_mul(ctx, {.gate = gate, .up = up, .out = gate});
            EXPECT_LE(testing::rel_rms(gate, out), 0) << "in place of the gate";
          }
  });
}

TEST(SiluMul, InPlaceOfUp) {
  testing::Random random(2);
  const OwnedTensor gate = random_normal(DType::f32, {9, 31}, random),
                    up = random_normal(DType::f32, {9, 31}, random), out = make_tensor(DType::f32, {9, 31});
  Ctx ctx;
  silu_mul(ctx, {.gate = gate.tensor, .up = up.tensor, .out = out.tensor});
  silu_mul(ctx, {.gate = gate.tensor, .up = up.tensor, .out = up.tensor});
  EXPECT_TRUE(testing::same_bits(up.tensor, out.tensor));
}

// Below -88 the result is less than 1e-36 and may be flushed to 0.
TEST(SiluMul, ExtremeGates) {
  const std::vector<float> gates = {-kInf, -3e38f, -1000,  -104, -100, -89, -88,   -20,
                                    -0.f,  0,      1e-40f, 20,   88,   100, 3e38f, kInf};
  const int64_t D = static_cast<int64_t>(gates.size());
  Ctx ctx;
  for_each_isa([&] {
    for (const DType type : kTypes) {
      SCOPED_TRACE(std::string(name_of(type)));
      const OwnedTensor gate = make_tensor(type, {1, D}), up = make_tensor(type, {1, D}),
                        out = make_tensor(type, {1, D});
      testing::fill(gate.tensor, [&](int64_t i) { return gates[static_cast<size_t>(i)]; });
      testing::fill(up.tensor, [](int64_t) { return 0.5; });
      testing::fill_nan(out.tensor);
      silu_mul(ctx, {.gate = gate.tensor, .up = up.tensor, .out = out.tensor});
      const auto g = testing::to_doubles(gate.tensor), found = testing::to_doubles(out.tensor);
      for (size_t i = 0; i < found.size(); ++i) {
        const double expected = std::isinf(g[i]) ? (g[i] < 0 ? 0 : kInf) : 0.5 * silu(g[i]);
        if (std::isinf(expected))
          EXPECT_EQ(found[i], expected);
        else
          EXPECT_NEAR(found[i], expected, 1e-36 + std::abs(expected) * (type == DType::f32 ? 1e-6 : 4e-3))
              << g[i];
      }
    }
  });
}

TEST(SiluMul, NanStaysNan) {
  Ctx ctx;
  for_each_isa([&] {
    for (const int64_t D : {3, 64}) {
      const OwnedTensor gate = make_tensor(DType::f32, {1, D}), up = make_tensor(DType::f32, {1, D});
      testing::fill(up.tensor, [](int64_t) { return 1; });
      testing::fill(gate.tensor, [](int64_t i) { return i == 1 ? std::nanf("") : 0.f; });
      silu_mul(ctx, {.gate = gate.tensor, .up = up.tensor, .out = gate.tensor});
      const auto found = testing::to_doubles(gate.tensor);
      for (size_t i = 0; i < found.size(); ++i) EXPECT_EQ(std::isnan(found[i]), i == 1) << i;
    }
  });
}

TEST(SiluMul, ThreadsChangeNoBit) {
  testing::Random random(5);
  const OwnedTensor gate = random_normal(DType::f32, {70, 1000}, random, 3),
                    up = random_normal(DType::f32, {70, 1000}, random);
  const OwnedTensor alone = make_tensor(DType::f32, {70, 1000}), out = make_tensor(DType::f32, {70, 1000});
  Ctx ctx;
  silu_mul(ctx, {.gate = gate.tensor, .up = up.tensor, .out = alone.tensor});
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    ctx.pool = &pool;
    testing::fill_nan(out.tensor);
    silu_mul(ctx, {.gate = gate.tensor, .up = up.tensor, .out = out.tensor});
    EXPECT_TRUE(testing::same_bits(alone.tensor, out.tensor)) << threads << " threads";
  }
}

TEST(SiluMul, DoorSaysWhatItFound) {
  Ctx ctx;
  const OwnedTensor memory = make_tensor(DType::f32, {64}), other = make_tensor(DType::f32, {64});
  const auto tensor = [&](std::initializer_list<int64_t> dims, DType dtype = DType::f32) {
    return Tensor(memory.tensor.data, dtype, dims);
  };
  const auto run = [&](const SiluMulArgs& a) -> std::string {
    try {
      silu_mul(ctx, a);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const Tensor gate = tensor({2, 8}), out(other.tensor.data, DType::f32, {2, 8});
  EXPECT_EQ(run({.gate = gate, .up = tensor({2, 7}), .out = out}),
            "silu_mul: up: expected shape [2, 8], found [2, 7]");
  EXPECT_EQ(run({.gate = gate, .up = tensor({2, 8}, DType::f16), .out = out}),
            "silu_mul: up: expected F32 or BF16, found F16");
  EXPECT_EQ(run({.gate = gate, .up = tensor({2, 8}, DType::bf16), .out = gate}),
            "silu_mul: out: shares its memory with an input of another type or other strides");
  EXPECT_EQ(
      run({.gate = gate, .up = gate, .out = Tensor(memory.tensor.data, DType::f32, {2, 8}, Device::cuda)}),
      "silu_mul: out: expected a tensor on cpu, found one on cuda");
#ifndef KL_CUDA
  ctx.device = Device::cuda;
  const Tensor far(memory.tensor.data, DType::f32, {2, 8}, Device::cuda);
  EXPECT_EQ(run({.gate = far, .up = far, .out = far}),
            "silu_mul: asked to run on cuda, but this program was built without CUDA");
#endif
}

}  // namespace
}  // namespace kl
