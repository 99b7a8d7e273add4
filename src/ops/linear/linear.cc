// The door of linear: what must fit together, which back-end runs, and how the CPU's threads share the
// product.
#include "ops/linear/linear.h"

#include <algorithm>

#include "simd/gemm.h"
#include "simd/gemm_bf16.h"
#include "simd/scratch.h"

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

constexpr int64_t kPackedRows = 2048;  // at once: bounds the scratch to 2048 · in elements of bf16
constexpr int64_t kPackRows = 16;      // some 10 us; a multiple of bf16_group()

// body(t, rows, o, outputs) for blocks of at most `rows` x `outputs` elements of out. Neighbouring tasks
// share their rows of w.
template <class Body>
void for_each_block(ThreadPool* pool, const LinearArgs& a, int64_t rows, int64_t outputs, Body&& body) {
  const int64_t T = a.x.size(0), out = a.w.size(0);
  const int64_t down = (T + rows - 1) / rows, across = (out + outputs - 1) / outputs;
  parallel_for(pool, down * across, 1, [&](int64_t task, int64_t) {
    const int64_t t = task % down * rows, o = task / down * outputs;
    body(t, std::min(rows, T - t), o, std::min(outputs, out - o));
  });
}

void linear_exact(ThreadPool* pool, const LinearArgs& a) {
  const int64_t in = a.x.size(1), task_rows = gemm_task_rows(a.x.size(0));
  const int64_t task_outputs = gemm_task_columns(task_rows, in);
  for_each_block(pool, a, task_rows, task_outputs, [&](int64_t t, int64_t rows, int64_t o, int64_t outputs) {
    const Gemm block = {.a = a.x.at<float>(t),
                        .lda = a.x.stride[0],
                        .b = static_cast<const char*>(a.w.data) + o * in * size_of(a.w.dtype),
                        .b_dtype = a.w.dtype,
                        .ldb = in,
                        .c = a.out.at<float>(t, o),
                        .ldc = a.out.stride[0],
                        .m = rows,
                        .n = outputs,
                        .k = in,
                        .accumulate = a.accumulate};
    KL_ACTIVE_ISA(gemm_nt)(block);
  });
}

// At most kPackedRows rows of x.
void linear_bf16(Ctx& ctx, const LinearArgs& a) {
  const int64_t T = a.x.size(0), in = a.x.size(1);
  Scratch scratch(ctx);
  bf16* const x = scratch.b16(packed_bf16_size(T, in));
  parallel_for(ctx.pool, T, kPackRows, [&](int64_t begin, int64_t end) {
    pack_bf16(a.x.at<float>(begin), a.x.stride[0], end - begin, in, x + packed_bf16_size(begin, in));
  });
  // Many rows share what is read of w; fewer if threads would go without a task.
  const int64_t out = a.w.size(0), threads = ctx.pool ? ctx.pool->threads() : 1;
  const auto tasks = [&](int64_t rows) {
    const int64_t outputs = gemm_bf16_task_columns(std::min(T, rows), in);
    return ((T + rows - 1) / rows) * ((out + outputs - 1) / outputs);
  };
  int64_t task_rows = gemm_bf16_most_rows();
  while (task_rows > kGemmBf16TaskRows && tasks(task_rows) < 4 * threads) task_rows /= 2;
  task_rows = std::min(T, task_rows);
  const int64_t task_outputs = gemm_bf16_task_columns(task_rows, in);
  for_each_block(ctx.pool, a, task_rows, task_outputs,
                 [&](int64_t t, int64_t rows, int64_t o, int64_t outputs) {
                   gemm_nt_bf16({.a = x + packed_bf16_size(t, in),
                                 .b = a.w.at<bf16>(o),
                                 .ldb = in,
                                 .c = a.out.at<float>(t, o),
                                 .ldc = a.out.stride[0],
                                 .m = rows,
                                 .n = outputs,
                                 .k = in,
                                 .accumulate = a.accumulate});
                 });
}

void linear_cpu(Ctx& ctx, const LinearArgs& a) {
  const int64_t T = a.x.size(0);
  if (T == 0 || a.w.size(0) == 0) return;
  if (ctx.precision == Precision::exact || a.w.dtype != DType::bf16 || !has_gemm_bf16())
    return linear_exact(ctx.pool, a);
  for (int64_t t = 0; t < T; t += kPackedRows) {
    LinearArgs part = a;
    part.x = a.x.slice(0, t, std::min(T, t + kPackedRows));
    part.out = a.out.slice(0, t, std::min(T, t + kPackedRows));
    linear_bf16(ctx, part);
  }
}

}  // namespace

void linear(Ctx& ctx, const LinearArgs& a) {
  check_args(a, ctx.device);
  const TraceScope trace(ctx.trace, "linear", static_cast<double>(a.x.bytes() + a.w.bytes() + a.out.bytes()),
                         2.0 * static_cast<double>(a.out.numel()) * static_cast<double>(a.x.size(1)));
  switch (ctx.device) {
    case Device::cpu: return linear_cpu(ctx, a);
    case Device::cuda: KL_CHECK(false, "linear: asked to run on cuda, where it has no kernel");
  }
}

}  // namespace kl
