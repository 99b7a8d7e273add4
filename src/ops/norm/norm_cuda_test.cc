// The norms on the GPU beside their definitions. Skipped without a GPU.
#ifdef KL_CUDA
#include <gtest/gtest.h>

#include "cuda/memory.h"
#include "ops/norm/norm.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

// f32: sums in another order. bf16: a result next to a rounding boundary may fall to its other side.
double tolerance(DType out) { return out == DType::bf16 ? 3e-4 : 2e-6; }

Ctx cuda_ctx() {
  Ctx ctx;
  ctx.device = Device::cuda;
  return ctx;
}

void expect_rms_norm(int64_t T, int64_t D, int64_t pad, DType in, DType out) {
  SCOPED_TRACE(cat("rms_norm ", T, " x ", D, " + ", pad, ", ", name_of(in), " to ", name_of(out)));
  testing::Random random(static_cast<uint64_t>(T * 1000 + D));
  const OwnedTensor x = testing::random_normal(in, {T, D + pad}, random, 3);
  const OwnedTensor weight = testing::random_normal(DType::f32, {D}, random, 0.2, 1);
  OwnedTensor expected = make_tensor(out, {T, D});
  const auto view = [&](const Tensor& t) { return t.slice(1, 0, D); };
  rms_norm_ref({.x = view(x.tensor), .weight = weight.tensor, .out = expected.tensor});

  const cuda::DeviceTensor d_x = cuda::to_device(x.tensor), d_weight = cuda::to_device(weight.tensor);
  const cuda::DeviceTensor d_out = cuda::device_tensor(out, {T, D + pad});
  Ctx ctx = cuda_ctx();
  rms_norm(ctx, {.x = view(d_x.tensor), .weight = d_weight.tensor, .out = view(d_out.tensor)});
  EXPECT_LE(testing::rel_rms(view(cuda::to_host(d_out.tensor).tensor), expected.tensor), tolerance(out));
  if (in != out) return;
  rms_norm(ctx, {.x = view(d_x.tensor), .weight = d_weight.tensor, .out = view(d_x.tensor)});
  EXPECT_LE(testing::rel_rms(view(cuda::to_host(d_x.tensor).tensor), expected.tensor), tolerance(out));
}

TEST(RmsNormCuda, EveryShapeAndType) {
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device";
  const int64_t shapes[][3] = {{1, 2304, 0}, {7, 7168, 0}, {300, 64, 4}, {3, 1, 0},
                               {5, 1023, 0}, {4, 512, 1},  {0, 8, 0}};
  for (const auto& [T, D, pad] : shapes)
    for (const DType in : {DType::f32, DType::bf16})
      for (const DType out : {DType::f32, DType::bf16}) expect_rms_norm(T, D, pad, in, out);
}

void expect_gated(int64_t T, int64_t H, int64_t D, DType in, DType gate_type, DType out) {
  SCOPED_TRACE(cat("rms_norm_gated ", T, " x ", H, " x ", D, ", ", name_of(in), ", ", name_of(gate_type),
                   " to ", name_of(out)));
  testing::Random random(static_cast<uint64_t>(T * 1000 + D));
  const OwnedTensor x = testing::random_normal(in, {T, H, D}, random, 3);
  const OwnedTensor gate =
      testing::random_normal(gate_type, {T, 2 * H, D}, random, 2);  // rows of every other head
  const OwnedTensor weight = testing::random_normal(DType::f32, {D}, random, 0.2, 1);
  OwnedTensor expected = make_tensor(out, {T, H, D});
  const auto view = [&](const Tensor& t) { return t.slice(1, H, 2 * H); };
  rms_norm_gated_ref(
      {.x = x.tensor, .gate = view(gate.tensor), .weight = weight.tensor, .out = expected.tensor});

  const cuda::DeviceTensor d_x = cuda::to_device(x.tensor), d_gate = cuda::to_device(gate.tensor);
  const cuda::DeviceTensor d_weight = cuda::to_device(weight.tensor),
                           d_out = cuda::device_tensor(out, {T, H, D});
  Ctx ctx = cuda_ctx();
  rms_norm_gated(
      ctx, {.x = d_x.tensor, .gate = view(d_gate.tensor), .weight = d_weight.tensor, .out = d_out.tensor});
  EXPECT_LE(testing::rel_rms(cuda::to_host(d_out.tensor).tensor, expected.tensor), tolerance(out));
  if (in != out) return;
  rms_norm_gated(
      ctx, {.x = d_x.tensor, .gate = view(d_gate.tensor), .weight = d_weight.tensor, .out = d_x.tensor});
  EXPECT_LE(testing::rel_rms(cuda::to_host(d_x.tensor).tensor, expected.tensor), tolerance(out));
}

TEST(RmsNormGatedCuda, EveryShapeAndType) {
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device";
  const int64_t shapes[][3] = {{1, 32, 128}, {9, 3, 64}, {5, 2, 100}, {33, 1, 7}, {2, 4, 256}, {0, 4, 128}};
  for (const auto& [T, H, D] : shapes)
    for (const DType in : {DType::f32, DType::bf16})
      for (const DType gate : {DType::f32, DType::bf16})
        for (const DType out : {DType::f32, DType::bf16}) expect_gated(T, H, D, in, gate, out);
}

}  // namespace
}  // namespace kl
#endif  // KL_CUDA
