// The door of linear: what must fit together, which back-end runs, and how the CPU's threads share the
// product.
#include "ops/linear/linear.h"

#include <algorithm>

#include "simd/gemm.h"

namespace kl {
namespace {

void check_args(const LinearArgs& a, Device device) {
  check_shape("linear: x", a.x, {-1, -1});
  check_shape("linear: w", a.w, {-1, a.x.size(1)});
  check_shape("linear: out", a.out, {a.x.size(0), a.w.size(0)});
  check_dtype("linear: x", a.x, {DType::f32});
  check_dtype("linear: w", a.w, {DType::f32, DType::bf16, DType::f16});
  check_dtype("linear: out", a.out, {DType::f32});
  check_device("linear: x", a.x, device);
  check_device("linear: w", a.w, device);
  check_device("linear: out", a.out, device);
  check_rows("linear: x", a.x);
  check_rows("linear: out", a.out);
  KL_CHECK(a.w.is_contiguous(), "linear: w: expected a contiguous tensor, found strides ", a.w.stride[0],
           ", ", a.w.stride[1]);
  KL_CHECK(a.out.numel() == 0 || a.out.data != a.x.data, "linear: out: expected other memory than that of x");
}

constexpr int64_t kTaskRows = 96;  // with 1024 columns, 384 KiB of x: stays in a core's second-level cache

void linear_cpu(ThreadPool* pool, const LinearArgs& a) {
  const int64_t T = a.x.size(0), in = a.x.size(1), out = a.w.size(0);
  if (T == 0 || out == 0) return;
  const int64_t rows = std::min(T, kTaskRows), outputs = gemm_task_columns(rows, in);
  const int64_t down = (T + rows - 1) / rows, across = (out + outputs - 1) / outputs;
  // Neighbouring tasks share their rows of w.
  parallel_for(pool, down * across, 1, [&](int64_t task, int64_t) {
    const int64_t t = task % down * rows, o = task / down * outputs;
    const Gemm block = {.a = a.x.at<float>(t),
                        .lda = a.x.stride[0],
                        .b = static_cast<const char*>(a.w.data) + o * in * size_of(a.w.dtype),
                        .b_dtype = a.w.dtype,
                        .ldb = in,
                        .c = a.out.at<float>(t, o),
                        .ldc = a.out.stride[0],
                        .m = std::min(rows, T - t),
                        .n = std::min(outputs, out - o),
                        .k = in,
                        .accumulate = a.accumulate};
    KL_ACTIVE_ISA(gemm_nt)(block);
  });
}

}  // namespace

void linear(Ctx& ctx, const LinearArgs& a) {
  check_args(a, ctx.device);
  const TraceScope trace(ctx.trace, "linear", static_cast<double>(a.x.bytes() + a.w.bytes() + a.out.bytes()),
                         2.0 * static_cast<double>(a.out.numel()) * static_cast<double>(a.x.size(1)));
  switch (ctx.device) {
    case Device::cpu: return linear_cpu(ctx.pool, a);
    case Device::cuda: KL_CHECK(false, "linear: asked to run on cuda, where it has no kernel");
  }
}

}  // namespace kl
