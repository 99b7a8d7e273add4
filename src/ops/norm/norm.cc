// The doors of the norms: what must fit together, and which back-end runs.
#include "ops/norm/norm.h"

#include <algorithm>

#include "ops/norm/norm_cpu.h"

#ifdef KL_CUDA
#include "ops/norm/norm_cuda.h"
#endif

namespace kl {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // 5 to 10 us in f32: enough to be worth waking a thread for

int64_t rows_per_task(int64_t elements_of_a_row) {
  return std::max<int64_t>(1, kElementsPerTask / elements_of_a_row);
}

void check_operand(std::string_view name, const Tensor& t, Device device) {
  check_dtype(name, t, {DType::f32, DType::bf16});
  check_device(name, t, device);
  check_rows(name, t);
}

void check_weight(std::string_view name, const Tensor& weight, int64_t D, Device device) {
  check_shape(name, weight, {D});
  check_dtype(name, weight, {DType::f32});
  check_device(name, weight, device);
  check_rows(name, weight);
}

void check_mean(std::string_view name, int64_t D, float eps) {
  KL_CHECK(D > 0, name, ": expected rows of at least one element, found none");
  KL_CHECK(eps > 0 && eps < 1, name, ": expected an eps between 0 and 1, found ", eps);
}

void check_args(const RmsNormArgs& a, Device device) {
  check_shape("rms_norm: x", a.x, {-1, -1});
  check_shape("rms_norm: out", a.out, {a.x.size(0), a.x.size(1)});
  check_operand("rms_norm: x", a.x, device);
  check_operand("rms_norm: out", a.out, device);
  check_in_place("rms_norm: out", a.out, a.x);
  check_weight("rms_norm: weight", a.weight, a.x.size(1), device);
  check_mean("rms_norm", a.x.size(1), a.eps);
}

void check_args(const RmsNormGatedArgs& a, Device device) {
  check_shape("rms_norm_gated: x", a.x, {-1, -1, -1});
  const int64_t T = a.x.size(0), H = a.x.size(1), D = a.x.size(2);
  check_shape("rms_norm_gated: gate", a.gate, {T, H, D});
  check_shape("rms_norm_gated: out", a.out, {T, H, D});
  check_operand("rms_norm_gated: x", a.x, device);
  check_operand("rms_norm_gated: gate", a.gate, device);
  check_operand("rms_norm_gated: out", a.out, device);
  check_in_place("rms_norm_gated: out", a.out, a.x);
  check_in_place("rms_norm_gated: out", a.out, a.gate);
  check_weight("rms_norm_gated: weight", a.weight, D, device);
  check_mean("rms_norm_gated", D, a.eps);
}

// Both: some rows. Operands that are not all f32 go through the definition.
void norm_rows(const RmsNormArgs& a) {
  if (a.x.dtype != DType::f32 || a.out.dtype != DType::f32) return rms_norm_ref(a);
  KL_ACTIVE_ISA(norm_rows)
  ({.x = a.x.ptr<float>(),
    .weight = a.weight.ptr<float>(),
    .out = a.out.ptr<float>(),
    .x_stride = a.x.stride[0],
    .out_stride = a.out.stride[0],
    .rows = a.x.size(0),
    .D = a.x.size(1),
    .eps = a.eps});
}
void norm_rows(const RmsNormGatedArgs& a) {
  if (a.x.dtype != DType::f32 || a.gate.dtype != DType::f32 || a.out.dtype != DType::f32)
    return rms_norm_gated_ref(a);
  for (int64_t t = 0; t < a.x.size(0); ++t) {
    KL_ACTIVE_ISA(norm_rows)
    ({.x = a.x.at<float>(t),
      .weight = a.weight.ptr<float>(),
      .gate = a.gate.at<float>(t),
      .out = a.out.at<float>(t),
      .x_stride = a.x.stride[1],
      .gate_stride = a.gate.stride[1],
      .out_stride = a.out.stride[1],
      .rows = a.x.size(1),
      .D = a.x.size(2),
      .eps = a.eps});
  }
}

// Rows do not know each other, so threads share them out.
void rms_norm_cpu(ThreadPool* pool, const RmsNormArgs& a) {
  parallel_for(pool, a.x.size(0), rows_per_task(a.x.size(1)), [&](int64_t begin, int64_t end) {
    RmsNormArgs rows = a;
    rows.x = a.x.slice(0, begin, end);
    rows.out = a.out.slice(0, begin, end);
    norm_rows(rows);
  });
}
void rms_norm_gated_cpu(ThreadPool* pool, const RmsNormGatedArgs& a) {
  const int64_t row = std::max<int64_t>(1, a.x.size(1) * a.x.size(2));
  parallel_for(pool, a.x.size(0), rows_per_task(row), [&](int64_t begin, int64_t end) {
    RmsNormGatedArgs rows = a;
    rows.x = a.x.slice(0, begin, end);
    rows.gate = a.gate.slice(0, begin, end);
    rows.out = a.out.slice(0, begin, end);
    norm_rows(rows);
  });
}

}  // namespace

void rms_norm(Ctx& ctx, const RmsNormArgs& a) {
  check_args(a, ctx.device);
  const double elements = static_cast<double>(a.x.numel());
  const TraceScope trace(ctx.trace, "rms_norm", static_cast<double>(a.x.bytes() + a.out.bytes()),
                         4 * elements);
  switch (ctx.device) {
    case Device::cpu: return rms_norm_cpu(ctx.pool, a);
    case Device::cuda:
#ifdef KL_CUDA
      return cuda::rms_norm(ctx, a);
#else
      KL_CHECK(false, "rms_norm: asked to run on cuda, but this program was built without CUDA");
#endif
  }
}

void rms_norm_gated(Ctx& ctx, const RmsNormGatedArgs& a) {
  check_args(a, ctx.device);
  const double elements = static_cast<double>(a.x.numel());
  const TraceScope trace(ctx.trace, "rms_norm_gated",
                         static_cast<double>(a.x.bytes() + a.gate.bytes() + a.out.bytes()), 8 * elements);
  switch (ctx.device) {
    case Device::cpu: return rms_norm_gated_cpu(ctx.pool, a);
    case Device::cuda:
#ifdef KL_CUDA
      return cuda::rms_norm_gated(ctx, a);
#else
      KL_CHECK(false, "rms_norm_gated: asked to run on cuda, but this program was built without CUDA");
#endif
  }
}

}  // namespace kl
