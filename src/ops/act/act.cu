// silu_mul on CUDA: one pass, four elements a thread where the tensors allow it.
#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "ops/act/act_cuda.h"

namespace kl::cuda {
namespace {

constexpr int kThreads = 256;

KL_DEVICE float silu_times(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

// Rows go to blocks along y, columns to threads along x; kWidth is 4 or 1. No __restrict__: `out` may be an
// input.
template <int kWidth, class Gate, class Up, class Out>
__global__ void silu_mul_kernel(const Gate* gate, int64_t gate_stride, const Up* up, int64_t up_stride,
                                Out* out, int64_t out_stride, int64_t rows, int64_t columns) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (column >= columns) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const Gate* g = gate + row * gate_stride + column;
    const Up* u = up + row * up_stride + column;
    Out* o = out + row * out_stride + column;
    if constexpr (kWidth == 4) {
      const float4 a = load4(g), b = load4(u);
      store4(o, {silu_times(a.x, b.x), silu_times(a.y, b.y), silu_times(a.z, b.z), silu_times(a.w, b.w)});
    } else {
      *o = from_float<Out>(silu_times(to_float(*g), to_float(*u)));
    }
  }
}

}  // namespace

void silu_mul(const Ctx& ctx, const SiluMulArgs& a) {
  const int64_t rows = a.out.size(0), columns = a.out.size(1);
  const bool fours = in_fours(a.gate) && in_fours(a.up) && in_fours(a.out);
  const int64_t per_block = kThreads * (fours ? 4 : 1);
  const LaunchConfig config{dim3(static_cast<unsigned>((columns + per_block - 1) / per_block),
                                 static_cast<unsigned>(rows < 65535 ? rows : 65535)),
                            dim3(kThreads), 0, static_cast<cudaStream_t>(ctx.stream)};
  dispatch_operand(a.gate.dtype, [&]<class Gate>() {
    dispatch_operand(a.up.dtype, [&]<class Up>() {
      dispatch_operand(a.out.dtype, [&]<class Out>() {
        launch(fours ? silu_mul_kernel<4, Gate, Up, Out> : silu_mul_kernel<1, Gate, Up, Out>, config,
               a.gate.ptr<Gate>(), a.gate.stride[0], a.up.ptr<Up>(), a.up.stride[0], a.out.ptr<Out>(),
               a.out.stride[0], rows, columns);
      });
    });
  });
}

}  // namespace kl::cuda
