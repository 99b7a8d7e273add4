// silu_mul on the GPU beside the definition. Skipped without a GPU.
#ifdef KL_CUDA
#include <gtest/gtest.h>

#include <cmath>

#include "cuda/memory.h"
#include "ops/act/act.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

struct Shape {
  int64_t T, D, pad;  // pad: elements between rows
};

void expect_right(const Shape& s, DType in, DType out) {
  SCOPED_TRACE(cat(s.T, " x ", s.D, " + ", s.pad, ", ", name_of(in), " to ", name_of(out)));
  testing::Random random(static_cast<uint64_t>(s.T * 1000 + s.D));
  const OwnedTensor gate = testing::random_normal(in, {s.T, s.D + s.pad}, random, 4);
  const OwnedTensor up = testing::random_normal(in, {s.T, s.D + s.pad}, random);
  OwnedTensor expected = make_tensor(out, {s.T, s.D});
  const auto view = [&](const Tensor& t) { return t.slice(1, 0, s.D); };
  silu_mul_ref({.gate = view(gate.tensor), .up = view(up.tensor), .out = expected.tensor});

  const cuda::DeviceTensor d_gate = cuda::to_device(gate.tensor), d_up = cuda::to_device(up.tensor);
  const cuda::DeviceTensor d_out = cuda::device_tensor(out, {s.T, s.D + s.pad});
  Ctx ctx;
  ctx.device = Device::cuda;
  silu_mul(ctx, {.gate = view(d_gate.tensor), .up = view(d_up.tensor), .out = view(d_out.tensor)});
  const OwnedTensor found = cuda::to_host(d_out.tensor);
  // f32: exp of the GPU is good to 2e-6 here. bf16: a result next to a rounding boundary may fall to its
  // other side.
  const double tolerance = out == DType::bf16 ? 3e-4 : 2e-6;
  EXPECT_LE(testing::rel_rms(view(found.tensor), expected.tensor), tolerance);
  for (int64_t row = 0; row < s.T && s.pad > 0; ++row)
    EXPECT_TRUE(std::isnan(testing::to_doubles(found.tensor[row].slice(0, s.D, s.D + 1))[0]))
        << "padding written";

  // In place.
  silu_mul(ctx, {.gate = view(d_gate.tensor),
                 .up = view(d_up.tensor),
                 .out = view(in == out ? d_gate.tensor : d_out.tensor)});
  if (in == out) {
    EXPECT_LE(testing::rel_rms(view(cuda::to_host(d_gate.tensor).tensor), expected.tensor), tolerance);
  }
}

TEST(SiluMulCuda, EveryShapeAndType) {
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device";
  for (const Shape& s : {Shape{1, 1024, 0},
                         {3, 9216, 0},
                         {257, 1027, 0},
                         {5, 36, 4},
                         {5, 36, 3},
                         {2, 1, 1},
                         {70000, 4, 0},
                         {0, 8, 0}})
    for (const DType in : {DType::f32, DType::bf16})
      for (const DType out : {DType::f32, DType::bf16}) expect_right(s, in, out);
}

}  // namespace
}  // namespace kl
#endif  // KL_CUDA
