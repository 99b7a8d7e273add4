// The door of silu_mul: what must fit together, and which back-end runs.
#include "ops/act/act.h"

#include <algorithm>

#include "ops/act/act_cpu.h"

#ifdef KL_CUDA
#include "ops/act/act_cuda.h"
#endif

namespace kl {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // 5 to 10 us in f32: enough to be worth waking a thread for

void check_operand(std::string_view name, const Tensor& t, const SiluMulArgs& a, Device device) {
  check_shape(name, t, {a.gate.size(0), a.gate.size(1)});
  check_dtype(name, t, {DType::f32, DType::bf16});
  check_device(name, t, device);
  check_rows(name, t);
}

void check_args(const SiluMulArgs& a, Device device) {
  check_shape("silu_mul: gate", a.gate, {-1, -1});
  check_operand("silu_mul: gate", a.gate, a, device);
  check_operand("silu_mul: up", a.up, a, device);
  check_operand("silu_mul: out", a.out, a, device);
  check_in_place("silu_mul: out", a.out, a.gate);
  check_in_place("silu_mul: out", a.out, a.up);
}

void silu_mul_piece(const SiluMulArgs& a) {
  for (const Tensor& t : {a.gate, a.up, a.out})
    if (t.dtype != DType::f32) return silu_mul_ref(a);
  KL_ACTIVE_ISA(silu_mul_rows)
  ({.gate = a.gate.ptr<float>(),
    .up = a.up.ptr<float>(),
    .out = a.out.ptr<float>(),
    .gate_stride = a.gate.stride[0],
    .up_stride = a.up.stride[0],
    .out_stride = a.out.stride[0],
    .rows = a.gate.size(0),
    .columns = a.gate.size(1)});
}

// Pieces of rows where rows are long and few, whole rows where they are short and many.
void silu_mul_cpu(ThreadPool* pool, const SiluMulArgs& a) {
  const int64_t T = a.gate.size(0), D = a.gate.size(1);
  const int64_t columns = std::clamp<int64_t>(D, 1, kElementsPerTask);
  const int64_t rows = kElementsPerTask / columns;
  const int64_t across = (D + columns - 1) / columns, down = (T + rows - 1) / rows;
  parallel_for(pool, across * down, 1, [&](int64_t task, int64_t) {
    const int64_t row = task / across * rows, column = task % across * columns;
    const auto piece = [&](const Tensor& t) {
      return t.slice(0, row, std::min(T, row + rows)).slice(1, column, std::min(D, column + columns));
    };
    silu_mul_piece({.gate = piece(a.gate), .up = piece(a.up), .out = piece(a.out)});
  });
}

}  // namespace

void silu_mul(Ctx& ctx, const SiluMulArgs& a) {
  check_args(a, ctx.device);
  const TraceScope trace(ctx.trace, "silu_mul",
                         static_cast<double>(a.gate.bytes() + a.up.bytes() + a.out.bytes()),
                         5 * static_cast<double>(a.gate.numel()));
  switch (ctx.device) {
    case Device::cpu: return silu_mul_cpu(ctx.pool, a);
    case Device::cuda:
#ifdef KL_CUDA
      return cuda::silu_mul(ctx, a);
#else
      KL_CHECK(false, "silu_mul: asked to run on cuda, but this program was built without CUDA");
#endif
  }
}

}  // namespace kl
